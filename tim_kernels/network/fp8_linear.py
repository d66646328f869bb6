"""A linear layer in 8 bits: its weight has a scale an output channel, tokens one each."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch.operators import refuse_derivatives
from ..fp8 import has_scaled_mm
from ..quantise_rows.fp8 import quantise_rows


class Fp8Tokens(NamedTuple):
    """Tokens (…, C) as FP8 values and scales (…, 1), in place of a tensor of `dtype`."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


class Fp8Linear(nn.Module):
    """What `linear` computes, (…, K) → (…, N), its weight quantised once, a row at a time.

    It takes tokens as a tensor, which it quantises, or as `Fp8Tokens`. On GPUs of sm_89 (with torch
    2.12 and later) and newer torch._scaled_mm multiplies, where K and N are multiples of 16;
    everywhere else the same is computed in float32. Either way the result is rounded to bfloat16,
    and then has the tokens' dtype.

    Raises:
        NotImplementedError: in training, or where a gradient or a tangent is needed.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        values, scales = quantise_rows(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("values", values)  # (N, K)
        self.register_buffer("scales", scales)  # (N, 1)
        self.register_buffer("bias", bias)
        self.train(linear.training)

    def forward(self, x: Tensor | Fp8Tokens) -> Tensor:
        return self._product(x, self.bias)

    def without_bias(self, x: Tensor | Fp8Tokens) -> Tensor:
        return self._product(x, None)

    def _product(self, x: Tensor | Fp8Tokens, bias: Tensor | None) -> Tensor:
        if self.training:
            raise NotImplementedError("an FP8 layer is for inference, not for training: eval() it")
        if isinstance(x, Tensor):
            refuse_derivatives("an FP8 layer", (x,))
            x = Fp8Tokens(*quantise_rows(x), x.dtype)
        values, scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
        multiply = _scaled_mm if _has_scaled_mm(self.values) else _emulated
        out = multiply(values, scales, self.values, self.scales, bias)
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)

    def _apply(self, fn, recurse=True):
        """Moves, and keeps every dtype: a network in float16 has the same FP8 weights."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                is_same = moved.dtype == buffer.dtype
                self._buffers[name] = moved if is_same else buffer.to(moved.device)
        return self

    def __getstate__(self) -> dict:
        """Pickle does not read float8 back: the values are kept as bytes."""
        buffers = self._buffers | dict(values=self.values.view(torch.uint8))
        return self.__dict__ | dict(_buffers=buffers)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._buffers["values"] = self.values.view(torch.float8_e4m3fn)

    def extra_repr(self) -> str:
        N, K = self.values.shape
        return f"in_features={K}, out_features={N}, bias={self.bias is not None}"


def _has_scaled_mm(weight: Tensor) -> bool:
    is_whole = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return is_whole and has_scaled_mm(weight.device)


def _scaled_mm(values, scales, weight, weight_scales, bias) -> Tensor:
    """(M, K) by (N, K) → bfloat16 (M, N), summed in float32 throughout."""
    return torch._scaled_mm(
        values, weight.t(), scales, weight_scales.t(), bias, out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )  # fmt: skip


def _emulated(values, scales, weight, weight_scales, bias) -> Tensor:
    """The same in float32: products of FP8 are exact there, sums and scales are rounded."""
    out = F.linear(values.float(), weight.float()) * scales * weight_scales.t()
    return (out if bias is None else out + bias.float()).bfloat16()
