"""The layers that network and blocks are made of, as functions of the modules that own the weights.

Nothing that hangs on a module is passed by. A layer's weights are read only where calling it would
do nothing but that (`is_plain`); any other layer, adapted, hooked, quantised, offloaded, is called.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import FLOATS
from ..dispatch.backend import choose
from ..dispatch.torch_private import has_global_hooks
from ..linear import op as products
from ..linear.choice import HALVES, requested, takes
from ..segments import Segments
from ..swiglu.fp8 import swiglu_fp8
from ..swiglu.op import swiglu, swiglu_with_paths
from ..time_pair_embedding.op import TimeMLP, time_embedding
from .fp8_linear import Fp8Linear, Fp8Tokens

PLAIN = {nn.Parameter, Tensor, type(None)}
WEIGHTLESS = {nn.Identity, nn.SiLU, nn.Dropout}
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


def is_plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether calling `layer` is what `kind` does with its own plain parameters, and nothing else.

    Asked at every call, of what the module is at that time: nothing is remembered."""
    if type(layer) is not kind:
        return False
    parameters = layer.__dict__["_parameters"]
    if "weight" not in parameters and kind not in WEIGHTLESS:
        return False  # the weight is computed: the older weight_norm, a replica of DataParallel
    return all(type(parameter) in PLAIN for parameter in parameters.values()) and _is_bare(layer)


def computes(module: nn.Module, function: Callable) -> bool:
    """Whether calling `module` is function(module, …), and nothing else."""
    forward = type(module).forward
    return function in (forward, getattr(forward, "function", None)) and _is_bare(module)


def _is_bare(module: nn.Module) -> bool:
    """Whether calling `module` is its class's forward, and nothing else."""
    own = module.__dict__  # read as it is: this is asked of several layers a block
    return (
        not has_global_hooks()
        and not any(own[hooks] for hooks in HOOKS)
        and "forward" not in own  # by which weights are offloaded
        and own.get("_compiled_call_impl") is None
    )


def is_quiet(module: nn.Module) -> bool:
    """Whether nobody looks on when `module` is called: no hooks but FSDP2's, and its class's
    forward. FSDP2 is told by its names: to import torch.distributed would cost everybody time."""
    own = module.__dict__
    if "forward" in own or has_global_hooks():
        return False
    for name in HOOKS:  # noqa: SIM110, a loop is faster than `all` of a generator
        if own[name] and not all(map(_is_fsdp2, own[name].values())):
            return False
    return True


def takes_fp8(owner: nn.Module, *names: str) -> bool:
    """Whether these layers of `owner` are all FP8, and nobody sees what they are given."""
    layers = [getattr(owner, name, None) for name in names]
    are_fp8 = all(type(layer) is Fp8Linear and is_quiet(layer) for layer in layers)
    return are_fp8 and is_quiet(owner)


def _is_fsdp2(hook) -> bool:
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the module's parameters when it is called, and only then."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def compute_dtype(layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a layer takes; `default` if its weights do not tell."""
    registry = getattr(layer, "_diffusers_hook", None)  # by which weights are kept in float8
    if registry is not None and (casting := registry.get_hook("layerwise_casting")):
        return casting.compute_dtype
    for parameter in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
        if parameter is not None and parameter.dtype in FLOATS:
            return parameter.dtype
    return default


def bias_path(linear: nn.Module) -> Tensor | None:
    """Zeros (out,) whose gradient is that of the bias of `linear`, for a kernel to add to every
    token of `beside_path(linear, x)`: it sums over tokens on its way, where the layer's own
    backward reads their whole gradient again. Values are what they are without.

    None where the bias has no gradient, or `linear` is more than its weights."""
    bias = linear.bias if is_plain(linear) else None
    return None if bias is None or not bias.requires_grad else bias - bias.detach()


def are_paths_shorter(device: torch.device) -> bool:
    """Whether somebody may ask for gradients, and kernels make them."""
    return torch.is_grad_enabled() and choose("ada_layer_norm", device.type, False) != "reference"


