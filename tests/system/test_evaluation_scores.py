"""FID, Inception score, precision and recall: golden values, exact ones, refusals."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from safetensors.torch import load_file

from tim.evaluation import (
    frechet_distance,
    inception_score,
    precision_recall,
    spatial_features,
)
from tim.evaluation.clip import cosines
from tim.evaluation.clip import preprocessed as for_clip
from tim.evaluation.inception import antialiased_bilinear, preprocessed, tensorflow_bilinear
from tim.evaluation.scores import squared_radii
from tim.evaluation.statistics import Moments, distance

FOLDER = GOLDEN / "evaluation"
ARRAYS = load_file(FOLDER / "arrays.safetensors")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def moments(rows, batch=17):
    found = Moments()
    for part in rows.split(batch):
        found.add(part)
    return found


def fid(one, other):
    return distance(moments(one), moments(other))


def sets_of_features():
    full = ARRAYS["fid_full_a"], ARRAYS["fid_full_b"]
    dead = [each[:120].clone() for each in full]
    for each in dead:
        each[:, :9] = 0
    return {
        "full": full,
        "rank": (ARRAYS["fid_rank_a"], ARRAYS["fid_rank_b"]),
        "shift": (full[0][:200], full[0][:200] + 0.25),
        "same": (full[0][:150], full[0][:150]),
        "constant": dead,
    }


@pytest.mark.parametrize("name", sets_of_features())
def test_fid_is_golden_and_exact(name):
    found = fid(*sets_of_features()[name])
    assert found == pytest.approx(EXPECTED[f"fid_{name}"], rel=1e-6, abs=1e-6)
    assert found == pytest.approx(EXPECTED[f"fid_{name}_exact"], rel=1e-7, abs=1e-12)
    if name in ("full", "rank"):
        assert found == pytest.approx(EXPECTED[f"mjhq_fid_{name}"], rel=1e-6)


def test_moments_are_those_of_all_rows_at_once():
    rows = ARRAYS["fid_full_a"].double()
    ours = moments(rows, 7)
    assert torch.allclose(ours.mean, rows.mean(0), rtol=1e-13)
    assert torch.allclose(ours.covariance, rows.T.cov(), rtol=1e-12, atol=1e-15)
    halves = [moments(rows[:123]), moments(rows[123:])]
    halves[0].update(halves[1])
    halves[0].update(Moments())
    assert torch.allclose(halves[0].covariance, rows.T.cov(), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="two pictures or more, got 1"):
        moments(rows[:1]).covariance  # noqa: B018


@pytest.mark.parametrize("rows", [5, 40, 300])
def test_frechet_distance_where_features_are_few_and_uneven(rows):
    """Beside the sum of singular values of the features themselves, which squares nothing."""
    generator = torch.Generator().manual_seed(rows)
    spread = torch.logspace(0, -6, 96, dtype=torch.float64)
    one, other = (
        torch.randn(rows, 96, generator=generator, dtype=torch.float64) * spread for _ in range(2)
    )
    a, b = ((x - x.mean(0)) / math.sqrt(rows - 1) for x in (one, other))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    exact = (one.mean(0) - other.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    assert fid(one, other) == pytest.approx(float(exact - 2 * cross), rel=1e-7)


def test_frechet_distance_refuses_what_is_no_gaussian():
    mu, sigma = torch.zeros(3), torch.eye(3)
    assert frechet_distance(mu.numpy(), sigma.numpy(), mu, 4 * sigma) == pytest.approx(3)
    with pytest.raises(ValueError, match=r"mu1 must be \(D,\)"):
        frechet_distance(mu, torch.eye(2), mu, sigma)
    with pytest.raises(ValueError, match="sigma2 must be finite, got 1 NaN"):
        wrong = sigma.clone()
        wrong[1, 1] = math.nan
        frechet_distance(mu, sigma, mu, wrong)
    with pytest.raises(ValueError, match="as many features, got 3 and 2"):
        frechet_distance(mu, sigma, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="negative variance"):
        frechet_distance(mu, -sigma, mu, sigma)


def test_sfid_and_both_against_a_reference_file():
    spatial = [
        spatial_features(ARRAYS[name].permute(0, 3, 1, 2)) for name in ("spatial_a", "spatial_b")
    ]
    assert spatial[0].shape[1] == 3 * 3 * 7
    assert fid(*spatial) == pytest.approx(EXPECTED["sfid"], rel=1e-6)
    with np.load(FOLDER / "reference.npz") as reference:
        for name, rows, keys in (
            ("fid", ARRAYS["fid_full_a"], ("mu", "sigma")),
            ("sfid", spatial[0], ("mu_s", "sigma_s")),
        ):
            ours = moments(rows)
            found = frechet_distance(ours.mean, ours.covariance, *(reference[key] for key in keys))
            assert found == pytest.approx(EXPECTED[f"{name}_to_reference"], rel=1e-6)
    with pytest.raises(ValueError, match=r"7 or more"):
        spatial_features(torch.zeros(2, 6, 3, 3))


def test_inception_score_is_golden():
    logits = ARRAYS["is_features"] @ ARRAYS["is_weights"]
    assert torch.allclose(logits.softmax(1), ARRAYS["is_rows"], atol=1e-6)
    size, used = EXPECTED["is_split_size"], EXPECTED["is_rows_used_with_whole_splits"]
    whole = inception_score(logits[:used], used // size)
    assert whole == pytest.approx(EXPECTED["is_whole_splits"], rel=1e-6)
    parts = [inception_score(part) for part in logits.split(size)]  # the last is short
    assert sum(parts) / len(parts) == pytest.approx(EXPECTED["is_split_exact"], rel=1e-6)
    assert inception_score(logits) == pytest.approx(EXPECTED["is_one_split_exact"], rel=1e-6)
    sure = ARRAYS["is_zero_rows"].log().clamp_min(-1e4)  # probabilities that float32 holds as 0
    assert inception_score(sure) == pytest.approx(EXPECTED["is_zeros_exact"], rel=1e-6)


def test_inception_score_refuses_parts_of_splits():
    with pytest.raises(ValueError, match="multiple of splits = 3"):
        inception_score(torch.zeros(10, 4), 3)
    with pytest.raises(ValueError, match="must be finite"):
        inception_score(torch.full((2, 4), math.nan))


@pytest.mark.parametrize("name", ["", "single_", "ties_"])
def test_precision_and_recall_are_golden(name, monkeypatch):
    scale = 512 if name == "single_" else 1
    group = "pr_ties_" if name == "ties_" else "pr_"
    sets = [ARRAYS[f"{group}{kind}"] * scale for kind in ("ref", "sample")]
    for blocks in ((2048, 8192), (32, 48), (7, 3)):
        monkeypatch.setattr("tim.evaluation.scores._ROWS", blocks[0])
        monkeypatch.setattr("tim.evaluation.scores._COLUMNS", blocks[1])
        found = precision_recall(*sets)
        assert found.precision == EXPECTED[f"pr_{name}precision_exact"]
        assert found.recall == EXPECTED[f"pr_{name}recall_exact"]
        if name:
            for kind, rows in zip(("ref", "sample"), sets, strict=True):
                golden = ARRAYS[f"pr_{name}radii_{kind}"].double()
                assert torch.allclose(squared_radii(rows), golden, rtol=1e-5, atol=0)


def by_hand(reference, samples, k):
    """All differences in float64."""

    def distances(one, other):
        return (one.double()[:, None] - other.double()).square().sum(-1)

    radii = [distances(each, each).sort(1).values[:, k] for each in (reference, samples)]
    between = distances(reference, samples)
    precision = (between <= radii[0][:, None]).any(0).double().mean().item()
    return precision, (between <= radii[1]).any(1).double().mean().item()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_of_copies(k, monkeypatch):
    """Copied rows lie on the edges of balls, where rounding would decide."""
    monkeypatch.setattr("tim.evaluation.scores._COLUMNS", 37)
    generator = torch.Generator().manual_seed(k)
    reference = torch.randn(60, 33, generator=generator) + 100
    samples = torch.cat([reference[:20], torch.randn(30, 33, generator=generator) + 100.3])
    samples = torch.cat([samples, samples[-1:].expand(k + 2, -1), reference[5:6].expand(k, -1)])
    found = precision_recall(reference, samples, k)
    assert (found.precision, found.recall) == by_hand(reference, samples, k)
    assert 0 < found.recall < 1
    assert precision_recall(reference, reference, k)[:2] == (1, 1)


def test_realism_is_one_at_the_edge_of_a_ball():
    reference = torch.tensor(
        [[0.0], [1.0], [10.0], [12.0]]
    )  # radii 1, 1, 2, 2; the small half counts
    samples = torch.tensor([[2.0], [-0.5], [11.0], [7.0]])
    found = precision_recall(reference, samples, 1)
    assert torch.allclose(found.realism, torch.tensor([1, 2, 1 / 10, 1 / 6]).double())
    assert found.precision == 0.75


def test_precision_and_recall_refuse_too_few():
    rows = torch.randn(10, 4)
    with pytest.raises(ValueError, match="reference must be .* more than k = 3 rows"):
        precision_recall(rows[:3], rows)
    with pytest.raises(ValueError, match="samples must be .* more than k = 3 rows"):
        precision_recall(rows, rows[:3])
    with pytest.raises(ValueError, match="as many features"):
        precision_recall(rows, rows[:, :3])
    with pytest.raises(ValueError, match="samples must be finite"):
        precision_recall(rows, rows * math.inf)


def test_resizes_are_golden():
    for name in ("up", "down"):
        pictures = ARRAYS[f"resize_{name}_in"].permute(0, 3, 1, 2)
        expected = ARRAYS[f"resize_{name}_out"].permute(0, 3, 1, 2)
        found = tensorflow_bilinear(pictures.float(), *expected.shape[-2:])
        assert torch.allclose(found, expected, atol=1e-4, rtol=0)
        plain = torch.nn.functional.interpolate(
            pictures.float(), expected.shape[-2:], mode="bilinear"
        )
        assert not torch.allclose(plain, expected, atol=1)
    picture = ARRAYS["antialias_in"].permute(2, 0, 1)[None]
    found = antialiased_bilinear(picture.float() / 255, 24, 24)[0]
    assert torch.allclose(found, ARRAYS["antialias_out"], atol=1e-6, rtol=0)
    assert torch.allclose(
        for_clip(picture, 24)[0], ARRAYS["antialias_normalised"], atol=1e-6, rtol=0
    )


def test_what_inception_sees():
    """Levels of flat pictures after both preprocessings."""
    flat = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 16, 20)
    for kind, levels in (("adm", [-1, 0, 127 / 128]), ("mjhq", [-1, 1 / 255, 1])):
        seen = preprocessed(flat, kind)
        assert seen.shape == (3, 3, 299, 299)
        assert torch.allclose(seen.amax((1, 2, 3)), torch.tensor(levels), atol=1e-6)
        assert torch.allclose(seen.amin((1, 2, 3)), torch.tensor(levels), atol=1e-6)


def test_clip_score_is_golden():
    images, texts = ARRAYS["clip_image"], ARRAYS["clip_text"]
    found = 100 * cosines(images, texts).mean().item()
    assert found == pytest.approx(EXPECTED["clip_all"], rel=1e-6)
    assert found == pytest.approx(EXPECTED["clip_exact"], rel=1e-9)
    with pytest.raises(ValueError, match="one CLIP"):
        cosines(images, texts[:, :4])


@pytest.mark.nightly
def test_fid_of_fifty_thousand_takes_seconds(one_thread):
    """Of one core; what else runs does not count."""
    rows = torch.randn(1000, 2048)
    started, found = time.process_time(), Moments()
    for shift in range(50):
        found.add(rows + shift)
    assert distance(found, found) == pytest.approx(0, abs=1e-6 * float(found.covariance.trace()))
    assert time.process_time() - started < 30


@pytest.mark.nightly
def test_precision_and_recall_of_fifty_thousand_stay_small(tmp_path):
    """In a process of its own, features and libraries included."""
    script = """
import resource, torch
from tim.evaluation import precision_recall
reference, samples = torch.randn(10_000, 2048), torch.randn(50_000, 2048)
found = precision_recall(reference, samples)
assert 0 <= found.precision <= 1 and 0 <= found.recall <= 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 2  # GiB
