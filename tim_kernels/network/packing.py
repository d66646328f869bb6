"""Several weights as one matrix, without a second copy of them.

Linear layers that read the same input are one GEMM when their weights lie one behind the other in
memory. `pack` puts them there the first time (the parameters keep their names, shapes and values,
only their memory moves) and afterwards hands out a view. Where that is impossible, inside
torch.compile or for tensors that are no plain parameters, it concatenates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..dispatch.torch_private import is_functorch_active, storage_id


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat(tensors)`, gradients included, but without the copy if it can be."""
    if len(tensors) == 1:
        return tensors[0]
    if torch.compiler.is_compiling() or not all(map(_is_movable, tensors)):
        return torch.cat(tuple(tensors))
    first = tensors[0]
    if any(t.dtype != first.dtype or t.device != first.device for t in tensors):
        return torch.cat(tuple(tensors))
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if is_functorch_active():  # no place to move memory
        can_view = not needs_gradient and _are_adjacent(tensors)
        return _span(tensors) if can_view else torch.cat(tuple(tensors))
    if not _are_adjacent(tensors):
        if not _may_move(tensors):
            return torch.cat(tuple(tensors))
        _move_together(tensors)
    return _Packed.apply(*tensors) if needs_gradient else _span(tensors)


def _is_movable(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and type(tensor.data) is Tensor and tensor.is_contiguous()


def _may_move(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody else counts on where they are: no flat buffer of an optimizer's, no graph
    that is being captured; and whether they stay aligned for 16-byte accesses."""
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if any(tensor.untyped_storage().nbytes() != tensor.nbytes for tensor in tensors):
        return False
    return all(tensor.nbytes % 16 == 0 for tensor in tensors[:-1])


def _are_adjacent(tensors: Sequence[Tensor]) -> bool:
    end, storage = tensors[0].storage_offset(), storage_id(tensors[0])
    for tensor in tensors:
        if storage_id(tensor) != storage or tensor.storage_offset() != end:
            return False
        end += tensor.numel()
    return True


@torch.inference_mode(False)  # parameters outlive it
@torch.no_grad()
def _move_together(parameters: Sequence[Tensor]) -> None:
    together = torch.cat([parameter.detach() for parameter in parameters])
    sizes = [parameter.shape[0] for parameter in parameters]
    for parameter, part in zip(parameters, together.split(sizes), strict=True):
        parameter.data = part


def _span(tensors: Sequence[Tensor]) -> Tensor:
    """One view over adjacent tensors."""
    first = tensors[0].detach()
    size = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return first.as_strided(size, first.stride())


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(*tensors):
        return _span(tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.sizes = [tensor.shape[0] for tensor in inputs]

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.sizes)
