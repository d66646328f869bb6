"""What README and docs say is what the repository holds, and what they show runs."""

import doctest
import importlib.util
import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import typer.main
from omegaconf import OmegaConf
from safetensors.torch import save_file
from typer.testing import CliRunner

import tim_kernels
from tests.system import small_pipelines
from tim import config
from tim.app import assets
from tim.app.cli import app
from tim.evaluation import emoji, mnist_variants
from tim.evaluation.mnist import GUIDANCE, table

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
EVERYTHING = "\n".join(PAGES.values())
README = PAGES["README.md"]
RESULTS = json.loads((ROOT / "docs/mnist/results.json").read_text())
SMALL = dict(hidden_size=32, encoder_depth=1, depth=2, num_heads=2, z_dim=None)


def blocks(page: str, language: str) -> list[str]:
    """Fenced code of a language; of none if it is empty."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S)
    return [code for name, code in fenced if name == language]


def commands() -> list[str]:
    """Every line of every block without a language, and what stands in `…` within a line."""
    lines = [line for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", EVERYTHING, flags=re.M | re.S))
    return lines + inline


@pytest.fixture
def at_a_readers(tmp_path, monkeypatch):
    """A folder with what a reader of the README brings: a model of their own as my_code.py, and
    the released files, which here are of small networks of the same kinds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sizes = dict(patch_size=2, in_channels=4, num_classes=10) | SMALL
    Path("my_code.py").write_text(
        "from tests.eager import EagerTiM, randomise\n"
        f"model = randomise(EagerTiM(**{sizes | dict(z_dim=6, projector_dim=8)}))\n"
    )
    yield
    sys.modules.pop("my_code", None)


def release(name: str, preset: str, monkeypatch, network: dict, **folders) -> None:
    """A weight file, and a preset of that name for it whose networks are in folders here."""
    cfg = config.load(preset)
    cfg.model.network.params.update(SMALL | network)
    cfg.model.update({key: str(folder.resolve()) for key, folder in folders.items()})
    OmegaConf.save(cfg, f"{preset}.yaml")
    monkeypatch.setitem(config._PRESETS, preset, Path(f"{preset}.yaml").resolve())
    state = config.build_network(cfg).state_dict()
    save_file(state, name) if name.endswith(".safetensors") else torch.save(state, name)


@pytest.fixture
def released(at_a_readers, monkeypatch):
    vae, dc_ae, text = Path("vae"), Path("dc-ae"), Path("text-encoder")
    eightfold = dict(block_out_channels=(8,) * 4, norm_num_groups=4)
    kinds = dict(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
    )
    diffusers.AutoencoderKL(**eightfold, **kinds).save_pretrained(vae)
    sides = dict(block_out_channels=(8,) * 6, layers_per_block=(1,) * 6, qkv_multiscales=((),) * 6)
    both = {f"{side}_{key}": of for side in ("encoder", "decoder") for key, of in sides.items()}
    diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, **both).save_pretrained(dc_ae)
    small_pipelines.gemma().save_pretrained(text)
    small_pipelines.tokenizer().save_pretrained(text)
    release("c2i_model_256.safetensors", "xl-256", monkeypatch, {}, vae_dir=vae)
    text_network = dict(in_channels=4, cap_feat_dim=24)
    release("t2i_model.bin", "t2i", monkeypatch, text_network, vae_dir=dc_ae, text_encoder_dir=text)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_code_runs_as_printed(page, released, capsys):
    """On what is here, without network; a page's blocks one after the other."""
    names = {}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page}, block {i}", "exec"), names)
    if page == "README.md":
        assert {path.name for path in Path().glob("*.png")} == {
            "three.png", "retriever.png", "fox.png"
        }  # fmt: skip
        assert "fused: the whole model" in capsys.readouterr().out


def test_samples_are_drawn_as_printed(released, tmp_path, monkeypatch):
    """Every `tim sample` and `tim explain` of docs/cli.md, one after the other."""
    small_pipelines.package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    Path("runs/mnist").mkdir(parents=True)
    Path("runs/mnist/model").symlink_to(assets.folder("mnist"))
    Path("prompts.txt").write_text("a red cat\na dog\n")
    lines = "\n".join(blocks("docs/cli.md", "")).splitlines()
    lines = [
        line.partition("    ")[0] for line in lines if line[:10] in ("tim sample", "tim explai")
    ]
    assert len(lines) == 9
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"
    assert Path("again.png").read_bytes() == Path("hearts.png").read_bytes()
    assert len(list(Path("pictures").iterdir())) == 2


@pytest.mark.parametrize("name", [n for n in tim_kernels.__all__ if n.islower()])
def test_every_function_is_explained_and_every_operation_shows_an_example(name):
    function = getattr(tim_kernels, name)
    assert f"`{name}" in EVERYTHING or f"{name}(" in EVERYTHING
    if not function.__module__.endswith(".op"):
        return
    assert f"`{name}`" in README and f"`{name}" in PAGES["docs/kernels.md"]
    names = vars(tim_kernels) | {"torch": torch}
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert len(test.examples) in (2, 3)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_measurements_are_those_of_the_committed_file():
    for guidance in GUIDANCE:
        assert table(RESULTS, guidance) in PAGES["docs/mnist.md"]
    assert table(RESULTS, GUIDANCE[0]) in README
    for name in ("classifier_accuracy", "frechet_distance_of_train_images"):
        value = RESULTS[name] * (100 if name == "classifier_accuracy" else 1)
        assert f"{value:.1f}" in README and f"{value:.1f}" in PAGES["docs/mnist.md"]


