"""The nodes for ComfyUI, in what ComfyUI asks of nodes: see small_comfy."""

import copy
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from golden_files import GOLDEN
from small_comfy import Comfy, InterruptProcessingException, SaveImage, check_node
from transformers import BertConfig, BertModel

from tim import comfyui
from tim.app import assets
from tim.comfyui.loader import TiMLoader
from tim.opening import open_pipeline

ROOT = Path(__file__).parents[2]
TEXT = GOLDEN / "training" / "text"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """With our nodes, by the file that docs/comfyui.md shows."""
    (code,) = re.findall("```python\n(.*?)```", (ROOT / "docs/comfyui.md").read_text(), re.DOTALL)
    (tmp_path / "tim_nodes.py").write_text(code)
    comfy = Comfy(tmp_path / "models")
    for name, module in comfy.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    comfy.load_custom_node(tmp_path / "tim_nodes.py")
    return comfy


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A text encoder as wide as the emoji's."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(TEXT, folder, dirs_exist_ok=True)
    config = BertConfig(
        vocab_size=120, hidden_size=384, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def workflow(name, **inputs):
    """A shipped one, with other inputs of its loader or its sampler."""
    prompt = json.loads(Path(comfyui.__file__).with_name("workflows").joinpath(name).read_text())
    for input, value in inputs.items():
        own = "2" if input in prompt["2"]["inputs"] else "1"
        prompt[own]["inputs"][input] = value
    return prompt


def test_the_names():
    assert {*comfyui.NODE_CLASS_MAPPINGS} == {"TiMLoader", "TiMTextSampler", "TiMClassSampler"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"RETURN_TYPES": ["IMAGE"]},
        {"RETURN_NAMES": ("one", "two")},
        {"FUNCTION": "load"},
        {"INPUT_TYPES": classmethod(lambda cls: {"inputs": {}})},
        {"INPUT_TYPES": classmethod(lambda cls: {"required": {"steps": ("INT", {"default": 1})}})},
        {"INPUT_TYPES": classmethod(lambda cls: {"required": {"labels": ("STRING",)}})},
        {"IS_CHANGED": lambda **inputs: ""},
    ],
)
def test_what_is_no_node(wrong):
    node = comfyui.NODE_CLASS_MAPPINGS["TiMClassSampler"]
    check_node(node)
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        check_node(type("Wrong", (node,), wrong))


def test_the_digits_are_the_pipeline_s(comfy):
    (images,) = comfy.run(workflow("digits.json"))["2"]
    direct = open_pipeline(assets.folder("mnist"))(
        [3, 1, 4, 1, 5], num_inference_steps=2, guidance_scale=1.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert images.shape == (5, 28, 28, 3) and images.std() > 0.1
    assert torch.equal(images.movedim(-1, 1)[:, :1], direct)
    assert len(SaveImage.saved["digits"]) == 5
    assert comfy.progress == [(1, 2), (2, 2)] and comfy.unloaded == 0


def test_the_emoji(comfy, reader):
    prompt = workflow("emoji.json", text_encoder=str(reader), batch_size=2, steps=2, width=48)
    (images,) = comfy.run(prompt)["2"]
    assert images.shape == (2, 32, 48, 3)
    assert not torch.equal(*images) and len(SaveImage.saved["emoji"]) == 2
    prompt["2"]["inputs"] |= {"negative_prompt": "red heart", "guidance_high": 2.0}
    (led_away,) = comfy.run(prompt)["2"]
    assert not torch.equal(images, led_away)


def test_the_network_stays_open(comfy, tmp_path):
    shutil.copytree(assets.folder("mnist"), tmp_path / "run" / "model")
    source = str(tmp_path / "run")
    first = comfy.run(workflow("digits.json", source=source))
    again = comfy.run(workflow("digits.json", source=source, seed=2**64 - 1))
    assert comfy.executed == ["2", "3"] and again["1"] is first["1"]
    assert not torch.equal(first["2"][0], again["2"][0])
    comfy.run(workflow("digits.json", source=source, seed=2**64 - 1))
    assert comfy.executed == []
    os.utime(tmp_path / "run/model/diffusion_pytorch_model.safetensors", (1, 1))
    comfy.run(workflow("digits.json", source=source))
    assert comfy.executed == ["1", "2", "3"]


def test_a_drawing_is_interrupted_after_a_step(comfy):
    comfy.interrupt_after = 1
    with pytest.raises(InterruptProcessingException):
        comfy.run(workflow("digits.json"))
    assert comfy.progress == [(1, 2)]
    comfy.run(workflow("digits.json"))
    assert comfy.executed == ["2", "3"]


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({"seed": 2**64}, "value_bigger_than_max: seed"),
        ({"seed": -1}, "value_smaller_than_min: seed"),
        ({"steps": 0}, "value_smaller_than_min: steps"),
        ({"batch_size": 0}, "value_smaller_than_min: batch_size"),
        ({"guidance": 0.5}, "value_smaller_than_min: guidance"),
        ({"preset": "xl-128"}, "value_not_in_list: preset"),
        ({"device": "cuda:7"}, "value_not_in_list: device"),
        ({"source": "mnits"}, "custom_validation_failed: there is no network 'mnits'"),
        ({"source": ""}, "custom_validation_failed: there is no network ''"),
        ({"pipeline": "mnist"}, "needs_a_link: pipeline"),
        ({"pipeline": ["2", 0]}, "return_type_mismatch: pipeline"),
    ],
)
def test_inputs_that_comfyui_refuses(comfy, inputs, error):
    errors = comfy.validate(workflow("digits.json", **inputs))
    assert [*errors.values()] == [[error]]


