"""LoRA files in networks and pipelines: diffusers' own methods, and files that are wrong."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_pipelines import CLASS, TEXT, class_pipeline, drawn, network, text_pipeline

from tim.models import TiMTransformer2DModel
from tim.models.lora import FILE, TARGETS
from tim.pipelines import TiMTextPipeline

pytestmark = pytest.mark.usefixtures("one_thread")
PIPELINES = {"text-1": text_pipeline, "class-1": class_pipeline}
PARAMS = {"text-1": TEXT, "class-1": CLASS}


def adapted(params, seed, rank=2):
    """A network with an adapter that changes it."""
    model = network(params)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=3.0, target_modules=list(TARGETS)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of a LoRA each, of their networks' names and a seed."""
    folder = tmp_path_factory.mktemp("lora")
    for name, params, seed, rank in (
        ("text-1", TEXT, 1, 2), ("text-2", TEXT, 2, 3), ("class-1", CLASS, 1, 2),
    ):  # fmt: skip
        TiMTextPipeline.save_lora_weights(
            folder / name, get_peft_model_state_dict(adapted(params, seed, rank)),
            transformer_lora_adapter_metadata={
                "r": rank, "lora_alpha": 3.0, "target_modules": list(TARGETS)
            },
        )  # fmt: skip
    return folder


def differ(one, other):
    return not torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def same(one, other):
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", PIPELINES)
def test_load_scale_and_unload(files, kind):
    pipeline = PIPELINES[kind]()
    kinds = [*map(type, pipeline.transformer.modules())]
    before = drawn(pipeline)
    pipeline.load_lora_weights(files / kind, adapter_name="x")
    assert pipeline.get_active_adapters() == ["x"]
    assert pipeline.get_list_adapters() == {"transformer": ["x"]}
    model = adapted(PARAMS[kind], 1)
    found, expected = (dict(m.named_parameters()) for m in (pipeline.transformer, model))
    assert len(found) == len(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name.replace(".default.", ".x.")], weight), name
    full = drawn(pipeline)
    assert differ(full, before)
    own, pipeline.transformer = pipeline.transformer, model
    assert torch.equal(drawn(pipeline), full)  # alpha comes with the file

    model.set_adapters("default", 0.5)
    half, pipeline.transformer = drawn(pipeline), own
    pipeline.set_adapters("x", 0.5)
    assert torch.equal(drawn(pipeline), half)
    assert differ(half, full)
    pipeline.disable_lora()
    assert same(drawn(pipeline), before)
    pipeline.enable_lora()
    assert torch.equal(drawn(pipeline), half)
    pipeline.unload_lora_weights()
    assert torch.equal(drawn(pipeline), before)
    assert kinds == [*map(type, pipeline.transformer.modules())]
    assert pipeline.get_list_adapters() == {}


def test_several_adapters_and_fusing(files, tmp_path):
    pipeline = text_pipeline()
    for seed in (1, 2):
        pipeline.load_lora_weights(str(files / f"text-{seed}" / FILE), adapter_name=f"s{seed}")
    pipeline.set_adapters(["s1", "s2"], [0.7, 0.3])
    both = drawn(pipeline)
    pipeline.set_adapters("s2")
    second = drawn(pipeline)
    assert differ(second, both)
    with pytest.raises(ValueError, match="adapters, s1, s2: save_lora_adapter saves one"):
        pipeline.save_pretrained(tmp_path / "refused")
    pipeline.delete_adapters("s1")
    assert torch.equal(drawn(pipeline), second)
    pipeline.fuse_lora()
    assert same(drawn(pipeline), second)
    pipeline.unfuse_lora()
    assert same(drawn(pipeline), second)

    pipeline.fuse_lora()
    assert "step by step: " in (drawn(pipeline), pipeline.engine.explain())[1]
    pipeline.unload_lora_weights()  # the weights stay, in plain layers
    assert same(drawn(pipeline), second)
    assert "text read once" in pipeline.engine.explain()
    pipeline.save_pretrained(tmp_path / "fused")
    assert same(drawn(TiMTextPipeline.from_pretrained(tmp_path / "fused")), second)


