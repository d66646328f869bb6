"""DPG-Bench: golden scores, and pictures that say which they are, in folders of every kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_judges
from coded_pictures import ANSWERS, ITEMS, QUESTIONS, answer, save
from damaged import as_mode, cut
from golden_files import GOLDEN
from PIL import Image
from typer.testing import CliRunner

from tim.app.cli import app
from tim.evaluation import compare, report
from tim.evaluation.dpg import boxes, check, evaluate, questions, score, table

EXPECTED = json.loads((GOLDEN / "evaluation/dpg_expected.json").read_text())
COUNT = {4: "pic_num_4", 1: "pic_num_1"}
ROW = 'a,"a text",,1,0,entity,whole,"entity - whole (cup)",Is there a cup?\n'
HEAD = QUESTIONS.read_text().splitlines()[0] + "\n"


@pytest.fixture(scope="module")
def asked():
    return questions.read(QUESTIONS)


def golden_answers(asked, pictures):
    """{item: [[answer of each question] of each picture]}."""
    return {
        item: [[of[str(k)][str(q.number)] for q in asked[item]] for k in range(pictures)]
        for item, of in ANSWERS.items()
    }


def close(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=1e-12) for name in expected)


@pytest.mark.parametrize("pictures", [1, 4])
def test_golden_scores(asked, pictures):
    expected, answers = EXPECTED[COUNT[pictures]], golden_answers(asked, pictures)
    scores = {item: score.picture_scores(asked[item], answers[item]) for item in answers}
    close({item: [*of, sum(of) / len(of)] for item, of in scores.items()}, expected["items"])
    assert score.overall(scores) == pytest.approx(expected["overall"], rel=1e-12)
    last = score.categories(asked, answers, last_only=True)
    close(last["l1"], expected["l1"])
    close(last["l2"], expected["l2"])


def test_golden_categories_of_all_pictures(asked):
    found = score.categories(asked, golden_answers(asked, 4))
    for level in ("l1", "l2"):
        close(found[level], EXPECTED["all_pictures"][level])


def test_questions_are_read_as_text(asked):
    assert list(asked) == ITEMS and sum(map(len, asked.values())) == 55
    first, third = asked["partiprompts7"][0], asked["COCOval2014000000000042"][2]
    assert first == (1, (), "entity - whole", "Is thing 1 of 0 there?")  # the first row too
    assert third.parents == (1, 2) and third.broad_category == "entity"
    assert {q.category for of in asked.values() for q in of} >= {"global -"}
    assert asked["12"][0].number == 1


def test_all_dependencies_single_numbers(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("\ufeff" + HEAD + ROW + ROW.replace(",1,0,", ",2,1,"), encoding="utf-8")
    assert [question.parents for question in questions.read(path)["a"]] == [(), (1,)]


def test_a_proposition_once_more_is_said(tmp_path, caplog):
    path = tmp_path / "twice.csv"
    path.write_text(HEAD + ROW + ROW.replace("cup?", "mug?"))
    assert [question.text for question in questions.read(path)["a"]] == ["Is there a mug?"]
    assert "line 3: proposition 1 once more" in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        (HEAD, "has no questions: see docs/evaluation.md"),
        ("item_id,text\na,b\n", "has no column proposition_id, dependency, tuple, question"),
        (HEAD + ROW.replace(",1,0,", ",1,2,"), "item a has no proposition 2, a parent"),
        (HEAD + ROW.replace(",1,0,", ",1,none,"), "line 2: .* whole numbers, got '1' and 'none'"),
        (HEAD + ROW.replace("Is there a cup?", ""), "line 2: question_natural_language must not"),
    ],
)
def test_wrong_questions_are_refused(tmp_path, text, message):
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        questions.read(tmp_path / "wrong.csv")


def test_questions_that_are_no_text_are_refused_by_name(tmp_path):
    (tmp_path / "wrong.csv").write_bytes(b"item_id\xff\n")
    with pytest.raises(ValueError, match="wrong.csv is no CSV in UTF-8"):
        questions.read(tmp_path / "wrong.csv")


def test_missing_questions_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="DPG-Bench's questions: see docs/evaluation.md"):
        questions.read(tmp_path / "dpg_bench.csv")


@pytest.mark.parametrize("text", ["yes", "Yes", " YES. ", "yes .\n"])
def test_a_yes(text):
    assert score.is_yes(text)


@pytest.mark.parametrize("text", ["no", "", "yes, two", "yess", "y", "yes.."])
def test_no_yes(text):
    assert not score.is_yes(text)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "pictures")
    return tmp_path / "pictures"


def run(folder, output, vqa=answer, **options):
    return evaluate(folder, QUESTIONS, output, vqa, vqa_name="reader", **options)


def test_the_truth_comes_out(folder, tmp_path):
    out = tmp_path / "out"
    result = run(folder, out)
    expected = EXPECTED["pic_num_4"]
    assert result["metrics"]["dpg_score"] == pytest.approx(expected["overall"], rel=1e-12)
    for level in ("l1", "l2"):
        close(result["breakdown"][level], EXPECTED["all_pictures"][level])
    assert result["counts"] == {
        "items": 8, "items_asked": 8, "pictures": 32, "asked": 32, "questions": 55, "left_out": 0
    }  # fmt: skip
    assert result["settings"]["vqa"] == "reader"
    assert json.loads((out / "result.json").read_text()) == result
    lines = table(result).splitlines()
    assert lines[0] == "| DPG-Bench by reader | of 100 |" and "| DPG score | 40.48 |" in lines
    assert lines[-1] == "8 of 8 items; categories of all pictures"
    for name in ("grid.png", "worst.png", "best.png"):
        with Image.open(out / name) as sheet:
            assert sheet.size == (8 * 264, 282)


def test_the_worst_comes_first(folder, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        report, "sheet", lambda pictures, labels, path, **_: shown.update({path.name: labels})
    )
    run(folder, tmp_path / "out")
    assert [label.split()[1] for label in shown["grid.png"]] == ITEMS
    assert shown["worst.png"][0] == "15 countbench3" and shown["best.png"][0] == "58 drawtext0"
    assert shown["best.png"] != shown["worst.png"]


def test_published_categories(folder, tmp_path):
    result = run(folder, tmp_path, published_categories=True)
    for level in ("l1", "l2"):
        close(result["breakdown"][level], EXPECTED["pic_num_4"][level])
    assert table(result).endswith("categories of the last picture")
    assert result["metrics"] == run(folder, tmp_path)["metrics"]


def test_one_picture_a_file(tmp_path):
    save(tmp_path / "pictures", pictures=1)
    result = run(tmp_path / "pictures", tmp_path / "out", per_prompt=1)
    expected = EXPECTED["pic_num_1"]
    assert result["metrics"]["dpg_score"] == pytest.approx(expected["overall"], rel=1e-12)
    close(result["breakdown"]["l2"], expected["l2"])
    with pytest.raises(ValueError, match="per_prompt must be 1 or 4, got 2"):
        run(tmp_path / "pictures", tmp_path / "out", per_prompt=2)


def test_grids_and_single_pictures_do_not_compare(folder, tmp_path):
    run(folder, tmp_path / "4")
    save(tmp_path / "single", pictures=1)
    run(tmp_path / "single", tmp_path / "1", per_prompt=1)
    found = compare.read([tmp_path / "4", tmp_path / "1"], steps=[1, 1])
    assert compare.differences(found) == ["per_prompt"]


def test_published_files(folder, tmp_path):
    run(folder, tmp_path / "out")
    lines = (tmp_path / "out/result.txt").read_text().splitlines()
    item = ITEMS[0]
    path, *numbers = lines[0].split(", ")
    assert path == str(folder / f"{item}.png")
    assert [*map(float, numbers)] == pytest.approx(EXPECTED["pic_num_4"]["items"][item], rel=1e-12)
    assert "L2 category scores:" in lines
    name, value = lines[-1].split(": ")
    assert name == "DPG-Bench score"
    assert float(value) == pytest.approx(EXPECTED["pic_num_4"]["overall"], rel=1e-12)
    details = (tmp_path / "out/result_detail.txt").read_text().splitlines()
    assert len(details) == 4 * 55
    said = ANSWERS[item]["1"]["2"]
    assert details[7] == f"{folder / item}.png, (8, 0, 16, 6), Is thing 2 of 0 there?, {said}"


def test_where_the_pictures_of_a_grid_are():
    assert boxes((20, 10), 4) == [
        (0, 0, 10, 5), (10, 0, 20, 5), (0, 5, 10, 10), (10, 5, 20, 10)
    ]  # fmt: skip
    assert boxes((20, 10), 1) == [(0, 0, 20, 10)]


def test_an_error_of_the_network_is_not_swallowed_and_work_is_kept(folder, tmp_path):
    calls = []

    def broken(picture, question):
        if len(calls) == 100:
            raise RuntimeError("out of answers")
        calls.append(question)
        return answer(picture, question)

    with pytest.raises(RuntimeError, match="out of answers"):
        run(folder, tmp_path / "out", broken)
    assert not (tmp_path / "out/result.json").exists()
    kept = (tmp_path / "out/judged/process-0.jsonl").read_text().splitlines()
    assert len(kept) == 3  # 24, 28 and 40 questions
    calls.clear()

    def counted(picture, question):
        calls.append(question)
        return answer(picture, question)

    assert run(folder, tmp_path / "out", counted) == run(folder, tmp_path / "whole")
    assert len(calls) == 4 * 55 - 92


def test_two_processes(folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    tests = Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"}
    command = [*launch, Path(__file__).with_name("coded_pictures.py"), folder, tmp_path / "two"]
    ended = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    one = run(folder, tmp_path / "one")
    assert json.loads((tmp_path / "two/result.json").read_text()) == one
    for i in range(2):
        done = (tmp_path / f"two/judged/process-{i}.jsonl").read_text().splitlines()
        assert len(done) == 4
    details = "result_detail.txt"
    assert (tmp_path / "two" / details).read_text() == (tmp_path / "one" / details).read_text()


def narrower(path):
    with Image.open(path) as image:
        cropped = image.crop((0, 0, 15, 12))
    cropped.save(path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "12.png: image file is truncated.*1 in all"),
        (as_mode("L"), "12.png: it is L, not RGB .1 in all"),
        (as_mode("RGBA"), "it is RGBA, not RGB"),
        (narrower, "12.png: a grid of 4 has even sides, got 15×12"),
        (Path.unlink, "12 is missing .1 in all"),
        (lambda path: path.rename(path.with_name("13.png")), "13.png is no item, 12 is missing .2"),
    ],
)
def test_what_is_wrong_is_named_and_left_out_only_when_told(folder, tmp_path, damage, message):
    damage(folder / "12.png")
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out")
    result = run(folder, tmp_path / "out", leave_out=True)
    counts = result["counts"]
    assert counts["items"] == 7 and counts["items_asked"] == 8 and counts["questions"] == 45
    assert counts["left_out"] == len(result["settings"]["left_out"]) > 0
    assert "7 of 8 items" in table(result)
    items = {**EXPECTED["pic_num_4"]["items"]}
    del items["12"]
    mean = 100 * sum(of[-1] for of in items.values()) / 7
    assert result["metrics"]["dpg_score"] == pytest.approx(mean, rel=1e-12)


def test_foreign_things_in_the_folder(folder, tmp_path):
    (folder / "run.json").write_text('{"seed": 0}')
    result = run(folder, tmp_path / "out")
    assert result["counts"]["left_out"] == 0 and result["run"] == {"seed": 0}
    (folder / "12.jpg").write_bytes((folder / "12.png").read_bytes())
    (folder / "more").mkdir()
    with pytest.raises(ValueError, match="12.png is 12.jpg once more, more is a folder .2 in all"):
        check(folder, QUESTIONS, tmp_path / "out")
    check(folder, QUESTIONS, tmp_path / "out", leave_out=True)


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no picture of an item; it must be FOLDER/ITEM.png"):
        run(tmp_path / "empty", tmp_path / "out", leave_out=True)


def test_results_do_not_go_among_the_pictures(folder):
    for output in (folder, folder / "results"):
        with pytest.raises(ValueError, match="must lie outside the pictures' folder"):
            run(folder, output)


def test_nothing_left_to_judge(folder, tmp_path):
    for path in folder.glob("*.png"):
        cut(path)
    with pytest.raises(ValueError, match="no picture was judged"):
        run(folder, tmp_path / "out", leave_out=True)


def test_what_a_network_computes_must_be_finite(folder, tmp_path):
    def broken(picture, question):
        if picture.getpixel((0, 0))[:2] == (1, 2):  # of the second item's third picture
            raise FloatingPointError("logits are not finite")
        return answer(picture, question)

    said = f"{ITEMS[1]}.png: logits are not finite .1 in all"
    with pytest.raises(ValueError, match=said):
        run(folder, tmp_path / "out", broken)
    result = run(folder, tmp_path / "out", broken, leave_out=True)
    assert result["counts"]["items"] == 7 and result["counts"]["left_out"] == 1


def test_an_answer_is_a_text(folder, tmp_path):
    with pytest.raises(ValueError, match="vqa must answer with a text, got True"):
        run(folder, tmp_path / "out", lambda picture, question: True)


def test_a_function_needs_a_name(folder, tmp_path):
    with pytest.raises(ValueError, match="a vqa of your own needs vqa_name="):
        evaluate(folder, QUESTIONS, tmp_path, answer)


def test_tim_evaluate_dpg(folder, tmp_path):
    def tim(*more):
        command = ["evaluate", "dpg", folder, "--questions", QUESTIONS, "--output", tmp_path / "o"]
        return CliRunner().invoke(app, [str(each) for each in (*command, *more)])

    blip = small_judges.save_blip(tmp_path / "blip")
    result = tim("--vqa", blip, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"| DPG-Bench by {blip} | of 100 |" in result.stdout
    assert "8 of 8 items; categories of all pictures" in result.stdout
    settings = json.loads((tmp_path / "o/result.json").read_text())["settings"]
    assert settings["vqa"] == str(blip) and len(settings["vqa_weights"]) == 8
    missing = tim("--vqa", tmp_path / "nowhere").stderr.strip().splitlines()[-1]
    assert missing.startswith("error: ") and missing.endswith("see docs/evaluation.md")
    (folder / "12.png").unlink()
    left = tim("--vqa", blip)
    assert left.exit_code == 1 and "12 is missing (1 in all); --leave-out" in left.stderr
    assert "7 of 8 items" in tim("--vqa", blip, "--leave-out").stdout
