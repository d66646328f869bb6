"""What several packages refuse, each in one line that says what came and what is needed."""

import contextlib
import contextvars
import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from tim_kernels.dispatch.torch_private import is_mapped

P = ParamSpec("P")
_order_required = contextvars.ContextVar("order_required", default=True)


def whole(name: str, given: Any, least: int | None = None) -> int:
    """`given` as an int: an integer of Python, numpy or torch (0-d), but no truth value.

    Raises:
        ValueError: it is something else, or less than `least`.
    """
    try:
        is_flag = isinstance(given, bool) or getattr(given, "dtype", None) == torch.bool
        if is_flag or getattr(given, "ndim", 0):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {given!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {given}")
    return number


def whole_sizes(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor whose arguments annotated as int are any kind of integer, 1 or more."""
    parameters = list(inspect.signature(init).parameters.values())
    sizes = {p.name for p in parameters if p.annotation in (int, int | None)}

    def as_size(name: str, given: Any) -> Any:
        return given if name not in sizes or given is None else whole(name, given, 1)

    @functools.wraps(init)
    def with_sizes(*args: P.args, **options: P.kwargs) -> None:
        args = (as_size(p.name, given) for p, given in zip(parameters, args, strict=False))
        init(*args, **{name: as_size(name, given) for name, given in options.items()})

    return with_sizes


def closest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" where a name is like one that is known, else nothing."""
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def some(names: Sequence[Any], most: int = 3) -> str:
    """The first few and how many there are."""
    first = ", ".join(str(name) for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"


def readable(tensor: Tensor) -> bool:
    """Whether looking at values is free: a real CPU tensor, outside torch.compile and vmap."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not is_mapped((tensor,))
    )


def check_times(t: Tensor, r: Tensor, batch: int) -> None:
    """Refuse times that are not (batch,) or that run the wrong way (r > t)."""
    for name, time in (("t", t), ("r", r)):
        if time.shape != (batch,) or not time.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor of shape ({batch},), one time a sample; "
                f"got {tuple(time.shape)} {time.dtype}"
            )
    if readable(t) and readable(r) and _order_required.get() and bool((r > t).any()):
        i = int((r > t).nonzero()[0])
        raise ValueError(
            f"r must not be later than t: sample {i} has r = {float(r[i]):g} > t = {float(t[i]):g}"
        )


@contextlib.contextmanager
def unordered_times() -> Iterator[None]:
    """Allow r > t for as long as it is open: a finite difference in t steps over t = r."""
    token = _order_required.set(False)
    try:
        yield
    finally:
        _order_required.reset(token)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity; reads the tensor, so call it once and not in a loop."""
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} must be finite, got {count} NaN or infinite values")


def check_computed(name: str, tensor: Tensor, by: str, dtype: torch.dtype) -> None:
    """Refuse to go on with NaN and infinity that were computed; reads the tensor.

    Raises:
        FloatingPointError: it has some.
    """
    if not bool(torch.isfinite(tensor).all()):
        reason = f"{by} in {dtype}"
        if dtype == torch.float16:
            reason += " exceeds its range (65504): bfloat16 or float32 holds it"
        raise FloatingPointError(f"{name} are not finite: {reason}")
