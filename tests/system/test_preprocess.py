"""Real digits of many sizes through `tim preprocess`: killed, shared, read back for training."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
from digit_folders import save_digits
from safetensors.torch import load_file, save_file
from small_pipelines import dc_ae, sd_vae
from typer.testing import CliRunner

from tim import data
from tim.app.cli import app
from tim.data import pictures, preprocess
from tim.files import locked

PER_CLASS = 30
NATIVE = ["--native", "--min-image-size", 4, "--batch-size", 4, "--pack-tokens", 256]


def tim(*arguments, code=0):
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["preprocess", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return (result.stderr if code else result.stdout).strip().splitlines()[-1]


def contents(folder):
    """All files but the lock, in which a process leaves its number."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    save_digits(folder / "pictures", PER_CLASS)
    sd_vae().save_pretrained(folder / "kl")
    dc_ae().save_pretrained(folder / "dc")
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """Of one process that nothing stopped."""
    said = tim(place / "pictures", place / "whole", "--vae", place / "kl", *NATIVE)
    assert said == f"{place / 'whole'}: {10 * PER_CLASS} made, 0 there before"
    return place / "whole"


@pytest.fixture
def few(place, tmp_path):
    """A copy of a few, which may be damaged."""
    for digit in range(3):
        (tmp_path / f"pictures/{digit}").mkdir(parents=True)
        for path in sorted((place / f"pictures/{digit}").iterdir())[:5]:
            shutil.copy(path, tmp_path / f"pictures/{digit}")
    return tmp_path


def test_native_latents_train(place, whole):
    dataset = {
        "jsonl_dir": whole / "metadata.jsonl", "latent_dirs": [whole],
        "image_dir": place / "pictures", "num_classes": 10,
    }  # fmt: skip
    digits = data.make("native", dataset)
    assert len(digits) == 10 * PER_CLASS
    sizes = Counter(map(tuple, (2 * digits.sizes).tolist()))
    assert {(20, 20), (20, 16), (20, 12), (16, 20)} <= sizes.keys() and max(sizes.values()) < 200
    batches = data.Loader(digits, digits.sampler(8, seed=0))
    seen = 0
    for _, batch in zip(range(60), batches, strict=False):
        h, w = batch["latent"].shape[2:]
        assert batch["image"].shape[2:] == (2 * h, 2 * w) and batch["latent"].shape[1] == 4
        seen += len(batch["label"])
    assert seen > 200 and batches.unreadable == 0
    packed = data.make("native", dataset | {"packed_json": whole / "packs-256.json"})
    for pack in packed.packs:
        assert sum(h * w for h, w in packed.sizes[pack].tolist()) <= 256
    assert sorted(sum(packed.packs, [])) == list(range(len(digits)))
    line = json.loads((whole / "metadata.jsonl").read_text().splitlines()[PER_CLASS])
    assert line["image_file"] == "1/000.png" and line["type"] == "native-resolution"
    image = pictures.read(place / "pictures/1/000.png")
    assert (line["ori_w"], line["ori_h"]) == image.size


def test_a_latent_is_a_draw_of_the_posterior_of_each_picture(place, whole):
    """And each draw is another one."""
    model = diffusers.AutoencoderKL.from_pretrained(place / "kl")
    lines = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    noise = []
    for line in lines:
        file = load_file(whole / line["latent_file"])
        assert file["label"].dtype == torch.float32 and file["label"].shape == ()
        assert int(file["label"]) == int(line["image_file"][0])
        image = pictures.read(place / "pictures" / line["image_file"])
        image = pictures.stretched(image, line["image_w"], line["image_h"])
        both = torch.stack([pictures.to_tensor(image, mirrored=m) for m in (False, True)])
        with torch.no_grad():
            posterior = model.encode(both).latent_dist
        assert file["latent"].shape == (2, 4, line["latent_h"], line["latent_w"])
        noise.append(
            (file["latent"] / model.config.scaling_factor - posterior.mean) / posterior.std
        )
    values = torch.cat([each.flatten() for each in noise])
    assert abs(float(values.mean())) < 0.01 and abs(float(values.std()) - 1) < 0.01
    least = min(len(each[0].flatten()) for each in noise)
    rows = torch.cat([each.flatten(1)[:, :least] for each in noise])
    assert len(rows.unique(dim=0)) == 2 * len(lines)


