"""Any-step sampling (arXiv 2509.04394, section 3.4)."""

from .loop import SAMPLE_TYPES, SampleType, sample
from .packed import sample_packed

__all__ = ["SAMPLE_TYPES", "SampleType", "sample", "sample_packed"]
