"""Digits and emoji from the networks that are trained already."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tim.app import assets
from tim.checks import whole
from tim.files import replacing
from tim.images import labelled_grid, step_grid, step_label
from tim.pipelines import TiMTextPipeline
from tim.pipelines.base import transport_of
from tim.training import load_export

STEPS = (1, 2, 4, 8, 32)


def draw(output: Path, *, seed: int = 0, weights: Path | None = None) -> Path:
    """Draw the digits 0 to 9 at 1, 2, 4, 8 and 32 steps from the same noise, as one PNG grid.

    Raises:
        FileNotFoundError: `weights` does not hold an exported network.
        ValueError: `output` is not called .png.
    """
    _check_png(output)
    network, transport, _ = load_export(weights or assets.folder("mnist"))
    noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(whole("seed", seed)))
    grid = step_grid(network, transport, noise, torch.arange(10), STEPS, progress=True)
    with replacing(output) as path:
        grid.save(path)
    return output


def draw_emoji(output: Path, *, seed: int = 0, weights: Path | None = None) -> Path:
    """Draw a sheet of prompts, a row each, at 1, 2, 4, 8 and 32 steps from the same noise.

    Raises:
        FileNotFoundError: see `drawn_emoji`.
        ValueError: `output` is not called .png.
    """
    _check_png(output)
    rows = drawn_emoji(weights or assets.folder("emoji"), STEPS, seed)
    with replacing(output) as path:
        labelled_grid(rows, [step_label(count) for count in STEPS]).save(path)
    return output


def drawn_emoji(weights: Path, steps: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Of each prompt its pictures (len(steps), 3, H, W) in [-1, 1], from the same noise.

    `weights` holds an exported network, `prompts.json`, the texts, and `prompts.safetensors`, their
    features, so that no text encoder is needed.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    network, _, cfg = load_export(weights)
    pipeline = TiMTextPipeline(network.float(), None, None, None, *transport_of(cfg))
    texts = json.loads((weights / "prompts.json").read_text())
    y = load_file(weights / "prompts.safetensors")["y"].float()
    shape = (len(texts), 3, network.config.input_size, network.config.input_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(whole("seed", seed)))
    drawn = []
    for count in steps:
        pipeline.set_progress_bar_config(desc=f"emoji, {step_label(count)}")
        pictures = pipeline(
            prompt_embeds=y, num_inference_steps=count, guidance_scale=1.0, latents=noise,
            output_type="pt",
        ).images  # fmt: skip
        drawn.append(pictures * 2 - 1)
    return dict(zip(texts, torch.stack(drawn, dim=1), strict=True))


def _check_png(output: Path) -> None:
    if output.suffix != ".png":
        raise ValueError(f"the output must end in .png, got {output}")
