"""Whether somebody else's model computes what the fused one does: both on a small input."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .layers import swiglu_mlp

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass
class Own:
    """What a model makes of a small input."""

    inputs: tuple[Tensor, ...]
    stand_ins: dict[str, Tensor]  # for parameters that are all zero, as before training
    out: Tensor
    is_checkpointed: bool  # its blocks run again in backward


def of_own(model: nn.Module) -> tuple[Own | None, str | None]:
    """Its own result, or why there is none; neither without weights."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None, None
    try:
        inputs, stand_ins = _inputs(model), _stand_ins(model)
        with _eval(model), torch.no_grad():
            out = functional_call(model, stand_ins, inputs)
        return Own(inputs, stand_ins, out, _checkpoints(model, inputs)), None
    except Exception as error:  # whatever a stranger's forward raises
        return None, f"the trial of its forward failed: {error!r}"


def difference(own: Own, model: nn.Module) -> str | None:
    """Why the fused model's result is not its own."""
    try:
        with _eval(model), torch.no_grad():
            out = functional_call(model, own.stand_ins, own.inputs)
    except Exception as error:
        return f"the trial of the fused forward failed: {error!r}"
    return _difference(own.out, out)


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without TF32, to which cuDNN rounds a convolution, but not our GEMM."""
    convolution, was_training = torch.backends.cudnn.conv, model.training
    before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        convolution.fp32_precision = before


def _stand_ins(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: _noise(parameter.shape, parameter) * 0.02
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.any()
    }


def _inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """A small batch: a 2×3 grid of tokens, or the one size that the model takes."""
    embedder, proj = model.x_embedder, model.x_embedder.proj
    size = 2 * proj.kernel_size[0], 3 * proj.kernel_size[0]
    if getattr(embedder, "strict_img_size", False):  # timm's
        size = getattr(embedder, "img_size", None) or size
    x = _noise((2, proj.in_channels, *size), proj.weight)
    t, r = (torch.tensor(time, device=x.device) for time in ((0.9, 0.5), (0.3, 0.1)))
    if hasattr(model.y_embedder, "embedding_table"):
        y = torch.tensor([0, model.y_embedder.embedding_table.num_embeddings - 1]).to(x.device)
    else:
        y = _noise((2, 3, model.y_embedder.norm.normalized_shape[0]), proj.weight)
    return x, t, r, y


def _checkpoints(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the blocks run again in backward, in training."""
    x, *others = inputs
    x, was_training, runs = x.detach().requires_grad_(), model.training, []
    count = model.blocks[0].attn.register_forward_pre_hook(lambda *_: runs.append(None))
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            model.train()
            out = model(x, *others)
            forward = len(runs)
            torch.autograd.grad(out.sum(), x)
        return len(runs) > forward
    except RuntimeError as error:
        return "heckpoint" in str(error)  # the reentrant form refuses torch.autograd.grad
    finally:
        model.train(was_training)
        count.remove()


def _noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _difference(own: Tensor, ours: Tensor) -> str | None:
    if not isinstance(own, Tensor) or own.shape != ours.shape:
        return f"its forward returns {type(own).__name__}, not a sample shaped like x"
    error = (own.double() - ours.double()).norm()
    tolerance = TOLERANCE.get(own.dtype, 5e-2)
    is_float32 = own.dtype == torch.float32 and own.is_cuda
    if is_float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        tolerance = TOLERANCE[torch.float16]  # as many bits, in other places
    if not error <= tolerance * own.double().norm() + 1e-12:
        return f"its forward computes something else (‖difference‖ = {error:.2e} on a trial input)"
    return None


@torch.no_grad()
def computes_swiglu(mlp: nn.Module) -> bool:
    """Whether layers named as SwiGLU's are used as SwiGLU's."""
    weight = mlp.fc1_g.weight
    if weight.is_meta:
        return True
    x = _noise((3, weight.shape[1]), weight)
    try:
        return _difference(mlp.forward(x), swiglu_mlp(mlp, x)) is None
    except Exception:  # whatever a stranger's forward raises
        return False
