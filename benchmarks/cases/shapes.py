"""The published models and the sizes at which things are measured."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

CONFIGS = Path(__file__).parents[2] / "tim/configs"


class Model(NamedTuple):
    """A published model at its training resolution and the batches it is measured at."""

    preset: str
    grid: tuple[int, int]
    latent: tuple[int, int, int]
    text_tokens: int
    batches: tuple[int, ...]
    depth: int | None = None

    @property
    def tokens(self) -> int:
        """Of one image."""
        return math.prod(self.grid)

    def network_params(self) -> dict:
        """The network's arguments, from the shipped configuration; needs nothing of `tim`."""
        cfg = yaml.safe_load((CONFIGS / f"{self.preset}.yaml").read_text())
        params = cfg["model"]["network"]["params"]
        params.pop("rope_order", None)  # both orders are one on the square grids used here
        if params["z_dim"] is None:  # the eager tree always has a projector; nothing here runs it
            params |= dict(z_dim=1, projector_dim=1)
        return params if self.depth is None else params | dict(depth=self.depth, encoder_depth=1)

    def meta_inputs(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x, t, r, y of a forward, on the meta device."""
        with torch.device("meta"):
            t, r = torch.empty(2, batch)
            y = torch.empty(batch, dtype=torch.long)
            if self.text_tokens:
                y = torch.empty(
                    batch, self.text_tokens, self.network_params()["cap_feat_dim"], dtype=dtype
                )
            return torch.empty(batch, *self.latent, dtype=dtype), t, r, y


MODELS = {
    "c2i-xl": Model("xl-256", (16, 16), (4, 32, 32), 0, (8, 64, 256)),
    "t2i-xl": Model("t2i", (32, 32), (32, 32, 32), 256, (1, 8, 32)),
}
SMALL_MODELS = {"mnist": Model("mnist", (7, 7), (1, 28, 28), 0, (2,), depth=2)}  # for a CPU


class Shape(NamedTuple):
    """What an op is called on; `grids` packs one sequence of each size end to end instead."""

    batch: int
    grid: tuple[int, int]
    latent: tuple[int, int, int]
    width: int = 1152
    head_dim: int = 72
    grids: tuple[tuple[int, int], ...] | None = None

    @property
    def tokens(self) -> int:
        return (
            sum(h * w for h, w in self.grids) if self.grids else self.batch * math.prod(self.grid)
        )


def _published() -> dict[str, Shape]:
    shapes = {
        f"{name}, batch {batch}": Shape(batch, model.grid, model.latent)
        for name, model in MODELS.items()
        for batch in model.batches
    }
    shapes["4096 tokens"] = Shape(1, (64, 64), (32, 64, 64))
    shapes["16384 tokens"] = Shape(1, (128, 128), (32, 128, 128))
    mixed = ((16, 16), (32, 32), (24, 42), (48, 21), (64, 64), (36, 28), (16, 64), (128, 32))
    shapes["packed, 8 resolutions"] = Shape(8, (0, 0), (32, 32, 32), grids=mixed)
    return shapes


PUBLISHED = _published()
SMALL = {  # for a CPU
    "small, batch 2": Shape(2, (4, 4), (4, 8, 8), width=144),
    "small, packed": Shape(3, (0, 0), (4, 8, 8), width=144, grids=((4, 4), (2, 5), (1, 3))),
}
