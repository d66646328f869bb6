"""The command `tim sample`."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tim.app.common import check_device, dtype_of, errors_without_traceback

WHAT, NETWORK, HOW, OUTPUT = "What to draw", "Network", "How", "Output"
EXAMPLE = 'Example: tim sample emoji "red heart" "waving hand: dark skin tone" --steps 4'
Text = str | None


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def sample(
    network: Annotated[
        Text,
        typer.Argument(
            metavar="MODEL",
            help="emoji or mnist, which come along; a run's folder; a saved pipeline's folder or "
            "its name on the hub; or a weight file, with --config.",
            show_default=False,
        ),
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="Prompts, or ids or names of classes. After --like or --model it comes first.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None, _option(WHAT, "A file of prompts or classes, one a line.")
    ] = None,
    labels: Annotated[Text, _option(WHAT, "Ids of classes, such as 3,1,4.")] = None,
    negative_prompt: Annotated[Text, _option(WHAT, "What guidance leads away from.")] = None,
    count: Annotated[int | None, _option(WHAT, "Pictures of each; 1 by default.")] = None,
    seed: Annotated[
        int | None, _option(WHAT, "Of the first picture's noise, the next has the next; 0.")
    ] = None,
    like: Annotated[
        Path | None, _option(WHAT, "Repeat a picture of tim sample; other options change it.")
    ] = None,
    model: Annotated[Text, _option(NETWORK, "The network, in place of MODEL.")] = None,
    config: Annotated[
        Text, _option(NETWORK, "Of a weight file: a preset's name or a YAML file.")
    ] = None,
    vae: Annotated[Text, _option(NETWORK, "Another autoencoder: a folder or hub name.")] = None,
    text_encoder: Annotated[
        Text, _option(NETWORK, "Another text encoder: a folder or hub name.")
    ] = None,
    dtype: Annotated[
        Text,
        _option(
            NETWORK, "float32, bfloat16 or float16; by default the first on a CPU, else the second."
        ),
    ] = None,
    device: Annotated[
        Text, _option(NETWORK, "cuda, cpu, …; a GPU by default if there is one.")
    ] = None,
    height: Annotated[int | None, _option(HOW, "In px; as trained by default.")] = None,
    width: Annotated[int | None, _option(HOW, "In px; as trained by default.")] = None,
    steps: Annotated[int | None, _option(HOW, "Sampling steps; 8 by default.")] = None,
    guidance: Annotated[
        float | None,
        _option(
            HOW, "Classifier-free guidance; 1 is none, 1.5 the default.", "--guidance",
            "--cfg-scale",
        ),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        _option(
            HOW,
            "LOW HIGH: guidance acts where the noise, as a share of all, is between; 0 1 by "
            "default. Above 1, on the first step too.",
        ),
    ] = None,
    sample_type: Annotated[Text, _option(HOW, "transition, the default, or ddiffusion.")] = None,
    stochasticity: Annotated[
        float | None, _option(HOW, "Noise added between steps; 0 by default.")
    ] = None,
    output: Annotated[
        Path,
        _option(
            OUTPUT,
            "A .png; a folder for a .png each; or a .safetensors. By default tim-sample.png.",
        ),
    ] = Path("tim-sample.png"),
    grid: Annotated[
        bool | None,
        _option(
            OUTPUT, "Several pictures as one, with captions, as by default in a .png, or a .png "
            "each.", "--grid/--no-grid",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Draw pictures of prompts or classes; they keep their settings, which --like repeats."""
    with errors_without_traceback():
        before = _before(like)
        words = [word for word in (network, *(what or ())) if word is not None]
        if model is None and like is None:
            model = _first(words)
        words += [*_labels(labels), *_lines(prompts)]
        given = {
            "model": model, "what": words or None, "config": config, "vae": vae,
            "text_encoder": text_encoder, "negative_prompt": negative_prompt, "height": height,
            "width": width, "steps": steps, "guidance": guidance,
            "guidance_interval": guidance_interval, "sample_type": sample_type,
            "stochasticity": stochasticity, "seed": seed, "count": count, "dtype": dtype,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        values = {**before.get("settings", {}), **given}
        if words:
            values.pop("grid", None)
        values["device"] = _device(device, before)
        _draw(values, output, grid, like, before)
    typer.echo(output)


def _draw(
    values: dict[str, Any], output: Path, grid: bool | None, like: Path | None,
    before: dict[str, Any],
) -> None:  # fmt: skip
    from tim.app import assets, drawing
    from tim.app.settings import settings_of

    settings = settings_of(values)
    settings = dataclasses.replace(settings, grid=_is_grid(settings, output, grid))
    _check_output(output, grid)
    _check_there(settings.model, like)
    pipeline = assets.open_pipeline(
        settings.model, settings.config, dtype=dtype_of(settings.dtype), device=settings.device,
        vae=settings.vae, text_encoder=settings.text_encoder,
    )  # fmt: skip
    settings = settings.filled(pipeline)
    weights = drawing.weights_of(pipeline, settings.model)
    if like is not None:
        _note_differences(like, before, weights, settings.dtype)
    is_states = output.suffix == ".safetensors"
    save = drawing.save_states if is_states else drawing.save_pictures
    save(pipeline, settings, output, weights)


def _before(like: Path | None) -> dict[str, Any]:
    from tim.app import record

    return {} if like is None else record.read(like)


def _first(words: list[str]) -> str:
    if not words:
        raise ValueError('a network is needed, such as in: tim sample emoji "red heart"')
    return words.pop(0)


def _labels(labels: str | None) -> list[str]:
    if labels is None:
        return []
    ids = [label.strip() for label in labels.split(",")]
    if not all(label.isdecimal() for label in ids):
        raise ValueError(f"labels must be like 3,1,4, got {labels!r}")
    return ids


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of prompts")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows writes a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path} has no prompts: one a line is needed")
    return found


