"""Any-step sampling (arXiv 2509.04394, section 3.4)."""

from .engine import Engine
from .loop import sample
from .packed import sample_packed
from .requests import Request
from .steps import SAMPLE_TYPES, Guider, Options, SampleType, Step

__all__ = [
    "SAMPLE_TYPES", "Engine", "Guider", "Options", "Request", "SampleType", "Step", "sample",
    "sample_packed",
]  # fmt: skip
