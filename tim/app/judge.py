"""`tim evaluate geneval` and `tim evaluate dpg`: pictures judged by what their prompts ask for."""

from pathlib import Path
from typing import Annotated

import typer

from tim.app.common import Device, LeaveOut, Results, device_of, errors_without_traceback
from tim.processes import Processes, launched_group


def geneval(
    pictures: Annotated[Path, typer.Argument(help="A folder with one for each prompt: 00000, …")],
    output: Results,
    detector: Annotated[
        str, typer.Option(help="A Mask2Former of COCO's 80 classes: a folder or a name on the hub.")
    ] = "facebook/mask2former-swin-small-coco-instance",
    clip: Annotated[
        str, typer.Option(help="The CLIP that tells colours: a folder or a name on the hub.")
    ] = "openai/clip-vit-large-patch14",
    prompts: Annotated[
        Path | None, typer.Option(help="Other prompts than GenEval's 553, as its JSONL.")
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 4,
    leave_out: LeaveOut = False,
    device: Device = None,
) -> None:
    """GenEval: whether pictures show the objects asked for; torchrun shares the work."""
    device = device_of(device)
    with errors_without_traceback(), launched_group():
        from tim.evaluation.geneval import check, evaluate, table
        from tim.evaluation.geneval.colours import ClipColours
        from tim.evaluation.geneval.detector import Mask2Former

        options = dict(prompts=prompts, per_prompt=per_prompt, leave_out=leave_out)
        check(pictures, output, **options)
        networks = Mask2Former.load(detector, device), ClipColours.load(clip, device)
        result = evaluate(pictures, output, *networks, **options)
        _say(table(result), output)


def dpg(
    pictures: Annotated[Path, typer.Argument(help="A folder of ITEM.png.")],
    questions: Annotated[Path, typer.Option(help="dpg_bench.csv.")],
    output: Results,
    vqa: Annotated[
        str,
        typer.Option(
            help="blip, qwen2.5-vl, or another of these kinds: a folder or a name on the hub."
        ),
    ] = "blip",
    per_prompt: Annotated[
        int, typer.Option(help="Pictures of each prompt: 4 as the quarters of its file, or 1.")
    ] = 4,
    published_categories: Annotated[
        bool,
        typer.Option(
            "--published-categories", help="Category scores of each item's last picture alone."
        ),
    ] = False,
    leave_out: LeaveOut = False,
    device: Device = None,
) -> None:
    """DPG-Bench: questions about pictures, answered by a network; torchrun shares the work."""
    device = device_of(device)
    with errors_without_traceback(), launched_group():
        from tim.evaluation.dpg import check, evaluate, table
        from tim.evaluation.dpg.vqa import load_vqa

        check(pictures, questions, output, leave_out=leave_out)
        result = evaluate(
            pictures, questions, output, load_vqa(vqa, device), per_prompt=per_prompt,
            published_categories=published_categories, leave_out=leave_out,
        )  # fmt: skip
        _say(table(result), output)


def _say(table: str, output: Path) -> None:
    if Processes.here().is_first:
        typer.echo(f"{table}\n{output / 'result.json'}")
