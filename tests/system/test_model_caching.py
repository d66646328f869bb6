"""diffusers' caches of blocks in our network, by themselves and in a run."""

import pytest
import torch
from diffusers import hooks
from small_pipelines import (
    CLASS,
    PROMPTS,
    TEXT,
    class_pipeline,
    network,
    seeded,
    text_pipeline,
)

from tim.sampling import sample, sample_packed
from tim.transports import make

DEEP = dict(depth=4)
STEPS = 6
NONE_SKIPPED = {
    "first block": hooks.FirstBlockCacheConfig(threshold=0.0),
    "Taylor": hooks.TaylorSeerCacheConfig(cache_interval=1),
    "magnitudes": hooks.MagCacheConfig(
        threshold=0.0, mag_ratios=[0.9] * STEPS, num_inference_steps=STEPS
    ),
}
SOME_SKIPPED = {
    "first block": hooks.FirstBlockCacheConfig(threshold=0.5),
    "Taylor": hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "magnitudes": hooks.MagCacheConfig(
        threshold=1.0, mag_ratios=[0.9] * STEPS, num_inference_steps=STEPS
    ),
}


def deep(kind: str):
    make_pipeline, params, what = dict(
        classes=(class_pipeline, CLASS, [1, 7]), text=(text_pipeline, TEXT, PROMPTS)
    )[kind]
    pipeline = make_pipeline()
    pipeline.transformer = network(params | DEEP)
    calls = []
    of_taylor = pipeline.transformer.blocks[2].attn.proj
    of_taylor.register_forward_hook(lambda *_: calls.append(1))

    def latents(**options):
        calls.clear()
        options = dict(num_inference_steps=STEPS, output_type="latent") | options
        return pipeline(what, generator=seeded(), **options).images

    return pipeline, latents, calls


@pytest.mark.parametrize("kind", ["classes", "text"])
@pytest.mark.parametrize("name", NONE_SKIPPED)
def test_a_cache_that_skips_nothing_changes_nothing(kind, name):
    pipeline, latents, calls = deep(kind)
    expected = latents()
    pipeline.transformer.enable_cache(NONE_SKIPPED[name])
    for _ in range(2):
        torch.testing.assert_close(latents(), expected, atol=1e-4, rtol=1e-4)
        assert len(calls) == STEPS
    pipeline.transformer.disable_cache()
    assert torch.equal(latents(), expected)
    assert not any("forward" in vars(module) for module in pipeline.transformer.modules())


@pytest.mark.parametrize("kind", ["classes", "text"])
@pytest.mark.parametrize("name", SOME_SKIPPED)
def test_what_is_skipped_is_not_computed_and_each_run_begins_anew(kind, name):
    pipeline, latents, calls = deep(kind)
    everywhere = dict(guidance_interval=(0, 1.1))
    exact = latents(**everywhere)
    pipeline.transformer.enable_cache(SOME_SKIPPED[name])
    first = latents(**everywhere)
    assert 1 <= len(calls) < STEPS
    assert 0 < (first - exact).abs().mean() < exact.abs().mean() / 2
    again = latents(**everywhere)
    assert torch.equal(again, first)
    latents()  # whose first step is of half as many rows
    assert torch.equal(latents(**everywhere), first)


def test_a_step_that_is_skipped_adds_what_the_rest_added_before():
    model = network(CLASS | DEEP)
    model.enable_cache(hooks.FirstBlockCacheConfig(threshold=1e9))
    x, y = torch.randn(2, 4, 4, 4, generator=seeded()), torch.tensor([1, 7])
    outputs = []
    handle = model.final_layer.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    first = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: first.append(args[0]))
    with torch.no_grad():
        for t in (1.0, 0.5):
            model(x, torch.full((2,), t), torch.full((2,), t - 0.5), y)
    handle.remove()
    added = outputs[0] - first[0]
    torch.testing.assert_close(outputs[1] - first[1], torch.zeros_like(added))  # handed on
    head = first[1] - added
    whole = network(CLASS | DEEP)
    seen = []
    whole.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        whole(x, torch.full((2,), 0.5), torch.zeros(2), y)
    torch.testing.assert_close(head, seen[0], atol=1e-4, rtol=1e-4)


def test_runs_of_samplers_begin_anew():
    model, y = network(CLASS | DEEP), torch.tensor([1, 7])
    z = torch.randn(2, 4, 4, 4, generator=seeded())
    model.enable_cache(hooks.FirstBlockCacheConfig(threshold=1e9))
    args = model, make("OT_FM")
    first = sample(*args, z, y, num_steps=3)
    sample(*args, -z, y, num_steps=3)
    assert torch.equal(sample(*args, z, y, num_steps=3), first)
    packed = sample_packed(*args, [*z], y, num_steps=3)
    sample_packed(*args, [*-z], y, num_steps=3)
    for a, b in zip(sample_packed(*args, [*z], y, num_steps=3), packed, strict=True):
        assert torch.equal(a, b)


REFUSED = {
    "PyramidAttentionBroadcastConfig": dict(spatial_attention_block_skip_range=2),
    "FasterCacheConfig": {},
    "TextKVCacheConfig": {},
    "SeaCacheConfig": {},
}


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(hooks, name)])
def test_caches_that_do_not_fit(name):
    model = network(CLASS)
    with pytest.raises(ValueError, match=f"this network has no {name}: (it looks|the sampler)"):
        model.enable_cache(getattr(hooks, name)(**REFUSED[name]))
    assert not model.is_cache_enabled


def test_other_things_that_are_no_cache_for_us():
    for config, message in (
        (hooks.TaylorSeerCacheConfig(use_lite_mode=True), "no TaylorSeer of use_lite_mode"),
        (0.05, "this network has no float: it takes FirstBlockCacheConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            network(CLASS).enable_cache(config)
    with pytest.raises(ValueError, match="needs two blocks or more, got 1"):
        network(CLASS | dict(depth=1)).enable_cache(NONE_SKIPPED["first block"])
