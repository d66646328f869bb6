"""Diffusers pipelines around the network: from a label or a prompt to pictures.

Class names and the network's module path are stored in every saved `model_index.json`: they stay.
"""

from .classes import TiMClassPipeline
from .text import TiMTextPipeline

__all__ = ["TiMClassPipeline", "TiMTextPipeline"]
