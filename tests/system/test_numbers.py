"""Sizes, counts, seeds and labels: any kind of integer, and nothing that only looks like one."""

import numpy as np
import pytest
import torch
from small_mnist import small
from small_pipelines import CLASS, class_pipeline, network, seeded, text_pipeline

from tim import checkpoints
from tim.app import demo
from tim.checks import whole
from tim.config import build_network, build_objective
from tim.data import mnist
from tim.evaluation import mnist as evaluation
from tim.images import labelled_grid
from tim.models import TiMTransformer2DModel
from tim.sampling import sample
from tim.training import draws
from tim.transports import make

INTEGERS = [int, np.int64, np.uint8, np.array, torch.tensor]
NOT_INTEGERS = [
    True,
    np.True_,
    torch.tensor(True),
    2.0,
    np.float64(2),
    torch.tensor(2.0),
    "2",
    None,
]
NOT_INTEGERS += [np.array([2]), torch.tensor([2]), [2]]
LATENT = dict(output_type="latent")


@pytest.mark.parametrize("kind", INTEGERS)
def test_any_integer(kind):
    assert whole("n", kind(3)) == 3 and type(whole("n", kind(3))) is int


@pytest.mark.parametrize("given", NOT_INTEGERS, ids=repr)
def test_no_integer(given):
    with pytest.raises(ValueError, match="^n must be a whole number, got "):
        whole("n", given)


@pytest.mark.parametrize("kind", INTEGERS)
def test_pipelines_take_them(kind):
    options = dict(output_type="latent", generator=seeded())
    sizes = dict(height=kind(12), width=kind(8), num_inference_steps=kind(2))
    plain = dict(height=12, width=8, num_inference_steps=2)
    draw = class_pipeline()
    expected = draw([3, 4], **plain, **options).images
    for labels in ([kind(3), kind(4)], (kind(3), 4), np.array([3, 4]), torch.tensor([3, 4])):
        options["generator"] = seeded()
        assert torch.equal(draw(labels, **sizes, **options).images, expected)
    assert len(draw(kind(3), num_inference_steps=1, **LATENT).images) == 1
    draw = text_pipeline(max_seq_length=kind(4))
    images = draw("a cat", num_images_per_prompt=kind(2), num_inference_steps=kind(1), **LATENT)
    assert len(images.images) == 2


@pytest.mark.parametrize("given", NOT_INTEGERS[:6], ids=repr)
def test_pipelines_refuse_others(given):
    draw, write = class_pipeline(), text_pipeline()
    for name in ("height", "num_inference_steps", "class_labels"):
        with pytest.raises(ValueError, match=f"{name} must be .*(whole number|integers), got "):
            draw(**dict(class_labels=1) | {name: given})
    with pytest.raises(ValueError, match="class_labels must be one or more integers"):
        draw([1, given])
    with pytest.raises(ValueError, match="num_images_per_prompt must be a whole number, got "):
        write("a cat", num_images_per_prompt=given)


@pytest.mark.parametrize("kind", INTEGERS)
def test_functions_take_them(kind, tmp_path):
    args = network(CLASS), make("OT_FM"), torch.zeros(1, 4, 4, 4), torch.tensor([1])
    assert torch.equal(sample(*args, num_steps=kind(2)), sample(*args, num_steps=2))
    assert make("EDM").sample_t(kind(3)).shape == (3,)
    assert build_objective(small()).sample_times(kind(10))[2] == 5
    assert torch.equal(*(torch.rand(2, generator=draws.generator(n, 1)) for n in (3, kind(3))))
    assert next(iter(draws.ImageStream(kind(9), kind(4), seed=kind(1)))) == next(
        iter(draws.ImageStream(9, 4, seed=1))
    )
    row = {"a": torch.zeros(1, 1, 4, 4)}
    assert labelled_grid(row, "0", scale=kind(3)).size == labelled_grid(row, "0", scale=3).size
    options = [dict(num_steps=n(1), per_class=n(1), seed=n(2)) for n in (int, kind)]
    args = build_network(small()), make("OT_FM")
    one, other = (evaluation.draw(*args, **each)[0] for each in options)
    assert torch.equal(one, other) and len(one) == mnist.NUM_CLASSES


def test_functions_refuse_others(tmp_path):
    args = network(CLASS), make("OT_FM"), torch.zeros(1, 4, 4, 4), torch.tensor([1])
    for call in (
        lambda n: sample(*args, num_steps=n),
        make("EDM").sample_t,
        build_objective(small()).sample_times,
        lambda n: draws.generator(0, n),
        lambda n: draws.ImageStream(n, 4, seed=1),
        lambda n: draws.ImageStream(9, 4, seed=n),
        lambda n: labelled_grid({"a": torch.zeros(1, 1, 4, 4)}, "0", scale=n),
        lambda n: evaluation.draw(*args[:2], num_steps=1, per_class=n, seed=0),
        lambda n: evaluation.train_classifier(seed=n),
        lambda n: demo.draw(tmp_path / "demo.png", seed=n),
    ):
        for given in (True, 2.5, "2"):
            with pytest.raises(ValueError, match="must be a whole number, got "):
                call(given)


def test_a_network_s_arguments_for_a_checkpoint(tmp_path):
    torch.save(network(CLASS).state_dict(), tmp_path / "a.bin")
    params = {n: np.int64(v) if type(v) is int else v for n, v in CLASS.items()}
    loaded = checkpoints.load(tmp_path / "a.bin", params)
    assert loaded.config.depth == 2 and type(loaded.config.depth) is int
    with pytest.raises(ValueError, match="model.network.params.depth must be int, got True"):
        checkpoints.load(tmp_path / "a.bin", CLASS | {"depth": np.True_})


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_network_s_sizes(tmp_path, kind):
    sizes = {n: kind(v) if type(v) is int else v for n, v in CLASS.items()}
    network(sizes).save_pretrained(tmp_path)
    loaded = TiMTransformer2DModel.from_pretrained(tmp_path)
    assert dict(loaded.config) | CLASS == dict(loaded.config)
    for given in (True, 2.0, np.True_):
        with pytest.raises(ValueError, match="depth must be a whole number, got "):
            TiMTransformer2DModel(**sizes | {"depth": given})
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        TiMTransformer2DModel(**sizes | {"num_heads": 0})
