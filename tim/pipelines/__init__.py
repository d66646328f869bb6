"""Diffusers pipelines around the network: from a label or a prompt to pictures.

Class names and the network's module path are stored in every saved `model_index.json`: they stay.
"""

from ..requirements import require

require("transformers")

import diffusers  # noqa: E402

from .classes import TiMClassPipeline  # noqa: E402
from .text import TiMTextPipeline  # noqa: E402

# Where DiffusionPipeline looks up the class that a saved folder names.
for _saved in (TiMClassPipeline, TiMTextPipeline):
    setattr(diffusers, _saved.__name__, _saved)

__all__ = ["TiMClassPipeline", "TiMTextPipeline"]
