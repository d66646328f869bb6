"""Networks and pipelines as diffusers' own: found, loaded, kept small, offloaded, shared."""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
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
    quiet,
    sd_vae,
    seeded,
    text_pipeline,
    tokenizer,
)

from tim.models import TiMTransformer2DModel
from tim.pipelines import TiMClassPipeline, TiMTextPipeline
from tim_kernels.attention import choice

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
LATENT = dict(num_inference_steps=2, output_type="latent")


# Found


AFTER = """
folder = {folder!r}
from diffusers import AutoModel, DiffusionPipeline
print(type(AutoModel.from_pretrained(folder, subfolder="transformer")).__name__)
print(type(AutoModel.from_pretrained(folder + "/transformer")).__name__)
"""


@pytest.mark.parametrize(
    "module, last",
    [
        ("tim.models", ""),
        pytest.param(
            "tim.pipelines", "print(type(DiffusionPipeline.from_pretrained(folder)).__name__)",
            marks=pytest.mark.nightly,  # this process has it of the same import
        ),
    ],
)  # fmt: skip
def test_found_in_a_process_of_its_own(module, last, tmp_path):
    class_pipeline().save_pretrained(tmp_path)
    script = f"import {module}\n" + AFTER.format(folder=str(tmp_path)) + last
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    pipeline = ["TiMClassPipeline"] if last else []
    assert run.stdout.split() == ["TiMTransformer2DModel"] * 2 + pipeline, run.stderr


# Single files


def test_a_network_of_a_single_file(tmp_path):
    model, path = network(CLASS), tmp_path / "class.safetensors"
    save_file(model.bfloat16().state_dict(), path)
    torch.save(model.state_dict(), tmp_path / "class.bin")
    yaml = published_config(tmp_path, CLASS, "tim.models.c2i.tim_model.TiM")
    model.save_pretrained(tmp_path / "saved")
    class_pipeline().save_pretrained(tmp_path / "pipeline")
    for file in (path, str(tmp_path / "class.bin")):
        for config in (CLASS, yaml, tmp_path / "saved", str(tmp_path / "pipeline")):
            found = TiMTransformer2DModel.from_single_file(file, config=config)
            assert found.dtype == torch.bfloat16 and not found.training
            pairs = zip(found.state_dict().items(), model.state_dict().items(), strict=True)
            assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    for name in ("torch_dtype", "dtype"):
        options = {"config": CLASS, "device": "cpu", name: torch.float32}
        assert TiMTransformer2DModel.from_single_file(path, **options).dtype == torch.float32


def test_single_files_that_do_not_fit(tmp_path):
    path, state = tmp_path / "class.safetensors", network(CLASS).state_dict()
    state["strange.weight"] = state.pop("x_embedder.proj.bias")
    save_file(state, path)
    for load in (TiMTransformer2DModel.from_single_file, TiMClassPipeline.from_single_file):
        config = CLASS if load.__self__ is TiMTransformer2DModel else tmp_path / "pipeline"
        class_pipeline().save_pretrained(tmp_path / "pipeline")
        with pytest.raises(ValueError, match=r"missing: x_embedder.proj.bias\nunexpected: strange"):
            load(path, config=config)
        with pytest.raises(ValueError, match=r"holds weights alone: config is needed, .*xl-256"):
            load(path)
        with pytest.raises(ValueError, match="holds no config.json of a network"):
            load(path, config=str(tmp_path))
        with pytest.raises(ValueError, match="neither a preset"):
            load(path, config="xl-255")
        with pytest.raises(TypeError, match="original_config"):
            load(path, config=config, original_config="a.yaml")


def test_a_pipeline_of_a_single_file(tmp_path):
    save_file(network(CLASS).state_dict(), tmp_path / "class.safetensors")
    sd_vae().save_pretrained(tmp_path / "vae")
    yaml = published_config(
        tmp_path, CLASS, "tim.models.c2i.tim_model.TiM", vae_dir=str(tmp_path / "vae")
    )
    made = TiMClassPipeline.from_single_file(str(tmp_path / "class.safetensors"), config=yaml)
    same = class_pipeline(transport="EDM", transport_params=dict(T_max=70.0))
    assert torch.equal(drawn(made), drawn(same))
    options = dict(config=yaml, torch_dtype=torch.bfloat16, vae=sd_vae(), local_files_only=True)
    half = TiMClassPipeline.from_single_file(tmp_path / "class.safetensors", **options)
    assert half.transformer.dtype == torch.bfloat16 and half.vae.dtype == torch.float32


