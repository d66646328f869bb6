"""What `tim generate` leaves goes through the evaluation of its kind as it is, and into compare."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_folders import TEXTS, captions, drawn
from torch.nn.functional import normalize

from tim.evaluation import compare, dpg, geneval, imagenet, mjhq
from tim.evaluation.features import Features

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = "item_id,proposition_id,dependency,tuple,question_natural_language"


class Means:
    """Mean levels as features, of pictures as of texts."""

    name = "means"

    def __call__(self, pictures):
        return Features(normalize(pictures.double().mean((2, 3)).float(), dim=1))

    def texts(self, prompts):
        return normalize(torch.ones(len(prompts), 3), dim=1)


def of_imagenet(folder, output, tmp_path):
    pictures = np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))])
    rows = Means()(torch.from_numpy(pictures).movedim(-1, 1)).pool.double()
    statistics = dict(mu=rows.mean(0).numpy(), sigma=rows.T.cov().numpy())
    np.savez(tmp_path / "reference.npz", arr_0=pictures, **statistics)
    metrics = "fid", "precision", "recall"
    return imagenet.evaluate(
        folder, tmp_path / "reference.npz", Means(), count=6, metrics=metrics, output=output
    )


def of_mjhq(folder, output, tmp_path):
    given = dict(reference=folder, inception=Means(), clip=Means())
    return mjhq.evaluate(folder, captions("mjhq", tmp_path, TEXTS), output=output, **given)


def of_geneval(folder, output, tmp_path):
    names = dict(detector_name="none", colours_name="none")
    prompts = captions("geneval", tmp_path, TEXTS)
    return geneval.evaluate(folder, output, lambda _: [], lambda *_: [], prompts=prompts, **names)


def of_dpg(folder, output, tmp_path):
    lines = [f"item{i},1,0,entity - whole (cat),Is there a cat?" for i in range(len(TEXTS))]
    (tmp_path / "questions.csv").write_text("\n".join([HEAD, *lines]))
    return dpg.evaluate(
        folder, tmp_path / "questions.csv", output, lambda *_: "yes", vqa_name="yes"
    )


@pytest.mark.parametrize(
    "evaluate, expected, pictures",
    [
        (of_imagenet, {"fid": 0, "precision": 1, "recall": 1}, 6), (of_mjhq, {"fid": 0}, 4),
        (of_geneval, {"overall": 1}, 16), (of_dpg, {"dpg_score": 100}, 16),
    ],
)  # fmt: skip
def test_a_folder_of_tim_generate(tmp_path, evaluate, expected, pictures):
    name = evaluate.__name__.removeprefix("of_")
    options = dict(num_fid_samples=6) if name == "imagenet" else {}
    folder = drawn(name, tmp_path / "samples", **options)
    leftover = folder / ".partial-killed" / folder.name
    leftover.mkdir(parents=True)  # of a killed run
    (leftover / "half.png").write_bytes(b"half of a pict")
    result = evaluate(folder, tmp_path / "result", tmp_path)
    for metric, value in expected.items():
        assert result["metrics"][metric] == pytest.approx(value, abs=1e-6)
    assert result["counts"]["pictures"] == result["counts"]["asked"] == pictures
    assert result["counts"]["left_out"] == 0
    assert result["run"] == json.loads((folder / "run.json").read_text())
    (found,) = compare.read([Path(tmp_path / "result")])
    assert (found.label, found.steps) == ("guidance 1.5", 2) and found.metrics == result["metrics"]
    for sheet in ("grid", "best"):
        assert (tmp_path / f"result/{sheet}.png").is_file()
