"""Folders of pictures for GenEval, DPG-Bench, MJHQ-30K and ImageNet."""
