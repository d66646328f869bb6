"""The diffusers pipelines draw what the network, the sampler and the autoencoder make."""

import json
import math

import accelerate
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
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
    sd_vae,
    seeded,
    text_pipeline,
    tokenizer,
)

from tim.pipelines import TiMClassPipeline, TiMTextPipeline
from tim.sampling import sample
from tim.transports import make


def test_classes_are_sampled_and_decoded():
    pipeline = class_pipeline()
    options = dict(num_inference_steps=3, guidance_scale=2.0, generator=seeded())
    images = pipeline([1, 7], output_type="pt", **options).images
    z, y = torch.randn(2, 4, 4, 4, generator=seeded()), torch.tensor([1, 7])
    x = sample(
        pipeline.transformer,
        make("OT_FM"),
        z,
        y,
        torch.full_like(y, 10),
        num_steps=3,
        cfg_scale=2.0,
    )
    with torch.no_grad():
        expected = pipeline.vae.decode(x / 0.5).sample
    assert images.shape == (2, 3, 8, 8)
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    latents = pipeline([1, 7], output_type="latent", latents=z, return_dict=False, **options)[0]
    assert torch.equal(latents, x)


def test_any_size_and_picture():
    pipeline = class_pipeline()
    (image,) = pipeline(3, height=12, width=20, num_inference_steps=1, guidance_scale=1).images
    assert image.size == (20, 12) and image.mode == "RGB"
    (array,) = pipeline(3, num_inference_steps=1, output_type="np").images
    assert isinstance(array, np.ndarray) and array.shape == (8, 8, 3)


def test_prompts_are_read_as_the_released_network_was_trained():
    """Padded on the right and cut to the longest, padding attended to; nothing is the empty
    prompt, cut alike. At padding, flash attention gives zero: one vector, whatever the prompt, and
    not what sdpa gives (tests/system/test_encoders.py has it of published code)."""
    pipeline = text_pipeline()
    ids = torch.zeros(3, 8, dtype=torch.long)
    ids[0, :3], ids[1, :2] = torch.tensor([2, 3, 4]), torch.tensor([2, 5])
    encoder = pipeline.text_encoder
    with torch.no_grad():
        encoded = encoder(ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    y, y_null = pipeline.encode_prompt(PROMPTS)
    assert y.shape == y_null.shape == (2, 3, 24)
    torch.testing.assert_close(y[0], encoded.last_hidden_state[0, :3])
    torch.testing.assert_close(y[1, :2], encoded.last_hidden_state[1, :2])
    torch.testing.assert_close(y_null, y[1, 2].expand(2, 3, -1))
    assert (y[1, 2] - encoded.last_hidden_state[1, 2]).abs().max() > 1
    twice, _ = pipeline.encode_prompt(PROMPTS, num_images_per_prompt=2)
    assert torch.equal(twice, y.repeat_interleave(2, dim=0))
    earlier, _ = text_pipeline(use_last_hidden_state=False).encode_prompt(PROMPTS)
    torch.testing.assert_close(earlier[0], encoded.hidden_states[-2][0, :3])
    cut, _ = text_pipeline(max_seq_length=2).encode_prompt(PROMPTS[0])
    assert cut.shape == (1, 2, 24)
    assert pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[1] is None


def test_prompts_are_escaped_where_the_captions_were(tmp_path):
    """As of the released weights; the flag is saved with the pipeline."""
    asked = []

    class Tokenizer(type(tokenizer())):
        def __call__(self, texts, **options):
            asked.append(texts)
            return super().__call__(texts, **options)

    pipeline = text_pipeline(escape_captions=True)
    pipeline.tokenizer.__class__ = Tokenizer
    pipeline.encode_prompt("a café", negative_prompt="red\ncat")
    assert ["a caf\\xe9"] in asked and ["red\\ncat"] in asked and "a café" not in asked
    pipeline.save_pretrained(tmp_path)
    assert TiMTextPipeline.from_pretrained(tmp_path).config.escape_captions
    assert not text_pipeline().config.escape_captions


def test_negative_prompts():
    """One for all or one each; the longest of all prompts sets the length."""
    pipeline, long = text_pipeline(), "a red cat a dog"
    y, y_null = pipeline.encode_prompt(PROMPTS, 2, negative_prompt=long)
    assert y.shape == y_null.shape == (4, 5, 24)
    torch.testing.assert_close(y_null, pipeline.encode_prompt(long)[0].expand(4, -1, -1))
    _, each = pipeline.encode_prompt(PROMPTS, 2, negative_prompt=[long, "a dog"])
    dog = pipeline._text_features(["a dog"])[0][:, :5]
    torch.testing.assert_close(each, torch.cat([y_null[:1], dog]).repeat_interleave(2, dim=0))


def test_an_encoder_with_a_language_head():
    """As AutoModelForCausalLM gives it."""
    pipeline, bare = text_pipeline(), gemma()
    causal = transformers.Gemma3ForCausalLM(bare.config).eval()
    causal.model.load_state_dict(bare.state_dict())
    other = TiMTextPipeline(pipeline.transformer, dc_ae(), causal, tokenizer(), max_seq_length=8)
    for a, b in zip(other.encode_prompt(PROMPTS), pipeline.encode_prompt(PROMPTS), strict=True):
        torch.testing.assert_close(a, b)


def test_prompts_are_sampled_and_decoded():
    pipeline = text_pipeline(transport="TrigFlow", transport_params=dict(T_max=1.5))
    images = pipeline(
        PROMPTS, height=16, width=32, num_inference_steps=2, guidance_scale=3.0,
        num_images_per_prompt=2, generator=seeded(), output_type="pt",
    ).images  # fmt: skip
    y, y_null = pipeline.encode_prompt(PROMPTS, 2)
    z = torch.randn(4, 4, 4, 8, generator=seeded()) * math.sin(1.5)
    x = sample(
        pipeline.transformer, make("TrigFlow", T_max=1.5), z, y, y_null, num_steps=2, cfg_scale=3.0
    )
    with torch.no_grad():
        expected = pipeline.vae.decode(x / 0.4).sample
    assert images.shape == (4, 3, 16, 32)
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))