def test_sources_that_may_be(comfy, tmp_path):
    (tmp_path / "models" / "tim").mkdir(parents=True)
    (tmp_path / "models" / "tim" / "mine").mkdir()
    for source in ("mine", str(tmp_path), "somebody/tim-xl", ["4", 0]):
        prompt = workflow("digits.json", source=source)
        if isinstance(source, list):
            comfy.nodes["Text"] = type("Text", (SaveImage,), {"RETURN_TYPES": ("STRING",)})
            prompt["4"] = {**copy.deepcopy(prompt["3"]), "class_type": "Text"}
        assert comfy.validate(prompt) == {}


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("digits.json", {"labels": "three"}, "labels must be numbers such as 3, 1, 4; got 'three'"),
        ("digits.json", {"labels": "11"}, "11"),
        ("digits.json", {"width": 30}, "multiples of 4, got 28×30"),
        ("digits.json", {"preset": "mnist"}, "has its own configuration: leave out mnist"),
        ("digits.json", {"source": "emoji"}, "a network of classes is needed"),
        ("emoji.json", {"source": "mnist", "text_encoder": ""}, "a network of texts is needed"),
        (
            "emoji.json",
            {"negative_prompt": "cat", "guidance": 1.0},
            "negative_prompt needs a guidance above 1, got 1",
        ),
    ],
)
def test_what_the_nodes_refuse(comfy, reader, name, inputs, message):
    reads = {"text_encoder": str(reader)} if inputs.get("source", name[:5]) == "emoji" else {}
    with pytest.raises(ValueError, match=message):
        comfy.run(workflow(name, **{**reads, **inputs}))


def test_where_and_how_it_is_opened(comfy, tmp_path, monkeypatch):
    """A weight file by its name, in ComfyUI's folders."""
    opened = []
    monkeypatch.setattr(assets, "open_pipeline", lambda *given, **options: (given, options))
    weights = tmp_path / "models" / "checkpoints" / "c2i.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    comfy.device = torch.device("cuda", 1)
    for dtype, device in (("default", "default"), ("float16", "cpu")):
        (pipeline,) = TiMLoader().load("c2i.safetensors", "xl-256", dtype, device, vae="mine")
        opened.append(pipeline)
    (given, first), (_, second) = opened
    assert given == (str(weights), "xl-256")
    assert first == dict(dtype=None, device=comfy.device, vae="mine", text_encoder=None)
    assert (second["dtype"], second["device"]) == (torch.float16, torch.device("cpu"))
    assert comfy.unloaded == 1
