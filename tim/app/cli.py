"""The command `tim`."""

from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from tim.app import evaluate, explain, generate, sample, web
from tim.app.common import (
    Commands,
    Device,
    device_of,
    dtype_of,
    errors_without_traceback,
    fail,
    say,
)
from tim.processes import launched_group

DRAW, TRAIN, MEASURE, HERE = "Draw", "Train", "Measure", "This machine"
app = typer.Typer(
    help="Transition Models: pictures in any number of steps.",
    epilog="Example: tim sample mnist 3 1 4 --steps 2. Each command has its own -h.",
    cls=Commands, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        for line in explain.versions():
            typer.echo(line)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Versions of what runs, and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    try:
        import tim_kernels  # noqa: F401
    except ValueError as error:  # a wrong TIM_KERNELS_BACKEND
        fail(error, 2)


app.command(rich_help_panel=DRAW, epilog=sample.EXAMPLE)(sample.sample)
app.command("app", rich_help_panel=DRAW, epilog=web.EXAMPLE)(web.web)


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: tim train --config mnist training.max_train_steps=100 --output runs/short",
)
def train(
    config: Annotated[str, typer.Option(help="A preset's name or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as training.max_train_steps=100.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/<config> by default.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of some steps to <output>/profile.")
    ] = False,
) -> None:
    """Train a network; a stopped run goes on from its latest checkpoint."""
    from tim import config as configs
    from tim.app import assets
    from tim.training import train as run
    from tim.training.parallel import leaving_together

    with errors_without_traceback(), leaving_together():
        cfg = assets.with_folders(configs.override(configs.load(config), overrides or []))
        folder = run(cfg, output or Path("runs") / Path(config).stem, profile=profile)
    typer.echo(f"network: {folder}")


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: tim export runs/mnist/checkpoints/step-10000 mnist.safetensors",
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, whole or sharded.")],
    output: Annotated[Path, typer.Argument(help="A .safetensors file.")],
    average: Annotated[bool, typer.Option(help="The averaged network or the network.")] = True,
) -> None:
    """Write a checkpoint's weights as one file, under the published names."""
    from tqdm import tqdm

    from tim.files import replacing
    from tim.training import merged

    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"{output} must end in .safetensors")
    with errors_without_traceback(), tqdm(total=2, desc="read") as bar:
        weights = merged(checkpoint, average)
        bar.set_description("write")
        bar.update()
        with replacing(output) as path:
            save_file(weights, path)
        bar.update()
    typer.echo(output)


@app.command(rich_help_panel=TRAIN, epilog="Example: tim download weights --list")
def download(
    what: Annotated[
        str, typer.Argument(help="imagenet-256, imagenet-512, imagenet-native, t2i-toy or weights.")
    ],
    root: Annotated[
        Path, typer.Option(help="Where the folders datasets and checkpoints are.")
    ] = Path("."),
    only_list: Annotated[
        bool, typer.Option("--list", help="Say which files must lie where, and which do.")
    ] = False,
) -> None:
    """Fetch data sets and weights from the Hugging Face hub; what was cut off goes on."""
    with errors_without_traceback():
        from tim.data import download as hub

        if not only_list:
            return hub.download(what, root, typer.echo)
        for line in hub.listing(what, root):
            typer.echo(line)


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: tim preprocess images latents --vae stabilityai/sd-vae-ft-ema "
    "--image-size 256",
)
def preprocess(
    images: Annotated[Path, typer.Argument(help="A folder of class folders of pictures.")],
    latents: Annotated[Path, typer.Argument(help="Where the latents go.")],
    vae: Annotated[
        str, typer.Option(help="An autoencoder of diffusers: a folder or a name on the hub.")
    ],
    image_size: Annotated[
        int | None, typer.Option(help="Cut out the middle square, of this side in px.")
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Keep the size of each picture.")
    ] = False,
    min_image_size: Annotated[
        int | None, typer.Option(help="Native sides are multiples of it, in px; by default of 32.")
    ] = None,
    max_image_size: Annotated[
        int | None, typer.Option(help="Native areas are at most its square; 2048 px by default.")
    ] = None,
    pack_tokens: Annotated[
        int | None, typer.Option(help="Also write packs of at most so many latent positions.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures encoded at once, each process.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, as published, bfloat16 or float16.")] = (
        "float32"
    ),
    seed: Annotated[int, typer.Option(help="Of what the autoencoder draws.")] = 0,
    workers: Annotated[int, typer.Option(help="Threads that read and write, each process.")] = 8,
    device: Device = None,
) -> None:
    """Make latents of pictures; a stopped run goes on, and torchrun shares the work."""
    if native == (image_size is not None):
        raise typer.BadParameter("give one of --image-size and --native")
    limits = {"min_image_size": min_image_size, "max_image_size": max_image_size}
    limits = {name: size for name, size in limits.items() if size is not None}
    if limits and not native:
        raise typer.BadParameter("--min-image-size and --max-image-size are for --native")
    device = device_of(device)
    with errors_without_traceback():
        kind = dtype_of(dtype)
        from tim.data.preprocess import preprocess as run
        from tim.encoders import Autoencoder

        autoencoder = Autoencoder.load(vae, dtype=kind, device=device)
        with launched_group():
            made = run(
                images, latents, autoencoder, image_size=image_size, batch_size=batch_size,
                pack_tokens=pack_tokens, seed=seed, num_workers=workers, **limits,
            )  # fmt: skip
    unreadable = len(made.unreadable)
    say(
        f"{latents}: {made.new} made, {made.there} there before"
        + f", {unreadable} pictures cannot be read: move them away" * bool(unreadable)
    )


@app.command(rich_help_panel=MEASURE, epilog="Example: tim compare results/4.json results/8.json")
def compare(
    results: Annotated[list[Path], typer.Argument(help="What `tim evaluate` wrote, of one kind.")],
    output: Annotated[Path, typer.Option(help="A .png.")] = Path("tim-compare.png"),
    metric: Annotated[str | None, typer.Option(help="Plot this one alone.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Of each result; equal ones are one line.")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Of each result, where its run.json does not say.")
    ] = None,
) -> None:
    """Results over the number of sampling steps, beside the published figures."""
    if output.suffix != ".png":
        raise typer.BadParameter(f"{output} must end in .png")
    with errors_without_traceback():
        from tim.evaluation import compare as comparison

        found = comparison.read(results, labels=label or (), steps=steps or ())
        comparison.plot(found, output, metric)
        typer.echo(comparison.table(found))
        if different := comparison.differences(found):
            typer.echo(f"not measured alike, so not to be compared: {', '.join(different)}")
    typer.echo(output)


@app.command(rich_help_panel=DRAW, epilog="Example: tim demo --seed 1")
def demo(
    output: Annotated[
        Path, typer.Option(help="Where the digits go; the emoji go beside them.")
    ] = Path("tim-demo.png"),
    seed: Annotated[int, typer.Option(help="Of the initial noise.", min=0, max=2**63 - 1)] = 0,
) -> None:
    """Draw digits and emoji at 1, 2, 4, 8 and 32 steps with networks that are trained already."""
    from tim.app.demo import draw, draw_emoji

    with errors_without_traceback():
        typer.echo(draw(output, seed=seed).resolve())
        beside = output.with_stem(f"{output.stem}-emoji")
        typer.echo(draw_emoji(beside, seed=seed).resolve())


app.command(rich_help_panel=HERE, epilog=explain.EXAMPLE)(explain.explain)
app.add_typer(generate.app, name="generate", rich_help_panel=DRAW)
app.add_typer(evaluate.app, name="evaluate", rich_help_panel=MEASURE)
