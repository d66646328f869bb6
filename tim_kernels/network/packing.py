"""Pictures of different sizes in one row of tokens (NaViT, arXiv 2307.06304)."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch.torch_private import register_pytree
from ..segments import Segments


@dataclass(frozen=True, eq=False)
class Packing:
    """S pictures, T tokens in all, end to end; made by `Packing.of`.

    Attributes:
        sizes: (h, w) of every picture's row-major grid of tokens, on the host.
        grids: the same, int32 (S, 2) on the tokens' device.
        segments: where each picture's tokens are.
    """

    sizes: tuple[tuple[int, int], ...]
    grids: Tensor
    segments: Segments

    @classmethod
    def of(
        cls, sizes: Iterable[tuple[int, int]], device: torch.device | str | int | None = None
    ) -> "Packing":
        """Pictures of these grids (h, w) of tokens.

        Raises:
            ValueError: there is none, or a side is not a whole number of at least 1.

        Example:
            >>> Packing.of([(2, 3), (4, 4)]).total
            22
        """
        sizes = tuple(map(_checked, sizes))
        if not sizes:
            raise ValueError("sizes must be (h, w) of at least one picture, got none")
        grids = torch.tensor(sizes, dtype=torch.int32, device=device)
        return cls(sizes, grids, Segments.from_lengths([h * w for h, w in sizes], device))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        """T."""
        return sum(h * w for h, w in self.sizes)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Packing":
        """The same on another device."""
        grids = self.grids.to(device, non_blocking=non_blocking)
        return Packing(self.sizes, grids, self.segments.to(device, non_blocking))

    def __getitem__(self, pictures: slice) -> "Packing":
        """Some of the pictures, such as `packing[3:]`."""
        return Packing.of(self.sizes[pictures], self.grids.device)

    def __add__(self, others: "Packing") -> "Packing":
        """These pictures and then others."""
        return Packing.of(self.sizes + others.sizes, self.grids.device)

    def tokens_of(self, first: int) -> int:
        """How many tokens the first pictures have."""
        return sum(h * w for h, w in self.sizes[:first])

    def spread(self, rows: Tensor) -> Tensor:
        """One row a picture, (S, …), as one row a token, (T, …)."""
        lengths = self.segments.cu_seqlens.diff()
        return rows.repeat_interleave(lengths, dim=0, output_size=self.total)

    def means(self, values: Tensor) -> Tensor:
        """Of one value a token, (…, T), the mean of each picture's, (…, S): the same bits every
        run, and what is not finite stays in its picture."""
        cu, token = self.segments.cu_seqlens, torch.arange(self.total, device=values.device)
        is_own = (token >= cu[:-1, None]) & (token < cu[1:, None])  # (S, T)
        return torch.where(is_own, values.unsqueeze(-2), 0).sum(-1) / cu.diff()


register_pytree(Packing, ("sizes", "grids", "segments"))


def pack(latents: Sequence[Tensor], patch_size: int) -> tuple[Tensor, Packing]:
    """Pictures or latents (channels, H, W) of any sizes as tokens and their packing.

    Tokens are (T, channels, patch_size, patch_size), a patch each, row by row and picture after
    picture: a model with `packing` takes and gives them, and per-sample arithmetic takes them as T
    samples. A tensor (B, channels, H, W) is B pictures.

    Raises:
        ValueError: no pictures, sides that are no multiples of patch_size, or other channels,
            dtypes or devices than the first's.

    Example:
        >>> tokens, packing = pack([torch.randn(4, 8, 12), torch.randn(4, 6, 6)], patch_size=2)
        >>> tokens.shape, packing.sizes
        (torch.Size([33, 4, 2, 2]), ((4, 6), (3, 3)))
    """
    latents, p = list(latents), operator.index(patch_size)
    for i, x in enumerate(latents):
        first = latents[0]
        if x.ndim != 3 or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(
                f"latents must be (channels, H, W), sides multiples of patch_size {p}; got "
                f"{tuple(x.shape)} at {i}"
            )
        kinds = [(len(each), each.dtype, str(each.device)) for each in (first, x)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "latents must have one number of channels, dtype and device, got "
                f"{kinds[0]} and {kinds[1]} at {i}"
            )
    packing = Packing.of(
        [(x.shape[1] // p, x.shape[2] // p) for x in latents],
        latents[0].device if latents else None,
    )
    return torch.cat([_patches(x, p) for x in latents]), packing


def unpack(tokens: Tensor, packing: Packing) -> list[Tensor]:
    """The pictures (channels, H, W) of tokens (T, channels, p, p): `pack` undone.

    Raises:
        ValueError: tokens that are not those of the packing.

    Example:
        >>> pictures = unpack(*pack([torch.randn(4, 8, 12), torch.randn(4, 6, 6)], patch_size=2))
    """
    if tokens.ndim != 4 or len(tokens) != packing.total:
        raise ValueError(
            f"tokens must be ({packing.total}, channels, p, p) as packed, got {tuple(tokens.shape)}"
        )
    parts = tokens.split([h * w for h, w in packing.sizes])
    return [_picture(part, *size) for part, size in zip(parts, packing.sizes, strict=True)]


def _patches(x: Tensor, p: int) -> Tensor:
    x = x.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # (c, h, p, w, p)
    return x.permute(1, 3, 0, 2, 4).flatten(0, 1)


def _picture(x: Tensor, h: int, w: int) -> Tensor:
    return x.unflatten(0, (h, w)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    try:
        h, w = map(operator.index, size)
    except (TypeError, ValueError):
        raise ValueError(f"a size must be (h, w) in tokens, got {size!r}") from None
    if min(h, w) < 1:
        raise ValueError(f"a picture must have at least one token, got {h}×{w}")
    return h, w
