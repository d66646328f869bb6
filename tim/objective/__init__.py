"""The transition objective (arXiv 2509.04394, sections 3.2–3.3)."""

from ..requirements import require

require("accelerate")

from .derivative import DERIVATIVES, Derivative, Difference, ForwardMode  # noqa: E402
from .loss import TransitionLoss, TransitionObjective  # noqa: E402
from .weights import TIME_WEIGHTS  # noqa: E402

__all__ = [
    "DERIVATIVES",
    "TIME_WEIGHTS",
    "Derivative",
    "Difference",
    "ForwardMode",
    "TransitionLoss",
    "TransitionObjective",
]
