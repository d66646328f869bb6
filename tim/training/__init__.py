"""Training: a resumable loop, its checkpoints and its loss log."""

from tim.training.export import load_export, save_export
from tim.training.loop import train
from tim.training.signals import Stopped

__all__ = ["Stopped", "load_export", "save_export", "train"]
