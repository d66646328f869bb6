"""Items of the published sets to the pixel, the flip and the caption."""

import json
import random

import pytest
import torch
from golden_files import GOLDEN
from PIL import Image
from safetensors.torch import load_file

from tim import data
from tim.data import pictures

FOLDER = GOLDEN / "training"
FACTS = json.loads((FOLDER / "facts.json").read_text())
T2I = FOLDER / "t2i"


def levels(image):
    """The 8-bit levels of a picture in [-1, 1], when they are exact."""
    scaled = image * 127.5 + 127.5
    assert float((scaled - scaled.round()).abs().max()) < 1e-4
    return scaled.round().to(torch.uint8)


def test_latents_to_the_pixel_and_flip():
    golden = load_file(FOLDER / "c2i_items.safetensors")
    facts = FACTS["c2i"]
    images = data.LatentImages(FOLDER / "c2i/latents", FOLDER / "c2i/images", facts["image_size"])
    assert len(images) == 6 and images.num_classes == 3
    torch.manual_seed(3)
    for fact in facts["items"]:
        key = f"{fact['round']}.{fact['index']}"
        item = images[fact["index"]]
        assert set(item) == set(images.names) == {"latent", "image", "label"}
        assert torch.equal(item["latent"], golden[f"latent.{key}"])
        assert torch.equal(levels(item["image"]), golden[f"image.{key}"])
        assert item["label"].dtype == torch.int64 and item["label"] == golden[f"label.{key}"]


def captioned(**options):
    files = T2I / "bucket_sampler.json", T2I / "data_info.jsonl"
    return data.CaptionedImages(T2I, *files, **options)


def test_captions_and_pictures():
    golden = load_file(FOLDER / "t2i_items.safetensors")
    images = captioned(escape_captions=True)
    random.seed(5)
    for fact in FACTS["t2i"]["items"]:
        if fact["caption"] is None:
            with pytest.raises(data.UnreadableError, match=r"missing\.png"):
                images[fact["index"]]
            continue
        item = images[fact["index"]]
        assert item["caption"] == fact["caption"]
        assert list(item["image"].shape) == fact["shape"]
        assert torch.equal(levels(item["image"]), golden[f"image.{fact['index']}"])


def test_collated():
    fact = FACTS["t2i"]["collate"]
    loader = data.Loader(
        captioned(escape_captions=True), [fact["batch"]]
    )  # not visits: random's own
    random.seed(6)
    (batch,) = loader
    assert batch["caption"] == fact["captions"]
    assert list(batch["image"].shape) == fact["shape"]
    assert (loader.drawn, loader.unreadable) == (4, 1)


def test_unescaped_captions():
    images = captioned()
    drawn = {images[data.Visit(1, 0, image)]["caption"] for image in range(40)}
    assert drawn == {"café at night", "two\nlines", "back\\slash 猫", 'quote " and 😀'}


def test_native_sizes():
    for row in FACTS["resizing"]["rows"]:
        assert list(pictures.native_size(*row["size"])) == row["native"]
    assert pictures.native_size(500_000, 10) == (457_920, 32)  # published: no height


def test_resizing():
    golden = load_file(FOLDER / "resizing.safetensors")
    for i in range(3):
        image = Image.fromarray(golden[f"input.{i}"].numpy())
        size = pictures.native_size(*image.size, unit=16, most=64)
        for name, ours in (
            ("native", pictures.stretched(image, *size)),
            ("crop", pictures.centre_crop(image, 32)),
        ):
            ours = levels(pictures.to_tensor(ours)).movedim(0, -1)
            assert torch.equal(ours, golden[f"{name}.{i}"]), (name, i)


def test_draws_are_of_the_visit():
    """The same visit gives the same flip and caption whatever was drawn before; others vary."""
    latents = data.LatentImages(FOLDER / "c2i/latents", FOLDER / "c2i/images", 32)
    first = [latents[data.Visit(0, 7, image)]["latent"] for image in range(40)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = [latents[data.Visit(0, 7, image)]["latent"] for image in range(40)]
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert torch.equal(torch.get_rng_state(), before)
    assert 10 < sum(torch.equal(latent, first[0]) for latent in first) < 30
    other_seed = torch.stack([latents[data.Visit(0, 8, image)]["latent"] for image in range(40)])
    assert not torch.equal(torch.stack(first), other_seed)


def test_image_folder(tmp_path):
    """Upright, in any depth, sorted; a label is the place of the folder."""
    for name, colour in (("b/deep/x.jpg", "red"), ("a/y.png", "lime"), ("a/x.PNG", "blue")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    (tmp_path / "a/.hidden.png").touch()
    turned = Image.new("RGB", (40, 20), "black")
    turned.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.crop((10, 0, 30, 20)).save(tmp_path / "b/z.png", exif=exif)

    images = data.ImageFolder(tmp_path, 10, flip=False)
    assert images.classes == ["a", "b"] and images.num_classes == 2 and len(images) == 4
    assert [int(images[i]["label"]) for i in range(4)] == [0, 0, 1, 1]
    assert images[0]["image"][:, 5, 5].tolist() == [-1, -1, 1]  # x before y
    assert images[1]["image"][:, 5, 5].tolist() == [-1, 1, -1]
    image = images[3]["image"]
    assert image.shape == (3, 10, 10) and image[0, 5, 0] == -1 and image[0, 5, 9] == 1
    flipped = data.ImageFolder(tmp_path, 10)
    left = {float(flipped[data.Visit(3, 0, i)]["image"][0, 5, 0]) for i in range(20)}
    assert left == {-1, 1}


def test_digits_go_through_the_same_door():
    images, labels = data.mnist.load("train")
    digits = data.make("mnist")
    batch = next(iter(data.Loader(digits, digits.sampler(8, seed=0))))
    order = next(iter(data.FlatSampler(4000, 8, seed=0)))
    assert torch.equal(batch["image"], images[order]) and torch.equal(batch["label"], labels[order])
    assert digits.num_classes == 10
