"""The pipelines used as diffusers' are: interrupted, fed with features, found by name."""

import logging
import threading

import diffusers
import pytest
import torch
from small_pipelines import (
    CLASS,
    PROMPTS,
    TEXT,
    class_pipeline,
    dc_ae,
    drawn,
    gemma,
    network,
    published_config,
    quiet,
    seeded,
    text_pipeline,
    tokenizer,
)

from tim.pipelines import TiMClassPipeline, TiMTextPipeline
from tim.sampling import sample
from tim.transports import make

LATENT = dict(guidance_scale=1.0, output_type="latent")


def interrupt(pipeline, *_):
    pipeline._interrupt = True


def interrupt_from_a_thread(pipeline, *_):
    thread = threading.Thread(target=interrupt, args=[pipeline])
    thread.start()
    thread.join()


@pytest.mark.parametrize("stop", [interrupt, interrupt_from_a_thread])
def test_an_interrupted_call_returns_what_it_reached(stop):
    pipeline, calls, states = class_pipeline(), [], []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))

    def on_step_end(pipe, step, time, kwargs):
        states.append(kwargs["latents"])
        if step == 1:
            stop(pipe)

    options = dict(num_inference_steps=4, callback_on_step_end=on_step_end, generator=seeded())
    latents = pipeline([1, 7], **LATENT, **options).images
    assert len(calls) == 2
    assert torch.equal(latents, states[1].float())
    pipeline([1], num_inference_steps=3, **LATENT)  # the next call begins anew
    assert len(calls) == 5


def test_a_call_without_a_callback_can_be_interrupted_and_asks_nothing_more_of_a_step(monkeypatch):
    pipeline, calls, asked = class_pipeline(), [], []

    def on_call(*_):
        calls.append(1)
        pipeline._interrupt = len(calls) == 2

    handle = pipeline.transformer.register_forward_hook(on_call)
    pipeline([1], num_inference_steps=4, **LATENT)
    assert len(calls) == 2
    handle.remove()
    monkeypatch.setattr("tim.sampling.evaluation.StepByStep.is_stale", lambda _: asked.append(1))
    pipeline([1], num_inference_steps=4, **LATENT)
    assert not asked
    pipeline([1], num_inference_steps=4, callback_on_step_end=lambda *_: None, **LATENT)
    assert len(asked) == 4


def test_a_sampler_that_is_told_to_stop():
    z, y = torch.randn(1, 4, 4, 4, generator=seeded()), torch.tensor([1])
    args = network(CLASS), make("OT_FM"), z, y
    assert torch.equal(sample(*args, num_steps=3, should_stop=lambda: True), z)
    asked = iter([False, True])
    states = sample(*args, num_steps=3, should_stop=lambda: next(asked), return_trajectory=True)
    whole = sample(*args, num_steps=3, return_trajectory=True)
    assert torch.equal(states, whole[:2])


def test_features_in_place_of_prompts():
    pipeline = text_pipeline()
    options = dict(num_inference_steps=2, output_type="pt", num_images_per_prompt=2)
    expected = pipeline(PROMPTS, generator=seeded(), **options).images
    y, y_null = pipeline.encode_prompt(PROMPTS)
    given = dict(prompt_embeds=y, negative_prompt_embeds=y_null)
    assert torch.equal(pipeline(generator=seeded(), **given, **options).images, expected)
    del given["negative_prompt_embeds"]  # "nothing", of the length of the prompts
    assert torch.equal(pipeline(generator=seeded(), **given, **options).images, expected)
    given = dict(prompt=PROMPTS, negative_prompt_embeds=y_null[:1])
    assert torch.equal(pipeline(generator=seeded(), **given, **options).images, expected)


def test_a_pipeline_without_a_text_encoder(tmp_path):
    whole = text_pipeline()
    y, y_null = whole.encode_prompt(PROMPTS)
    whole.save_pretrained(tmp_path)
    bare = quiet(TiMTextPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None))
    for pipeline in (bare, quiet(TiMTextPipeline(network(TEXT), dc_ae()))):
        options = dict(num_inference_steps=2, output_type="pt", generator=seeded())
        images = pipeline(prompt_embeds=y, negative_prompt_embeds=y_null, **options).images
        assert torch.equal(images, drawn(whole))
        for given in (dict(prompt=PROMPTS), dict(prompt_embeds=y)):
            with pytest.raises(ValueError, match="no text encoder .* give prompt_embeds"):
                pipeline(**given)
        assert len(pipeline(prompt_embeds=y, num_inference_steps=1, guidance_scale=1).images) == 2


