"""The command `tim app`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tim.app.common import Device, device_of, dtype_of, errors_without_traceback

EXAMPLE = "Example: tim app runs/digits --port 8000"


def web(
    source: Annotated[
        str,
        typer.Argument(
            help="emoji or mnist, which come along; a run's folder; a saved pipeline's folder or "
            "name on the hub; or a weight file, with --config."
        ),
    ] = "emoji",
    config: Annotated[
        str | None, typer.Option(help="Of a weight file: a preset's name or a YAML file.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="0.0.0.0 lets other machines in; by default this one alone.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="By default the first that is free from 7860 on.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also at a public address, of Gradio's, for a week.")
    ] = False,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; by default the first on a CPU, else the second."
        ),
    ] = None,
) -> None:
    """Draw in a browser."""
    device = device_of(device)
    with errors_without_traceback():
        serve(source, config, host=host, port=port, share=share, device=device, dtype=dtype)


def serve(
    source: str = "emoji", config: str | None = None, *, host: str | None = None,
    port: int | None = None, share: bool = False, device: str | None = None,
    dtype: str | None = None,
) -> None:  # fmt: skip
    """Serve the page of a network until it is stopped: what `tim app` does, with its options.

    Raises:
        ImportError: Gradio is not installed, or the text encoder of "emoji".
        ValueError, OSError: see `tim.opening.open_pipeline`.
        OSError: the port is taken.
    """
    from tim.app import assets  # not before: it imports all of diffusers
    from tim.app.page import LAUNCH, page

    pipeline = assets.open_pipeline(source, config, dtype=dtype_of(dtype), device=device_of(device))
    is_ours = assets.is_name(source)  # their samples are best without guidance
    examples = _examples(assets.folder("emoji")) if is_ours and source == "emoji" else None
    blocks = page(pipeline, source, config, examples=examples, guidance=1.0 if is_ours else 1.5)
    blocks.launch(server_name=host, server_port=port, share=share, **LAUNCH)


def _examples(folder: Path) -> list[str]:
    """Prompts that the emoji network draws well."""
    texts = json.loads((folder / "prompts.json").read_text())
    return texts[::-1][:8]  # the short ones come last
