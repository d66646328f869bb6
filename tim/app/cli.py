"""The command `tim`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from tim.app import evaluate, generate
from tim.app.common import Device, check_device, device_of, errors_without_traceback, fail, say
from tim.processes import launched_group

app = typer.Typer(
    help="Transition Models: train, sample, generate, evaluate, demo.", no_args_is_help=True
)
app.add_typer(generate.app, name="generate")
app.add_typer(evaluate.app, name="evaluate")


@app.callback()
def _check_environment() -> None:
    try:
        import tim_kernels  # noqa: F401
    except ValueError as error:  # a wrong TIM_KERNELS_BACKEND
        fail(error, 2)


@app.command()
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
    from tim.training import train as run
    from tim.training.parallel import leaving_together

    with errors_without_traceback(), leaving_together():
        cfg = configs.override(configs.load(config), overrides or [])
        folder = run(cfg, output or Path("runs") / Path(config).stem, profile=profile)
    typer.echo(f"network: {folder}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, whole or sharded.")],
    output: Annotated[Path, typer.Argument(help="A .safetensors file.")],
    average: Annotated[bool, typer.Option(help="The averaged network or the network.")] = True,
) -> None:
    """Write a checkpoint's weights as one file, under the published names."""
    from tim.files import replacing
    from tim.training import merged

    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"{output} must end in .safetensors")
    with errors_without_traceback():
        weights = merged(checkpoint, average)
        with replacing(output) as path:
            save_file(weights, path)
    typer.echo(output)


@app.command()
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


@app.command()
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
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise typer.BadParameter(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    device = device_of(device)
    with errors_without_traceback():
        from tim.data.preprocess import preprocess as run
        from tim.encoders import Autoencoder

        autoencoder = Autoencoder.load(vae, dtype=dtypes[dtype], device=device)
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


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="The `model` folder that `tim train` wrote.")],
    labels: Annotated[str, typer.Option(help="Class ids, comma-separated.")],
    output: Annotated[Path, typer.Option(help="A .png grid or .safetensors.")],
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 8,
    cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda, cpu, …; a GPU by default if there is one.")
    ] = None,
) -> None:
    """Draw samples of the given classes from a trained network."""
    from tim.files import replacing
    from tim.images import labelled_grid, step_label
    from tim.sampling import sample as run
    from tim.training import load_export

    if output.suffix not in (".png", ".safetensors"):
        raise typer.BadParameter(f"{output} must end in .png or .safetensors")
    try:
        y = torch.tensor([int(label) for label in labels.split(",")])
    except ValueError:
        raise typer.BadParameter(f"labels must be like 3,1,4, got {labels!r}") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    with errors_without_traceback():
        network, transport, _ = load_export(model)
        network.to(device)
        size, channels = network.config.input_size, network.config.in_channels
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(y), channels, size, size, generator=generator)
        y_null = torch.full_like(y, network.config.num_classes)
        inputs = (tensor.to(device) for tensor in (transport.initial_state(noise), y, y_null))
        x = run(network, transport, *inputs, num_steps=steps, cfg_scale=cfg_scale).cpu()
        with replacing(output) as path:
            if output.suffix == ".png":
                labelled_grid({step_label(steps): x}, labels.split(",")).save(path)
            else:
                save_file({"samples": x, "labels": y}, path)
    typer.echo(output)


@app.command()
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


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Where the digits go; the emoji go beside them.")
    ] = Path("tim-demo.png"),
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
) -> None:
    """Draw digits and emoji at 1, 2, 4, 8 and 32 steps with networks that are trained already."""
    from tim.app.demo import draw, draw_emoji

    with errors_without_traceback():
        typer.echo(draw(output, seed=seed).resolve())
        beside = output.with_stem(f"{output.stem}-emoji")
        typer.echo(draw_emoji(beside, seed=seed).resolve())
