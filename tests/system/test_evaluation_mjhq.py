"""MJHQ-30K end to end, on drawn pictures, a tiny random CLIP and means of colour as features."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import normalize
from two_processes import in_two_processes
from typer.testing import CliRunner

from tim.app.cli import app
from tim.evaluation import features
from tim.evaluation.clip import Clip, preprocessed
from tim.evaluation.features import Features
from tim.evaluation.mjhq import evaluate
from tim.evaluation.statistics import Moments, distance
from tim.processes import launched_group

WORDS = ["<pad>", "<s>", "</s>", "a", "red", "blue", "cat", "dog", "house"]
ITEMS = {  # by category
    "animals": ["a red cat", "a blue cat", "a red dog", "a blue dog", "a dog"],
    "art": ["a red house", "a blue house", "a house", "red", "a red house a blue house " * 3],
}
LONGEST = 10  # tokens


class Colours:
    """Features (N, 4) of a picture, in place of Inception's."""

    name = "colours"

    def __call__(self, pictures):
        levels = pictures.float() / 255
        return Features(torch.cat([levels.mean((2, 3)), levels.std((1, 2, 3))[:, None]], 1))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    ).save_pretrained(folder)
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=size | dict(
                vocab_size=len(WORDS), max_position_embeddings=LONGEST, bos_token_id=1,
                eos_token_id=2, pad_token_id=0,
            ),
            vision_config=size | dict(image_size=16, patch_size=8),
            projection_dim=12,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return Clip(clip_folder)


def draw(folder, seed, items=ITEMS, end=".jpg"):
    """A folder of CATEGORY/ID.jpg; their levels as they were saved."""
    noise, found = np.random.default_rng(seed), {}
    for category, prompts in items.items():
        (folder / category).mkdir(parents=True)
        for number in range(len(prompts)):
            picture = np.tile(noise.integers(0, 256, (3, 4, 3), np.uint8).repeat(8, 0), (1, 5, 1))
            path = folder / category / f"{category}{number}{end}"
            Image.fromarray(picture).save(path)
            found[f"{category}/{category}{number}"] = np.array(Image.open(path))
    return found


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """samples/, real/ and meta_data.json in the current folder."""
    monkeypatch.chdir(tmp_path)
    entries = {
        f"{category}{number}": {"category": category, "prompt": prompt}
        for category, prompts in ITEMS.items()
        for number, prompt in enumerate(prompts)
    }
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    return draw(tmp_path / "samples", 0), draw(tmp_path / "real", 1)


def as_tensor(pictures):
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2)


def fid(one, other):
    moments = Moments(), Moments()
    for each, pictures in zip(moments, (one, other), strict=True):
        each.add(Colours()(as_tensor(pictures)).pool)
    return distance(*moments)


def prompt_of(name):
    category, item = name.split("/")
    return ITEMS[category][int(item.removeprefix(category))]


def score(clip, pictures, model):
    """The mean of 100 · cosine, one picture and one prompt at a time."""
    found = []
    for name, picture in pictures.items():
        seen = preprocessed(as_tensor([picture]), 16)
        words = ["<s>", *prompt_of(name).split()[: LONGEST - 2], "</s>"]
        tokens = torch.tensor([[WORDS.index(word) for word in words]])
        with torch.no_grad():
            pair = model(input_ids=tokens, pixel_values=seen)
        found.append(100 * (normalize(pair.image_embeds) @ normalize(pair.text_embeds).T).item())
    return sum(found) / len(found)


@pytest.mark.parametrize("batch_size", [3, 64])  # 3 leaves an incomplete one
def test_numbers_overall_and_by_category(set_up, clip, clip_folder, batch_size):
    samples, real = set_up
    result = evaluate(
        "samples", "meta_data.json", reference="real", inception=Colours(), clip=clip,
        batch_size=batch_size,
    )  # fmt: skip
    model = transformers.CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    parts = {"all": (samples, real)} | {
        category: tuple(
            {k: v for k, v in each.items() if k.startswith(category)} for each in set_up
        )
        for category in ITEMS
    }
    for part, (ours, theirs) in parts.items():
        found = {
            name: result["metrics"][name] if part == "all" else result["breakdown"][name][part]
            for name in ("fid", "clip_score")
        }
        assert found["fid"] == pytest.approx(fid(ours.values(), theirs.values()), rel=1e-6)
        assert found["clip_score"] == pytest.approx(score(clip, ours, model), rel=1e-5)
    assert result["counts"] == {
        "asked": 10, "missing": 0, "no_item": 0, "pictures": 10, "left_out": 0,
        "reference_pictures": 10, "reference_left_out": 0,
        "reference_missing": 0,
    }  # fmt: skip
    assert result["settings"]["inception"] == "colours"
    assert str(clip_folder) in result["settings"]["clip"]
    assert "antialiasing to 16²" in result["settings"]["clip"]