def beside_path(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), whose bias has its gradient by `bias_path`."""
    return F.linear(x, linear.weight, linear.bias.detach())


def swiglu_mlp(mlp: nn.Module, x: Tensor | Fp8Tokens) -> Tensor:
    """fc2(silu(fc1_g(x))·fc1_x(x))."""
    if takes_fp8(mlp, "fc2"):
        return mlp.fc2(Fp8Tokens(*swiglu_fp8(mlp.fc1_g(x), mlp.fc1_x(x)), x.dtype))
    if torch.is_grad_enabled() and ends_in_swiglu(mlp, x):
        return products.mlp(x, *map(_weights, (mlp.fc1_g, mlp.fc1_x, mlp.fc2)))
    return mlp.fc2(swiglu_hidden(mlp, x))


def swiglu_hidden(mlp: nn.Module, x: Tensor) -> Tensor:
    """silu(fc1_g(x))·fc1_x(x)."""
    if not torch.is_grad_enabled() and ends_in_swiglu(mlp, x):
        return products.linear_swiglu(x, _weights(mlp.fc1_g), _weights(mlp.fc1_x))
    return swiglu(mlp.fc1_g(x), mlp.fc1_x(x))


def ends_in_swiglu(mlp: nn.Module, x: Tensor) -> bool:
    """Whether fc1's products end in SwiGLU, and with gradients fc2's in its derivative."""
    if requested() == "torch":  # before anything is asked of layers, at every call
        return False
    layers = mlp.fc1_g, mlp.fc1_x, mlp.fc2
    are_plain = all(map(is_plain, layers))
    return are_plain and takes(x, *(layer.weight for layer in layers)) and products.is_worth(x)


def ends_in_residual(
    owner: nn.Module, function: Callable, layer: nn.Module, x: Tensor, segments: Segments | None
) -> bool:
    """Whether `layer`, the last product of `owner`, whose call is function(owner, …), is added to
    x as it ends: nobody asks for a gradient or looks on."""
    if requested() == "torch" or torch.is_grad_enabled() or x.dtype not in HALVES:
        return False
    is_own = computes(owner, function) and is_plain(layer)
    is_own = is_own and all(map(is_quiet, owner.children()))  # those that are not called, too
    return is_own and takes(x, layer.weight) and products.are_tiles_full(x, segments)


def add_product(
    layer: nn.Linear, h: Tensor, x: Tensor, gate: Tensor, bias: Tensor | None,
    segments: Segments | None,
) -> Tensor:  # fmt: skip
    """x + gate·(layer(h) + bias), by one kernel; gate and bias are rows of samples."""
    return products.linear_gated_residual(h, _weights(layer), x, gate, bias, segments)


def _weights(linear: nn.Linear) -> products.Layer:
    return products.Layer(linear.weight, linear.bias)


def swiglu_branch(mlp: nn.Module, x: Tensor, paths: bool) -> tuple[Tensor, Tensor | None]:
    """mlp(x), and if there may be `paths` that of its last bias, for whoever adds it to the
    residual."""
    is_own = computes(mlp, swiglu_mlp) and all(map(is_quiet, mlp.children()))
    if not (paths and is_own) or takes_fp8(mlp, "fc2"):
        return mlp(x), None
    if ends_in_swiglu(mlp, x):
        path, fc2 = bias_path(mlp.fc2), _weights(mlp.fc2)
        if path is not None:
            fc2 = fc2._replace(bias=fc2.bias.detach())
        out = products.mlp(x, _weights(mlp.fc1_g), _weights(mlp.fc1_x), fc2)
        return out, None if path is None else path.to(out.dtype)
    (gate, of_gate), (value, of_value) = with_path(mlp.fc1_g, x), with_path(mlp.fc1_x, x)
    return with_path(mlp.fc2, swiglu_with_paths(gate, value, of_gate, of_value))


def with_path(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """linear(x), and what a kernel is to add to it."""
    path = bias_path(linear)
    if path is None:
        return linear(x), None
    out = beside_path(linear, x)
    return out, path.to(out.dtype)


def embed_time(embedder: nn.Module, t: Tensor) -> Tensor:
    """Times (B,) → (B, C)."""
    return embedder.mlp(time_embedding(t, compute_dtype(embedder.mlp[0], torch.float32)))


def plain_time_mlp(embedder: nn.Module) -> TimeMLP | None:
    """The embedder's weights, if calling it were nothing but their use."""
    mlp = embedder.mlp
    if not (is_quiet(embedder) and type(mlp) is nn.Sequential and is_quiet(mlp) and len(mlp) == 3):
        return None
    first, act, last = mlp
    if not (is_plain(first) and is_plain(act, nn.SiLU) and is_plain(last)):
        return None
    return TimeMLP(first.weight, first.bias, last.weight, last.bias)


def embed_label(embedder: nn.Module, y: Tensor) -> Tensor:
    """Class labels (B,) → (B, C)."""
    return embedder.embedding_table(y)


def embed_text(embedder: nn.Module, y: Tensor) -> Tensor:
    """Text features (B, L, D) → (B, L, C)."""
    return embedder.mlp(embedder.norm(y.to(compute_dtype(embedder.norm, y.dtype))))


def embed_patches(embedder: nn.Module, x: Tensor) -> Tensor:
    """(B, channels, H, W) → tokens (B, N, C), row-major: the patch convolution as one GEMM."""
    proj = embedder.proj
    x = x.to(compute_dtype(proj, x.dtype))
    if not (is_plain(proj, nn.Conv2d) and _cuts_patches(proj)):
        return proj(x).flatten(2).transpose(1, 2)
    p = proj.kernel_size[0]
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))
    patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, h·w, channels·p·p)
    return F.linear(patches, proj.weight.flatten(1), proj.bias)


def _cuts_patches(proj: nn.Conv2d) -> bool:
    is_whole = proj.padding == (0, 0) and proj.dilation == (1, 1) and proj.groups == 1
    return proj.kernel_size == proj.stride and is_whole


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h·w, p·p·c) → (B, c, h·p, w·p); a token is laid out (p_row, p_col, channel)."""
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