def test_square_latents_beside_their_pictures(place, tmp_path):
    folder, options = tmp_path / "square", ["--image-size", 16, "--batch-size", 32]
    assert "300 made" in tim(place / "pictures", folder, "--vae", place / "dc", *options)
    squares = data.LatentImages(folder, place / "pictures", 16)
    assert len(squares) == 300 and squares.num_classes == 10
    model = dc_ae()
    for index in range(0, 300, 37):
        torch.manual_seed(index)
        item = squares[index]  # the picture or its mirror image, by the draw
        with torch.no_grad():
            latent = model.encode(item["image"][None]).latent[0] * model.config.scaling_factor
        assert (latent - item["latent"]).norm() <= 1e-5 * latent.norm()
        assert int(item["label"]) == index // PER_CLASS
    mixed = data.NativeLatents(
        folder / "metadata.jsonl", [folder], place / "pictures", data_types=["fixed-16x16"]
    )
    assert mixed[5]["latent"].shape == (4, 4, 4)
    assert mixed[5]["image"].shape == (3, 16, 16)


def make_until_killed(arguments):
    """In a process of its own; in the middle of a batch."""
    saved = []

    def save_then_die(tensors, path):
        save_file(tensors, path)
        saved.append(path)
        if len(saved) == 102:
            os.kill(os.getpid(), signal.SIGKILL)

    preprocess.save_file = save_then_die
    tim(*arguments)


def test_killed_and_gone_on_with(place, whole, tmp_path):
    folder = tmp_path / "latents"
    arguments = [place / "pictures", folder, "--vae", place / "kl", *NATIVE, "--workers", 2]
    run = multiprocessing.get_context("fork").Process(target=make_until_killed, args=[arguments])
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert list(folder.glob(".partial-*"))
    expected, made = contents(whole), list(folder.glob("*/*.safetensors"))
    assert 80 <= len(made) < 102
    assert all(path.read_bytes() == expected[str(path.relative_to(folder))] for path in made)
    said = tim(*arguments)
    assert said.endswith(f": {300 - len(made)} made, {len(made)} there before")
    assert contents(folder) == expected


def test_two_processes_make_what_one_makes(place, whole, tmp_path):
    folder = tmp_path / "latents"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "tim", "preprocess", place / "pictures", folder, "--vae", place / "kl"),
            *map(str, NATIVE),
        ],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{folder}: 300 made, 0 there before\n"
    assert "process 1 of 2" in run.stderr
    assert contents(folder) == contents(whole)


def test_other_settings_are_refused(place, whole):
    before = contents(whole)
    usual = [place / "pictures", whole, "--vae", place / "kl", *NATIVE]
    for change, words in {
        ("--seed", 1): "are of seed 0, not 1",
        ("--dtype", "bfloat16"): "are of dtype float32, not bfloat16",
        ("--max-image-size", 16): "are of image_size [4, 2048], not [4, 16]",
        ("--vae", place / "dc"): "are of autoencoder ",
    }.items():
        said = tim(*usual, *change, code=1)
        assert said.startswith("error: the latents of ") and words in said
    with locked(whole):
        assert "is being written to by process" in tim(*usual, code=1)
    assert contents(whole) == before


