"""What is read from files: native latents, what is missing or damaged, one door for all sets."""

import json
import shutil

import pytest
import torch
from golden_files import GOLDEN
from PIL import Image
from safetensors.torch import save_file

from tim import config, data
from tim.data import packing

C2I, T2I = GOLDEN / "training/c2i", GOLDEN / "training/t2i"
LATENT = {"latent_dir": C2I / "latents", "image_dir": C2I / "images", "image_size": 32}
CAPTIONS = {
    "root_dir": T2I,
    "packed_json": T2I / "bucket_sampler.json",
    "jsonl_dir": T2I / "data_info.jsonl",
}


@pytest.fixture
def c2i(tmp_path):
    """A copy that may be damaged, and its section `data.dataset`."""
    shutil.copytree(C2I, tmp_path, dirs_exist_ok=True)
    return LATENT | {"latent_dir": tmp_path / "latents", "image_dir": tmp_path / "images"}


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


SIZES = [(20, 20), (20, 12), (16, 20), (20, 20), (20, 12), (20, 20), (20, 20)]


@pytest.fixture
def native(tmp_path):
    """Latents of seven sizes, the last of a fixed one; the pictures are 2 px a latent."""
    for folder in ("latents/a", "fixed/a", "pictures/a"):
        (tmp_path / folder).mkdir(parents=True)
    lines = []
    for i, (h, w) in enumerate(SIZES):
        is_fixed = i == len(SIZES) - 1
        latent = torch.stack([torch.full((4, h, w), 1.0 + i), torch.full((4, h, w), -1.0 - i)])
        where = tmp_path / ("fixed" if is_fixed else "latents")
        save_file(
            {"latent": latent, "label": torch.tensor([float(i % 3)])}, where / f"a/{i}.safetensors"
        )
        picture = Image.new("RGB", (2 * w + 9, 2 * h), "white")
        picture.paste("black", (0, 0, w, 2 * h))
        picture.save(tmp_path / f"pictures/a/{i}.png")
        line = {"image_file": f"a/{i}.png", "latent_file": f"a/{i}.safetensors", "ori_w": 2 * w + 9}
        line |= {"latent_h": h, "latent_w": w, "image_h": 2 * h, "image_w": 2 * w}
        lines.append(line | {"type": "fixed-40x40" if is_fixed else "native-resolution"})
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "jsonl_dir": tmp_path / "meta.jsonl",
        "latent_dirs": [tmp_path / "latents", tmp_path / "fixed"],
        "data_types": ["native-resolution", "fixed-40x40"],
        "image_dir": tmp_path / "pictures",
        "num_classes": 3,
    }


def test_native_batches_have_one_size(native):
    images = data.make("improved_pack", native)
    sampler = images.sampler(2, seed=0)
    loader = data.Loader(images, sampler)
    shapes = []
    for micro_step, batch in enumerate(loader):
        latent, image = batch["latent"], batch["image"]
        assert image.shape[2:] == (2 * latent.shape[2], 2 * latent.shape[3])
        for one, picture, label in zip(latent, image, batch["label"], strict=True):
            left, right = picture[0, 4, 0], picture[0, 4, -1]
            assert (left < right) == (one[0, 0, 0] > 0)  # flipped together
            assert (abs(one[0, 0, 0]) - 1) % 3 == label
        shapes.append(tuple(latent.shape))
        if sampler.seen(micro_step + 1) == len(SIZES):
            break
    assert sorted(shapes) == [(1, 4, 16, 20), (2, 4, 20, 12), (2, 4, 20, 20), (2, 4, 20, 20)]


def test_native_packs(native, tmp_path):
    (tmp_path / "packs.json").write_text("[[0, 1], [2, 3, 4], [5, 6]]")
    images = data.make("improved_pack", native | {"packed_json": tmp_path / "packs.json"})
    for _, batch in zip(range(3), data.Loader(images, images.sampler(1, seed=0)), strict=False):
        sizes = [latent.shape[1:] for latent in batch["latent"]]
        assert len(batch["label"]) == len(sizes) in (2, 3)
        assert isinstance(batch["latent"], list) == (len(set(sizes)) > 1)


