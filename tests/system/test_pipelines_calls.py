"""What a pipeline's call takes and tells: callbacks, numbers, generators, pictures alone."""

import logging

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from small_pipelines import PROMPTS, class_pipeline, seeded, text_pipeline

BOTH = pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
LATENT = dict(num_inference_steps=2, output_type="latent")


@pytest.mark.parametrize(
    "make_pipeline, what, names",
    [
        (class_pipeline, [1, 7], ["class_labels", "negative_class_labels"]),
        (text_pipeline, PROMPTS, ["prompt_embeds", "negative_prompt_embeds"]),
    ],
)
def test_a_callback_is_given_the_tensors_that_it_names(make_pipeline, what, names):
    pipeline, seen = make_pipeline(), []

    def callback(pipe, step, time, tensors):
        seen.append(tensors)
        assert pipe.num_timesteps == 2 and pipe.guidance_scale == 1.5 and not pipe.interrupt
        return dict(tensors)

    options = dict(callback_on_step_end=callback, generator=seeded(), **LATENT)
    drawn_with = pipeline(what, callback_on_step_end_tensor_inputs=["latents", *names], **options)
    assert [set(tensors) for tensors in seen] == [{"latents", *names}] * 2
    y, y_null = (seen[0][name] for name in names)
    if names[0] == "class_labels":
        assert y.tolist() == what and y_null.tolist() == [10, 10]
    else:
        assert all(map(torch.equal, (y, y_null), pipeline.encode_prompt(what)))
    plain = pipeline(what, generator=seeded(), **LATENT).images
    assert torch.equal(drawn_with.images, plain)
    pipeline(what, callback_on_step_end_tensor_inputs=names[:1], **options)
    assert [*seen[-1]] == names[:1]