def test_of_a_network_alone(files, tmp_path):
    """In half precision; what it saves it reads."""
    model = network(TEXT).to(torch.bfloat16)
    model.load_lora_adapter(files / "text-1", adapter_name="x")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_lora_adapter(tmp_path, "x")
    model.unload_lora()
    model.load_lora_adapter(tmp_path, prefix=None, adapter_name="y")
    weights = load_file(files / "text-1" / FILE)
    for name, weight in get_peft_model_state_dict(model, adapter_name="y").items():
        assert torch.equal(weight, weights[f"transformer.{name}"].bfloat16())


QKV = "transformer.blocks.0.attn.qkv.lora_{}.weight"


def renamed(weights):
    weights["transformer.blocks.7.attn.qkv.lora_A.weight"] = weights.pop(QKV.format("A"))


def of_peft(weights):
    for name in [*weights]:
        weights[f"base_model.model.{name}"] = weights.pop(name)


def wider(weights):
    weights[QKV.format("A")] = torch.zeros(2, 33)


def of_two_ranks(weights):
    weights[QKV.format("A")] = torch.zeros(3, 32)


def of_one_side(weights):
    del weights[QKV.format("B")]


def of_another_rank(weights):
    for name, weight in weights.items():
        weights[name] = (weight[:1] if "lora_A" in name else weight[:, :1]).contiguous()


WRONG = {
    renamed: "holds what fits no layer of this network: blocks.7.attn.qkv.lora_A.weight",
    of_peft: r"no LoRA of a transformer: names must be like transformer\.\S+, got base_model.model",
    wider: r"blocks.0.attn.qkv: A and B are \(2, 33\) and \(96, 2\) for a weight \(96, 32\)",
    of_two_ranks: "blocks.0.attn.qkv: rank 3 of A, 2 of B",
    of_one_side: "blocks.0.attn.qkv: lora_A without the other",
    of_another_rank: r"blocks.0.attn.\S+: rank 1, but 2 by the metadata, .* and 1. more",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_files_that_do_not_fit(files, tmp_path, change):
    """The network is as it was."""
    weights, pipeline = load_file(files / "text-1" / FILE), text_pipeline()
    change(weights)
    metadata = {f"transformer.{name}": of for name, of in (("r", 2), ("lora_alpha", 3))}
    with pytest.raises(ValueError, match=WRONG[change]) as caught:
        pipeline.transformer.load_lora_adapter(weights, metadata=metadata)
    assert "\n" not in str(caught.value)
    save_file(weights, tmp_path / FILE)
    if change is not of_another_rank:  # without metadata that is a LoRA like another
        with pytest.raises(ValueError, match=WRONG[change]):
            pipeline.load_lora_weights(tmp_path)
    assert [*map(type, network(TEXT).modules())] == [*map(type, pipeline.transformer.modules())]


def test_files_that_are_none(files, tmp_path, monkeypatch):
    pipeline = class_pipeline()
    with pytest.raises(ValueError, match=r"text-1 holds what fits no layer .*blocks.0.cross_attn"):
        pipeline.load_lora_weights(files / "text-1")
    whole = (files / "class-1" / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{tmp_path} holds no whole {FILE}: ") as caught:
        pipeline.load_lora_weights(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"no LoRA in \S+empty: ") as caught:
        pipeline.load_lora_weights(tmp_path / "empty")
    assert "\n" not in str(caught.value)
    pipeline.load_lora_weights(files / "class-1", adapter_name="x")
    with pytest.raises(ValueError, match="x already in use"):
        pipeline.load_lora_weights(files / "class-1", adapter_name="x")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    with pytest.raises(ImportError, match="a LoRA needs peft: pip install"):
        pipeline.load_lora_weights(files / "class-1")


def test_a_network_without_adapters_is_saved_as_before(tmp_path):
    model = network(CLASS)
    model.save_pretrained(tmp_path)
    model.add_adapter(LoraConfig(r=2, target_modules=list(TARGETS)))
    with pytest.raises(ValueError, match="adapters, default"):
        model.save_pretrained(tmp_path)
    model.unload_lora()
    model.save_pretrained(tmp_path)
    assert TiMTransformer2DModel.from_pretrained(tmp_path).config.depth == CLASS["depth"]