def test_pictures_that_cannot_be_read(place, few, caplog):
    usual = [few / "pictures", few / "latents", "--vae", place / "kl", *NATIVE]
    cut, text = few / "pictures/1/001.png", few / "pictures/2/004.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    text.write_text("no picture")
    good = cut.with_name("000.png")
    said = tim(*usual)
    assert said.endswith(": 13 made, 0 there before, 2 pictures cannot be read: move them away")
    named = "\n".join(record.getMessage() for record in caplog.records)
    assert f"cannot be read: {cut}: " in named and f"cannot be read: {text}: " in named
    lines = (few / "latents/metadata.jsonl").read_text()
    assert lines.count("\n") == 13 and "1/001.png" not in lines and "2/004.png" not in lines
    first = contents(few / "latents")
    shutil.copy(good, cut)
    assert ": 1 made, 13 there before, 1 pictures" in tim(*usual)
    again = contents(few / "latents")
    assert again.keys() - first.keys() == {"1/001.safetensors"}
    assert all(again[name] == first[name] for name in first if name.endswith("safetensors"))


def test_too_many_that_cannot_be_read(place, few):
    for path in (few / "pictures/0").iterdir():
        for i in range(3):
            (path.parent / f"{path.stem}{i}.png").write_text("no picture")
    said = tim(few / "pictures", few / "latents", "--vae", place / "kl", *NATIVE, code=1)
    assert said.startswith("error: 15 of 30 pictures cannot be read, more than 0.01: ")
    assert len(list(few.glob("latents/*/*.safetensors"))) == 15


def test_what_cannot_be_written(place, few):
    (few / "latents").mkdir()
    (few / "latents/1").touch()
    said = tim(few / "pictures", few / "latents", "--vae", place / "kl", *NATIVE, code=1)
    assert said.startswith("error: ") and "File exists" in said and "latents/1" in said
    (few / "latents/1").unlink()
    assert " there before" in tim(few / "pictures", few / "latents", "--vae", place / "kl", *NATIVE)
    assert not list(few.glob("latents/.partial-*"))


def test_what_is_damaged_or_labelled_anew_is_made_again(place, few):
    usual = [few / "pictures", few / "latents", "--vae", place / "kl", *NATIVE]
    tim(*usual)
    first = contents(few / "latents")
    path = few / "latents/1/002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert tim(*usual).endswith(": 1 made, 14 there before")
    assert contents(few / "latents") == first
    shutil.copytree(few / "pictures/2", few / "pictures/10")  # sorted before 2
    assert tim(*usual).endswith(": 10 made, 10 there before")
    assert int(load_file(few / "latents/2/000.safetensors")["label"]) == 3


MISTAKES = {
    "neither": ([], 2, "give one of --image-size and --native"),
    "both": (["--native", "--image-size", 16], 2, "give one of --image-size and --native"),
    "limits": (["--image-size", 16, "--min-image-size", 4], 2, "are for --native"),
    "factor": (["--image-size", 15], 1, "image_size must be a multiple of 2 px, got 15"),
    "unit": (["--native", "--min-image-size", 7], 1, "min_image_size must be a multiple of 2 px"),
    "most": (["--native", "--max-image-size", 8], 1, "max_image_size must be at least min_image_"),
    "batch": (["--native", "--batch-size", 0], 1, "batch_size must be at least 1, got 0"),
    "workers": (["--native", "--workers", 0], 1, "num_workers must be at least 1, got 0"),
    "pack": (["--native", "--pack-tokens", 0], 1, "pack_tokens must be at least 1, got 0"),
    "dtype": (["--native", "--dtype", "float8"], 1, "dtype must be one of float32, bfloat16, "),
    "device": (["--native", "--device", "nope"], 2, "device 'nope'"),
    "vae": (["--native", "--vae", "/nowhere"], 1, "/nowhere"),
}


@pytest.mark.parametrize("options, code, words", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(place, tmp_path, options, code, words):
    arguments = [place / "pictures", tmp_path / "latents", "--vae", place / "kl", *options]
    result = CliRunner().invoke(app, ["preprocess", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert words in result.output
    assert not Path(tmp_path / "latents").exists()


def test_pictures_of_one_name(few, place):
    shutil.copy(few / "pictures/1/000.png", few / "pictures/1/000.again.png")
    said = tim(few / "pictures", few / "latents", "--vae", place / "kl", *NATIVE, code=1)
    assert "pictures of class 1 have one name up to the first dot" in said
