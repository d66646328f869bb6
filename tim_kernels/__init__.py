"""Fused operations of Transition Models (arXiv 2509.04394). Needs torch alone."""

from .ada_layer_norm.op import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm
from .attention.reference import attention
from .backend import BackendUnavailable, explain, set_backend, use_backend
from .qk_norm_rope.reference import grid_positions, norm_rope, rope_tables
from .segments import Segments
from .swiglu.reference import swiglu
from .time_pair_embedding.reference import CONDITIONS, sinusoid

__version__ = "0.1.0"

__all__ = [
    "CONDITIONS",
    "BackendUnavailable",
    "Segments",
    "ada_layer_norm",
    "attention",
    "explain",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "grid_positions",
    "norm_rope",
    "rope_tables",
    "set_backend",
    "sinusoid",
    "swiglu",
    "use_backend",
]
