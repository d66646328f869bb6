"""The ADM suite end to end, on digits seen through a classifier that was trained for seconds."""

import json
import shutil

import numpy as np
import pytest
import torch
from digit_network import DigitNetwork, levels, reference, save
from PIL import Image
from torch import nn
from two_processes import in_two_processes
from typer.testing import CliRunner

from tim.app.cli import app
from tim.data import mnist
from tim.evaluation import compare, features, inception
from tim.evaluation.imagenet import METRICS, evaluate
from tim.evaluation.mnist import train_classifier
from tim.processes import launched_group


@pytest.fixture(scope="module")
def network():
    return DigitNetwork(train_classifier(epochs=2)[0])


@pytest.fixture(scope="module")
def real():
    """A thousand training images, of every digit as many."""
    return mnist.load("train")[0][::4]


@pytest.fixture(scope="module")
def adm(network, real, tmp_path_factory):
    return reference(real, network, tmp_path_factory.mktemp("adm") / "reference.npz")


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A hundred held-out digits in a folder."""
    return save(mnist.load("held_out")[0][::10], tmp_path_factory.mktemp("some") / "samples")


def measured(images, adm, network, **options):
    stream = torch.from_numpy(levels(images)).permute(0, 3, 1, 2)
    options = dict(count=len(images), split=250) | options
    return evaluate(stream.split(64), adm, network, **options)["metrics"]


def test_real_against_itself(real, adm, network):
    found = measured(real, adm, network)
    assert list(found) == list(METRICS)
    assert [found["fid"], found["sfid"]] == pytest.approx([0, 0], abs=1e-6)
    assert found["precision"] == found["recall"] == 1


def test_noise_worsens_every_number_step_by_step(adm, network):
    images = mnist.load("held_out")[0][::2]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    steps = [measured(images + level * noise, adm, network) for level in (0, 0.1, 0.3, 0.6)]
    for name in ("fid", "sfid"):
        values = [found[name] for found in steps]
        assert all(2 * fewer < more for fewer, more in zip(values, values[1:], strict=False)), name
    for name in ("inception_score", "precision", "recall"):
        values = [found[name] for found in steps]
        assert values == sorted(values, reverse=True) and values[-1] < values[0] / 2, name
    assert 1 < steps[0]["inception_score"] <= 10


def test_half_the_digits_halve_recall_and_not_precision(adm, network):
    images, digits = mnist.load("held_out")
    every, half = (
        measured(chosen, adm, network, metrics=("precision", "recall"), k=1)
        for chosen in (images[::2], images[digits < 5])
    )
    assert 0.4 < half["recall"] / every["recall"] < 0.65
    assert half["precision"] > every["precision"] - 0.02


def test_a_result_says_what_was_measured(some, adm, network, tmp_path):
    (some / "run.json").write_text('{"settings": {"num_steps": 4}}')
    output = tmp_path / "out"
    result = evaluate(some, adm, network, count=90, split=40, output=output, batch_size=32)
    (some / "run.json").unlink()
    assert json.loads((output / "result.json").read_text()) == result
    assert result["benchmark"] == "imagenet" and list(result["metrics"]) == list(METRICS)
    assert result["counts"] == {
        "pictures": 90, "in_splits": 80, "splits": 2, "reference_pictures": 1000, "asked": 90,
        "left_out": 0, "not_used": 10,
    }  # fmt: skip
    settings = result["settings"]
    assert settings["network"] == "digit classifier" and settings["reference"] == "reference.npz"
    assert settings["distances"] == "float64" and settings["neighbour"] == 3
    assert result["run"] == {"settings": {"num_steps": 4}} and "torch" in result["versions"]
    for title in ("grid", "worst", "best"):
        assert Image.open(output / f"{title}.png").width == 8 * (256 + 8)


def test_both_doors_and_a_rerun_give_the_same_numbers(some, adm, network, tmp_path):
    """The rerun without looking at any picture again."""
    pictures = [np.array(Image.open(path)) for path in sorted(some.iterdir())]
    np.savez(tmp_path / "samples.npz", arr_0=np.stack(pictures))
    first = evaluate(some, adm, network, count=100, output=tmp_path / "out")
    shown = network.shown
    again = evaluate(some, adm, network, count=100, output=tmp_path / "out")
    assert again == first and network.shown == shown
    other = evaluate(tmp_path / "samples.npz", adm, network, count=100, batch_size=7)
    assert other["metrics"] == pytest.approx(first["metrics"], rel=1e-5)
    assert other["counts"] == first["counts"] and first["counts"]["splits"] == 1


def test_two_processes_give_the_same_numbers(some, adm, network, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 30)

    def run(rank, folder):
        with launched_group():
            result = evaluate(some, adm, network, count=100, output=folder / "two")
        torch.save(result, folder / ("found.pt" if rank == 0 else "other.pt"))

    in_two_processes(tmp_path, run)
    one = evaluate(some, adm, network, count=100)
    for name in ("found.pt", "other.pt"):
        assert torch.load(tmp_path / name) == one
    assert json.loads((tmp_path / "two" / "result.json").read_text()) == one


def test_what_lacks_is_named(some, adm, network, tmp_path):
    with np.load(adm) as arrays:
        part = {name: arrays[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "part.npz", **part)
    assert evaluate(some, tmp_path / "part.npz", network, count=100, metrics=("fid",))["metrics"]
    with pytest.raises(ValueError, match="lacks mu_s, sigma_s, which fid and sfid need"):
        evaluate(some, tmp_path / "part.npz", network, count=100, metrics=("fid", "sfid"))
    with pytest.raises(ValueError, match="holds no arr_0"):
        evaluate(some, tmp_path / "part.npz", network, count=100, metrics=("fid", "recall"))
    with pytest.raises(ValueError, match="fewer pictures than asked: .* holds 100 of 50,000"):
        evaluate(some, adm, network)
    with pytest.raises(ValueError, match="metrics must be some of"):
        evaluate(some, adm, network, metrics=("fid", "kid"))
    with pytest.raises(ValueError, match="inception_score needs logits"):
        pool_alone = lambda pictures: network(pictures)[:1]  # noqa: E731
        evaluate(some, adm, lambda p: features.Features(*pool_alone(p)), count=100,
                 metrics=("inception_score",))  # fmt: skip


class TinyInception(nn.Module):
    """Layers of Inception's names, one of them off the path, as branches are."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = nn.Conv2d(3, 8, 3, stride=16)
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(8, 9, 1)
        self.Mixed_6d.forward = lambda x: self.Mixed_6d.branch1x1(x).tanh()
        self.AvgPool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(9, 12)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    torch.manual_seed(0)
    network = TinyInception().requires_grad_(False)
    monkeypatch.setattr(inception, "_network", lambda weights: network)
    (tmp_path / "weights.pth").write_bytes(b"weights")
    return network


