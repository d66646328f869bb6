"""The table of MNIST networks, of untrained ones and a classifier trained for one epoch."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from small_mnist import small

from tim import config
from tim.data import mnist
from tim.evaluation import mnist as evaluation
from tim.evaluation import mnist_variants as variants
from tim.evaluation.mnist import features, frechet_distance, frechet_error, train_classifier
from tim.training import save_export


@pytest.fixture(scope="module")
def judge():
    return train_classifier(epochs=1)


@pytest.fixture
def quickly(judge, monkeypatch):
    monkeypatch.setattr(variants, "train_classifier", lambda seed: judge)
    monkeypatch.setattr(variants, "STEPS", (1, 2))
    monkeypatch.setattr(variants, "RECOGNISED_AT", (1, 2))
    monkeypatch.setattr(variants, "FRECHET_AT", (2,))


@pytest.fixture
def folders(tmp_path):
    """The preset's network, small, and one that knows no missing class, for a longer run."""
    made = {"preset": small()}
    change = {"model": {"network": {"params": {"class_dropout_prob": 0.0}}}}
    made["longer"] = OmegaConf.merge(small(max_train_steps=5000), change)
    for name, cfg in made.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_export(config.build_network(cfg), cfg, tmp_path / name)
    return [f"{name}={tmp_path / name}" for name in made]


def test_one_network_after_the_other(folders, quickly, tmp_path, capsys):
    output = tmp_path / "variants.json"
    for folder in reversed(folders):
        variants.main([folder], output=output, per_class=4)
    results = json.loads(output.read_text())
    assert list(results["networks"]) == ["longer", "preset"]
    longer = results["networks"]["longer"]
    assert longer["trained_images"] == 5000 * 16
    assert longer["settings"]["model.network.params.class_dropout_prob"] == 0
    assert "model.network.params.num_classes" not in longer["settings"]
    measured = longer["by_steps"]["2"]
    assert measured["frechet_error"] > 0
    table = variants.table(results)
    assert table in capsys.readouterr().out
    assert table.splitlines()[0] == (
        "|  | images seen | recognised, 1 step | recognised, 2 steps | Fréchet, 2 steps |"
    )
    assert table.splitlines()[2].startswith("| preset | 128 |")
    distance, error = measured["frechet_distance"], measured["frechet_error"]
    assert table.splitlines()[3].startswith("| longer | 80,000 |")
    assert table.splitlines()[3].endswith(f"| {distance:.2f} ± {error:.2f} |")


def test_what_was_measured_in_another_way_stays_apart(folders, quickly, tmp_path):
    output = tmp_path / "variants.json"
    variants.main(folders[:1], output=output, per_class=4)
    before = output.read_text()
    with pytest.raises(ValueError, match="'samples_per_step_count': 40.* not .*: 50"):
        variants.main(folders[1:], output=output, per_class=5)
    assert output.read_text() == before


@pytest.mark.parametrize("given", [["model"], ["=model"], ["a="], ["a=one", "a=two"]])
def test_a_network_needs_a_name_of_its_own(given, tmp_path):
    with pytest.raises(ValueError, match=f"NAME=DIR, each name once, got '{given[-1]}'"):
        variants.main(given, output=tmp_path / "variants.json")


def test_the_error_is_that_of_another_draw(judge, monkeypatch):
    """Of disjoint sets of real images too dark, whose distances spread as the error says."""
    classifier, _ = judge
    images, real = (mnist.load(split)[0] for split in ("train", "held_out"))
    rows = features(classifier, torch.cat([images * 0.8 - 0.2, real]))
    monkeypatch.setattr(evaluation, "features", lambda _, chosen: rows[chosen])
    parts = torch.arange(4000).view(10, 20, 20).permute(2, 0, 1).flatten(1)
    real = torch.arange(4000, 5000)
    distances = torch.tensor([frechet_distance(classifier, part, real) for part in parts])
    errors = torch.tensor([frechet_error(classifier, part, real) for part in parts])
    assert 0.6 < errors.mean() / distances.std() < 1.6
