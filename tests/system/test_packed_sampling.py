"""Pictures of different sizes in one call: each is what it is alone."""

import numpy as np
import pytest
import torch
from eager import EagerTiM, randomise
from golden_files import relative_error
from small_pipelines import PROMPTS, class_pipeline, text_pipeline

from tim.models import TiMTransformer2DModel
from tim.sampling import sample, sample_packed
from tim.transports import TRANSPORTS, make

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=24, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, lora_hidden_size=8, z_dim=6, projector_dim=10,
)  # fmt: skip
SIZES = (4, 6), (2, 2), (6, 4)
ALONE = 1e-6


def problem(text=False):
    config = TINY | dict(cap_feat_dim=7 if text else None)
    model = TiMTransformer2DModel(**config)
    model.load_state_dict(randomise(EagerTiM(**config)).state_dict())
    g = torch.Generator().manual_seed(0)
    z = [torch.randn(3, *size, generator=g) for size in SIZES]
    y, y_null = torch.arange(3), torch.full((3,), 5)
    if text:
        y, y_null = torch.randn(2, 3, 4, 7, generator=g)
    return model, z, y, y_null


def generators(count=3):
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


def alone(model, transport, z, y, y_null, generator=None, **options):
    return [
        sample(
            model, transport, z[i][None], y[i : i + 1], y_null[i : i + 1],
            generator=None if generator is None else [generator[i]], **options,
        )
        for i in range(len(z))
    ]  # fmt: skip


OPTIONS = {
    "one step": dict(num_steps=1),
    "guided": dict(num_steps=4, cfg_scale=2.0, cfg_high=0.9),
    "ddiffusion": dict(num_steps=3, sample_type="ddiffusion"),
    "stochastic": dict(num_steps=4, cfg_scale=1.5, stochasticity_ratio=0.3),
}


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_is_as_alone(name, text):
    given, options = problem(text), OPTIONS[name]
    transport = make("OT_FM")
    ours = sample_packed(given[0], transport, *given[1:], generator=generators(), **options)
    expected = alone(given[0], transport, *given[1:], generator=generators(), **options)
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other[0].shape and relative_error(one, other[0]) < ALONE


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_transport(name):
    model, z, *others = problem()
    transport = make(name)
    z = [transport.initial_state(x) for x in z]
    ours = sample_packed(model, transport, z, *others, num_steps=3, return_trajectory=True)
    expected = alone(model, transport, z, *others, num_steps=3, return_trajectory=True)
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == (4, *other.shape[2:]) and relative_error(one, other[:, 0]) < ALONE


def test_a_step_s_callback_sees_pictures():
    model, z, *others = problem()
    seen = []

    def on_step(step, time, states):
        seen.append((step, time, [x.shape for x in states]))
        return [x / 2 for x in states]

    ours = sample_packed(model, make("OT_FM"), z, *others, num_steps=2, on_step=on_step)
    expected = alone(
        model, make("OT_FM"), z, *others, num_steps=2, on_step=lambda step, time, x: x / 2
    )
    assert seen == [(i, 0.5 - 0.5 * i, [x.shape for x in z]) for i in range(2)]
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other[0]) < ALONE


@pytest.mark.parametrize("change", [lambda x: x[::-1], lambda x: x[:2], lambda x: None])
def test_what_a_step_s_callback_returns_must_fit(change):
    """Pictures in another order have as many tokens."""
    model, z, *others = problem()
    on_step = lambda step, time, states: change(states)  # noqa: E731
    with pytest.raises(ValueError, match=r"must return the states, of shapes \[\(3, 4, 6\), "):
        sample_packed(model, make("OT_FM"), z, *others, num_steps=2, on_step=on_step)


def test_one_generator_for_all():
    model, z, *others = problem()
    options = dict(num_steps=3, stochasticity_ratio=0.5)
    pair = [
        sample_packed(model, make("OT_FM"), z, *others, generator=generators(1)[0], **options)
        for _ in range(2)
    ]
    assert all(map(torch.equal, *pair))
    each = [
        sample_packed(model, make("OT_FM"), z, *others, generator=kind(generators()), **options)
        for kind in (list, tuple)
    ]
    assert all(map(torch.equal, *each))
    with pytest.raises(ValueError, match="3 generators are needed, one a picture; got 2"):
        sample_packed(model, make("OT_FM"), z, *others, generator=generators(2), **options)


HEIGHTS, WIDTHS = [8, 16, 12], [12, 8, 16]


def exact(pipeline):
    """With a network in float64: what rounding makes of untrained weights is not the question."""
    pipeline.transformer.double()
    return pipeline


