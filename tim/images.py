"""From tensors to pictures: grids with a label on every row and column."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from tim.checks import whole
from tim.sampling import sample
from tim.sampling.steps import Step
from tim.transports import Transport

_FONT = ImageFont.load_default(size=14)


def by_size(function: Callable[..., Tensor], *columns: Iterable[Tensor]) -> list[Tensor]:
    """`function` of rows of tensors, of those of one shape at a time, stacked; its result for each
    row, in their order."""
    rows, groups = list(zip(*columns, strict=True)), defaultdict(list)
    for place, row in enumerate(rows):
        groups[tuple(x.shape for x in row)].append(place)
    found: dict[int, Tensor] = {}
    for places in groups.values():
        stacked = map(torch.stack, zip(*(rows[place] for place in places), strict=True))
        found |= zip(places, function(*stacked), strict=True)
    return [found[place] for place in range(len(rows))]


def to_pil(image: Tensor) -> Image.Image:
    """A grey or RGB image (1 or 3, H, W) in [-1, 1], values beyond clipped, as a PIL image."""
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return Image.fromarray(levels.movedim(0, -1).squeeze(-1).numpy())


def labelled_grid(
    rows: Mapping[str, Tensor], columns: Sequence[str], *, scale: int = 2, gap: int = 4
) -> Image.Image:
    """One picture of labelled rows of images (len(columns), C, H, W) in [-1, 1]."""
    scale, gap = whole("scale", scale, 1), whole("gap", gap, 0)
    height, width = next(iter(rows.values())).shape[-2:]
    tile_h, tile_w = height * scale, width * scale
    left = max(int(_FONT.getlength(label)) for label in rows) + 3 * gap
    top = 14 + 3 * gap
    size = (left + len(columns) * (tile_w + gap), top + len(rows) * (tile_h + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, label in enumerate(columns):
        centre = left + j * (tile_w + gap) + tile_w // 2
        draw.text((centre, top // 2), label, fill="black", font=_FONT, anchor="mm")
    for i, (label, images) in enumerate(rows.items()):
        y = top + i * (tile_h + gap)
        draw.text((left - 2 * gap, y + tile_h // 2), label, fill="black", font=_FONT, anchor="rm")
        for j, image in enumerate(images):
            tile = to_pil(image).resize((tile_w, tile_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + j * (tile_w + gap), y))
    return canvas


def step_label(num_steps: int) -> str:
    """`1 step`, `2 steps`, …"""
    return f"{num_steps} step" if num_steps == 1 else f"{num_steps} steps"


def step_grid(
    network: nn.Module,
    transport: Transport,
    noise: Tensor,
    y: Tensor,
    steps: Sequence[int],
    columns: Sequence[str] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    *,
    progress: bool = False,
) -> Image.Image:
    """Samples of y (B, …) from one noise (B, C, H, W) of variance 1, a row a step count; or, where
    their names are wider than they are, a column.

    `columns` names the samples, by default by their labels y (B,); `decode` makes images of them;
    `progress` shows a bar of all steps.
    """
    z = transport.initial_state(noise)
    with tqdm(total=sum(steps), desc="samples", disable=not progress) as bar:

        def counted(each: Iterable[Step]) -> Iterator[Step]:
            for step in each:
                yield step
                bar.update()

        rows = {
            step_label(count): sample(network, transport, z, y, num_steps=count, progress=counted)
            for count in steps
        }
    if decode is not None:
        rows = {label: decode(latents) for label, latents in rows.items()}
    names = list(columns or [str(label) for label in y.tolist()])
    by_name = dict(zip(names, torch.stack([*rows.values()], dim=1), strict=True))
    width = 2 * next(iter(rows.values())).shape[-1]
    if len(by_name) == len(names) and max(map(_FONT.getlength, names)) > width:
        return labelled_grid(by_name, list(rows))
    return labelled_grid(rows, names)


def captioned(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:  # fmt: skip
    """One picture of several of one size, each with its caption under it; small ones enlarged.

    `columns` is how many stand side by side: by default up to six, or about as many as rows.
    """
    width, height = pictures[0].size
    scale, gap, line, most = max(1, 96 // max(width, height)), 8, 14, 4
    columns = min(columns or max(6, math.ceil(math.sqrt(len(pictures)))), len(pictures))
    tile_w, tile_h = width * scale, height * scale
    cell = max(tile_w, 96)
    font = ImageFont.load_default(size=11)
    letters = int(cell / font.getlength("n"))
    texts = [
        textwrap.wrap(caption, letters, max_lines=most, placeholder=" …") for caption in captions
    ]
    rows = math.ceil(len(pictures) / columns)
    under = max(map(len, texts)) * line
    size = columns * (cell + gap) + gap, rows * (tile_h + under + 2 * gap) + gap
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for place, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap + column * (cell + gap), gap + row * (tile_h + under + 2 * gap)
        tile = picture.convert("RGB").resize((tile_w, tile_h), Image.Resampling.NEAREST)
        canvas.paste(tile, (left + (cell - tile_w) // 2, top))
        for number, text in enumerate(lines):
            at = left + cell // 2, top + tile_h + gap // 2 + number * line
            draw.text(at, text, fill="black", font=font, anchor="ma")
    return canvas
