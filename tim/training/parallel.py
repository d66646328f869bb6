"""One network on many devices: DistributedDataParallel or FSDP2.

With FSDP2 (`fully_shard` on each block and on the network) every process holds a share of the
weights, of the optimizer's moments and of the average. Only the first builds the network, the
others begin on the meta device and get their shares from it.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tim.models import TiMTransformer2DModel
from tim.training.signals import Stopped

FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
_TO_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Parallel:
    """How the processes of a run share a network, by `training.parallel` and
    `training.fsdp_group_size`: shards lie in groups of that many processes, and groups hold the
    same (HSDP); null is one group. One process without a launcher has nothing to share.

    Raises:
        ValueError: the size of a group does not divide the number of processes.
    """

    def __init__(self, accelerator: Accelerator, run: DictConfig):
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.is_first = accelerator.is_main_process
        self.is_sharded = run.parallel == "fsdp2" and dist.is_initialized()
        self.mesh = self._mesh(run.fsdp_group_size) if self.is_sharded else None

    def _mesh(self, group: int | None) -> DeviceMesh:
        if group is None or group == self.processes:
            return init_device_mesh(self.device.type, (self.processes,))
        if self.processes % group:
            raise ValueError(
                f"training.fsdp_group_size must divide the {self.processes} processes, got {group}"
            )
        shape, names = (self.processes // group, group), ("replicate", "shard")
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def place(
        self, make: Callable[[], TiMTransformer2DModel], copies: int, one_base: bool = False
    ) -> list[TiMTransformer2DModel]:
        """That many equal networks on the device, or this process's shares of them. With
        `one_base` they have their frozen parameters in common."""
        if not self.is_sharded:
            first = make().to(self.device)
            common = {id(p): p for p in first.parameters() if one_base and not p.requires_grad}
            return [first, *(copy.deepcopy(first, {**common}) for _ in range(copies - 1))]
        weights = make().state_dict() if self.is_first else {}
        return [self._shared(make, weights) for _ in range(copies)]

    def _shared(self, make, weights: dict[str, Tensor]) -> TiMTransformer2DModel:
        with torch.device("meta"):
            network = make()
        for block in network.blocks:
            fully_shard(block, mesh=self.mesh)
        # The root, too, gives back what it gathered: the average has no backward that would.
        fully_shard(network, mesh=self.mesh, reshard_after_forward=True)
        network.to_empty(device=self.device)
        set_model_state_dict(network, dict(weights), options=FROM_FIRST)  # it writes there
        return network

    def wrap(self, network: nn.Module) -> nn.Module:
        """What to call in training."""
        if self.is_sharded or self.processes == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)

    def accumulating(self, model: nn.Module, is_last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-step; gradients meet in the last one alone."""
        if isinstance(model, DistributedDataParallel) and not is_last:
            return model.no_sync()
        if self.is_sharded:
            model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def any(self, flag: bool | int) -> int:
        """The largest flag of all processes."""
        if self.processes == 1:
            return int(flag)
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(0)

    def whole_weights(self, network: nn.Module) -> dict[str, Tensor]:
        """All weights under the published names, in the first process; all processes call it."""
        return get_model_state_dict(network, options=_TO_FIRST if self.is_sharded else None)


def clip_gradients(network: nn.Module, most: float) -> Tensor:
    """The norm of all gradients, which are scaled down to `most` if that is not 0."""
    parameters = list(network.parameters())
    if most:
        norm = nn.utils.clip_grad_norm_(parameters, most)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return getattr(norm, "full_tensor", lambda: norm)().detach()


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """For a process that ends with its run: the group ends before the interpreter does, which
    gloo's threads would abort now and then. A process that failed does not wait for the others."""
    try:
        yield
    except Stopped:
        _leave()
        raise
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
