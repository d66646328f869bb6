"""What the pipelines refuse, with what came and what is needed."""

import pytest
import torch
from small_pipelines import (
    CLASS,
    PROMPTS,
    TEXT,
    class_pipeline,
    dc_ae,
    gemma,
    network,
    published_config,
    quiet,
    sd_vae,
    seeded,
    text_pipeline,
    tokenizer,
)

from tim.pipelines import TiMClassPipeline, TiMTextPipeline


def test_components_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="conditioned on text: use TiMTextPipeline"):
        TiMClassPipeline(network(TEXT), sd_vae())
    with pytest.raises(ValueError, match="conditioned on classes: use TiMClassPipeline"):
        TiMTextPipeline(network(CLASS), dc_ae(), gemma(), tokenizer())
    with pytest.raises(ValueError, match="reads text features of 16, the encoder has 24"):
        TiMTextPipeline(network(TEXT | dict(cap_feat_dim=16)), dc_ae(), gemma(), tokenizer())
    with pytest.raises(ValueError, match="4 latent channels, the network 3"):
        TiMClassPipeline(network(CLASS | dict(in_channels=3)), sd_vae())
    with pytest.raises(ValueError, match="no transport 'flow'"):
        TiMClassPipeline(network(CLASS), sd_vae(), "flow")
    with pytest.raises(ValueError, match="max_seq_length must be at least 1"):
        text_pipeline(max_seq_length=0)


def test_folders_that_no_configuration_names(tmp_path):
    path = published_config(tmp_path, TEXT, "tim.models.t2i.tim_model.TiM", text_encoder_dir=None)
    with pytest.raises(ValueError, match="no model.vae_dir, got None: give vae"):
        TiMTextPipeline.from_checkpoint("nowhere.bin", path)
    with pytest.raises(ValueError, match="no model.text_encoder_dir, got None: give text_encoder"):
        TiMTextPipeline.from_checkpoint("nowhere.bin", path, vae=dc_ae())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(height=10), "multiples of 4, got 10×8"),
        (dict(width=0), "multiples of 4, got 8×0"),
        (dict(height=8.0), "height must be a whole number, got 8.0"),
        (dict(latents=torch.zeros(1, 4, 4, 6)), r"latents must be floating-point \(1, 4, 4, 4\)"),
        (dict(latents=torch.zeros(1, 4, 4, 4, dtype=torch.int)), "floating-point"),
        (dict(generator=[seeded(), seeded()]), "1 generators are needed, one a picture; got 2"),
        (dict(guidance_interval=(0.0,)), "guidance_interval must be"),
        (dict(guidance_interval=(0.5, 0.1)), "guidance_interval must be"),
        (dict(latents=torch.full((1, 4, 4, 4), torch.nan)), "must be finite"),
        (dict(generator=3), "generator must be a torch.Generator or a list, got 3"),
        (dict(generator=[3]), "generator must be a torch.Generator or a list, got 3"),
        (dict(stochasticity_ratio="0"), "stochasticity_ratio must be finite .*, got '0'"),
        (dict(stochasticity_ratio=None), "stochasticity_ratio must be finite"),
        (dict(callback_on_step_end=3), "callback_on_step_end must be a function, got 3"),
        (dict(callback_on_step_end_tensor_inputs=None), "must be of latents, class_labels"),
        (dict(callback_on_step_end_tensor_inputs=[["latents"]]), "must be of latents"),
        (dict(sigmas="1"), "sigmas must be numbers, got '1'"),
        (dict(num_inference_steps=0), "num_inference_steps must be at least 1, got 0"),
        (dict(num_inference_steps=2.5), "num_inference_steps must be a whole number, got 2.5"),
        (dict(output_type="jpeg"), "output_type must be pil, np, pt or latent, got 'jpeg'"),
        (dict(sample_type="diffusion"), "sample_type"),
        (dict(class_labels=11), "class labels must lie in 0 … 10, got 11"),
        (dict(class_labels=[0.5]), "one or more integers"),
        (dict(class_labels=[]), "one or more integers"),
        (dict(class_labels=torch.tensor([True])), "one or more integers"),
        (dict(class_labels="cat"), "one or more integers, got 'cat'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_pipeline()(**dict(class_labels=1) | options)


def test_guidance_needs_a_label_of_no_class():
    pipeline = quiet(TiMClassPipeline(network(CLASS | dict(class_dropout_prob=0.0)), sd_vae()))
    with pytest.raises(ValueError, match="trained with class_dropout_prob = 0"):
        pipeline(1)
    assert len(pipeline(1, guidance_scale=1.0, num_inference_steps=1).images) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=[]), r"prompt must be a text or several, got \[\]"),
        (dict(prompt=None), "prompt must be a text or several, got None"),
        (dict(prompt=[["a", "cat"]]), "prompt must be a text or several"),
        (
            dict(negative_prompt=["a"] * 3),
            "negative_prompt must be one or 2, as prompts are; got 3",
        ),
        (dict(negative_prompt=5), "negative_prompt must be a text or several"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt must be at least 1, got 0"),
        (dict(height=3), "multiples of 4, got 3×16"),
    ],
)
def test_bad_prompts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        text_pipeline()(**dict(prompt=PROMPTS) | options)


def test_features_that_are_not_finite_are_refused():
    """Gemma 3 in float16 does that, and would draw black pictures."""
    pipeline = text_pipeline()
    torch.nn.init.constant_(pipeline.text_encoder.norm.weight, float("inf"))
    with pytest.raises(ValueError, match="the text features in torch.float32 must be finite"):
        pipeline(PROMPTS)


@pytest.mark.parametrize("returned", [torch.zeros(1), {"latents": torch.zeros(1, 4, 4)}, 3])
def test_a_callback_that_returns_something_else(returned):
    with pytest.raises(ValueError, match=r"must return nothing or \{'latents': …\} of shape"):
        class_pipeline()(1, num_inference_steps=1, callback_on_step_end=lambda *_: returned)