def _device(name: str | None, before: dict[str, Any]) -> str:
    """The one asked for, or that of the picture to repeat if it is here, or a GPU."""
    has_gpu = torch.cuda.is_available()
    if name is None:
        recorded = before.get("settings", {}).get("device")
        name = "cuda" if has_gpu and recorded != "cpu" else "cpu"
    check_device(name)
    return name


def _check_output(output: Path, grid: bool | None) -> None:
    is_file = output.suffix in (".png", ".safetensors")
    if not (is_file or output.suffix == "" or output.is_dir()):
        raise ValueError(f"{output} must end in .png or .safetensors, or be a folder")
    if grid and output.suffix != ".png":
        raise ValueError(f"a grid needs an output in .png, got {output}")
    folder = output.parent if is_file else output
    if is_file and output.is_dir():
        raise ValueError(f"{output} is a folder: a file is needed")
    if not is_file and output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: a folder, a .png or a .safetensors is needed")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} may not be written to: give another --output")


def _check_there(model: str, like: Path | None) -> None:
    from tim.app import assets
    from tim.opening import is_pipeline

    is_known = assets.is_name(model) or Path(model).exists() or is_pipeline(model)
    if like is not None and not is_known:
        raise FileNotFoundError(f"{like} is of {model}, which is not here: give --model")


def _is_grid(settings: Any, output: Path, grid: bool | None) -> bool:
    if output.suffix != ".png" or grid is not None:
        return bool(grid)
    return settings.grid or len(settings.what) * settings.count > 1


def _note_differences(
    like: Path, before: dict[str, Any], weights: dict[str, str], dtype: str
) -> None:
    """Why the picture may come out as another."""
    from tim.app.drawing import made_with

    names = [*weights] if dtype == before["settings"].get("dtype") else ["network"]
    others = [name for name in names if weights[name] != before["weights"].get(name)]
    if others:
        typer.echo(
            f"note: not the weights that drew {like} ({', '.join(others)}): expect another picture",
            err=True,
        )
    then, now = (each.get("versions", {}) for each in (before.get("made_with", {}), made_with()))
    if changed := [
        f"{name} {then.get(name)}, now {now.get(name)}"
        for name in ("torch", "device")
        if then.get(name) != now.get(name)
    ]:
        typer.echo(
            f"note: {like} was drawn with {'; '.join(changed)}: last bits may differ", err=True
        )
