"""The exponential moving average of a network's weights."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Average:
    """`network` holds the average of another's parameters: p ← p − (1 − decay)·(p − its p).

    The decay is constant from the first step on, as published. With `warmup` it is
    min(decay, (1 + n)/(10 + n)) after n earlier steps, 0 at the first. Shards of FSDP2 are averaged
    where they lie. `trained` says which parameters of a network are averaged.
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float,
        warmup: bool = False,
        step: int = 0,
        trained: Callable[[nn.Module], Iterable[nn.Parameter]] = nn.Module.parameters,
    ):
        self.network = network.eval().requires_grad_(False)
        self.decay, self.warmup, self.step = decay, warmup, step
        self._trained = trained

    def decay_at(self, step: int) -> float:
        """That of step `step`, the first being 0."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + step) / (10 + step)) if step else 0.0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take up the parameters of the network, after an optimizer step."""
        decay = self.decay_at(self.step)
        self.step += 1
        averages, values = (local(self._trained(each)) for each in (self.network, network))
        torch._foreach_sub_(averages, torch._foreach_sub(averages, values), alpha=1 - decay)


def local(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """What this process holds of them."""
    return [getattr(p, "to_local", lambda p=p: p)() for p in parameters]