def test_the_table_of_other_settings_is_that_of_the_committed_file():
    results = json.loads((ROOT / "docs/mnist/variants.json").read_text())
    assert mnist_variants.table(results) in PAGES["docs/mnist.md"]
    short = json.loads((ROOT / "docs/mnist/from-scratch.json").read_text())
    assert mnist_variants.table(short) in PAGES["docs/mnist.md"]
    shipped = results["networks"]["as shipped"]
    assert shipped["trained_images"] == 640_000 and not shipped["settings"]
    for steps, measured in RESULTS["networks"]["TiM"]["by_guidance"]["1.0"].items():
        assert shipped["by_steps"][steps]["recognised"] == measured["recognised"]


def test_the_tables_of_emoji_are_those_of_the_committed_file():
    results = json.loads((ROOT / "docs/emoji/results.json").read_text())
    networks = results["networks"]
    for kind, factor in emoji.TABLES:
        if factor in ("right", ""):
            assert emoji.table(results, kind, factor) in PAGES["docs/emoji.md"], (kind, factor)
    assert {network["trained_pictures"] for network in networks.values()} == {176_000}
    tim, flow = (networks[name]["by_guidance"] for name in ("TiM", "flow matching"))
    for by_steps in (*tim.values(), *flow.values()):
        assert all(measured["pair"]["base"] == 1 for measured in by_steps.values())
    assert tim["1.5"]["4"]["pair"]["right"] > 0.9
    one, eight = tim["1.0"]["1"]["pair"], flow["1.0"]["8"]["pair"]
    assert one["right"] > eight["right"] - one["right_error"]
    assert flow["1.0"]["1"]["pair"]["right"] > eight["right"]  # which the page says, too


def test_one_step_is_far_ahead_of_flow_matching_and_more_steps_are_no_worse():
    networks = RESULTS["networks"]
    assert len({network["trained_images"] for network in networks.values()}) == 1
    for guidance in map(str, GUIDANCE):
        tim, flow = (networks[n]["by_guidance"][guidance] for n in ("TiM", "flow matching"))
        assert tim["1"]["recognised"] > flow["1"]["recognised"] + 0.1
        assert tim["1"]["frechet_distance"] < flow["1"]["frechet_distance"] / 5
        counts = ["1", "2", "4", "8", "32"]
        for fewer, more in zip(counts, counts[1:], strict=False):
            errors = tim[fewer]["standard_error"], tim[more]["standard_error"]
            noise = 2 * sum(error**2 for error in errors) ** 0.5
            assert tim[more]["recognised"] >= tim[fewer]["recognised"] - noise


def test_more_steps_gain_what_the_readme_says():
    tim, flow = (
        RESULTS["networks"][n]["by_guidance"]["1.0"] for n in ("TiM", "flow matching")
    )  # fmt: skip
    counts = ("2", "4", "8", "32")
    assert all(round(100 * tim[n]["recognised"]) in (92, 93) for n in counts)
    assert all(flow[n]["recognised"] > tim[n]["recognised"] for n in counts)
    lower = [n for n in counts if flow[n]["frechet_distance"] < tim[n]["frechet_distance"]]
    assert lower == ["4", "8", "32"]


@pytest.mark.parametrize("page", PAGES)
def test_links_pictures_and_headings_exist(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert heading in [title.lower().replace(" ", "-") for title in titles], target


def test_paths_exist():
    trees = [block for page in PAGES for block in blocks(page, "") if "tim_kernels/ " in block]
    assert len(trees) == 2
    named = [path for block in trees for path in _paths_of_tree(block)]
    named += [c for c in commands() if re.fullmatch(r"[\w.<>-]+(/[\w.<>-]+)+/?", c)]
    missing = [path for path in named if not [*ROOT.glob(path.replace("<op>", "*").rstrip("/"))]]
    made_there = ("build/", "datasets/", "runs/")
    assert not [path for path in missing if not path.startswith(made_there)]


def _paths_of_tree(block: str):
    """Of a drawing: names end at two blanks, and lie in what stands above them and further left."""
    folders = {}
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip())
        above = [folders[i] for i in sorted(folders) if i < indent]
        names = re.split(r"  +", line.strip())[0].split()
        yield from ("".join((*above, name)) for name in names)
        folders = {i: folder for i, folder in folders.items() if i < indent} | {indent: names[0]}


def _every_command(group, prefix=""):
    """By the words that call it; a group of commands too."""
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        if hasattr(command, "commands"):
            yield from _every_command(command, f"{prefix}{name} ")


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    reports = re.findall(r'case "(\w+)"', (ROOT / "benchmarks/__main__.py").read_text())
    cli = dict(_every_command(typer.main.get_command(app)))
    found = {"make": set(), "benchmarks": set(), "tim": set()}
    for command in commands():
        words = command.partition("  #")[0].partition("    ")[0].split()
        words = [word.removeprefix(".venv/bin/") for word in words]
        match [*itertools.dropwhile(lambda word: word[0].isupper() and "=" in word, words)]:
            case ["make", *rest]:
                for target in [word for word in rest if "=" not in word]:
                    assert re.search(rf"^({target}:|.*\.{target}.*:)", makefile, re.M), command
                    found["make"].add(target)
            case ["python", "-m", "benchmarks", report, *_]:
                assert report in reports, command
                found["benchmarks"].add(report)
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), command
            case ["tim", "--version" | "-h"]:
                pass
            case ["tim", name, *options] if name != "…":
                name = next(n for n in (" ".join([name, *options[:1]]), name) if n in cli)
                params = cli[name].params
                known = {o for param in params for o in (*param.opts, *param.secondary_opts)}
                assert {o for o in options if o.startswith("--")} <= known, command
                found["tim"].add(name)
    assert found["make"] >= {"demo", "test", "bench", "gpu"}
    assert found["benchmarks"] == set(reports)
    groups = {name for name, command in cli.items() if hasattr(command, "commands")}
    assert found["tim"] | groups == set(cli)
