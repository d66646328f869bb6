"""What the launchers and the shapes of their outputs must agree on."""

from torch import Tensor


def is_of_token(cond: Tensor | None) -> bool:
    """Whether conditioning is of each token, (B, N, C) or packed (1, T, C), and not a row a sample,
    (B, C) or (1, C)."""
    return cond is not None and cond.ndim == 3


def sums(scale: Tensor | None, norm_bias: Tensor | None) -> int:
    """How many sums over tokens backward makes."""
    return 5 if is_of_token(scale) and norm_bias is not None else 4
