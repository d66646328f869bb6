"""Inception with random weights beside torch-fidelity's own use of it: `make inception`.

torch-fidelity needs torchvision, which is not there beside a CPU build of torch. Nothing is skipped
where these tests are asked for: without either they fail.
"""

import json
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from tim.app.cli import app
from tim.evaluation import spatial_features
from tim.evaluation.features import measure, work_folder
from tim.evaluation.imagenet import evaluate
from tim.evaluation.inception import Inception, preprocessed, tensorflow_bilinear
from tim.evaluation.pictures import Folder, Npz
from tim.evaluation.scores import inception_score, precision_recall

pytestmark = pytest.mark.inception
MODULE = "torch_fidelity.feature_extractor_inceptionv3"


@pytest.fixture(scope="module")
def theirs():
    """torch-fidelity's class."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    """A file like the published one, of random weights that keep the size of features."""
    torch.manual_seed(0)
    with patch.object(theirs, "load_state_dict"), patch(f"{MODULE}.load_state_dict_from_url"):
        network = theirs("random", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def levels():
    noise = np.random.default_rng(0)
    coarse = noise.integers(0, 256, (12, 8, 8, 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)  # (12, 64, 64, 3)


@pytest.fixture(scope="module")
def pictures(levels):
    return torch.from_numpy(levels).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def network(weights):
    return Inception(weights, "adm")


@pytest.mark.parametrize("size", [(64, 64), (299, 299), (512, 300), (33, 900)])
def test_the_resize_is_theirs_to_the_bit(theirs, size):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as resize,
    )

    picture = torch.randint(0, 256, (2, 3, *size)).float()
    expected = resize(picture, size=(299, 299), align_corners=False)
    assert torch.equal(tensorflow_bilinear(picture, 299, 299), expected)


def test_features_are_theirs(theirs, network, weights, pictures):
    maps = []
    own = theirs("own", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    own.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
    pool, logits = own(pictures)
    found = network(pictures)
    assert pool.std(0).mean() > 1e-3  # not all alike
    assert found.pool.shape == (12, 2048) and torch.equal(found.pool, pool)
    assert found.logits.shape == (12, 1008) and torch.equal(found.logits, logits)
    assert found.spatial.shape == (12, 2023)
    assert torch.equal(found.spatial, maps[0][:, :7].permute(0, 2, 3, 1).reshape(12, -1))
    assert torch.equal(found.spatial, spatial_features(maps[0]))


def test_the_other_preprocessing_goes_into_the_same_network(theirs, weights, pictures):
    own = theirs("own", ["2048"], feature_extractor_weights_path=str(weights))

    def as_they_expect_it(levels, **options):
        return preprocessed(levels.byte(), "mjhq") * 128 + 128

    with patch(f"{MODULE}.interpolate_bilinear_2d_like_tensorflow1x", as_they_expect_it):
        (expected,) = own(pictures)
    found = Inception(weights, "mjhq", spatial=False)(pictures)
    assert torch.allclose(found.pool, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert not torch.allclose(found.pool, own(pictures)[0], rtol=1e-3, atol=1e-3)
    assert found.spatial is None and found.logits is None


def test_both_doors_give_the_same_features(network, levels, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, picture in enumerate(levels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    np.savez(tmp_path / "samples.npz", arr_0=levels)
    found = []
    for pictures in (Folder(folder), Npz(tmp_path / "samples.npz")):
        with work_folder(None) as work:
            measured = measure(pictures, network, work, batch_size=5)
            found.append([measured.joined(kind) for kind in ("pool", "spatial", "logits")])
    assert all(map(torch.equal, *found))


def test_scores_are_theirs(network, pictures):
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    logits = network(pictures).logits
    (score,) = (
        value for name, value in isc_features_to_metric(logits, splits=3, shuffle=False).items()
        if name.endswith("mean")
    )  # fmt: skip
    assert inception_score(logits, 3) == pytest.approx(score, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    reference, samples = (torch.randn(n, 16, generator=generator) for n in (300, 200))
    precision, recall = calculate_precision_recall_part(samples, reference, 3, 64)
    ours = precision_recall(reference, samples)
    assert ours[:2] == pytest.approx((float(precision), float(recall)), abs=1e-6)


def test_the_commands(weights, network, levels, pictures, tmp_path):
    """Of pictures against their own statistics: FID and sFID 0, precision and recall 1."""
    seen = network(pictures)
    statistics = {}
    for end, rows in (("", seen.pool), ("_s", seen.spatial)):
        statistics[f"mu{end}"] = rows.double().mean(0).numpy()
        statistics[f"sigma{end}"] = np.cov(rows.double().numpy(), rowvar=False)
    np.savez(tmp_path / "reference.npz", arr_0=levels, **statistics)
    given = ["--inception-weights", weights, "--device", "cpu"]
    given += ["--output", tmp_path / "out"]
    reference = tmp_path / "reference.npz"
    command = ["imagenet", reference, reference, "--num-samples", 12]
    done = CliRunner().invoke(app, [*map(str, ["evaluate", *command, *given])])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    spread = float(seen.pool.double().var(0).sum())
    assert abs(found["fid"]) < 1e-6 * spread and found["precision"] == found["recall"] == 1
    assert 1 <= found["inception_score"] <= 12 and math.isfinite(found["sfid"])
    for number, picture in enumerate(levels):
        (tmp_path / "samples/art").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"samples/art/{number}.png")
    items = {str(number): {"category": "art", "prompt": "a"} for number in range(12)}
    (tmp_path / "meta_data.json").write_text(json.dumps(items))
    command = [
        "mjhq", tmp_path / "samples", "--meta-data", tmp_path / "meta_data.json",
        "--reference", tmp_path / "samples", "--metrics", "fid",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*map(str, ["evaluate", *command, *given])])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert abs(result["metrics"]["fid"]) < 1e-6 * spread
    assert "antialiasing to 299²" in result["settings"]["inception"]


class Harmful:
    def __reduce__(self):
        return print, ("code of a weights file ran",)


def test_other_weights_are_refused(theirs, tmp_path, capsys):
    for content in ({"weight": torch.zeros(3)}, {"weight": Harmful()}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="holds no weights of this Inception"):
            Inception(tmp_path / "other.pth", "adm")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no weights of this Inception"):
        Inception(tmp_path / "other.pth", "adm")
    assert "code of a weights file ran" not in capsys.readouterr().out


def test_a_stream_is_measured_without_files(network, pictures, tmp_path):
    seen = network(pictures).pool.double()
    np.savez(tmp_path / "own.npz", mu=seen.mean(0), sigma=np.cov(seen.numpy(), rowvar=False))
    found = evaluate(iter(pictures), tmp_path / "own.npz", network, count=12, metrics=("fid",))
    assert abs(found["metrics"]["fid"]) < 1e-6 * float(seen.var(0).sum())