def test_a_text_pipeline_of_a_single_file_and_the_rest_of_a_saved_one(tmp_path):
    other = network(TEXT)
    with torch.no_grad():
        other.final_layer.linear.weight.mul_(2)
    torch.save(other.half().state_dict(), tmp_path / "text.bin")
    saved = text_pipeline(transport="TrigFlow")
    saved.save_pretrained(tmp_path / "saved")
    made = TiMTextPipeline.from_single_file(tmp_path / "text.bin", config=tmp_path / "saved")
    assert made.config.transport == "TrigFlow" and made.config.max_seq_length == 8
    assert made.transformer.dtype == torch.float16 and made.text_encoder.dtype == torch.float32
    saved.transformer = other
    assert torch.equal(drawn(made), drawn(saved))
    yaml = published_config(tmp_path, TEXT, "tim.models.t2i.tim_model.TiM", max_seq_length=8)
    parts = dict(vae=dc_ae(), text_encoder=gemma(), tokenizer=tokenizer())
    made = TiMTextPipeline.from_single_file(tmp_path / "text.bin", config=yaml, **parts)
    assert made.transformer.dtype == torch.float16


def test_a_single_file_by_its_address(tmp_path):
    """Of a repository in the hub's cache, as a download lays it out."""
    commit = "0" * 40
    repository = tmp_path / "models--someone--tim"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(network(CLASS).state_dict(), repository / "snapshots" / commit / "a.safetensors")
    address = "https://huggingface.co/someone/tim/blob/main/a.safetensors"
    options = dict(config=CLASS, cache_dir=tmp_path, local_files_only=True)
    found = TiMTransformer2DModel.from_single_file(address, **options)
    assert torch.equal(found.x_embedder.proj.weight, network(CLASS).x_embedder.proj.weight)
    with pytest.raises(OSError, match="b.safetensors|local"):
        TiMTransformer2DModel.from_single_file(address.replace("/a.", "/b."), **options)


# Small in memory


@BOTH
def test_float8_weights_are_computed_with_in_bfloat16(make_pipeline):
    pipeline = make_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    expected = drawn(pipeline)
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    stored = {
        name.partition(".")[0]: parameter.dtype
        for name, parameter in pipeline.transformer.named_parameters()
        if "norm" not in name
    }
    inner = stored.pop("blocks")
    assert inner == torch.float8_e4m3fn and set(stored.values()) == {torch.bfloat16}
    pictures = drawn(pipeline)
    assert 0 < (pictures - expected).abs().max() < 0.2
    assert (pictures - expected).abs().mean() < 0.03


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


