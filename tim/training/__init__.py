"""Training: a resumable loop, its checkpoints and its loss log."""

from tim.training.export import load_export, save_export
from tim.training.loop import train
from tim.training.parts import Parts, Position
from tim.training.signals import Stopped
from tim.training.state import merged

__all__ = ["Parts", "Position", "Stopped", "load_export", "merged", "save_export", "train"]
