"""The commands `tim generate geneval|dpg|mjhq|imagenet`."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tim.app.common import Device, device_of, errors_without_traceback, say
from tim.generate.settings import KINDS, PRESETS, make
from tim.processes import launched_group

app = typer.Typer(
    help="Folders of pictures for benchmarks; a stopped run goes on, and torchrun shares the work.",
    epilog="Example: tim generate imagenet --checkpoint runs/mnist/model --output pictures",
    no_args_is_help=True,
)

Checkpoint = Annotated[
    Path,
    typer.Option(
        "--checkpoint", "--ckpt",
        help="emoji or mnist; a weight file, the `model` folder of `tim train`, or a saved "
        "pipeline's folder.",
    ),
]  # fmt: skip
Config = Annotated[
    str | None, typer.Option(help="Of a weight file: a preset's name or a YAML file.")
]
Output = Annotated[
    Path, typer.Option("--output", "--sample-dir", help="Where the folder of pictures goes.")
]
_CAPTIONS = {
    "geneval": "A JSONL file in place of GenEval's own prompts.",
    "dpg": "The folder of DPG-Bench's ID.txt.",
    "mjhq": "MJHQ-30K's meta_data.json.",
}
_HELP = {
    "geneval": "GenEval: four pictures of each prompt, their grid and the prompt's line.",
    "dpg": "DPG-Bench: the 2×2 grid of each prompt.",
    "mjhq": "MJHQ-30K: a JPEG of each prompt, in folders of categories.",
    "imagenet": "ImageNet: numbered pictures of drawn classes.",
}


_EXAMPLES = {
    "geneval": "--checkpoint t2i_model.bin --config t2i --preset geneval --output pictures",
    "dpg": "--checkpoint t2i_model.bin --config t2i --caption-dir prompts --output pictures",
    "mjhq": "--checkpoint t2i_model.bin --config t2i --caption-dir meta_data.json "
    "--output pictures",
    "imagenet": "--checkpoint c2i_model_256.safetensors --config xl-256 --output pictures",
}


def _command(name: str) -> Callable[..., None]:
    """The command of a benchmark, whose options are the fields of its settings."""

    def command(
        checkpoint: Path, output: Path, config: str | None, device: str | None, preset: str | None,
        caption_dir: Path | None = None, **given: Any,
    ) -> None:  # fmt: skip
        device = device_of(device)
        changes = {field: value for field, value in given.items() if value is not None}
        with errors_without_traceback():
            from tim.app import assets
            from tim.generate.benchmarks import BENCHMARKS
            from tim.generate.run import generate
            from tim.generate.sources import load

            settings = make(name, preset, **changes)
            captions = (caption_dir,) if name in _CAPTIONS else ()
            benchmark = BENCHMARKS[name](settings, *captions)
            source = load(
                assets.path_of(checkpoint), config, dtype=getattr(torch, settings.dtype),
                text_encoder=assets.text_encoder_of(checkpoint),
            )  # fmt: skip
            with launched_group():
                folder = generate(benchmark, source.to(device), output)
        say(folder)

    options = [
        _parameter("checkpoint", Checkpoint),
        _parameter("output", Output),
        _parameter("config", Config, None),
        _parameter("preset", _preset(name), None),
        *_caption_dir(name),
        *map(_option, dataclasses.fields(KINDS[name])),
        _parameter("device", Device, None),
    ]
    command.__signature__ = inspect.Signature(options)
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def _preset(name: str) -> Any:
    published = ", ".join(PRESETS[name])
    return Annotated[str | None, typer.Option(help=f"Published settings: {published}.")]


def _caption_dir(name: str) -> list[inspect.Parameter]:
    if name not in _CAPTIONS:
        return []
    option = typer.Option("--caption-dir", help=_CAPTIONS[name])
    if name == "geneval":  # whose prompts ship
        return [_parameter("caption_dir", Annotated[Path | None, option], None)]
    return [_parameter("caption_dir", Annotated[Path, option])]


def _option(field: dataclasses.Field) -> inspect.Parameter:
    """Of a field of the settings; None, where it is not given, leaves it to the preset."""
    name, default, help = field.name.replace("_", "-"), field.default, field.metadata["help"]
    panel = "Switches" if field.type is bool else "Settings"
    if field.type is bool:
        name, help = f"{name}/--no-{name}", f"{help} {'On' if default else 'Off'} by default."
    elif default is not None:
        help = f"{help} By default {default}."
    names = f"--{name}", *field.metadata["names"]
    option = typer.Option(*names, help=help, rich_help_panel=panel)
    return _parameter(field.name, Annotated[field.type | None, option], None)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty):
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


for _name in KINDS:
    _epilog = f"Example: tim generate {_name} {_EXAMPLES[_name]}"
    app.command(_name, help=_HELP[_name], epilog=_epilog)(_command(_name))
