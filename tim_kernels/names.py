"""What is chosen by name: each list once, for type checkers and at run time."""

from typing import Literal, TypeVar, cast, get_args

Backend = Literal["auto", "reference", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Attention = Literal[
    "auto", "native", "flash_attn.cute", "flash_attn_interface", "flash_attn", "cudnn", "flash"
]  # fmt: skip
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)

Linear = Literal["torch", "quack"]
LINEARS: tuple[Linear, ...] = get_args(Linear)

RopeOrder = Literal["upstream", "grid"]
ORDERS: tuple[RopeOrder, ...] = get_args(RopeOrder)

Condition = Literal["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"]  # of the delta embedding
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

Name = TypeVar("Name", bound=str)


def checked(name: str, names: tuple[Name, ...], source: str) -> Name:
    """
    Raises:
        ValueError: it is none of `names`; `source` says whose it is.
    """
    if name not in names:
        raise ValueError(f"{source} must be one of {', '.join(names)}; got {name!r}")
    return cast(Name, name)
