"""torch.func.vmap over an operation: one call for every slice, by the kernels that each takes."""

from collections.abc import Callable

import torch
from torch import Tensor


def each_slice(function: Callable, info, in_dims, *args) -> tuple[Tensor | tuple, int | tuple]:
    """A vmap rule: `function` of the slices of `args` along in_dims, and the outputs stacked."""

    def slices(x, dim) -> tuple:
        if not isinstance(dim, int):  # no tensor, or one that is the same everywhere
            return (x,) * count
        return x.unbind(dim) if info.batch_size else (x.new_zeros(x.sum(dim).shape),)

    count = max(info.batch_size, 1)  # without slices one of zeros has the outputs' shapes
    columns = map(slices, args, in_dims)
    calls = [function(*each) for each in zip(*columns, strict=True)]
    is_one = isinstance(calls[0], Tensor)
    outputs = [calls] if is_one else zip(*calls, strict=True)
    outputs = tuple(torch.stack(each)[: info.batch_size] for each in outputs)
    return (outputs[0], 0) if is_one else (outputs, (0,) * len(outputs))
