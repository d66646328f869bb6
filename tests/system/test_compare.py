"""Results side by side: what the table and the plot say, and what is refused."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from tim.app.cli import app
from tim.evaluation import compare, report


def tim(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def result(folder, name, steps, benchmark="imagenet", checkpoint="net.safetensors", **metrics):
    path = folder / f"{name}.json"
    settings = {"num_steps": steps, "height": 256, "width": 256, "checkpoint": checkpoint}
    run = {"settings": settings | {"cfg_scale": 1.5}} if steps else None
    report.write(path, benchmark, metrics, settings={}, counts={"pictures": 4}, run=run)
    return path


def test_the_table_has_each_result_and_the_published_figures_of_its_size(tmp_path):
    files = [
        result(tmp_path, "one", 1, fid=7.5, recall=0.5),
        result(tmp_path, "many", 250, fid=2.25),
        result(tmp_path, "mine", 4, "geneval", overall=0.5),
    ]
    ended = tim("compare", *files)
    assert ended.exit_code == 0, ended.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.output.split("\n")]
    assert ["imagenet", "steps", "fid", "recall"] in lines
    assert ["one", "1", "7.5", "0.5"] in lines and ["many", "250", "2.25", "–"] in lines
    assert ["TiM, arXiv 2509.04394, 1 step", "–", "6.14", "–"] in lines
    assert ["TiM, arXiv 2509.04394, 250 guided steps", "–", "1.65", "–"] in lines
    assert ["mine", "4", "0.5"] in lines
    assert ["TiM, arXiv 2509.04394, 64 guided steps", "–", "0.83"] in lines
    assert "4.79" not in ended.output  # of pictures of 512 px


def test_the_plot_joins_what_differs_in_steps_alone(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, dotted = [], []
    plot, line = Axes.plot, Axes.axhline
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.append((a[1:], k)) or plot(*a, **k))
    monkeypatch.setattr(Axes, "axhline", lambda *a, **k: dotted.append((a[1], k)) or line(*a, **k))
    files = [
        result(tmp_path, "b", 8, fid=3.0),
        result(tmp_path, "a", 1, fid=7.0),
        result(tmp_path, "other", 1, checkpoint="second.bin", fid=9.0),
    ]
    output = tmp_path / "steps.png"
    assert tim("compare", *files, "--output", output).exit_code == 0
    assert [arguments for arguments, _ in drawn] == [((1, 8), (7.0, 3.0)), ((1,), (9.0,))]
    labels = [options["label"] for _, options in drawn]
    assert labels == ["net, guidance 1.5", "second, guidance 1.5"]
    assert [(value, options["ls"]) for value, options in dotted] == [(6.14, ":"), (1.65, ":")]
    assert Image.open(output).size == (720, 480)


def test_what_is_no_result_is_refused(tmp_path):
    ended = tim("compare", tmp_path / "none.json")
    assert ended.exit_code == 1 and "there is no result" in ended.output
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"benchmark": "imagenet"')
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"benchmark": "cifar", "metrics": {}, "run": None}))
    for name in ("list", "half", "other"):
        with pytest.raises(ValueError, match=f"{name}.json"):
            compare.read(tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match="no fid, got recall"):
        compare.tables([compare.read(result(tmp_path, "lacks", 1, recall=0.5))])


def test_a_plot_needs_the_number_of_steps(tmp_path):
    path = result(tmp_path, "unknown", None, fid=1.0)
    ended = tim("compare", path, "--output", tmp_path / "plot.png")
    assert ended.exit_code == 1 and "how many steps" in ended.output
    assert not (tmp_path / "plot.png").exists()


def test_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="fid = nan"):
        result(tmp_path, "nan", 1, fid=float("nan"))
    assert not (tmp_path / "nan.json").exists()
