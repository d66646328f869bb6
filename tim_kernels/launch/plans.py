"""What is the same for every call of the same shapes is worked out once and looked up after."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MOST = 4096  # signatures of one operator; beyond them it starts anew
_all: list["Plans"] = []


class Plans(dict):
    """By signature, what to do with arguments of it."""

    def __init__(self):
        super().__init__()
        _all.append(self)

    def find(self, key: tuple, make: Callable, *args):
        """The plan of a signature; make(*args) if there is none."""
        try:
            plan = self.get(key)
        except TypeError:  # sizes that are symbols, while something is traced, have no hash
            return make(*args)
        if plan is None:
            plan = self[key] = make(*args)
        return plan

    def __setitem__(self, key, plan) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # what a plan made is of the graph's memory
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, plan)


def made_apart(make: Callable[[], Tensor]) -> Tensor:
    """make(), in a thread of its own: what outlives a call must be no tensor of the functorch
    transform or inference mode that the caller is in, nor come from its CUDA graph's memory."""
    made: list[Tensor] = []

    def run() -> None:
        made.append(make())
        if made[0].is_cuda:
            torch.cuda.current_stream(made[0].device).synchronize()  # other streams will read it

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return made[0]


def forget() -> None:
    """Drop every plan: something changed that no signature shows."""
    for plans in _all:
        plans.clear()


@contextlib.contextmanager
def forgotten_around() -> Iterator[None]:
    """Plans made before, inside and after are made of different settings."""
    forget()
    try:
        yield
    finally:
        forget()


def signature(args: tuple) -> tuple:
    """All that checks, the choice of a backend, views and launches depend on: of tensors their
    class, shape, dtype, device, and strides where they are not contiguous; anything else by its
    value."""
    return tuple(
        [
            (type(x), x.shape, x.dtype, x.device, None if x.is_contiguous() else x.stride())
            if isinstance(x, Tensor)
            else (x if type(x) is not list else tuple(x))
            for x in args
        ]
    )