FEATURES = torch.zeros(2, 3, 24)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(), "prompt must be a text or several, got None"),
        (dict(prompt=PROMPTS, prompt_embeds=FEATURES), "prompt and prompt_embeds were given"),
        (
            dict(prompt=PROMPTS, negative_prompt="a", negative_prompt_embeds=FEATURES),
            "negative_prompt and negative_prompt_embeds were given",
        ),
        (dict(prompt_embeds=FEATURES[0]), r"\(B, tokens, 24\), got \(3, 24\)"),
        (dict(prompt_embeds=FEATURES[..., :5]), r"\(B, tokens, 24\), got \(2, 3, 5\)"),
        (dict(prompt_embeds=FEATURES.int()), "must be floating-point"),
        (dict(prompt_embeds="a cat"), "got str"),
        (dict(prompt_embeds=FEATURES[:0]), r"got \(0, 3, 24\)"),
        (dict(prompt_embeds=FEATURES / 0), "prompt_embeds must be finite"),
        (
            dict(prompt_embeds=FEATURES, negative_prompt_embeds=FEATURES[:, :2]),
            "of one length, got 3 and 2: encode both in one encode_prompt",
        ),
        (
            dict(prompt_embeds=FEATURES, negative_prompt_embeds=torch.zeros(3, 3, 24)),
            "negative_prompt must be one or 2, as prompts are; got 3",
        ),
    ],
)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_features_that_do_not_fit(given, message, batch_invariant):
    with pytest.raises(ValueError, match=message):
        text_pipeline()(**given, batch_invariant=batch_invariant)


@pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
def test_found_by_the_name_in_a_saved_folder(tmp_path, make_pipeline):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipeline) and torch.equal(drawn(again), drawn(pipeline))
    model = diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert type(model) is type(pipeline.transformer)


def test_a_compiled_network_is_saved_and_found(tmp_path):
    pipeline = class_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(drawn(again), drawn(class_pipeline()))


def test_what_is_cut_from_a_prompt_is_said(caplog):
    caplog.set_level(logging.WARNING)
    pipeline = text_pipeline(max_seq_length=3)
    pipeline.encode_prompt(PROMPTS)
    assert not caplog.records
    pipeline.encode_prompt(["a red cat a dog", "a dog"], negative_prompt="a a a cat")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"truncated to max_seq_length = 3 tokens, the prompt loses {lost!r}"
        for lost in ("a dog", "cat")
    ]


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_a_network_that_overflows_in_float16(output_type):
    pipeline = class_pipeline()
    with torch.no_grad():
        pipeline.transformer.blocks[1].mlp.fc2.weight.mul_(1e6)
    pipeline.transformer.to(torch.float16)
    with pytest.raises(FloatingPointError, match="the network in torch.float16 exceeds its range"):
        pipeline(1, num_inference_steps=2, output_type=output_type)


def test_an_autoencoder_that_overflows_in_float16():
    pipeline = class_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.mul_(1e7)
    pipeline.vae.to(torch.float16)
    with pytest.raises(FloatingPointError, match="autoencoder in torch.float16 exceeds its range"):
        pipeline(1, num_inference_steps=1)


def test_weights_that_are_not_finite():
    pipeline = class_pipeline()
    torch.nn.init.constant_(pipeline.transformer.final_layer.linear.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="samples are not finite: the network in torch.fl"):
        pipeline(1, num_inference_steps=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_draws_pixels(channels, tmp_path):
    """Without an autoencoder: samples are pictures; from parts, a folder or a weight file."""
    params = TEXT | dict(in_channels=channels)
    pipeline = quiet(TiMTextPipeline(network(params), None, gemma(), tokenizer(), max_seq_length=8))
    pictures = drawn(pipeline)
    assert pictures.shape == (2, channels, 4, 4)
    options = dict(num_inference_steps=2, generator=seeded(), output_type="latent")
    samples = pipeline(PROMPTS, **options).images
    assert torch.equal(pictures, (samples / 2 + 0.5).clamp(0, 1))
    assert pipeline("a cat").images[0].size == (4, 4)

    pipeline.save_pretrained(tmp_path)
    again = quiet(TiMTextPipeline.from_pretrained(tmp_path))
    assert again.vae is None and torch.equal(drawn(again), pictures)

    torch.save(pipeline.transformer.state_dict(), tmp_path / "pixels.bin")
    target = "tim.models.t2i.tim_model.TiM"
    options = dict(escape_captions=False, max_seq_length=8)
    path = published_config(tmp_path, params | dict(z_dim=None), target, **options)
    loaded = TiMTextPipeline.from_checkpoint(
        tmp_path / "pixels.bin", path, dtype=torch.float32, text_encoder=gemma(),
        tokenizer=tokenizer(),
    )  # fmt: skip
    assert loaded.vae is None and loaded.vae_scale_factor == 1


def test_pixels_have_the_channels_of_pictures():
    with pytest.raises(ValueError, match="1 or 3 channels, those of pictures; got 4"):
        TiMClassPipeline(network(CLASS), None)
    pictures = drawn(TiMClassPipeline(network(CLASS | dict(in_channels=3))))
    assert pictures.shape == (2, 3, 4, 4)