@pytest.mark.parametrize("kind", ["adm", "mjhq"])
def test_inception_gives_pool_spatial_and_logits_without_the_bias(tiny, tmp_path, kind):
    pictures = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)
    network = inception.Inception(tmp_path / "weights.pth", kind)
    found = network(pictures)
    maps = tiny.Mixed_6d.branch1x1(tiny.Conv2d_1a_3x3(inception.preprocessed(pictures, kind)))
    pool = maps.tanh().mean((2, 3))
    assert torch.allclose(found.pool, pool, atol=1e-6)
    assert torch.allclose(found.logits, tiny.fc(pool) - tiny.fc.bias, atol=1e-6)
    h, w = maps.shape[-2:]
    assert torch.equal(found.spatial.view(3, h, w, 7)[1, 2, 5], maps[1, :7, 2, 5])
    assert inception.PREPROCESSINGS[kind] in network.name and "sha256" in network.name
    assert inception.Inception(tmp_path / "weights.pth", kind, spatial=False)(pictures)[1:] == (
        None, None
    )  # fmt: skip


def tim(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command(tiny, some, tmp_path, real):
    """On statistics of the tiny network's own features."""
    network = inception.Inception(tmp_path / "weights.pth", "adm")
    adm = reference(real[::25], network, tmp_path / "adm.npz")
    output = tmp_path / "out"
    command = ["imagenet", some, adm, "--output", output, "--num-samples", 40, "--device", "cpu"]
    refused = tim(*command)
    assert refused.exit_code == 1 and "--download-weights" in refused.stderr
    command += ["--inception-weights", tmp_path / "weights.pth", "--split", 20]
    done = tim(*command)
    assert done.exit_code == 0, done.output
    assert "TensorFlow-1 bilinear" in done.output and "splits: 2" in done.output
    metrics = json.loads((output / "result.json").read_text())["metrics"]
    assert "| all | " + " | ".join(f"{value:.4g}" for value in metrics.values()) in done.output
    one = tim(*command, "--metrics", "fid")
    assert one.exit_code == 0
    assert {path.name for path in output.glob("*.png")} == {"grid.png"}  # no score of a picture
    assert json.loads((output / "result.json").read_text())["metrics"] == {"fid": metrics["fid"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": "nowhere"}, "there is no folder nowhere"),
        # before any network is loaded
        ({"pictures": "nowhere", "--inception-weights": "none.pth"}, "there is no folder nowhere"),
        ({"reference": "nowhere.npz", "--inception-weights": "none.pth"}, "no file nowhere.npz"),
        ({"reference": "nowhere.npz"}, "there is no file nowhere.npz"),
        ({"--num-samples": 101}, "holds 100 of 101"),
        ({"--metrics": "fid,kid"}, "metrics are fid, sfid,"),
        ({"--batch-size": 0}, "batch_size must be at least 1"),
    ],
)
def test_the_command_refuses_in_one_line(tiny, some, adm, tmp_path, change, message):
    options = {
        "pictures": some, "reference": adm, "--num-samples": 100,
        "--output": tmp_path / "out", "--device": "cpu",
        "--inception-weights": tmp_path / "weights.pth",
    } | change  # fmt: skip
    pictures, reference_file = options.pop("pictures"), options.pop("reference")
    flat = [part for option in options.items() for part in option]
    refused = tim("imagenet", pictures, reference_file, *flat)
    assert refused.exit_code == 1
    (line,) = refused.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out" / "result.json").exists()


def test_several_runs_and_a_torn_record_are_refused(some, adm, network, tmp_path):
    """Before anything is measured."""
    shown = network.shown
    shutil.copytree(some, tmp_path / "all/one")
    (tmp_path / "all/one/run.json").write_text("{")
    with pytest.raises(ValueError, match="1 folders of tim generate: give one, such as .*one"):
        evaluate(tmp_path / "all", adm, network, count=100)
    for content, said in (("{", "run.json is not JSON"), ("[]", "run.json must be a JSON object")):
        (tmp_path / "all/one/run.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            evaluate(tmp_path / "all/one", adm, network, count=100)
    assert network.shown == shown


def test_other_references_of_one_name_are_told_apart(some, adm, network, tmp_path):
    with np.load(adm) as arrays:
        changed = {name: arrays[name] for name in arrays.files} | {"mu": arrays["mu"] + 1}
    np.savez(tmp_path / adm.name, **changed)
    for number, path in enumerate((adm, tmp_path / adm.name)):
        given = dict(count=100, metrics=("fid",), output=tmp_path / f"{number}")
        evaluate(some, path, network, **given)
    found = compare.read([tmp_path / "0", tmp_path / "1"], steps=[1, 1])
    assert compare.differences(found) == ["reference_checksum"]


def test_results_lie_apart_from_the_pictures(some, adm, network):
    with pytest.raises(ValueError, match="must lie outside the pictures' folder"):
        evaluate(some, adm, network, count=100, output=some / "results")
    assert not (some / "results").exists()


def test_missing_weights_point_to_the_page(some, adm, tmp_path):
    command = ["imagenet", some, adm, "--output", tmp_path / "out", "--num-samples", 100]
    refused = tim(*command, "--inception-weights", tmp_path / "nowhere.pth", "--device", "cpu")
    assert refused.exit_code == 1 and "nowhere.pth" in refused.stderr
    assert "see docs/evaluation.md" in refused.stderr