@pytest.mark.parametrize("output_type", ["pt", "np", "pil", "latent"])
def test_class_pipeline(output_type):
    pipeline, labels = exact(class_pipeline()), [1, 7, 3]
    options = dict(num_inference_steps=2, output_type=output_type, stochasticity_ratio=0.2)
    ours = pipeline(
        labels, height=HEIGHTS, width=WIDTHS, generator=generators(), **options
    ).images  # fmt: skip
    assert isinstance(ours, list)
    for i, image in enumerate(ours):
        alone = pipeline(
            labels[i], height=HEIGHTS[i], width=WIDTHS[i], generator=generators()[i], **options
        ).images[0]
        if output_type == "pil":
            assert image.size == (WIDTHS[i], HEIGHTS[i])
            difference = np.asarray(image).astype(int) - np.asarray(alone)
            assert abs(difference).max() <= 1
            continue
        assert image.shape == alone.shape
        assert relative_error(torch.as_tensor(image), torch.as_tensor(alone)) < ALONE


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(guidance_scale=1.0),
        dict(guidance_interval=(0.0, 2.0), negative_prompt=["a red dog", "cat", "a"]),
        dict(guidance_interval=(0.0, 2.0), negative_prompt="a dog"),
    ],
    ids=["guided", "unguided", "negatives", "negative"],
)
def test_text_pipeline(options):
    """A prompt is not changed by longer ones, nor by the padding that they ask for."""
    pipeline, prompts = exact(text_pipeline()), ["cat", "a red dog on a red cat", "a cat"]
    options = dict(num_inference_steps=2, output_type="pt") | options
    ours = pipeline(prompts, height=HEIGHTS, width=16, generator=generators(), **options).images
    assert [x.shape for x in ours] == [(3, height, 16) for height in HEIGHTS]
    negatives = options.pop("negative_prompt", None)
    for i, image in enumerate(ours):
        negative = negatives[i] if isinstance(negatives, list) else negatives
        alone = pipeline(
            prompts[i], height=HEIGHTS[i], width=16, generator=generators()[i],
            negative_prompt=negative, **options,
        ).images[0]  # fmt: skip
        assert relative_error(image, alone) < ALONE
    some = pipeline(
        PROMPTS[0], height=HEIGHTS, width=8, num_images_per_prompt=3, **options
    ).images  # fmt: skip
    assert [x.shape for x in some] == [(3, height, 8) for height in HEIGHTS]


def test_latents_and_a_callback():
    pipeline = exact(class_pipeline())
    noise = [torch.randn(4, h // 2, w // 2) for h, w in zip(HEIGHTS, WIDTHS, strict=True)]
    options = dict(height=HEIGHTS, width=WIDTHS, num_inference_steps=2, output_type="latent")

    def halve(pipeline, step, time, given):
        return {"latents": [x / 2 for x in given["latents"]]}

    ours = pipeline(
        [1, 7, 3], latents=noise, callback_on_step_end=halve, **options
    ).images  # fmt: skip
    alone = pipeline(
        7, 16, 8, latents=noise[1][None], num_inference_steps=2, output_type="latent",
        callback_on_step_end=lambda _, step, time, given: {"latents": given["latents"] / 2},
    ).images  # fmt: skip
    assert relative_error(ours[1], alone[0]) < ALONE
    with pytest.raises(ValueError, match=r"of shape \[\(4, 4, 6\), .* got dict"):
        pipeline(
            [1, 7, 3], callback_on_step_end=lambda *_: {"latents": noise[:2]}, **options
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(height=[8, 8]), "height and width must be as many, got 2 and 3"),
        (dict(height=8, width=[8, 8]), "must be of one or 3 pictures, got 2"),
        (dict(height=[]), "got 0 and 3"),
        (dict(height=[8, 8, 6]), "multiples of 4, got 6×16"),
        (dict(generator=[torch.Generator()]), "3 generators are needed, one a picture; got 1"),
        (dict(latents=[torch.zeros(4, 4, 4)]), "3 latents are needed"),
        (dict(latents=[torch.zeros(4, 4, 4)] * 3), r"floating-point \(1, 4, 4, 6\)"),
        (dict(latents=[1, 2, 3]), "latents must be tensors, got .*int"),
        (dict(height=8, width=8, latents=[torch.zeros(4, 4, 4)] * 3), "one tensor .* got a list"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        class_pipeline()([1, 7, 3], **dict(height=HEIGHTS, width=WIDTHS) | changes)
