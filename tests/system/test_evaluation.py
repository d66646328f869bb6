"""The MNIST measurements, with a classifier trained for one epoch."""

import math

import pytest
import torch

from tim.data import mnist
from tim.evaluation import mnist as evaluation


@pytest.fixture(scope="module")
def trained():
    return evaluation.train_classifier(epochs=1)


@pytest.fixture(scope="module")
def held_out():
    return mnist.load("held_out")


def test_classifier_learns(trained):
    _, accuracy = trained
    assert accuracy > 0.6


def test_classifier_is_reproducible(monkeypatch):
    """In four steps of an epoch of 400 images; another seed gives another."""
    load = mnist.load
    monkeypatch.setattr(mnist, "load", lambda split: tuple(each[::10] for each in load(split)))
    first, again, other = (
        evaluation.train_classifier(epochs=1, seed=seed)[0].head.weight for seed in (0, 0, 1)
    )
    assert torch.equal(again, first) and not torch.equal(other, first)


def test_share_of_recognised_digits(trained, held_out):
    classifier, accuracy = trained
    images, labels = held_out
    right = evaluation.recognised(classifier, images, labels)
    wrong = evaluation.recognised(classifier, images, (labels + 1) % 10)
    assert right["recognised"] == accuracy
    assert wrong["recognised"] < 1 - accuracy
    assert right["standard_error"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 1000))


def test_frechet_distance_orders_real_blurred_and_noise(trained, held_out):
    classifier, _ = trained
    real, labels = (each[::2] for each in held_out)
    train = mnist.load("train")[0][::8]
    same = evaluation.frechet_distance(classifier, real, real)
    floor = evaluation.frechet_distance(classifier, train, real)
    one_digit = evaluation.frechet_distance(classifier, real[labels == 3], real)
    noise = evaluation.frechet_distance(classifier, torch.randn(250, 1, 28, 28).clamp(-1, 1), real)
    assert abs(same) < 1e-3 * noise
    assert same < floor < one_digit / 10
    assert floor < noise / 10


def test_frechet_distance_of_known_gaussians(held_out):
    class FirstPixels(evaluation.DigitClassifier):
        num_features = 2

        def forward(self, images):
            return images.flatten(1)[:, :2]

    images, shift = torch.randn(2000, 1, 28, 28), torch.tensor(3.0)
    distance = evaluation.frechet_distance(FirstPixels(), images, images + shift)
    assert distance == pytest.approx(2 * 3.0**2, rel=1e-4)


def test_table_and_plot(tmp_path):
    measured = {"recognised": 0.9, "standard_error": 0.01, "frechet_distance": 2.0}
    steps = {str(count): measured for count in evaluation.STEPS}
    results = {
        "classifier_accuracy": 0.99,
        "frechet_distance_of_train_images": 0.5,
        "networks": dict.fromkeys(
            ("TiM", "flow matching"),
            {"by_guidance": {str(scale): steps for scale in evaluation.GUIDANCE}},
        ),
    }
    lines = evaluation.table(results).splitlines()
    assert len(lines) == 2 + len(evaluation.STEPS)
    assert lines[3] == "| 2 | 90.0 ± 1.0 % | 90.0 ± 1.0 % | 2.00 | 2.00 |"
    evaluation.plot(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