@BOTH
def test_quantised_when_loaded(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    expected = drawn(pipeline)
    mapping = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": int8()})
    options = dict(torch_dtype=torch.float32)
    whole = type(pipeline).from_pretrained(tmp_path, quantization_config=mapping, **options)
    alone = TiMTransformer2DModel.from_pretrained(
        tmp_path, subfolder="transformer", quantization_config=int8(), **options
    )
    pipeline.transformer = alone
    for each in (whole, pipeline):
        weight = each.transformer.blocks[0].attn.qkv.weight
        assert "torchao" in type(weight).__module__
        assert 0 < (drawn(each) - expected).abs().max() < 0.1


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@BOTH
def test_offloaded_by_groups(make_pipeline, level):
    pipeline, cpu = make_pipeline(), torch.device("cpu")
    expected = drawn(pipeline)
    groups = dict(num_blocks_per_group=1) if level == "block_level" else {}
    pipeline.transformer.enable_group_offload(cpu, cpu, offload_type=level, **groups)
    torch.testing.assert_close(drawn(pipeline), expected, rtol=0, atol=1e-5)


@BOTH
def test_another_dtype(make_pipeline):
    pipeline = make_pipeline()
    expected = drawn(pipeline)
    pipeline.to(torch.bfloat16)
    assert pipeline.dtype == torch.bfloat16 == pipeline.transformer.dtype
    torch.testing.assert_close(drawn(pipeline), expected, rtol=0, atol=0.15)


# Attention


def test_attention_backends_by_diffusers_names(monkeypatch):
    model = network(CLASS)
    try:
        model.set_attention_backend("native")
        assert choice.chosen() == "native"
        for name in ("_native_math", "sage"):
            with pytest.raises(ValueError, match=f"'{name}' cannot be set: TiM has native, "):
                model.set_attention_backend(name)
        for name in ("flash", "_flash_3", "_native_cudnn", "_native_flash"):
            with pytest.raises(ValueError, match=f"'{name}' cannot be set: it needs a CUDA device"):
                model.set_attention_backend(name)
        monkeypatch.setattr(choice, "obstacle", lambda name: None)
        monkeypatch.setattr("tim.models.transformer.obstacle", lambda name: None)
        for name, ours in (("_native_cudnn", "cudnn"), ("_flash_3", "flash_attn_interface")):
            model.set_attention_backend(name)
            assert choice.chosen() == ours
    finally:
        choice.set_attention("auto")


# Shared, saved and loaded


@BOTH
def test_components_are_shared(make_pipeline):
    pipeline = make_pipeline()
    expected, kind = drawn(pipeline), type(pipeline)
    for other in (kind(**pipeline.components, **settings(pipeline)), kind.from_pipe(pipeline)):
        assert all(other.components[name] is part for name, part in pipeline.components.items())
        assert torch.equal(drawn(other), expected)


def test_shared_components_keep_their_dtypes(tmp_path):
    pipeline = class_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    expected = drawn(pipeline)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    other = TiMClassPipeline.from_pipe(pipeline, scheduler=scheduler)
    assert other.scheduler is scheduler and pipeline.scheduler is None
    assert pipeline.transformer.dtype == torch.bfloat16 and other.vae.dtype == torch.float32
    assert torch.equal(drawn(pipeline), expected)
    pipeline.save_pretrained(tmp_path)
    pipeline.transformer = TiMTransformer2DModel.from_pretrained(
        tmp_path, subfolder="transformer", quantization_config=int8(), torch_dtype=torch.bfloat16
    )
    assert torch.equal(drawn(TiMClassPipeline.from_pipe(pipeline)), drawn(pipeline))
    assert (
        TiMClassPipeline.from_pipe(class_pipeline(), dtype=torch.bfloat16).dtype == torch.bfloat16
    )
    with pytest.raises(ValueError, match="conditioned on classes: use TiMClassPipeline"):
        TiMTextPipeline.from_pipe(pipeline)
    with pytest.raises(TypeError, match="requires_safety"):
        TiMClassPipeline.from_pipe(pipeline, requires_safety=True)


def settings(pipeline):
    parts = pipeline.components
    names = pipeline.config.keys() - parts.keys()
    return {name: pipeline.config[name] for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    "left_out", [(), ("vae",), ("text_encoder", "tokenizer"), ("vae", "text_encoder", "tokenizer")]
)
def test_saved_and_loaded_without_what_is_optional(left_out, tmp_path):
    """Without an autoencoder, of a network of pixels."""
    params = TEXT | (dict(in_channels=3) if "vae" in left_out else {})
    parts = dict(vae=dc_ae(), text_encoder=gemma(), tokenizer=tokenizer())
    parts |= dict.fromkeys(left_out) | dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline = quiet(TiMTextPipeline(network(params), **parts, max_seq_length=8))
    y, y_null = text_pipeline().encode_prompt(PROMPTS)
    given = dict(prompt_embeds=y, negative_prompt_embeds=y_null, **LATENT)
    expected = pipeline(generator=seeded(), **given).images
    pipeline.save_pretrained(tmp_path)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert {name for name, part in again.components.items() if part is None} == set(left_out)
    assert torch.equal(again(generator=seeded(), **given).images, expected)


def test_a_component_that_comes_later_is_saved(tmp_path):
    pipeline = TiMTextPipeline(network(TEXT), dc_ae(), max_seq_length=8)
    pipeline.text_encoder, pipeline.tokenizer = gemma(), tokenizer()
    pipeline.save_pretrained(tmp_path)
    again = TiMTextPipeline.from_pretrained(tmp_path)
    assert torch.equal(drawn(again), drawn(text_pipeline()))
