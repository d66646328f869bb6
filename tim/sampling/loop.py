"""The sampler as a function."""

from collections.abc import Callable, Iterable
from typing import SupportsIndex

from torch import Tensor, nn

from tim.transports import Transport

from .engine import Engine, Generators, Progress, StepCallback
from .steps import Guider, SampleType


def sample(
    model: nn.Module,
    transport: Transport,
    z: Tensor,
    y: Tensor,
    y_null: Tensor | None = None,
    *,
    num_steps: SupportsIndex | None = None,
    T_max: float | None = None,
    T_min: float | None = None,
    cfg_scale: float = 1.0,
    cfg_low: float = 0.0,
    cfg_high: float = 1.0,
    stochasticity_ratio: float = 0.0,
    sample_type: SampleType = "transition",
    generator: Generators = None,
    return_trajectory: bool = False,
    progress: Progress = False,
    on_step: StepCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
    times: Iterable[float] | None = None,
    guider: Guider | None = None,
) -> Tensor:
    """Carry the state z at T_max to data at T_min in `num_steps` network evaluations.

    Args:
        z: the state itself, (B, C, H, W): `transport.initial_state(noise)` for noise of variance 1.
        y, y_null: the model's conditioning and, shaped alike, the one that means "nothing".
        num_steps: times run linearly from T_max to T_min.
        T_max, T_min: the transport's unless given.
        cfg_scale: classifier-free guidance (arXiv 2207.12598), two evaluations a step; 1 is none.
        cfg_low, cfg_high: guidance acts where cfg_low·T_max < t < cfg_high·T_max.
        stochasticity_ratio: noise added between the first and the last step (OT_FM only).
        sample_type: "transition" asks the network for F(x, t, r), "ddiffusion" for F(x, t, t).
        generator: of the added noise; one, or one a sample, or a function that makes it of a state.
        return_trajectory: return all num_steps + 1 states.
        progress: show a bar; or what makes one of the steps and gives them, as a pipeline's
            `progress_bar` does. Where it gives no more, the state reached is returned.
        on_step: given each step's index, the time reached and the state; what it returns goes on.
        should_stop: asked before each step; where it says so, the state reached is returned.
        times: where the state is at first and after each step, decreasing; in place of `num_steps`,
            T_max and T_min.
        guider: what makes one prediction of those with y and y_null, in place of `cfg_scale`: see
            `tim.sampling.Guider`.

    Returns the data (B, C, H, W) or the trajectory (num_steps + 1, B, C, H, W), in z's dtype. In
    between the state is float64; the network runs in its own dtype.

    Raises:
        ValueError: options out of range; y_null missing or not shaped as y; z not finite, not
            floating-point or on another device than y; generators of another number.
        FloatingPointError: the samples are not finite, as where float16 overflows in the network.
    """
    return Engine(model, transport).sample(
        z, y, y_null, num_steps=num_steps, T_max=T_max, T_min=T_min, cfg_scale=cfg_scale,
        cfg_low=cfg_low, cfg_high=cfg_high, stochasticity_ratio=stochasticity_ratio,
        sample_type=sample_type, generator=generator, return_trajectory=return_trajectory,
        progress=progress, on_step=on_step, should_stop=should_stop, times=times, guider=guider,
    )  # fmt: skip
