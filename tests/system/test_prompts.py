"""The benchmarks' lists of prompts: their order, their text, and what is refused."""

import json
from collections import Counter

import pytest

from tim.data import prompts


def test_geneval_s_own():
    found = prompts.geneval()
    tags = Counter(prompt.metadata["tag"] for prompt in found)
    counts = [80, 99, 80, 94, 100, 100]
    assert [*tags.items()] == [*zip(prompts.GENEVAL_TAGS, counts, strict=True)]
    assert len({prompt.text for prompt in found}) == len(found) == 553
    assert [found[0].name, found[-1].name] == ["00000", "00552"]


def test_dpg_is_sorted_stripped_and_utf_8(tmp_path):
    for name, text in (("b", " a café \n"), ("a", "a dog"), ("10", "a cat")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "notes.md").write_text("")
    found = [(prompt.name, prompt.text) for prompt in prompts.dpg(tmp_path)]
    assert found == [("10", "a cat"), ("a", "a dog"), ("b", "a café")]
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"c\.txt is not UTF-8"):
        prompts.dpg(tmp_path)
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"c\.txt: the prompt must be a text"):
        prompts.dpg(tmp_path)


def test_mjhq_keeps_the_file_s_order(tmp_path):
    path = tmp_path / "meta_data.json"
    entry = {"category": "art", "prompt": " a café "}
    path.write_text(json.dumps({"z": entry, "a": entry | {"category": "food"}}, ensure_ascii=False))
    found = [(prompt.name, prompt.text) for prompt in prompts.mjhq(path)]
    assert found == [("art/z", "a café"), ("food/a", "a café")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"caf\xe9", "is not UTF-8"), (b"{", "is not JSON"), (b"[]", "must be a JSON object"),
        (b"{}", "has no prompts: see docs/evaluation.md"),
        (b'{"a": {"prompt": "a dog"}}', "a: an entry needs category and prompt"),
        (b'{"../a": {"category": "art", "prompt": "a dog"}}', "must each name one file"),
    ],
)  # fmt: skip
def test_what_is_no_meta_data_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"meta.json.*{message}"):
        prompts.mjhq(tmp_path / "meta.json")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"caf\xe9", "is not UTF-8"), (b"{", "line 1 is not JSON"), (b"", "has no prompts"),
        (b'{"prompt": "a dog"}', "line 1: a prompt needs tag, include and prompt"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_geneval_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"own.jsonl.*{message}"):
        prompts.geneval(tmp_path / "own.jsonl")


def test_a_line_ends_at_a_newline_alone(tmp_path):
    lines = [{"tag": "a", "include": [], "prompt": f"a dog\u2028{i}"} for i in range(2)]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "own.jsonl").write_text(text, encoding="utf-8")
    assert [each.metadata for each in prompts.geneval(tmp_path / "own.jsonl")] == lines


def test_missing_prompts_point_to_the_page(tmp_path):
    for read in (prompts.geneval, prompts.dpg, prompts.mjhq):
        with pytest.raises(FileNotFoundError, match="nowhere .*: see docs/evaluation.md"):
            read(tmp_path / "nowhere")
