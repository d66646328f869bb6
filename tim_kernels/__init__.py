"""Fused operations of Transition Models (arXiv 2509.04394). Needs torch alone."""

from .ada_layer_norm.fp8 import ada_layer_norm_fp8, gated_residual_ada_layer_norm_fp8
from .ada_layer_norm.op import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm
from .attention.choice import set_attention
from .attention.op import attention
from .dispatch.backend import BackendUnavailable, set_backend, use_backend
from .explain import explain
from .linear.choice import set_linear
from .names import CONDITIONS, Attention, Backend, Condition, Linear, RopeOrder
from .network.accelerate import Report, accelerate, restore
from .network.forward_mode import forward_mode
from .network.packing import Packing, pack, unpack
from .network.quantise import to_fp8
from .qk_norm_rope.op import qk_norm_rope, qkv_norm_rope
from .qk_norm_rope.reference import grid_positions, rope_tables
from .quantise_rows.fp8 import quantise_rows
from .segments import Segments
from .swiglu.fp8 import swiglu_fp8
from .swiglu.op import swiglu
from .time_pair_embedding.op import TimeMLP, time_pair_embedding
from .transition_inputs.op import transition_inputs
from .transition_loss.op import transition_loss
from .transition_step.op import transition_step

__version__ = "0.1.0"

__all__ = [
    "CONDITIONS",
    "Attention",
    "Backend",
    "BackendUnavailable",
    "Condition",
    "Linear",
    "Packing",
    "Report",
    "RopeOrder",
    "Segments",
    "TimeMLP",
    "accelerate",
    "ada_layer_norm",
    "ada_layer_norm_fp8",
    "attention",
    "explain",
    "forward_mode",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "gated_residual_ada_layer_norm_fp8",
    "grid_positions",
    "pack",
    "qk_norm_rope",
    "qkv_norm_rope",
    "quantise_rows",
    "restore",
    "rope_tables",
    "set_attention",
    "set_backend",
    "set_linear",
    "swiglu",
    "swiglu_fp8",
    "time_pair_embedding",
    "to_fp8",
    "transition_inputs",
    "transition_loss",
    "transition_step",
    "unpack",
    "use_backend",
]