@pytest.mark.parametrize("written", ["./samples", "samples//", "samples/../samples/", "{}/samples"])
def test_the_way_a_folder_is_written_does_not_matter(set_up, clip, tmp_path, written):
    plain = evaluate("samples", "meta_data.json", clip=clip)
    found = evaluate(written.format(tmp_path), "meta_data.json", clip=clip)
    assert found["metrics"] == plain["metrics"] and found["breakdown"] == plain["breakdown"]


def test_without_scores_there_is_no_worst_and_best(set_up, clip):
    given = dict(reference="real", inception=Colours(), output="out")
    for more, sheets in ((dict(clip=clip), {"grid", "worst", "best"}), ({}, {"grid"})):
        evaluate("samples", "meta_data.json", **given, **more)
        assert {name[:-4] for name in os.listdir("out") if name.endswith(".png")} == sheets


def test_any_spelling_of_a_picture_s_ending(set_up, clip):
    for number, end in enumerate((".JPG", ".jpeg", ".Jpg")):
        os.rename(f"samples/art/art{number}.jpg", f"samples/art/art{number}{end}")
    Image.open("samples/art/art3.jpg").save("samples/art/art3.PNG")
    os.remove("samples/art/art3.jpg")
    assert evaluate("samples", "meta_data.json", clip=clip)["counts"]["pictures"] == 10