def test_packing_is_tight():
    lengths = torch.randint(1, 400, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = packing.longest_first(lengths, 1024)
    assert sorted(line for pack in packs for line in pack) == [*range(3000)]
    sums = [sum(lengths[line] for line in pack) for pack in packs]
    assert max(sums) <= 1024 and len(packs) == -(-sum(lengths) // 1024)  # the fewest there can be
    with pytest.raises(ValueError, match="line 1 has 9 tokens, more than a pack's 8"):
        packing.longest_first([3, 9], 8)


def test_missing_latents_are_named_at_the_start(c2i):
    (c2i["latent_dir"] / "n01440764/n01440764_13.safetensors").unlink()
    shutil.rmtree(c2i["latent_dir"] / "n02119789")
    with pytest.raises(ValueError, match="no latent of 3 of 6 pictures") as error:
        data.make("latent", c2i)
    line = one_line(error)
    assert "n01440764/n01440764_13.PNG" in line and "n02119789/n02119789_12.PNG" in line


def test_pictures_with_one_latent_are_refused(c2i):
    folder = c2i["image_dir"] / "n01440764"
    shutil.copy(folder / "n01440764_10.PNG", folder / "n01440764_10.again.PNG")
    with pytest.raises(ValueError, match="of class n01440764 have one name up to the first dot"):
        data.make("latent", c2i)


def test_other_files_are_passed_over(c2i, caplog):
    (c2i["image_dir"] / "LOC_synset.txt").touch()
    (c2i["image_dir"] / "n01440764/.DS_Store").touch()
    for name in ("notes.txt", "thesis.pdf"):
        (c2i["image_dir"] / "n01440764" / name).touch()
    assert len(data.make("latent", c2i)) == 6
    (record,) = caplog.records
    names = record.getMessage().partition("not pictures: ")[2].split(", ")
    assert sorted(names) == ["n01440764/notes.txt", "n01440764/thesis.pdf"]


WRONG_LATENTS = {
    "cut": (None, "SafetensorError"),
    "one row": ({"latent": torch.ones(1, 4, 4, 4)}, r"latent must have shape \(2, C, 4, 4\)"),
    "larger": ({"latent": torch.ones(2, 4, 8, 8)}, r"shape \(2, C, 4, 4\), got \(2, 4, 8, 8\)"),
    "half a label": ({"label": torch.tensor(0.5)}, "label must be a whole number below 3"),
    "no class": ({"label": torch.tensor(3)}, "label must be a whole number below 3, got 3"),
    "two labels": ({"label": torch.zeros(2)}, "label must be a whole number below 3"),
}


@pytest.mark.parametrize("tensors, words", WRONG_LATENTS.values(), ids=WRONG_LATENTS)
def test_damaged_latents(c2i, tensors, words):
    path = c2i["latent_dir"] / "n01440764/n01440764_10.safetensors"
    if tensors is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        save_file({"latent": torch.ones(2, 4, 4, 4), "label": torch.tensor(0)} | tensors, path)
    images = data.make("latent", c2i)
    with pytest.raises(data.UnreadableError, match=words) as error:
        images[0]
    assert str(path) in one_line(error)


def test_labels_of_any_whole_kind(c2i):
    path = c2i["latent_dir"] / "n01440764/n01440764_10.safetensors"
    for label in (torch.tensor([2.0]), torch.tensor(2, dtype=torch.uint8), torch.tensor(2)):
        save_file({"latent": torch.ones(2, 4, 4, 4).half(), "label": label}, path)
        item = data.make("latent", c2i)[0]
        assert item["label"].shape == () and item["label"].dtype == torch.int64
        assert int(item["label"]) == 2 and item["latent"].dtype == torch.float32


def pictures_of(folder, count, broken):
    (folder / "class").mkdir(parents=True)
    for i in range(count):
        path = folder / f"class/{i:03}.png"
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:40])
    return data.ImageFolder(folder, 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_are_counted_and_named(tmp_path, caplog, num_workers):
    images = pictures_of(tmp_path, 100, {17})
    loader = data.Loader(images, images.sampler(10, seed=0), num_workers=num_workers)
    sizes = [len(batch["label"]) for _, batch in zip(range(20), loader, strict=False)]
    assert sorted(sizes) == [9] * 2 + [10] * 18
    assert (loader.drawn, loader.unreadable) == (200, 2)
    (record,) = caplog.records
    assert "class/017.png: UnidentifiedImageError" in record.getMessage()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_files_stop_the_run(tmp_path, num_workers):
    images = pictures_of(tmp_path, 40, range(20))
    loader = data.Loader(images, images.sampler(4, seed=0), num_workers=num_workers)
    with pytest.raises(data.UnreadableError, match="items cannot be read, more than 0.01") as error:
        for _ in loader:
            pass
    assert ".png" in one_line(error) and loader.drawn < 40


def test_a_share_may_be_unreadable(tmp_path):
    """Over 2,000 images 1 % are let through, and not one more."""
    images = pictures_of(tmp_path, 100, {5})
    loader = data.Loader(images, images.sampler(100, seed=0))
    sizes = [len(batch["label"]) for _, batch in zip(range(30), loader, strict=False)]
    assert sizes == [99] * 30
    loader = data.Loader(images, images.sampler(100, seed=0), most_unreadable=0.0099)
    with pytest.raises(data.UnreadableError, match="of 1000 items cannot be read"):
        for _ in loader:
            pass


def test_a_batch_without_any_readable_item(tmp_path):
    images = pictures_of(tmp_path, 40, {3, 4})
    loader = data.Loader(images, [[data.Visit(3, 0, 9)]])
    (batch,) = loader
    assert batch["image"].shape == (1, 3, 4, 4) and torch.equal(
        batch["image"], images.collate([images[data.Visit(5, 0, 9)]])["image"]
    )
    assert (loader.drawn, loader.unreadable) == (1, 2)
    (batch,) = data.Loader(images, [[3]])  # a plain index
    assert len(batch["label"]) == 1
    images = pictures_of(tmp_path / "all", 20, range(20))
    with pytest.raises(data.UnreadableError, match="none of 17 items can be read"):
        next(iter(data.Loader(images, [[data.Visit(3, 0, 9)]], most_unreadable=1.0)))


def test_workers_read_what_one_process_reads():
    """And torch's generator is left alone."""
    images = data.make("latent", LATENT)
    before = torch.get_rng_state()
    runs = []
    for num_workers in (0, 2):
        loader = data.Loader(images, images.sampler(4, seed=1, start=10), num_workers=num_workers)
        runs.append([batch for _, batch in zip(range(4), loader, strict=False)])
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys() == {"latent", "image", "label"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def captioned(folder):
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a")
    return folder


@pytest.mark.parametrize("preset", config.presets())
def test_every_preset_has_a_door(preset, tmp_path, monkeypatch):
    """Its section as written, with the folders that it names."""
    section = config.resolved(config.load(preset).data)
    wanted = section.get("dataset") or {}
    given = CAPTIONS if "root_dir" in wanted else LATENT
    if section["data_type"] == "captioned_folder":
        given = {"image_dir": captioned(tmp_path / "captioned")}
    if "unit" in wanted:
        wanted["unit"] = 32  # px, of the golden captions' batches
    monkeypatch.chdir(tmp_path)
    for name, path in wanted.items():
        if isinstance(path, str):
            place = tmp_path / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if given[name].is_dir():
                shutil.copytree(given[name], place)
            else:
                shutil.copy(given[name], place)
    images = data.make(section["data_type"], wanted)
    item = images[len(images) - 1]
    assert set(item) == set(images.names)


MISTAKES = {
    "type": ("latents", {}, r"got 'latents' \(did you mean latent\?\)"),
    "unknown": ("latent", LATENT | {"image_sise": 1}, r"image_sise \(did you mean image_size\?\)"),
    "missing": ("latent", {"image_size": 1}, "needs latent_dir, image_dir for data_type latent"),
    "size": ("latent", LATENT | {"image_size": 0}, "image_size must be at least 1, got 0"),
    "folder": (
        "image",
        {"image_dir": "nowhere", "image_size": 8},
        "must be a folder, got 'nowhere'",
    ),
    "null": ("image", {"image_dir": None, "image_size": 8}, "image_dir must be a folder, got None"),
    "no classes": ("imagefolder", {"image_dir": T2I / "images", "image_size": 8}, "no class fold"),
    "empty class": ("imagefolder", {"image_dir": C2I, "image_size": 8}, "no pictures in latents"),
    "flip": ("image", {"image_dir": C2I / "images", "image_size": 8, "flip": 1}, "flip must be"),
    "mnist": ("mnist", {"split": "test"}, "has no split; data_type mnist takes nothing"),
    "no lines": ("image_ms", CAPTIONS | {"jsonl_dir": "x"}, "jsonl_dir must be a file, got 'x'"),
    "no packs": ("image_ms", CAPTIONS | {"packed_json": "x"}, "packed_json must be a file, got"),
    "dirs": (
        "improved_pack",
        {"jsonl_dir": "x", "latent_dirs": "x", "image_dir": T2I},
        "latent_dirs must be one folder for each",
    ),
}


@pytest.mark.parametrize("data_type, dataset, words", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_configuration(data_type, dataset, words):
    with pytest.raises(ValueError, match=words) as error:
        data.make(data_type, dataset)
    assert one_line(error).startswith("data.")


LINES = {
    "no JSON": ("{", "line 1: Expecting"),
    "no object": ("[]", "line 1: "),
    "blank": ("\n", "line 1: Expecting"),
    "no bucket": ('{"image_file": "a", "captions": ["b"]}', "line 1: no 'bucket'"),
    "bucket": (
        '{"image_file": "a", "bucket": "x-31x64", "captions": ["b"]}',
        "bucket must end in -HxW of at least 32 px, got 'x-31x64'",
    ),
    "no caption": ('{"image_file": "a", "bucket": "64x64", "captions": []}', "list of texts"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("text, words", LINES.values(), ids=LINES)
def test_wrong_lines(tmp_path, text, words):
    (tmp_path / "lines.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        data.make("image_ms", CAPTIONS | {"jsonl_dir": tmp_path / "lines.jsonl"})
    assert "lines.jsonl" in one_line(error)


PACKS = {
    "[[0, 5]]": "names line 5; there are 5, from 0 on",
    "[[-1]]": "names line -1",
    "[[0, 2]]": "batch 0 has pictures of several sizes",
    "[[0], []]": "none empty",
    "[]": "none empty",
    "[0, 1]": "must be a list of lists",
    "[[0.5]]": "must be a list of lists",
    '{"a": 1}': "must be a list of lists",
    "[[0]": "must be a list of lists",
}


@pytest.mark.parametrize("text, words", PACKS.items())
def test_wrong_packs(tmp_path, text, words):
    (tmp_path / "packs.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        data.make("image_ms", CAPTIONS | {"packed_json": tmp_path / "packs.json"})
    assert "packs.json" in one_line(error)
