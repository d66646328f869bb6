"""The site of docs/ is whole, and what its pages say of the code is in the code."""

import ast
import contextlib
import html
import io
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import tim_kernels
from tim import config, encoders, objective, pipelines, sampling, training

ROOT = Path(__file__).parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "build/site"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
FILES = [path for package in ("tim", "tim_kernels") for path in (ROOT / package).rglob("*.py")]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
MKDOCS = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav) -> list[str]:
    """Of a navigation, the files."""
    if isinstance(nav, str):
        return [nav]
    return [
        page for each in (nav if isinstance(nav, list) else nav.values()) for page in pages(each)
    ]


def test_every_page_is_in_the_navigation_once():
    there = [p.relative_to(DOCS) for kind in ("md", "ipynb") for p in DOCS.rglob(f"*.{kind}")]
    there = [path.with_suffix(".md").as_posix() for path in there]
    assert sorted(pages(MKDOCS["nav"])) == sorted([*there, "changelog.md", "contributing.md"])


def built() -> dict[Path, str]:
    """The pages of `make docs`, by their files."""
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^docs:.*\n((?:\t.*\n)+)", makefile, re.M)
    for command in recipe.replace("$(BIN)/", "").splitlines():
        program, *rest = command.split()
        program = [sys.executable] if program == "python" else [sys.executable, "-m", program]
        subprocess.run([*program, *rest], cwd=ROOT, check=True)
    return {path: path.read_text() for path in SITE.rglob("*.html")}


def broken_links(site: dict[Path, str]) -> list[str]:
    """Links, pictures and scripts of pages that lead to nothing."""
    names = {path: {*re.findall(r'\bid="([^"]+)"', text)} for path, text in site.items()}
    broken = []
    for page, text in site.items():
        for target in map(html.unescape, re.findall(r'\b(?:href|src)="([^"]*)"', text)):
            if re.match(r"https?:|mailto:|data:", target) or page.name == "404.html":
                continue
            path, _, heading = map(unquote, target.partition("#"))
            there = Path(os.path.normpath(page.parent / path)) if path else page
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file() or heading and heading not in names[there]:
                broken.append(f"{page.relative_to(SITE)}: {target}")
    return broken


def test_the_site_is_whole():
    """All of it in one test: it is built in one folder."""
    site = built()
    assert not broken_links(site)
    loads = r'<(?:script|img|iframe|source)\b[^>]*\bsrc="https?:|<link\b[^>]*stylesheet[^>]*https?:'
    assert not [page for page, text in site.items() if re.search(loads, text)]
    assert not [p for p in SITE.rglob("*.css") if re.search(r"url\([\"']?https?:", p.read_text())]

    reference = "".join(text for page, text in site.items() if page.parent.name == "reference")
    listed = {name.rpartition(".")[2] for name in re.findall(r'id="(tim[\w.]+)"', reference)}
    constants = {"Attention", "Backend", "CONDITIONS", "Condition", "Linear", "RopeOrder"}
    assert {*tim_kernels.__all__} - constants <= listed
    public = (pipelines, sampling, objective, encoders, training)
    names = {
        name for module in public for name in module.__all__ if name[0].isupper() or "_" in name
    }
    assert names - {"DERIVATIVES", "TIME_WEIGHTS", "SAMPLE_TYPES", "SampleType"} <= listed


def defined(body: list[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements that define a name."""
    found = []
    for node in body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        names = [getattr(target, "id", getattr(target, "name", None)) for target in targets]
        found += [node] if name in names else []
    return found


def test_paper_to_code_names_what_is_there():
    links = re.findall(r"\[`([^`:]+):([\w.]+)`\]\(\.\./([^)]+)\)", (DOCS / "paper.md").read_text())
    assert len(links) > 40
    for file, name, target in links:
        assert file == target
        body = TREES[file].body
        for part in name.split("."):
            found = defined(body, part)
            assert found, f"{file} has no {name}"
            body = getattr(found[0], "body", [])


@cache
def texts() -> str:
    """Every text in the code, a line each; … stands for what is filled in."""
    found = []
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\{?\w*\}?\}", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", "") for part in node.values)
                found.append("".join(p if isinstance(p, str) else "…" for p in parts))
    return "\n".join(text.replace("\n", " ") for text in found)


def messages() -> list[str]:
    quoted = re.findall(r"^### (`+) ?(.*?) ?\1$", (DOCS / "faq.md").read_text(), re.M)
    return [message for _, message in quoted]


@pytest.mark.parametrize("message", messages())
def test_messages_of_the_faq_are_in_the_code(message):
    parts = [re.escape(part) for part in message.split("…")]
    assert re.search(r"^" + "[^\n]*?".join(parts), texts(), re.M)


def test_every_heading_of_the_faq_is_a_message():
    assert len(messages()) == (DOCS / "faq.md").read_text().count("\n### ") > 40
    assert len(set(messages())) == len(messages())


def test_published_names_are_read():
    """Every `target:` of the page is in the table, every preset of it is one."""
    page = (DOCS / "upstream.md").read_text()
    targets = {*re.findall(r"`(tim\.(?:models|schedulers)\.\w+\.\w+(?:\.\w+)?)`", page)}
    published = {
        name for name in config.TARGETS if re.match(r"tim\.(models\.\w2i|schedulers)", name)
    }
    assert targets == published
    presets = {*re.findall(r"^\| tim_.*?\|(.*?)\|", page, re.M)}
    named = {name for cell in presets for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == {name for name in config.presets() if re.match(r"(b|xl)-|t2i", name)}


def code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_what_they_printed(notebook):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {o["output_type"] for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert len(outputs) > len(cells) / 2
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    said = json.dumps([{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in outputs])
    assert not re.search(r"/(home|root|tmp|usr|work|opt)/|site-packages", said)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("is_short", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_notebooks_run(notebook, is_short, tmp_path, monkeypatch):
    """As they are, and every day with few steps."""
    monkeypatch.chdir(tmp_path)
    source = code(notebook)
    if is_short:
        source = re.sub(r"^STEPS = .*$", "STEPS = 1, 2", source, flags=re.M)
        source = source.replace("(batches, 201)", "(batches, 1)")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, notebook.name, "exec"), {"__name__": "__main__"})
    assert printed.getvalue()
    if notebook.stem == "tim" and not is_short:
        losses = [float(x) for x in re.findall(r"before division ([\d.]+)", printed.getvalue())]
        assert losses[-1] < losses[1] < losses[0]
    errors = re.findall(r"^(?:forward mode|ε = \S+)\s+(\S+)", printed.getvalue(), re.M)
    exact, *differences = map(float, errors)
    assert exact < min(differences) / 10


def test_the_citation_is_of_this_version_and_of_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert cited["version"] == tim_kernels.__version__
    (license,) = re.findall(r'^license = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert cited["license"] == license
    (paper,) = cited["references"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert paper["url"].removeprefix("https://") in (ROOT / "README.md").read_text()
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in paper["url"]
    assert all({"given-names", "family-names"} == author.keys() for author in paper["authors"])
