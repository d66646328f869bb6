"""Nodes of ComfyUI. A file in its folder custom_nodes imports them; see docs/comfyui.md."""

from tim.comfyui.loader import TiMLoader
from tim.comfyui.samplers import TiMClassSampler, TiMTextSampler

NODE_CLASS_MAPPINGS = {
    "TiMLoader": TiMLoader,
    "TiMTextSampler": TiMTextSampler,
    "TiMClassSampler": TiMClassSampler,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TiMLoader": "TiM Loader",
    "TiMTextSampler": "TiM Text Sampler",
    "TiMClassSampler": "TiM Class Sampler",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
