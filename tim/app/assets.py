"""Networks that are trained already. A checkout has them beside the code; to the wheel, which is
kept small, the package `tim-assets` adds them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tim import opening
from tim.data import emoji
from tim.opening import Source
from tim.pipelines import TiMClassPipeline, TiMTextPipeline

NAMES = "mnist", "emoji"


def folder(name: str) -> Path:
    """Of a network of NAMES, as `tim train` exports it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    roots = [Path(__file__).parents[1] / "assets"]
    if (spec := find_spec("tim_assets")) is not None:
        roots += map(Path, spec.submodule_search_locations or ())
    for root in roots:
        if (root / name / "config.json").is_file():
            return root / name
    raise FileNotFoundError(
        f"the trained network {name!r} is not installed: run in a checkout of tim-kernels, or "
        "install its folder tim/assets with pip"
    )


def open_pipeline(
    source: Source, config: Source | None = None, **options: Any
) -> TiMClassPipeline | TiMTextPipeline:  # fmt: skip
    """What `tim.opening.open_pipeline` opens, with the same arguments and errors, or a network of
    NAMES.

    Raises:
        ImportError: the text encoder of "emoji" is not installed.
    """
    if options.get("text_encoder") is None:
        options["text_encoder"] = text_encoder_of(source)
    return opening.open_pipeline(path_of(source), config, **options)


def path_of(source: Source) -> Source:
    """The folder of a network of NAMES; any other source as it is.

    Raises:
        FileNotFoundError: see `folder`.
    """
    return folder(str(source)) if is_name(source) else source


def with_folders(cfg: DictConfig) -> DictConfig:
    """A training's settings, where `model.ckpt` and `model.text_encoder_dir` may be a network of
    NAMES: its weights, what reads its prompts.

    Raises:
        FileNotFoundError, ImportError: they are not installed.
    """
    cfg = cfg.copy()
    model = cfg.get("model")
    if not isinstance(model, DictConfig):
        return cfg  # refused by name where it is read
    if is_name(ckpt := model.get("ckpt")):
        model.ckpt = str(folder(ckpt))
    text_encoder = text_encoder_of(model.get("text_encoder_dir") or "")
    if text_encoder is not None:
        model.text_encoder_dir = str(text_encoder)
    return cfg


def is_name(source: Source) -> bool:
    """Whether a network of NAMES is meant, and not a folder here."""
    return str(source) in NAMES and not Path(source).exists()


def text_encoder_of(source: Source) -> Path | None:
    """The one that "emoji" needs beside its folder; None of any other source.

    Raises:
        ImportError: it is not installed.
    """
    if not (is_name(source) and str(source) == "emoji"):
        return None
    made = Path("datasets/emoji/text_encoder")  # of python -m tim.data.emoji
    return made.resolve() if made.is_dir() else emoji.text_encoder()
