"""The transition objective (arXiv 2509.04394, sections 3.2–3.3)."""

from .derivative import DERIVATIVES, Derivative, Difference, ForwardMode
from .loss import TransitionLoss, TransitionObjective
from .weights import TIME_WEIGHTS

__all__ = [
    "DERIVATIVES",
    "TIME_WEIGHTS",
    "Derivative",
    "Difference",
    "ForwardMode",
    "TransitionLoss",
    "TransitionObjective",
]