def test_what_a_callback_may_not_name_or_change():
    pipeline = text_pipeline()

    def cut(pipe, step, time, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0}

    options = dict(callback_on_step_end=cut, **LATENT)
    for names, message in (
        (
            ["latents", "noise"],
            r"must be of latents, prompt_embeds, .*; got \['latents', 'noise'\]",
        ),
        ("latents", "must be of latents"),
        (["prompt_embeds"], "cannot change prompt_embeds, only latents"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("a cat", callback_on_step_end_tensor_inputs=names, **options)


def test_what_a_callback_may_not_change_in_place():
    pipeline = text_pipeline()

    def cut(pipe, step, time, tensors):
        tensors["prompt_embeds"].zero_()

    names = dict(callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(ValueError, match="cannot change prompt_embeds, only latents"):
        pipeline("a cat", callback_on_step_end=cut, **names, **LATENT)
    with torch.inference_mode():
        options = dict(callback_on_step_end=lambda *_: None, height=[4, 8], width=4)
        assert len(pipeline(PROMPTS, **options, **LATENT).images) == 2


class Zeros(PipelineCallback):
    tensor_inputs = ["latents"]

    def __init__(self):
        super().__init__(cutoff_step_ratio=None, cutoff_step_index=1)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
        return callback_kwargs


def test_a_callback_object_of_diffusers():
    latents = class_pipeline()([1], callback_on_step_end=Zeros(), **LATENT).images
    assert not latents.any()


def test_integers_and_numbers_of_numpy():
    pipeline = class_pipeline()
    options = dict(height=8, width=16, guidance_scale=2.0, **LATENT)
    expected = pipeline([1, 7], generator=seeded(), **options)
    options = LATENT | dict(num_inference_steps=np.int64(2), guidance_scale=np.float32(2.0))
    interval = np.float64(0.0), np.float32(1.0)
    options |= dict(height=np.int32(8), width=np.uint8(16), guidance_interval=interval)
    for labels in (np.array([1, 7]), [np.int64(1), np.uint8(7)], torch.tensor([1, 7])):
        ours = pipeline(labels, generator=seeded(), **options).images
        assert torch.equal(ours, expected.images)
    several = pipeline([1, 7], height=np.array([8, 12]), **LATENT).images
    assert [tuple(x.shape) for x in several] == [(4, 4, 4), (4, 6, 4)]
    prompts = text_pipeline()(PROMPTS, num_images_per_prompt=np.int64(2), **LATENT).images
    assert len(prompts) == 4


def test_generators_in_a_tuple():
    pipeline = class_pipeline()
    options = dict(stochasticity_ratio=0.2, num_inference_steps=3, output_type="latent")
    for more in ({}, dict(batch_invariant=True), dict(height=[8, 12])):
        listed = pipeline([1, 7], generator=generators(2), **options, **more).images
        ours = pipeline([1, 7], generator=tuple(generators(2)), **options, **more).images
        assert all(map(torch.equal, ours, listed))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, "2", None, True, 1j])
def test_guidance_that_is_no_number(number):
    for name, given in (
        ("guidance_scale", number),
        ("guidance_interval", (0, number)),
        ("guidance_interval", (number, 1)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be finite and 0 or more, got"):
            class_pipeline()(1, **{name: given})
        with pytest.raises(ValueError, match=f"{name} must be finite and 0 or more, got"):
            text_pipeline()("a cat", **{name: given})


# Pictures alone and together


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


LABELS = [1, 7, 2, 9, 4]
OF_LENGTHS = ["a", "a red cat", "cat", "a a a a a dog", "dog"]


@pytest.mark.parametrize(
    "make_pipeline, what", [(class_pipeline, LABELS), (text_pipeline, OF_LENGTHS)]
)
@pytest.mark.parametrize("output_type", ["latent", "pt", "np"])
def test_a_picture_is_the_same_alone_and_beside_others(make_pipeline, what, output_type):
    pipeline = make_pipeline()
    options = dict(num_inference_steps=3, output_type=output_type, stochasticity_ratio=0.2)
    together = pipeline(what, generator=generators(5), batch_invariant=True, **options).images
    for i, generator in enumerate(generators(5)):
        alone = pipeline(what[i], generator=generator, **options).images[0]
        assert np.array_equal(np.asarray(together[i]), np.asarray(alone))


def test_pictures_alone_of_several_sizes_prompts_and_features():
    pipeline = text_pipeline()
    sizes = dict(height=[8, 12, 8, 12], width=8)
    options = dict(num_images_per_prompt=2, batch_invariant=True, **sizes, **LATENT)
    negative = ["a dog", "a red cat a"]
    together = pipeline(
        PROMPTS, negative_prompt=negative, generator=generators(4), **options
    ).images
    for i, generator in enumerate(generators(4)):
        given = dict(negative_prompt=negative[i // 2], height=sizes["height"][i], width=8)
        alone = pipeline(PROMPTS[i // 2], generator=generator, **given, **LATENT).images[0]
        assert torch.equal(together[i], alone)
    y, y_null = pipeline.encode_prompt(PROMPTS)
    given = dict(prompt_embeds=y, negative_prompt_embeds=y_null[:1], batch_invariant=True, **LATENT)
    together = pipeline(generator=generators(2), **given).images
    given |= dict(prompt_embeds=y[1:])
    assert torch.equal(together[1], pipeline(generator=generators(2)[1:], **given).images[0])
    plain = pipeline(PROMPTS, batch_invariant=True, guidance_scale=1.0, **LATENT).images
    assert plain.shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stochasticity_ratio=0.5, generator=seeded()), "needs a generator a picture"),
        (dict(callback_on_step_end=lambda *_: None), "one picture after the other: give no callba"),
    ],
)
def test_what_does_not_go_with_pictures_alone(options, message):
    with pytest.raises(ValueError, match=message):
        class_pipeline()([1, 7], batch_invariant=True, num_inference_steps=3, **options)
    with pytest.raises(ValueError, match="negative_prompt must be one or 2, as prompts are; got 3"):
        text_pipeline()(PROMPTS, negative_prompt=["a"] * 3, batch_invariant=True)


def test_what_is_cut_from_a_prompt_alone_is_said_once(caplog):
    caplog.set_level(logging.WARNING)
    options = dict(num_images_per_prompt=3, batch_invariant=True, **LATENT)
    text_pipeline(max_seq_length=3)(["a red cat a dog", "cat"], **options)
    assert [record.getMessage() for record in caplog.records] == [
        "truncated to max_seq_length = 3 tokens, the prompt loses 'a dog'"
    ]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(caplog, batch_invariant):
    pipeline = text_pipeline()
    _, nothing = pipeline.encode_prompt(PROMPTS)
    options = dict(batch_invariant=batch_invariant, **LATENT)
    for negative in ("", ["", ""], None):
        pipeline(PROMPTS, negative_prompt=negative, guidance_scale=1.0, **options)
    pipeline(PROMPTS, negative_prompt="a dog", guidance_scale=1.5, **options)
    assert not caplog.records
    for negative in ({"negative_prompt": "a dog"}, {"negative_prompt_embeds": nothing}):
        caplog.clear()
        pipeline(PROMPTS, guidance_scale=1.0, **negative, **options)
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "negative prompts are not read" in record.message
