"""The commands `tim evaluate …` that measure folders of pictures in numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tim.app import judge
from tim.app.common import Device, LeaveOut, Results, device_of, errors_without_traceback, say
from tim.processes import Processes, launched_group

app = typer.Typer(
    help="Measure pictures against a benchmark; torchrun shares the work, a rerun goes on.",
    epilog="Example: tim evaluate geneval pictures --output results",
    no_args_is_help=True,
)
WorkFolder = Annotated[
    Path | None, typer.Option("--work", help="Where features are kept; OUTPUT/features by default.")
]
Weights = Annotated[
    Path | None,
    typer.Option(help="pt_inception-2015-12-05-6726825d.pth, see docs/evaluation.md."),
]
DownloadWeights = Annotated[
    bool, typer.Option("--download-weights", help="Let torch-fidelity fetch Inception's weights.")
]
BatchSize = Annotated[int, typer.Option(help="Pictures in a network at once, each process.")]
Convert = Annotated[
    bool, typer.Option("--convert", help="Make grey, palette and transparent pictures RGB.")
]
Metrics = Annotated[str | None, typer.Option(help="Some, comma-separated; all by default.")]


@app.command(
    epilog="Example: tim evaluate imagenet pictures VIRTUAL_imagenet256_labeled.npz "
    "--output results --download-weights"
)
def imagenet(
    pictures: Annotated[Path, typer.Argument(help="A folder of pictures, or an npz of arr_0.")],
    reference: Annotated[Path, typer.Argument(help="ADM's VIRTUAL_imagenet….npz for that size.")],
    output: Results,
    inception_weights: Weights = None,
    download_weights: DownloadWeights = False,
    num_samples: Annotated[  # torchrun would take --num for an option of its own
        int, typer.Option(help="The first so many pictures; fewer are refused.")
    ] = 50_000,
    metrics: Metrics = None,
    split: Annotated[int, typer.Option(help="Pictures of a split of the Inception score.")] = 5000,
    neighbour: Annotated[int, typer.Option(help="The k of precision and recall.")] = 3,
    batch_size: BatchSize = 64,
    leave_out: LeaveOut = False,
    convert: Convert = False,
    work: WorkFolder = None,
    device: Device = None,
) -> None:
    """FID, sFID, Inception score, precision and recall as ADM's suite has them."""
    device = device_of(device)
    with errors_without_traceback():
        from tim.evaluation.imagenet import METRICS, check, evaluate

        chosen = _chosen(metrics, METRICS)
        opened, _ = check(
            pictures, reference, output, count=num_samples, metrics=chosen, convert=convert
        )
        with launched_group():
            network = _inception(inception_weights, download_weights, "adm", device)
            result = evaluate(
                opened, reference, network, count=num_samples, metrics=chosen, output=output,
                work=work, batch_size=batch_size, split=split, k=neighbour, leave_out=leave_out,
                convert=convert,
            )  # fmt: skip
    _print(result, output)


@app.command(
    epilog="Example: tim evaluate mjhq pictures --meta-data meta_data.json "
    "--metrics clip_score --output results"
)
def mjhq(
    pictures: Annotated[Path, typer.Argument(help="A folder of CATEGORY/ID.jpg.")],
    meta_data: Annotated[Path, typer.Option(help="MJHQ-30K's meta_data.json.")],
    output: Results,
    reference: Annotated[
        Path | None, typer.Option(help="MJHQ's pictures, or an npz of mu and sigma; for FID.")
    ] = None,
    inception_weights: Weights = None,
    download_weights: DownloadWeights = False,
    clip: Annotated[
        str, typer.Option(help="A CLIP of transformers: a folder or a name on the hub.")
    ] = "openai/clip-vit-large-patch14",
    text_features: Annotated[
        Path | None, typer.Option(help="safetensors CATEGORY/ID.jpg → unit vector.")
    ] = None,
    metrics: Metrics = None,
    batch_size: BatchSize = 64,
    leave_out: LeaveOut = False,
    convert: Convert = False,
    work: WorkFolder = None,
    device: Device = None,
) -> None:
    """FID and CLIP score of MJHQ-30K, overall and by category."""
    device = device_of(device)
    with errors_without_traceback():
        from tim.evaluation.clip import Clip
        from tim.evaluation.mjhq import METRICS, check, evaluate

        chosen = _chosen(metrics, METRICS)
        networks: dict[str, Any] = {}
        if "fid" not in chosen:
            reference = None
        elif reference is None:
            raise ValueError("FID needs --reference; --metrics clip_score goes without")
        check(pictures, meta_data, output, reference=reference, leave_out=leave_out)
        with launched_group():
            if "fid" in chosen:
                networks["inception"] = _inception(
                    inception_weights, download_weights, "mjhq", device, spatial=False
                )
                networks["reference"] = reference
            if "clip_score" in chosen:
                networks |= {"clip": Clip(clip, device=device), "text_features": text_features}
            result = evaluate(
                pictures, meta_data, output=output, work=work, batch_size=batch_size,
                leave_out=leave_out, convert=convert, **networks,
            )  # fmt: skip
    _print(result, output)


app.command(epilog="Example: tim evaluate geneval pictures --output results")(judge.geneval)
app.command(epilog="Example: tim evaluate dpg pictures --questions dpg_bench.csv --output results")(
    judge.dpg
)


def _chosen(metrics: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = known if metrics is None else tuple(name.strip() for name in metrics.split(","))
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"metrics are {', '.join(known)}; got {', '.join(unknown)}")
    return chosen


def _inception(weights: Path | None, may_download: bool, kind: str, device: str, **options) -> Any:
    from tim.data.prompts import PAGE
    from tim.evaluation.inception import Inception

    if weights is None and not may_download:
        raise ValueError(
            f"give Inception's weights as --inception-weights (see {PAGE}), or --download-weights"
        )
    processes = Processes.here()
    if weights is None and not processes.is_first:
        processes.wait()  # for the download
    network = Inception(weights, kind, device=device, **options)
    if weights is None and processes.is_first:
        processes.wait()
    return network


def _print(result: Mapping[str, Any], output: Path) -> None:
    from tim.evaluation import report

    names, parts = list(result["metrics"]), result["breakdown"]
    say(report.table(["", *names], [["all", *result["metrics"].values()], *(
        [part, *(parts[name].get(part, "–") for name in names)]
        for part in dict.fromkeys(part for values in parts.values() for part in values)
    )]))  # fmt: skip
    for title in ("counts", "settings"):
        say("\n".join(["", *(f"{name}: {value}" for name, value in result[title].items())]))
    say(f"\n{report.result_in(output)}")