def test_the_sampler_s_options_reach_it():
    pipeline = class_pipeline()
    z, y = torch.randn(2, 4, 4, 4, generator=seeded()), torch.tensor([1, 7])
    options = dict(
        num_inference_steps=4, latents=z, output_type="latent", guidance_scale=3.0,
        guidance_interval=(0.3, 0.8), stochasticity_ratio=0.5, sample_type="ddiffusion",
    )  # fmt: skip
    ours = pipeline(y, generator=seeded(), **options).images
    expected = sample(
        pipeline.transformer, make("OT_FM"), z, y, torch.full_like(y, 10), num_steps=4,
        cfg_scale=3.0, cfg_low=0.3, cfg_high=0.8, stochasticity_ratio=0.5,
        sample_type="ddiffusion", generator=seeded(),
    )  # fmt: skip
    assert torch.equal(ours, expected)


def test_the_state_at_t_max_has_its_noise_s_scale():
    """100 for VE_SDE, whose data part keeps its own; 1, all but exactly, for the others."""
    pipeline = class_pipeline(transport="VE_SDE")
    z = torch.randn(1, 4, 4, 4, generator=seeded())
    options = dict(num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    ours = pipeline(1, latents=z, **options).images
    y = torch.tensor([1])
    expected = sample(pipeline.transformer, make("VE_SDE"), 100 * z, y, num_steps=1)
    torch.testing.assert_close(ours, expected)


def test_a_half_precision_autoencoder():
    pipeline = class_pipeline()
    pipeline.vae.to(torch.bfloat16)
    images = drawn(pipeline)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, drawn(class_pipeline()), rtol=0, atol=0.05)


@pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
def test_offloaded_as_a_whole(make_pipeline):
    """By accelerate's hooks, which the CPU can stand in for a GPU under."""
    pipeline, hooks = make_pipeline(), []
    for name in pipeline.model_cpu_offload_seq.split("->"):
        model, hook = accelerate.cpu_offload_with_hook(getattr(pipeline, name), "cpu")
        hooks.append(hook)
        assert getattr(pipeline, name) is model
    pipeline._all_hooks = hooks
    assert torch.equal(drawn(pipeline), drawn(make_pipeline()))
    assert set(pipeline.model_cpu_offload_seq.split("->")) == {
        name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }


