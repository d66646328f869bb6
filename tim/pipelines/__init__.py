"""Diffusers pipelines around the network: from a label or a prompt to pictures.

Class names and the network's module path are stored in every saved `model_index.json`: they stay.
"""

from ..requirements import require

require("transformers")

from .classes import TiMClassPipeline  # noqa: E402
from .text import TiMTextPipeline  # noqa: E402

__all__ = ["TiMClassPipeline", "TiMTextPipeline"]
