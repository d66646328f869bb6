"""GenEval end to end: drawn objects, whose truth is known, in folders of every kind."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import drawn_objects
import pytest
from damaged import as_mode, cut
from drawn_objects import NAMES, RIGHT, detect, mean_colours
from PIL import Image

from tim.data.prompts import GENEVAL_TAGS, geneval
from tim.evaluation import judging
from tim.evaluation.geneval import check, evaluate, table

PER_TAG = 3
WANTED = 4 * PER_TAG * len(GENEVAL_TAGS)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of pictures, their prompts and the truth."""
    folder = tmp_path_factory.mktemp("drawn")
    of_tag = itertools.groupby(geneval(), key=lambda prompt: prompt.metadata["tag"])
    chosen = [prompt for _, prompts in of_tag for prompt in itertools.islice(prompts, PER_TAG)]
    lines = [json.dumps(prompt.metadata) for prompt in chosen]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    truth = drawn_objects.save(folder / "pictures", folder / "prompts.jsonl")
    return folder / "pictures", folder / "prompts.jsonl", truth


@pytest.fixture
def mine(drawn, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(drawn[0], tmp_path / "pictures")
    return tmp_path / "pictures", drawn[1]


def run(folder, prompts, output, detector=detect, **options):
    return evaluate(folder, output, detector, mean_colours, prompts=prompts, **NAMES, **options)


def rows(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def counting(calls: list, at: int | None = None):
    def detector(picture):
        if len(calls) == at:
            raise RuntimeError("the detector broke")
        calls.append(picture)
        return detect(picture)

    return detector


def test_the_truth_comes_out(drawn, tmp_path):
    folder, prompts, truth = drawn
    result = run(folder, prompts, tmp_path)
    found = rows(tmp_path)
    assert {row["filename"]: row["correct"] for row in found} == truth
    assert [row["filename"] for row in found] == sorted(truth)  # a stable order
    fields = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    for row in found:
        assert list(row) == fields and bool(row["reason"]) is not row["correct"]
        assert json.loads(row["metadata"])["prompt"] == row["prompt"]
        assert all(len(box) == 5 for of in json.loads(row["details"]).values() for box in of)
    accuracy = {tag: right / 4 for tag, right in RIGHT.items()}
    assert result["breakdown"]["accuracy"] == accuracy
    assert result["metrics"] == {
        "overall": pytest.approx(sum(accuracy.values()) / 6),
        "correct_pictures": pytest.approx(12 / 24),
        "correct_prompts": pytest.approx(5 / 6),
    }
    counts = {"pictures": WANTED, "asked": WANTED, "left_out": 0, "tags_missing": 0}
    assert counts.items() <= result["counts"].items()
    assert result["settings"]["detector"] == "rectangles" and result["versions"]["torch"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    wrong = sum(min(8, PER_TAG * (4 - right)) for right in RIGHT.values())
    right = sum(min(8, PER_TAG * right) for right in RIGHT.values())
    first = min(8, 4 * PER_TAG) * len(RIGHT)
    for name, shown in (("worst.png", wrong), ("best.png", right), ("grid.png", first)):
        with Image.open(tmp_path / name) as sheet:  # eight in a row
            assert sheet.size == (8 * 264, -(-shown // 8) * 282)


def test_the_reasons_say_what_is_wrong(drawn, tmp_path):
    folder, prompts, _ = drawn
    run(folder, prompts, tmp_path)
    reason = {row["tag"]: row["reason"] for row in rows(tmp_path) if not row["correct"]}
    words = {
        "two_object": ">=1, found 0", "counting": "<", "colors": "found 0", "position": " target",
        "color_attr": "\n",
    }  # fmt: skip
    assert reason.keys() == words.keys()
    assert all(word in reason[tag] for tag, word in words.items())


def test_the_table(drawn, tmp_path):
    folder, prompts, _ = drawn
    lines = table(run(folder, prompts, tmp_path)).splitlines()
    assert "| colors | 25.00 |" in lines
    assert "| overall, mean of the tags | 50.00 |" in lines
    assert lines[-2] == "detector rectangles"
    assert lines[-1] == f"{WANTED} of {WANTED} pictures judged"


def test_what_broke_goes_on(drawn, tmp_path):
    folder, prompts, _ = drawn
    with pytest.raises(RuntimeError, match="the detector broke"):
        run(folder, prompts, tmp_path, counting([], at=10))
    assert not (tmp_path / "results.jsonl").exists()
    done = tmp_path / "judged/process-0.jsonl"
    assert len(done.read_text().splitlines()) == 10
    done.write_bytes(done.read_bytes()[:-20])  # the last line torn
    calls = []
    result = run(folder, prompts, tmp_path, counting(calls))
    assert len(calls) == WANTED - 9
    whole = run(folder, prompts, tmp_path / "whole")
    assert result == whole
    assert rows(tmp_path) == rows(tmp_path / "whole")
    calls.clear()
    assert run(folder, prompts, tmp_path, counting(calls)) == whole and not calls


def test_other_pictures_and_other_settings_are_judged_anew(mine, tmp_path):
    folder, prompts = mine
    run(folder, prompts, tmp_path / "out")
    path = folder / "00000/samples/00000.png"
    Image.new("RGB", (64, 64), drawn_objects.GREY).save(path)
    calls = []
    result = run(folder, prompts, tmp_path / "out", counting(calls))
    assert len(calls) == 1
    assert result["breakdown"]["correct"]["single_object"] == 4 * PER_TAG - 1
    calls.clear()
    again = dict(detector_name="another", colours_name="mean", prompts=prompts)
    evaluate(folder, tmp_path / "out", counting(calls), mean_colours, **again)
    assert len(calls) == WANTED


def test_two_processes_one_of_them_killed(drawn, tmp_path):
    """What they had done is kept, and the result is that of one."""
    folder, prompts, _ = drawn
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [drawn_objects.__file__, folder, prompts, tmp_path / "two"]
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"}

    def launched(*more):
        command = [*map(str, (*launch, *arguments, *more))]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert launched(7).returncode != 0 and not (tmp_path / "two/result.json").exists()
    done = [
        json.loads(line)["picture"]
        for path in sorted((tmp_path / "two/judged").glob("process-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(done) == len({*done}) >= 6
    ended = launched()
    assert ended.returncode == 0, ended.stderr
    assert sum(json.loads((tmp_path / "two/seen.json").read_text())) == WANTED - len(done)
    assert json.loads((tmp_path / "two/result.json").read_text()) == run(
        folder, prompts, tmp_path / "one"
    )
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


def renamed(name):
    return lambda path: path.rename(path.with_name(name))


SAMPLE = "00002/samples/00001.png"


@pytest.mark.parametrize(
    "damage, where, message, lost",
    [
        (cut, SAMPLE, "samples/00001.png: image file is truncated.*1 in all", 1),
        (as_mode("L"), SAMPLE, "00001.png: it is L, not RGB .1 in all", 1),
        (as_mode("RGBA"), SAMPLE, "it is RGBA, not RGB", 1),
        (Path.unlink, SAMPLE, "00002 has 3 of 4 pictures", 1),
        (renamed("first.png"), SAMPLE, "00002/samples/first.png is no NUMBER.png", 1),
        (Path.unlink, "00003/metadata.jsonl", "00003/metadata.jsonl is missing", 4),
        (cut, "00003/metadata.jsonl", "00003/metadata.jsonl is no JSON", 4),
        (renamed("99999"), "00017", "99999 is no prompt's number, 00017 is missing .2 in all", 4),
        (renamed("cats"), "00017", "cats is no prompt's number", 4),
        (
            lambda path: path.write_text('{"tag": "counting", "include": [], "prompt": "a"}'),
            "00000/metadata.jsonl", "00000/metadata.jsonl is not that of 'a photo of a bench'", 4,
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_left_out_only_when_told(
    mine, tmp_path, damage, where, message, lost
):
    folder, prompts = mine
    damage(folder / where)
    with pytest.raises(ValueError, match=message):
        run(folder, prompts, tmp_path / "out")
    assert not (tmp_path / "out/result.json").exists()
    result = run(folder, prompts, tmp_path / "out", leave_out=True)
    assert result["counts"]["pictures"] == WANTED - lost
    assert result["counts"]["left_out"] == len(result["settings"]["left_out"]) > 0
    assert len(rows(tmp_path / "out")) == WANTED - lost


def test_more_pictures_than_asked(mine, tmp_path):
    folder, prompts = mine
    with pytest.raises(ValueError, match="00000 has 4 of 2 pictures, .*18 in all"):
        run(folder, prompts, tmp_path / "out", per_prompt=2)
    result = run(folder, prompts, tmp_path / "out", per_prompt=2, leave_out=True)
    assert result["counts"]["pictures"] == WANTED // 2
    assert result["breakdown"]["accuracy"]["counting"] == 1  # the first two
    with pytest.raises(ValueError, match="per_prompt must be at least 1"):
        run(folder, prompts, tmp_path / "out", per_prompt=0)


def test_a_missing_tag_is_said(mine, tmp_path):
    folder, prompts = mine
    for number in range(2 * PER_TAG, 3 * PER_TAG):
        shutil.rmtree(folder / f"{number:05d}")
    with pytest.raises(ValueError, match="00006 is missing, 00007 is missing, 00008 is missing"):
        check(folder, tmp_path / "out", prompts=prompts)
    check(folder, tmp_path / "out", prompts=prompts, leave_out=True)
    result = run(folder, prompts, tmp_path / "out", leave_out=True)
    assert result["settings"]["tags_missing"] == ["counting"]
    assert result["counts"]["tags_missing"] == 1
    assert "the mean is without counting: not GenEval's score" in table(result)


def test_any_number_of_digits(mine, tmp_path):
    """As the benchmark describes it."""
    folder, prompts = mine
    for path in [*folder.glob("*/samples/*.png")]:
        path.rename(path.with_name(f"{path.stem[1:]}.png"))
    result = run(folder, prompts, tmp_path / "out")
    assert result["counts"]["pictures"] == WANTED and result["counts"]["left_out"] == 0


def test_prompts_of_ones_own_must_be_judgeable(drawn, tmp_path):
    wrong = '{"tag": "colors", "include": [{"class": "dog"}], "prompt": "a dog"}'
    (tmp_path / "wrong.jsonl").write_text(wrong)
    with pytest.raises(ValueError, match="prompt 00000, 'a dog': no 'count'"):
        run(drawn[0], tmp_path / "wrong.jsonl", tmp_path / "out")


def test_the_same_folder_twice(mine, tmp_path):
    folder, prompts = mine
    shutil.copytree(folder / "00000", folder / "0")
    with pytest.raises(ValueError, match="00000 is 0 once more"):
        run(folder, prompts, tmp_path / "out")


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        run(tmp_path / "nowhere", None, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no folder of a prompt; it must be FOLDER/00000"):
        run(tmp_path / "empty", None, tmp_path / "out")


def test_results_do_not_go_among_the_pictures(drawn):
    for output in (drawn[0], drawn[0] / "results"):
        with pytest.raises(ValueError, match="must lie outside the pictures' folder"):
            run(drawn[0], drawn[1], output)
        assert not (output / "judged").exists()


def test_nothing_left_to_judge(mine, tmp_path):
    folder, prompts = mine
    for path in folder.glob("*/samples/*.png"):
        cut(path)
    with pytest.raises(ValueError, match="no picture was judged"):
        run(folder, prompts, tmp_path / "out", leave_out=True)
    assert not (tmp_path / "out/results.jsonl").exists()


def test_an_object_has_one_colour(drawn, tmp_path):
    with pytest.raises(ValueError, match="colours must be one for each of 1 objects, got .'red', "):
        names = dict(NAMES, prompts=drawn[1])
        evaluate(drawn[0], tmp_path, detect, lambda *_: ["red", "blue"], **names)


def test_a_function_needs_a_name(drawn, tmp_path):
    with pytest.raises(ValueError, match="a detector of your own needs detector_name="):
        evaluate(drawn[0], tmp_path, detect, mean_colours, prompts=drawn[1])


@pytest.mark.parametrize("place", ["score", "box"])
def test_what_a_detector_computes_must_be_finite(drawn, tmp_path, place):
    """It would be no object, and the picture wrong."""
    folder, prompts, _ = drawn
    wrong = drawn_objects.draw(geneval()[1].metadata, True).tobytes()

    def broken(picture):
        found = detect(picture)
        if picture.tobytes() != wrong:
            return found
        change = {"score": math.nan} if place == "score" else {"box": (math.nan, 0, 1, 1)}
        return [each._replace(**change) for each in found]

    with pytest.raises(ValueError, match=r"00001/samples/00000.png: .* not finite.*4 in all"):
        run(folder, prompts, tmp_path / "out", broken)
    result = run(folder, prompts, tmp_path / "out", broken, leave_out=True)
    assert result["counts"]["pictures"] == WANTED - 4 and result["counts"]["left_out"] == 4
    assert run(folder, prompts, tmp_path / "out")["counts"]["pictures"] == WANTED


def test_pictures_are_read_while_others_are_judged(drawn, tmp_path, monkeypatch):
    """The second is asked for before the first is judged."""
    read, seen = judging.picture, threading.Event()
    names = []

    def reading(path):
        names.append(path)
        if len(names) > WANTED + 1:  # all are looked at once before
            seen.set()
        return read(path)

    def detector(picture):
        assert seen.wait(60)
        return detect(picture)

    monkeypatch.setattr(judging, "picture", reading)
    run(*drawn[:2], tmp_path, detector)


def test_a_folder_of_several_runs_is_refused(mine, tmp_path):
    folder, prompts = mine
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="1 folders of tim generate: give one, such as .*pictures"):
        run(folder.parent, prompts, tmp_path / "out")


@pytest.mark.nightly
def test_all_553_prompts(tmp_path):
    truth = drawn_objects.save(tmp_path / "pictures", None)
    result = run(tmp_path / "pictures", None, tmp_path / "out")
    assert {row["filename"]: row["correct"] for row in rows(tmp_path / "out")} == truth
    assert result["counts"]["pictures"] == 4 * 553 == len(truth)
    assert Counter(row["tag"] for row in rows(tmp_path / "out"))["color_attr"] == 400
    assert result["metrics"]["overall"] == pytest.approx(12 / 24)
