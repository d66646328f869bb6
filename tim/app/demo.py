"""Digits from the network shipped in the package."""

from pathlib import Path

import torch

from tim.checks import whole
from tim.files import replacing
from tim.images import step_grid
from tim.training import load_export

WEIGHTS = Path(__file__).parents[1] / "assets" / "mnist"
STEPS = (1, 2, 4, 8, 32)


def draw(output: Path, *, seed: int = 0, weights: Path = WEIGHTS) -> Path:
    """Draw the digits 0 to 9 at 1, 2, 4, 8 and 32 steps from the same noise, as one PNG grid.

    Raises:
        FileNotFoundError: `weights` does not hold an exported network.
    """
    network, transport, _ = load_export(weights)
    noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(whole("seed", seed)))
    grid = step_grid(network, transport, noise, torch.arange(10), STEPS)
    with replacing(output) as path:
        grid.save(path)
    return output
