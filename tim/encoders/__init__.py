"""What stands between pictures and prompts and the network: autoencoders, text and image features.

One class of each serves training and pipelines.
"""

from ..requirements import require

require("diffusers", "transformers")

from .autoencoder import Autoencoder, Pixels  # noqa: E402
from .repa import repa_targets  # noqa: E402
from .text import KeptFeatures, TextEncoder  # noqa: E402

__all__ = ["Autoencoder", "KeptFeatures", "Pixels", "TextEncoder", "repa_targets"]
