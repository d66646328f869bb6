"""A folder of one's own pictures with captions."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from tim import data
from tim.captions import escaped
from tim.data import CaptionedFolder, Loader, UnreadableError

SIZES = {"b.png": (96, 64), "a.jpg": (64, 64), "deep/c.png": (200, 100), "deep/d.webp": (70, 70)}


def picture(width, height, seed):
    levels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture
def beside(tmp_path):
    """Pictures with a text each."""
    for seed, (name, size) in enumerate(SIZES.items()):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        picture(*size, seed).save(path, lossless=True, quality=95)
        path.with_suffix(".txt").write_text(f" a picture\n of {name} \n")
    (tmp_path / ".DS_Store").write_text("")
    return tmp_path


@pytest.fixture
def listed(beside):
    """The same with a list of captions."""
    lines = [{"file_name": name, "text": f"a picture of {name}"} for name in SIZES]
    for path in beside.rglob("*.txt"):
        path.unlink()
    text = "\n\n".join(json.dumps({"more": 1, **line}, ensure_ascii=False) for line in lines)
    (beside / "metadata.jsonl").write_text(text + "\n")
    return beside


@pytest.mark.parametrize("layout", ["beside", "listed"])
def test_squares(layout, request):
    folder = request.getfixturevalue(layout)
    items = data.make("captioned_folder", {"image_dir": str(folder), "image_size": 32})
    assert [items[i]["caption"] for i in range(4)] == [f"a picture of {n}" for n in sorted(SIZES)]
    assert items.names == ("image", "caption") and items.sizes is None
    assert {items[i]["image"].shape for i in range(4)} == {(3, 32, 32)}
    twins = data.pictures.read(folder / "a.jpg"), items[0]["image"]
    assert torch.equal(data.pictures.to_tensor(data.pictures.centre_crop(twins[0], 32)), twins[1])
    batch = next(iter(Loader(items, items.sampler(4, seed=0))))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert sorted(batch["caption"]) == sorted(items[i]["caption"] for i in range(4))


def test_own_shapes_in_batches_of_one_size(beside):
    items = CaptionedFolder(beside, min_image_size=16, max_image_size=80)
    sizes = [(64, 64), (64, 96), (48, 112), (64, 64)]
    assert [*map(tuple, items.sizes.tolist())] == sizes  # by name
    for i in range(4):
        assert items[i]["image"].shape == (3, *sizes[i])
    sampler = items.sampler(2, seed=0)
    first = list(islice(Loader(items, sampler), 6))
    assert {tuple(batch["image"].shape[2:]) for batch in first[:3]} == {*sizes}
    resumed = items.sampler(2, seed=0, start=sampler.seen(2))
    for one, other in zip(first[2:], Loader(items, resumed), strict=False):
        assert one["caption"] == other["caption"]


def test_upright_on_white_and_mirrored(tmp_path):
    image = picture(64, 32, 0)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.png", exif=exif)
    clear = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 32, 32))
    clear.save(tmp_path / "clear.png")
    for name in ("turned", "clear"):
        (tmp_path / f"{name}.txt").write_text("a café", "utf-8-sig")
    items = CaptionedFolder(tmp_path, flip=True, escape_captions=True)
    assert items.sizes.tolist() == [[32, 64], [64, 32]]
    assert items[0]["caption"] == escaped("a café") != "a café"
    seen = {tuple(items[0]["image"][:, 0, [0, -1]].flatten().tolist()) for _ in range(40)}
    blue, white = torch.tensor([-1.0, -1, 1]), torch.ones(3)
    sides = torch.stack((blue, white), 1), torch.stack((white, blue), 1)
    assert seen == {tuple(side.flatten().tolist()) for side in sides}
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    got = ((items[1]["image"] + 1) * 127.5).round().movedim(0, -1).numpy()
    assert np.array_equal(got, upright) or np.array_equal(got, upright[:, ::-1])


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_levels_of_16_bits(tmp_path, kind):
    levels = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(levels).save(tmp_path / f"grey.{kind}")
    (tmp_path / "grey.txt").write_text("a ramp")
    got = (CaptionedFolder(tmp_path)[0]["image"] + 1) * 127.5
    assert torch.allclose(got, torch.from_numpy(levels / 257).float().expand(3, -1, -1), atol=0.51)


def test_listed_names_as_one_writes_paths(listed):
    path = listed / "metadata.jsonl"
    path.write_text(path.read_text().replace("deep/c", "./deep//c"))
    assert len(CaptionedFolder(listed)) == len(SIZES)


def lost_text(folder):
    (folder / "b.txt").unlink()
    return "no caption in a .txt beside it for b.png"


def empty_text(folder):
    (folder / "b.txt").write_text(" \n")
    return "an empty caption in a .txt beside it for b.png"


def lost_picture(folder):
    (folder / "b.png").unlink()
    return "a caption without its picture: b.txt"


def of_two(folder):
    picture(8, 8, 1).save(folder / "b.gif")
    return "several pictures would share a .txt: b.gif"


def no_picture(folder):
    (folder / "b.png").write_bytes(b"no picture")
    return "b.png: UnidentifiedImageError"


def no_text(folder):
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    return "b.txt: UnicodeDecodeError"


def nothing(folder):
    for path in [*folder.rglob("*.*")]:
        path.unlink()
    return "has no pictures"


@pytest.mark.parametrize(
    "change",
    [lost_text, empty_text, lost_picture, of_two, no_picture, no_text, nothing],
    ids=lambda change: change.__name__,
)
def test_what_is_wrong_is_named(beside, change):
    message = change(beside)
    with pytest.raises((ValueError, UnreadableError), match=message) as caught:
        data.make("captioned_folder", {"image_dir": str(beside), "image_size": 8})
    assert "\n" not in str(caught.value) and "tim download" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "e.png", "text": "e"}', "a caption without its picture: e.png"),
        ('{"file_name": "b.png", "text": "again"}', "metadata.jsonl, line 8: b.png again"),
        ('{"file_name": "b.png"}', 'metadata.jsonl, line 8: {"file_name": …, "text": …} is needed'),
        ('{"file_name": "b.png", "text": 3}', "line 8: "),
        ("b.png: a picture", "line 8: .* got b.png: a picture"),
    ],
)
def test_lines_that_are_wrong(listed, line, message):
    with (listed / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        CaptionedFolder(listed)


def test_a_picture_that_is_not_listed(listed, caplog):
    (listed / "notes.md").write_text("not used")
    picture(8, 8, 0).save(listed / "new.png")
    with pytest.raises(ValueError, match=r"no caption in \S+metadata.jsonl for new.png"):
        CaptionedFolder(listed)
    assert "not used: notes.md" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_dir", "nowhere", "image_dir must be a folder, got 'nowhere'"),
        ("image_size", 0, "image_size must be at least 1"),
        ("min_image_size", 0, "min_image_size must be at least 1"),
        ("flip", "yes", "flip must be true or false"),
        ("escape_captions", 1, "escape_captions must be true or false"),
        ("image_sze", 1, r"has no image_sze \(did you mean image_size\?\)"),
    ],
)
def test_arguments_that_are_wrong(beside, name, value, message):
    with pytest.raises(ValueError, match=message):
        data.make("captioned_folder", {"image_dir": str(beside)} | {name: value})