def test_a_stored_reference_gives_the_same_fid(set_up):
    _, real = set_up
    rows = Colours()(as_tensor(real.values())).pool.double().numpy()
    np.savez("real.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    given = dict(inception=Colours(), leave_out=False)
    stored = evaluate("samples", "meta_data.json", reference="real.npz", **given)
    folder = evaluate("samples", "meta_data.json", reference="real", **given)
    assert stored["metrics"] == pytest.approx(folder["metrics"], rel=1e-5)
    assert stored["breakdown"] == {"fid": {}}
    np.savez("real.npz", arr_0=rows)
    with pytest.raises(ValueError, match="must hold mu and sigma, got arr_0"):
        evaluate("samples", "meta_data.json", reference="real.npz", **given)


def test_stored_text_features_give_the_same_score(set_up, clip):
    names = [f"{category}/{category}{n}" for category in ITEMS for n in range(5)]
    texts = clip.texts([prompt_of(name) for name in names])
    stored = {f"{name}.jpg": text.clone() for name, text in zip(names, texts, strict=True)}
    save_file(stored, "texts.safetensors")
    given = dict(clip=clip, text_features="texts.safetensors")
    plain = evaluate("samples", "meta_data.json", clip=clip)
    found = evaluate("samples", "meta_data.json", **given)
    assert found["metrics"] == pytest.approx(plain["metrics"], rel=1e-6)
    assert found["settings"]["text_features"] == "texts.safetensors"
    save_file(
        {name: text[:4] / text[:4].norm() for name, text in stored.items()}, "texts.safetensors"
    )
    with pytest.raises(ValueError, match="features of one CLIP"):
        evaluate("samples", "meta_data.json", **given)
    save_file(stored | {"art/art1.jpg": 2 * texts[0]}, "texts.safetensors")
    with pytest.raises(ValueError, match="art/art1 must be a unit vector"):
        evaluate("samples", "meta_data.json", **given)
    del stored["art/art1.jpg"]
    save_file(stored, "texts.safetensors")
    with pytest.raises(ValueError, match="no feature of 1 items: art/art1"):
        evaluate("samples", "meta_data.json", **given)
    with pytest.raises(FileNotFoundError, match="see docs/evaluation.md"):
        evaluate("samples", "meta_data.json", clip=clip, text_features="nowhere.safetensors")


def test_what_does_not_belong_or_is_not_there_is_refused_or_counted(set_up, clip):
    samples, _ = set_up
    os.rename("samples/art/art0.jpg", "samples/art/cat.jpg")
    with pytest.raises(ValueError, match=r"1 pictures are no item: art/cat\.jpg"):
        evaluate("samples", "meta_data.json", clip=clip)
    os.remove("samples/art/cat.jpg")
    with pytest.raises(ValueError, match="fewer pictures .*: 1 of 10 items have none: art/art0"):
        evaluate("samples", "meta_data.json", clip=clip)
    Image.new("L", (20, 20)).save("samples/art/art1.jpg")
    Image.new("RGB", (20, 20)).save("samples/more.png")
    with pytest.raises(ValueError, match="none of|1 pictures are no item: more.png"):
        evaluate("samples", "meta_data.json", clip=clip)
    found = evaluate("samples", "meta_data.json", clip=clip, leave_out=True)
    assert found["counts"] == {
        "asked": 10, "missing": 1, "no_item": 1, "pictures": 8, "left_out": 1,
    }  # fmt: skip
    os.remove("samples/more.png")
    Image.new("RGB", (20, 20)).save("samples/art/art1.png")
    with pytest.raises(ValueError, match=r"two pictures of one item: art/art1\.jpg"):
        evaluate("samples", "meta_data.json", clip=clip, leave_out=True)


def test_a_category_without_a_reference_is_said(set_up, caplog):
    os.rename("real/art", "real/other")
    found = evaluate("samples", "meta_data.json", reference="real", inception=Colours())
    assert list(found["breakdown"]["fid"]) == ["animals"] and "no FID of art" in caplog.text


def test_text_features_that_are_none_are_refused_by_name(set_up, clip):
    with pytest.raises(ValueError, match="meta_data.json is no safetensors file"):
        evaluate("samples", "meta_data.json", clip=clip, text_features="meta_data.json")


def test_items_without_a_reference_are_said_and_counted(set_up, caplog):
    os.remove("real/art/art2.jpg")
    found = evaluate("samples", "meta_data.json", reference="real", inception=Colours())
    assert "no picture of 1 of 10 items: art/art2" in caplog.text
    assert found["counts"]["reference_pictures"] == 9 and found["counts"]["reference_missing"] == 1


def test_nothing_to_measure_with_is_refused(set_up):
    with pytest.raises(ValueError, match="give one or both"):
        evaluate("samples", "meta_data.json")
    with pytest.raises(ValueError, match="give one or both"):
        evaluate("samples", "meta_data.json", reference="real")
    with pytest.raises(ValueError, match="must lie outside the pictures' folder"):
        evaluate("samples", "meta_data.json", clip=Colours(), output="samples/art/results")
    with pytest.raises(ValueError, match="text_features are for the CLIP score"):
        given = dict(reference="real", inception=Colours())
        evaluate("samples", "meta_data.json", text_features="texts.safetensors", **given)
    with pytest.raises(FileNotFoundError, match="see docs/evaluation.md"):
        evaluate("samples", "nowhere.json", reference="real", inception=Colours())


def test_two_processes_and_a_rerun_give_the_same(set_up, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 3)
    given = dict(reference="real", inception=Colours(), clip=clip, output="out")

    def run(rank, folder):
        with launched_group():
            result = evaluate("samples", "meta_data.json", **given)
        torch.save(result, folder / ("found.pt" if rank == 0 else "other.pt"))

    in_two_processes(tmp_path, run)
    two = torch.load("found.pt")
    assert (
        torch.load("other.pt") == two == json.loads((tmp_path / "out" / "result.json").read_text())
    )

    def fails(pictures):
        raise AssertionError("measured again")

    monkeypatch.setattr(Colours, "__call__", fails)
    monkeypatch.setattr(Clip, "__call__", fails)
    monkeypatch.setattr(Clip, "texts", fails)
    assert evaluate("samples", "meta_data.json", **given) == two


def test_the_command(set_up, clip_folder):
    command = [
        "evaluate", "mjhq", "samples", "--meta-data", "meta_data.json", "--clip", str(clip_folder),
        "--output", "out", "--device", "cpu",
    ]  # fmt: skip
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "FID needs --reference" in refused.stderr
    done = CliRunner().invoke(app, [*command, "--metrics", "clip_score"])
    assert done.exit_code == 0, done.output
    with open("out/result.json") as file:
        result = json.load(file)
    rows = {"all": result["metrics"]["clip_score"]} | result["breakdown"]["clip_score"]
    for part, value in rows.items():
        assert f"| {part} | {value:.4g} |" in done.output
    assert str(clip_folder) in done.output
    for title in ("grid", "worst", "best"):
        assert os.path.getsize(f"out/{title}.png")
    os.rename("samples/art/art1.jpg", "samples/art/cat.jpg")
    named = CliRunner().invoke(app, [*command, "--metrics", "clip_score", "--clip", "nowhere"])
    assert "1 pictures are no item: art/cat.jpg" in named.stderr  # before any network is loaded
    os.rename("samples/art/cat.jpg", "samples/art/art1.jpg")
    unknown = CliRunner().invoke(app, [*command, "--metrics", "clip_score", "--clip", "samples"])
    assert unknown.exit_code == 1 and "see docs/evaluation.md" in unknown.stderr


def test_a_clip_without_all_its_weights_is_refused(clip_folder, tmp_path):
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    state = model.state_dict()
    del state["visual_projection.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    transformers.AutoTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 weights are missing, such as visual_projection.weight"):
        Clip(tmp_path)
