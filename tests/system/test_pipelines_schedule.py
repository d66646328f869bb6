"""When steps are taken, and by whose guidance: times of one's own, schedulers and guiders."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import guiders
from small_pipelines import (
    CLASS,
    PROMPTS,
    class_pipeline,
    network,
    quiet,
    sd_vae,
    seeded,
    text_pipeline,
)

from tim.pipelines import TiMClassPipeline
from tim.sampling import Engine, Options, Request, sample, sample_packed
from tim.transports import make

LATENT = dict(output_type="latent")
MAP = getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)  # of newer releases
MATCH = diffusers.FlowMatchEulerDiscreteScheduler


def latents(pipeline, **options):
    what = [1, 7] if isinstance(pipeline, TiMClassPipeline) else PROMPTS
    return pipeline(what, generator=seeded(), **LATENT | options).images


@pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
def test_the_usual_times_given_change_nothing(make_pipeline):
    pipeline = make_pipeline()
    expected = latents(pipeline, num_inference_steps=4)
    for given in (
        [1, 0.75, 0.5, 0.25],
        np.linspace(1, 0, 5)[:-1],
        torch.tensor([1, 0.75, 0.5, 0.25]),
    ):
        for name in ("sigmas", "timesteps"):
            assert torch.equal(latents(pipeline, **{name: given}), expected)
    assert pipeline.num_timesteps == 4


def test_times_of_one_s_own_are_those_of_the_steps():
    pipeline, told = class_pipeline(), []
    given = dict(sigmas=[1, 0.9, 0.2], callback_on_step_end=lambda _, i, t, kw: told.append(t))
    ours = latents(pipeline, guidance_scale=1.0, **given)
    assert told == [0.9, 0.2, 0]
    x, y = torch.randn(2, 4, 4, 4, generator=seeded()).double(), torch.tensor([1, 7])
    for t, r in ((1, 0.9), (0.9, 0.2), (0.2, 0)):
        times = (torch.full((2,), time, dtype=torch.float32) for time in (t, r))
        with torch.no_grad():
            x = x - (t - r) * pipeline.transformer(x.float(), *times, y)
    torch.testing.assert_close(ours, x.float())


def test_times_of_another_transport_and_of_several_sizes():
    pipeline = class_pipeline(transport="EDM")
    times = pipeline._transport
    given = torch.linspace(times.T_max, times.T_min, 4, dtype=torch.float64)[:-1].tolist()
    assert torch.equal(latents(pipeline, timesteps=given), latents(pipeline, num_inference_steps=3))
    pipeline = class_pipeline()
    options = dict(height=[8, 16], generator=[seeded(), seeded()])
    own = pipeline([1, 7], sigmas=[1, 0.5], **LATENT, **options).images
    options["generator"] = [seeded(), seeded()]
    usual = pipeline([1, 7], num_inference_steps=2, **LATENT, **options).images
    assert all(map(torch.equal, own, usual))


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(sigmas=[1, 0.5], timesteps=[1, 0.5]), "sigmas and timesteps were given"),
        (
            dict(sigmas=[0.9, 0.5]),
            "sigmas must begin at T_max = 1, where .* noise; got 0.9",
        ),
        (dict(timesteps=[1000, 500]), "timesteps must begin at T_max = 1, .* got 1000"),
        (dict(sigmas=[1, 0.5, 0.5]), r"that decrease, got \[1.0, 0.5, 0.5, 0\.?0?\]"),
        (dict(sigmas=[1, float("nan")]), "that decrease"),
        (dict(sigmas=[1, 0.0]), "that decrease"),
        (dict(sigmas=[]), "that decrease"),
        (dict(sigmas="fast"), "sigmas must be numbers, got 'fast'"),
        (dict(timesteps=3), "timesteps must be numbers, got 3"),
        (dict(sigmas=[1, 0.5], num_inference_steps=3), "2 sigmas are as many steps, not .* = 3"),
    ],
)
def test_times_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        class_pipeline()(1, **given)


def test_sigmas_are_of_straight_lines():
    with pytest.raises(ValueError, match="times of OT_FM: give EDM timesteps"):
        class_pipeline(transport="EDM")(1, sigmas=[1, 0.5])


def test_a_sampler_s_times():
    args = network(CLASS), make("OT_FM"), torch.randn(2, 4, 4, 4), torch.tensor([1, 7])
    assert torch.equal(sample(*args, times=[1, 0.5, 0]), sample(*args, num_steps=2))
    states = sample(*args, times=iter([0.8, 0.3]), return_trajectory=True)
    assert len(states) == 2 and Options(times=[1, 0.5]).times == (1.0, 0.5)
    for given, message in (
        (dict(times=[1, 0], num_steps=1), "times say all"),
        (dict(times=[1, 0], T_min=0.1), "times say all"),
        (dict(times=[0, 1]), "times must be two numbers or more that decrease"),
        (dict(), "num_steps must be a whole number, got None"),
        (dict(num_steps=2, cfg_low=0.5, cfg_high=0.1), "cfg_low must not exceed cfg_high"),
        (dict(num_steps=2, cfg_low=float("nan")), "cfg_low must not exceed"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(*args, **given)


def schedulers():
    made = [MATCH(), MATCH(shift=3.0)]
    return made if MAP is None else [*made, MAP(), MAP(shift=5.0)]


@pytest.mark.parametrize("scheduler", schedulers(), ids=lambda s: type(s).__name__)
def test_a_scheduler_of_diffusers_gives_its_own_steps(scheduler):
    """Those that its `step` makes of the network's predictions; without a shift, ours."""
    pipeline = quiet(TiMClassPipeline(network(CLASS), sd_vae(), scheduler=scheduler))
    ours = latents(pipeline, num_inference_steps=4, guidance_scale=1.0)
    x, y = torch.randn(2, 4, 4, 4, generator=seeded()), torch.tensor([1, 7])
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    ends = scheduler.sigmas.float()
    for i, timestep in enumerate(scheduler.timesteps):
        times = (ends[i + j].expand(2) for j in (0, 1))
        with torch.no_grad():
            F = pipeline.transformer(x, *times, y)
        x = scheduler.step(F, timestep, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    usual = latents(class_pipeline(), num_inference_steps=4, guidance_scale=1.0)
    if scheduler.config.shift == 1:
        torch.testing.assert_close(ours, usual, atol=1e-4, rtol=1e-4)
    else:
        assert (ours - usual).abs().max() > 0.1
    timesteps = [1000 * sigma for sigma in (1, 0.75, 0.5, 0.25)]
    again = latents(pipeline, timesteps=timesteps, guidance_scale=1.0)
    torch.testing.assert_close(again, ours, atol=1e-4, rtol=1e-4)


def test_a_scheduler_keeps_its_state():
    """Which two calls of several threads may share."""
    pipeline = class_pipeline(scheduler=MATCH(shift=3.0))
    pipeline.scheduler.set_timesteps(7)
    before = pipeline.scheduler.sigmas.clone()
    latents(pipeline, num_inference_steps=3)
    assert torch.equal(pipeline.scheduler.sigmas, before)


def test_a_scheduler_is_saved_and_loaded(tmp_path):
    pipeline = class_pipeline()
    pipeline.scheduler = MATCH(shift=3.0)  # after None, too
    expected = latents(pipeline, num_inference_steps=3)
    pipeline.save_pretrained(tmp_path)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert again.scheduler.config.shift == 3
    assert torch.equal(latents(again, num_inference_steps=3), expected)
    again.scheduler = None
    usual = latents(class_pipeline(), num_inference_steps=3)
    assert torch.equal(latents(again, num_inference_steps=3), usual)


@pytest.mark.parametrize(
    "transport, scheduler, message",
    [
        ("OT_FM", diffusers.DDIMScheduler(), "FlowMatchEuler.*, got a DDIMScheduler: other"),
        ("EDM", MATCH(), "steps as OT_FM from 1 to 0 does, not EDM"),
        ("OT_FM", MATCH(use_dynamic_shifting=True), "with use_dynamic_shifting makes other steps"),
        ("OT_FM", MATCH(stochastic_sampling=True), "with stochastic_sampling makes other steps"),
    ],
)
def test_schedulers_that_do_not_step_as_the_transport(transport, scheduler, message):
    with pytest.raises(ValueError, match=message):
        class_pipeline(transport=transport, scheduler=scheduler)
    pipeline = class_pipeline(transport=transport)
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipeline(1)


@pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
def test_classifier_free_guidance_by_a_guider_is_ours(make_pipeline):
    pipeline = make_pipeline()
    guider = guiders.ClassifierFreeGuidance(guidance_scale=2.0)
    everywhere = dict(guidance_scale=2.0, guidance_interval=(0, 1.1))
    expected = latents(pipeline, num_inference_steps=4, **everywhere)
    assert torch.equal(latents(pipeline, num_inference_steps=4, guider=guider), expected)
    late = guiders.ClassifierFreeGuidance(guidance_scale=2.0, start=0.5)  # of 4 steps, the last 2
    interval = dict(guidance_scale=2.0, guidance_interval=(0, 0.6))
    expected = latents(pipeline, num_inference_steps=4, **interval)
    assert torch.equal(latents(pipeline, num_inference_steps=4, guider=late), expected)
    off = guiders.ClassifierFreeGuidance(guidance_scale=2.0, enabled=False)
    expected = latents(pipeline, num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(latents(pipeline, num_inference_steps=4, guider=off), expected)
    pipeline.engine.explain()


GUIDERS = {
    "ClassifierFreeZeroStarGuidance": dict(guidance_scale=2.0),
    "AdaptiveProjectedGuidance": dict(
        guidance_scale=2.0, adaptive_projected_guidance_momentum=-0.5
    ),
    "AdaptiveProjectedMixGuidance": dict(adaptive_projected_guidance_start_step=1),
    "TangentialClassifierFreeGuidance": dict(guidance_scale=2.0),
    "ClassifierFreeGuidance": dict(guidance_scale=2.0, guidance_rescale=0.7),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_other_guiders_are_asked_as_modular_pipelines_ask_them(name):
    pipeline = class_pipeline()
    ours = latents(pipeline, num_inference_steps=4, guider=getattr(guiders, name)(**GUIDERS[name]))
    x, y = torch.randn(2, 4, 4, 4, generator=seeded()).double(), torch.tensor([1, 7])
    guider, model = getattr(guiders, name)(**GUIDERS[name]), pipeline.transformer
    ends = [1, 0.75, 0.5, 0.25, 0]
    for i, (t, r) in enumerate(zip(ends, ends[1:], strict=False)):
        guider.set_state(step=i, num_inference_steps=4, timestep=torch.tensor(1000 * t))
        asked = guider.prepare_inputs({"y": (y, torch.full_like(y, 10))})
        for batch in asked:
            guider.prepare_models(model)
            times = (torch.full((2,), float(time)) for time in (t, r))
            with torch.no_grad():
                batch.noise_pred = model(x.float(), *times, batch.y).double()
            guider.cleanup_models(model)
        x = x - (t - r) * guider(asked)[0]
    torch.testing.assert_close(ours, x.float(), atol=1e-4, rtol=1e-4)
    plain = latents(pipeline, num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0, 2))
    assert (ours - plain).abs().max() > 1e-3


def test_guidance_by_magnitudes():
    """diffusers' takes tokens alone; those of a picture are all of it."""
    pipeline = class_pipeline()
    guider = guiders.MagnitudeAwareGuidance(guidance_scale=2.0, alpha=0.0)  # no weight: plain
    plain = latents(pipeline, num_inference_steps=3, guidance_scale=2.0, guidance_interval=(0, 2))
    ours = latents(pipeline, num_inference_steps=3, guider=guider)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    guider = guiders.MagnitudeAwareGuidance(guidance_scale=2.0, alpha=1.0)
    assert (latents(pipeline, num_inference_steps=3, guider=guider) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "guider, options, message",
    [
        (guiders.PerturbedAttentionGuidance(perturbed_guidance_layers=[1]), {}, "got Perturbed"),
        (guiders.AutoGuidance(auto_guidance_layers=[1], dropout=0.1), {}, "got AutoGuidance"),
        (2.0, {}, "got float"),
        (guiders.ClassifierFreeGuidance(), dict(guidance_scale=3.0), "a guider has its own scale"),
        (guiders.ClassifierFreeGuidance(), dict(guidance_interval=(0, 2)), "has its own scale"),
        (guiders.ClassifierFreeGuidance(), dict(height=[8, 16]), "packed as tokens"),
    ],
)
def test_guiders_that_are_refused(guider, options, message):
    with pytest.raises(ValueError, match=message):
        class_pipeline()([1, 7], num_inference_steps=2, guider=guider, **options)


class Squared(guiders.ClassifierFreeGuidance):
    """Whose pyramid has sides of powers of two, as that of the one it is called after."""

    def forward(self, pred_cond, pred_uncond=None):
        return guiders.classifier_free_guidance.GuiderOutput(pred=torch.zeros(2, 4, 4, 8))


Squared.__name__ = "FrequencyDecoupledGuidance"


def test_a_guider_that_changes_the_shape():
    message = r"FrequencyDecoupledGuidance does not guide .*2, 4, 4, 6\): it made \(2, 4, 4, 8\)"
    assert latents(class_pipeline(), width=16, guider=Squared()).shape == (2, 4, 4, 8)
    with pytest.raises(ValueError, match=message):
        latents(class_pipeline(), width=12, guider=Squared())


def test_a_guider_needs_a_label_of_no_class():
    pipeline = quiet(TiMClassPipeline(network(CLASS | dict(class_dropout_prob=0.0)), sd_vae()))
    with pytest.raises(ValueError, match=r"guidance \(a guider\) needs a network with the label"):
        pipeline(1, guider=guiders.ClassifierFreeGuidance())


class Halfway:
    """Half of the unguided prediction, at the odd steps."""

    def acts(self, index, t):
        return index % 2 == 1

    def __call__(self, step, F, F_uncond):
        assert (F_uncond is not None) == step.is_guided == self.acts(step.index, step.t)
        assert F.dtype == torch.float64
        return F if F_uncond is None else (F + F_uncond) / 2


def test_a_sampler_s_guider():
    model, transport = network(CLASS), make("OT_FM")
    z, y = torch.randn(2, 4, 4, 4), torch.tensor([1, 7])
    y_null = torch.full_like(y, 10)
    ours = sample(model, transport, z, y, y_null, num_steps=2, guider=Halfway())
    half = sample(model, transport, z, y, num_steps=1, T_min=0.5)
    with torch.no_grad():
        times = torch.full((2,), 0.5), torch.zeros(2)
        F = [model(half, *times, each) for each in (y, y_null)]
    torch.testing.assert_close(ours, half - 0.5 * (F[0] + F[1]) / 2)
    with pytest.raises(ValueError, match=r"guidance \(a guider\) needs y_null"):
        sample(model, transport, z, y, num_steps=2, guider=Halfway())
    with pytest.raises(ValueError, match="a guider guides alone: cfg_scale must be 1, got 2"):
        sample(model, transport, z, y, y_null, num_steps=2, guider=Halfway(), cfg_scale=2)
    with pytest.raises(ValueError, match="packed as tokens"):
        sample_packed(model, transport, [*z], y, y_null, num_steps=2, guider=Halfway())
    engine = Engine(model, transport, together=True, graphs=False)
    together = engine.sample(z, y, y_null, num_steps=2, guider=Halfway())
    assert torch.equal(together, ours)
    assert engine.explain() == "step by step: a guider looks at every step"
    options = Options(num_steps=2, guider=Halfway())
    requests = [Request(z[i], y[i], options, y_null[i]) for i in range(2)]
    drawn = [picture for _, picture in engine.stream(requests, max_batch=2)]
    assert torch.equal(torch.stack(drawn), ours)