def test_offloaded_by_groups():
    pipeline = class_pipeline()
    expected = drawn(pipeline)
    cpu = torch.device("cpu")
    pipeline.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    torch.testing.assert_close(drawn(pipeline), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
def test_saved_and_loaded(make_pipeline, tmp_path):
    """The module paths in model_index.json are part of what users keep."""
    pipeline = make_pipeline(transport="VE_SDE", transport_params=dict(sigma_max=50.0))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["tim.models.transformer", "TiMTransformer2DModel"]
    assert index["transport"] == "VE_SDE" and index["transport_params"] == {"sigma_max": 50.0}
    again = type(pipeline).from_pretrained(tmp_path)
    assert torch.equal(drawn(again), drawn(pipeline))
    for name in ("transport_params", "max_seq_length", "use_last_hidden_state"):
        assert again.config.get(name) == pipeline.config.get(name)


def test_from_released_files(tmp_path):
    """A weight file and a published configuration whose folders are local here."""
    save_file(network(CLASS).state_dict(), tmp_path / "class.safetensors")
    sd_vae().save_pretrained(tmp_path / "vae")
    path = published_config(
        tmp_path, CLASS, "tim.models.c2i.tim_model.TiM", vae_dir=str(tmp_path / "vae")
    )
    made = TiMClassPipeline.from_checkpoint(
        tmp_path / "class.safetensors", path, dtype=torch.float32
    )
    same = class_pipeline(transport="EDM", transport_params=dict(T_max=70.0))
    assert torch.equal(drawn(made), drawn(same))
    assert made.config.transport_params == {"T_max": 70.0}
    half = TiMClassPipeline.from_checkpoint(tmp_path / "class.safetensors", path)
    assert half.transformer.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert drawn(half).isfinite().all()


def test_from_released_text_files(tmp_path):
    torch.save(network(TEXT).state_dict(), tmp_path / "text.bin")
    dc_ae().save_pretrained(tmp_path / "vae")
    gemma().save_pretrained(tmp_path / "gemma")
    tokenizer().save_pretrained(tmp_path / "gemma")
    path = published_config(
        tmp_path, TEXT, "tim.models.t2i.tim_model.TiM", vae_dir=str(tmp_path / "vae"),
        text_encoder_dir=str(tmp_path / "gemma"), max_seq_length=8, use_last_hidden_state=False,
    )  # fmt: skip
    made = TiMTextPipeline.from_checkpoint(tmp_path / "text.bin", path, dtype=torch.float32)
    same = text_pipeline(
        transport="EDM", transport_params=dict(T_max=70.0), use_last_hidden_state=False
    )
    assert torch.equal(drawn(made), drawn(same)) and made.config.escape_captions
    half = TiMTextPipeline.from_checkpoint(tmp_path / "text.bin", path, dtype=torch.float16)
    assert half.transformer.dtype == torch.float16 and half.text_encoder.dtype == torch.bfloat16
    given = TiMTextPipeline.from_checkpoint(
        tmp_path / "text.bin", path, vae=dc_ae(), text_encoder=gemma(), tokenizer=tokenizer()
    )
    assert given.text_encoder.dtype == torch.float32 and drawn(given).isfinite().all()
    path = published_config(  # of a network of one's own
        tmp_path, TEXT, "tim.models.t2i.tim_model.TiM", escape_captions=False
    )
    own = TiMTextPipeline.from_checkpoint(
        tmp_path / "text.bin", path, vae=dc_ae(), text_encoder=gemma(), tokenizer=tokenizer()
    )
    assert not own.config.escape_captions


def test_each_step_is_told_and_may_be_changed():
    pipeline, told = class_pipeline(), []

    def on_step_end(pipe, step, time, kwargs):
        told.append((pipe is pipeline, step, time, kwargs["latents"].dtype))
        zeros = torch.zeros_like(kwargs["latents"], dtype=torch.float32)
        return {"latents": zeros} if step == 1 else None

    (latents,) = pipeline(
        [1], num_inference_steps=3, output_type="latent", callback_on_step_end=on_step_end,
        return_dict=False,
    )  # fmt: skip
    assert [step for _, step, *_ in told] == [0, 1, 2] and all(same for same, *_ in told)
    assert [time for *_, time, _ in told] == pytest.approx([2 / 3, 1 / 3, 0])
    assert {dtype for *_, dtype in told} == {torch.float64}
    last = sample(
        pipeline.transformer, make("OT_FM"), torch.zeros(1, 4, 4, 4), torch.tensor([1]),
        torch.tensor([10]), num_steps=1, T_max=1 / 3, cfg_scale=1.5, cfg_high=2.0,
    )  # fmt: skip
    torch.testing.assert_close(latents, last)


def test_a_list_of_generators_gives_each_picture_its_own_noise():
    pipeline = class_pipeline()
    options = dict(num_inference_steps=1, output_type="latent")
    pair = pipeline([1, 7], generator=[seeded(), seeded()], **options).images
    alone = pipeline([7], generator=seeded(), **options).images
    torch.testing.assert_close(pair[1:], alone)
