"""Fused operations of Transition Models (arXiv 2509.04394). Needs torch alone."""

from .ada_layer_norm.reference import ada_layer_norm, gated_residual
from .attention.reference import attention
from .qk_norm_rope.reference import grid_positions, norm_rope, rope_tables
from .swiglu.reference import swiglu
from .time_pair_embedding.reference import CONDITIONS, sinusoid

__version__ = "0.1.0"

__all__ = [
    "CONDITIONS",
    "ada_layer_norm",
    "attention",
    "gated_residual",
    "grid_positions",
    "norm_rope",
    "rope_tables",
    "sinusoid",
    "swiglu",
]
