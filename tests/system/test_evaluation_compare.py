"""Results side by side."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from tim.app.cli import app
from tim.evaluation import compare, report


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(path, metrics, *, benchmark="imagenet", network="Inception", **run):
    run = {"settings": run} if run else None
    report.write(
        path, benchmark, metrics, settings={"network": network, "pictures": str(path)}, counts={},
        run=run,
    )  # fmt: skip
    return path


def test_steps_and_labels_come_from_the_run(folder):
    for steps, scale, fid in ((8, 1.0, 3.0), (1, 1.0, 6.0), (1, 2.5, 5.0)):
        name = f"{steps}-{scale}.json"
        result(name, {"fid": fid, "recall": 0.5}, num_steps=steps, cfg_scale=scale, height=256)
    found = compare.read(["8-1.0.json", "1-1.0.json", "1-2.5.json"])
    assert [each[:2] for each in found] == [
        ("guidance 1", 1),
        ("guidance 1", 8),
        ("guidance 2.5", 1),
    ]
    assert compare.table(found).splitlines() == [
        "|  | steps | fid | recall |", "| :--- | ---: | ---: | ---: |",
        "| guidance 1 | 1 | 6 | 0.5 |", "| guidance 1 | 8 | 3 | 0.5 |",
        "| guidance 2.5 | 1 | 5 | 0.5 |",
        "| TiM 256², arXiv 2509.04394 | 1 | 6.14 | – |",
        "| TiM 256², arXiv 2509.04394 | 250 | 1.65 | – |",
    ]  # fmt: skip
    assert compare.differences(found) == []


@pytest.mark.parametrize(
    ("suite", "metric", "side", "values"),
    [
        ("geneval", "overall", 1024, {1: 0.67, 4: 0.76, 64: 0.83}),
        ("imagenet", "fid", 512, {1: 4.79, 250: 1.69}),
        ("imagenet", "recall", 512, None),
        ("imagenet", "fid", 64, None),
        ("mjhq", "fid", 512, None),
    ],
)
def test_published_figures(folder, suite, metric, side, values):
    result("one.json", {metric: 1.0}, benchmark=suite, num_steps=1, height=side)
    found = compare.published(compare.read(["one.json"]), metric)
    assert list(found.values()) == ([] if values is None else [values])


def test_the_command(folder):
    for steps in (1, 4):
        result(f"{steps}.json", {"fid": 9.0 / steps, "recall": 0.5})
    given = ["compare", "1.json", "4.json", "--output", "both.png"]
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 1 and "does not say its number of steps" in refused.stderr
    given += ["--steps", "1", "--steps", "4"]
    done = CliRunner().invoke(app, [*given, "--label", "ours", "--label", "ours"])
    assert done.exit_code == 0, done.output
    assert "| ours | 4 | 2.25 | 0.5 |" in done.output and "not measured alike" not in done.output
    both = Image.open("both.png").width
    one = CliRunner().invoke(app, [*given, "--metric", "fid"])
    assert one.exit_code == 0 and Image.open("both.png").width < both
    unknown = CliRunner().invoke(app, [*given, "--metric", "recal"])
    assert unknown.exit_code == 1 and "did you mean recall" in unknown.stderr


def test_what_does_not_compare(folder):
    result("one.json", {"fid": 1.0}, num_steps=1)
    result("other.json", {"fid": 1.0}, network="another", num_steps=2)
    result("mjhq.json", {"fid": 1.0}, benchmark="mjhq", num_steps=2)
    assert compare.differences(compare.read(["one.json", "other.json"])) == ["network"]
    done = CliRunner().invoke(app, ["compare", "one.json", "other.json"])
    assert "not measured alike, so not to be compared: network" in done.output
    with pytest.raises(ValueError, match="one benchmark, got imagenet, mjhq"):
        compare.read(["one.json", "mjhq.json"])
    with pytest.raises(ValueError, match="need as many labels, got 1"):
        compare.read(["one.json", "other.json"], labels=["a"])
    with pytest.raises(FileNotFoundError, match="there is no result nowhere.json"):
        compare.read(["nowhere.json"])
    for content in ("{", "[]", json.dumps({"metrics": {}})):
        (folder / "wrong.json").write_text(content)
        with pytest.raises(ValueError, match="is no result of"):
            compare.read(["wrong.json"])
