"""The command `tim explain`, and what `tim --version` says."""

from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from tim.app.common import Device, device_of, dtype_of, errors_without_traceback
from tim.provenance import versions as installed

EXAMPLE = "Example: tim explain mnist --steps 4"


def versions() -> Iterator[str]:
    """A line for each part that runs."""
    import tim_kernels

    found = {"tim-kernels": tim_kernels.__version__} | installed()
    for name in ("tim-kernels", "python", "torch", "triton", "diffusers", "transformers", "device"):
        yield f"{name:<14}{found.get(name, 'not installed')}"


def explain(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A network, as tim sample takes it; without, what would run of each op.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Of a weight file: a preset's name or a YAML file.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps of the plan.")] = 8,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance of the plan; 1 is none.")
    ] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Device = None,
) -> None:
    """Say what runs on this machine and why; of a network, block by block, and the sampler's plan.

    The plan is of one picture, which is drawn.
    """
    device = device_of(device)
    with errors_without_traceback():
        if model is None:
            import tim_kernels

            tim_kernels.explain()
            return
        _explain_model(model, config, steps, guidance, dtype_of(dtype), torch.device(device))


def _explain_model(
    model: str, config: str | None, steps: int, guidance: float, dtype: torch.dtype | None,
    device: torch.device,
) -> None:  # fmt: skip
    import tim_kernels
    from tim.app import assets
    from tim.app.settings import check_guidance
    from tim.opening import open_sampler
    from tim.sampling import Engine
    from tim.sampling.steps import Options

    options = Options(num_steps=steps, cfg_scale=guidance)
    check_guidance(guidance)
    network, transport = open_sampler(assets.path_of(model), config, dtype=dtype, device=device)
    times, has = options.steps(transport), network.config
    weights = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    kind = f"{has.num_classes} classes" if has.cap_feat_dim is None else "texts"
    typer.echo(
        f"{model}: {weights:,.1f} M parameters in {network.dtype} on {device}, of {kind}; "
        f"states of {has.in_channels}×{has.input_size}×{has.input_size}"
    )
    tim_kernels.explain(network)
    guided = sum(step.is_guided for step in times)
    typer.echo(
        f"{type(transport).__name__}: {steps} steps from t = {times[0].t:g} to {times[-1].r:g}, "
        f"{guided} of them guided: {steps + guided} network evaluations"
    )
    z = torch.zeros(1, has.in_channels, has.input_size, has.input_size, device=device)
    if has.cap_feat_dim is None:
        y = torch.zeros(1, dtype=torch.long, device=device)
        y_null = y + has.num_classes
    else:
        y = y_null = torch.zeros(1, 8, has.cap_feat_dim, device=device)
    engine = Engine(network, transport)
    engine.sample(z, y, y_null, num_steps=steps, cfg_scale=guidance)
    engine.explain()
