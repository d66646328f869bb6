"""Folders of pictures: what is in them, what a picture depends on, what is refused."""

import json

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from PIL import Image
from safetensors.torch import load_file
from small_folders import (
    TEXTS,
    class_source,
    contents,
    drawn,
    sampled,
    text_source,
)
from small_pipelines import text_pipeline

from tim.encoders import TextEncoder
from tim.generate import draws, pixels
from tim.generate import settings as known
from tim.generate.benchmarks import BENCHMARKS, GenEval
from tim.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")


def test_levels_and_grid_are_the_published_ones():
    golden = load_file(GOLDEN / "evaluation/arrays.safetensors")
    images = golden["pixels_in"]  # (prompt, picture, C, H, W)
    assert torch.equal(pixels.truncated(images[:, 0]), golden["pixels_truncated"])
    levels = pixels.rounded(images)
    assert torch.equal(levels, golden["pixels_offset"])
    grids = np.stack([pixels.grid(four.numpy()) for four in levels])
    assert np.array_equal(grids, golden["grid"].numpy())


def test_folders_have_the_published_names():
    cases = json.loads((GOLDEN / "evaluation/folder_names.json").read_text())
    assert len(cases) == 12
    types = set()
    for case in cases:
        args = dict(case["args"])
        types.add(data_type := args.pop("data_type", ""))
        name = args.pop("ckpt").rpartition("/")[2].partition(".")[0]
        assert known.folder_name(known.Settings(**args), name, data_type) == case["folder"]
    assert types == {kind.data_type for kind in BENCHMARKS.values()}


def test_presets_are_the_published_settings():
    def row(benchmark, preset=None):
        s = known.make(benchmark, preset)
        return (
            s.height, s.width, s.per_proc_batch_size, s.num_steps, s.cfg_scale, s.guidance_low,
            s.guidance_high, s.stochasticity_ratio,
        )  # fmt: skip

    assert row("geneval") == (None, None, 32, 50, 1.5, 0.0, 1.0, 0.0)
    assert row("geneval", "geneval-64") == (1024, 1024, 32, 64, 2.5, 0.0, 1.0, 0.0)
    assert row("geneval", "geneval-2560") == (2560, 2560, 4, 4, 2.5, 0.0, 1.0, 0.0)
    assert row("dpg", "dpg-16") == (1024, 1024, 32, 16, 2.5, 0.0, 1.0, 0.0)
    assert row("mjhq", "mjhq") == (1024, 1024, 32, 4, 1.5, 0.0, 1.0, 0.0)
    assert row("imagenet", "imagenet-256-250") == (256, 256, 128, 250, 2.5, 0.0, 0.6, 0.2)
    assert row("imagenet", "imagenet-512-1") == (512, 512, 32, 1, 1.0, 0.0, 1.0, 0.0)
    assert row("imagenet", "imagenet-512-250") == (512, 512, 32, 250, 3.0, 0.0, 0.7, 0.2)
    assert known.make("imagenet").num_fid_samples == 50_000
    changed = known.make("mjhq", "mjhq", num_steps=7)
    assert changed.num_steps == 7 and changed.cfg_scale == 1.5 and changed.quality == 75


def test_each_picture_has_draws_of_its_own():
    keys = [(seed, item, index) for seed in (0, 1) for item in "ab" for index in range(3)]
    noises = [draws.noise(*key, (4, 8, 8)) for key in keys]
    steps = [torch.randn(5, generator=draws.step_generator(*key)) for key in keys]
    for each in (noises, steps):
        assert len({tensor.numpy().tobytes() for tensor in each}) == len(keys)
    assert torch.equal(noises[0], draws.noise(*keys[0], (4, 8, 8)))
    everything = torch.cat([noise.flatten() for noise in noises])
    assert everything.dtype == torch.float32
    assert abs(everything.mean()) < 0.07 and abs(everything.std() - 1) < 0.05
    labels = [draws.label(0, f"{i:06d}", 10) for i in range(2000)]
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 150 and counts.max() < 250 and len(counts) == 10


def test_a_class_picture_is_what_the_sampler_makes_of_its_draws(tmp_path):
    source = class_source()
    changes = dict(cfg_scale=2.0, guidance_high=0.8, stochasticity_ratio=0.3, num_steps=4)
    changes["lot_size"] = 1
    folder = drawn("imagenet", tmp_path / "a", source=source, num_fid_samples=2, **changes)
    assert sorted(contents(folder)) == ["000000.png", "000001.png"]
    assert folder.name == "c2i-8x8-T0.0-1.0-Step-4-sto-0.3-transition-cfg-2.0-0.0-0.8"
    y = torch.tensor([draws.label(0, "000001", 10)])
    z = draws.noise(0, "000001", 0, (4, 4, 4))[None]
    x = sample(
        source.network, source.transport, z, y, torch.tensor([10]), num_steps=4, cfg_scale=2.0,
        cfg_high=0.8, stochasticity_ratio=0.3,
        generator=[draws.step_generator(0, "000001", 0)],
    )  # fmt: skip
    expected = ((source.autoencoder.decode(x) + 1) / 2 * 255).clamp(0, 255).byte()[0]
    image = Image.open(folder / "000001.png")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected.movedim(0, -1).numpy())


def test_a_text_picture_is_what_the_pipeline_makes_of_the_noise(tmp_path):
    """A prompt alone is padded as TiMTextPipeline does it."""
    folder = drawn("mjhq", tmp_path / "a", cfg_scale=3.0)
    z = draws.noise(0, "art/id2", 0, (4, 4, 4))[None]
    images = text_pipeline()(
        TEXTS[2], num_inference_steps=2, guidance_scale=3.0, latents=z, output_type="pt"
    ).images
    expected = (images[0] * 255).byte().movedim(0, -1).numpy()
    Image.fromarray(expected).save(tmp_path / "expected.jpg")
    stored, expected = (
        np.asarray(Image.open(path)).astype(float)
        for path in (folder / "art/id2.jpg", tmp_path / "expected.jpg")
    )
    assert np.abs(stored - expected).mean() < 0.5
    latents = drawn("dpg", tmp_path / "b", cfg_scale=3.0, save_latent=True, lot_size=1)
    (kept,) = load_file(latents / "item2.safetensors").values()
    z = draws.noise(0, "item2", 3, (4, 4, 4))[None]
    options = dict(num_inference_steps=2, guidance_scale=3.0, latents=z, output_type="latent")
    assert torch.equal(kept[3:], text_pipeline()(TEXTS[2], **options).images)


def test_geneval_s_files(tmp_path):
    folder = drawn("geneval", tmp_path / "a")
    assert folder.name.startswith("geneval-t2i-16x16-T0.0-1.0-Step-2-")
    parts = [f"samples/{k:05d}.png" for k in range(4)] + ["metadata.jsonl", "grid.png"]
    assert set(contents(folder)) == {f"{i:05d}/{part}" for i in range(4) for part in parts}
    line = json.loads((folder / "00002/metadata.jsonl").read_text())
    assert line == {"tag": "counting", "include": [], "prompt": TEXTS[2]}
    assert not (folder / "00002/metadata.jsonl").read_text().endswith("\n")
    four = [np.asarray(Image.open(folder / "00002" / part)) for part in parts[:4]]
    assert len({each.tobytes() for each in four}) == 4 and four[0].shape == (16, 16, 3)
    grid = np.asarray(Image.open(folder / "00002/grid.png"))
    rows = [np.concatenate(four[i : i + 2], axis=1) for i in (0, 2)]
    assert np.array_equal(grid, np.concatenate(rows))


def test_geneval_s_own_prompts_are_the_default():
    assert len(GenEval(known.make("geneval")).items) == 553


def test_dpg_s_and_mjhq_s_files(tmp_path):
    grids = drawn("dpg", tmp_path / "a")
    assert set(contents(grids)) == {f"item{i}.png" for i in range(4)}
    assert Image.open(grids / "item0.png").size == (32, 32)
    latents = drawn("dpg", tmp_path / "b", save_latent=True)
    assert set(contents(latents)) == {f"item{i}.safetensors" for i in range(4)}
    kept = load_file(latents / "item0.safetensors")["latent"]
    assert kept.shape == (4, 4, 4, 4) and kept.dtype == torch.float32
    image = text_source().decode(kept[3:])[0]
    quarter = np.asarray(Image.open(grids / "item0.png"))[16:, 16:]
    rounded = (127.5 * image + 128).clamp(0, 255).byte().movedim(0, -1).numpy()
    assert np.array_equal(quarter, rounded)
    names = {"art/id0.jpg", "food/id1.jpg", "art/id2.jpg", "food/id3.jpg"}
    one, other = (drawn("mjhq", tmp_path / f"{q}", quality=q) for q in (75, 20))
    assert set(contents(one)) == set(contents(other)) == names
    tables = [Image.open(folder / "art/id0.jpg").quantization for folder in (one, other)]
    assert sum(tables[0][0]) < sum(tables[1][0])


@pytest.mark.parametrize(
    "name, options",
    [
        ("geneval", {}), ("geneval", dict(lot_size=3)), ("dpg", {}), ("mjhq", {}),
        ("mjhq", dict(lot_size=3)), ("imagenet", dict(num_fid_samples=21)),
        ("imagenet", dict(num_fid_samples=5, lot_size=1)),
    ],
)  # fmt: skip
def test_batch_sizes_and_deletions_do_not_show(tmp_path, name, options):
    options = dict(stochasticity_ratio=0.4, num_steps=3, cfg_scale=2.0) | options
    expected = contents(drawn(name, tmp_path / "a", **options))
    folder = drawn(name, tmp_path / "b", per_proc_batch_size=16, **options)
    assert contents(folder) == expected
    for file in list(expected)[::3]:
        (folder / file).unlink()
    assert drawn(name, tmp_path / "b", per_proc_batch_size=1, **options) == folder
    assert contents(folder) == expected


def test_only_what_is_missing_is_drawn(tmp_path):
    folder, source = drawn("geneval", tmp_path / "a", cfg_scale=1.0), text_source()
    before, calls = contents(folder), sampled(source)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}

    def again():
        calls.clear()
        drawn("geneval", tmp_path / "a", source=source, cfg_scale=1.0)
        assert contents(folder) == before
        return len(calls)

    assert again() == 0
    (folder / "00001/samples/00002.png").unlink()
    assert again() == 2  # the steps of one picture
    (folder / "00003/grid.png").unlink()
    (folder / "00000/metadata.jsonl").unlink()
    assert again() == 0
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed - {"run.json", ".lock"} == {"00002.png", "grid.png", "metadata.jsonl"}
    Image.new("RGB", (4, 4)).save(folder / "00003/samples/00000.png")
    (folder / "00003/grid.png").unlink()
    with pytest.raises(ValueError, match=r"00000.png is \(4, 4, 3\), not \(16, 16, 3\): remove it"):
        again()
    sample = folder / "00003/samples/00000.png"
    sample.write_bytes(before["00003/samples/00000.png"][:-60])
    with pytest.raises(OSError, match=r"00003/samples/00000.png: OSError: .*truncated"):
        again()


def test_neighbours_do_not_change_a_prompt_s_picture(tmp_path):
    def first(name, texts, **options):
        folder = drawn("dpg", tmp_path / name, texts, num_steps=1, cfg_scale=1.0, **options)
        return contents(folder)["item0.png"]

    alone = first("a", TEXTS[:1])
    assert first("b", TEXTS[:3]) == alone
    padded = dict(published_padding=True)
    short, long = first("c", TEXTS[:2], **padded), first("d", TEXTS[:3], **padded)
    assert short == alone != long
    tokens = text_source().text
    features = tokens.encode([TEXTS[0]])[0][:, :7]  # as many as the longest in its batch has
    source = text_source()
    z = source.transport.initial_state(draws.noise(0, "item0", 0, (4, 4, 4))[None])
    image = source.decode(sample(source.network, source.transport, z, features, num_steps=1))
    quarter = np.asarray(Image.open(next((tmp_path / "d").glob("*/item0.png"))))[:16, :16]
    assert np.array_equal(quarter, pixels.rounded(image)[0].numpy())


def test_a_prompt_is_not_escaped_unless_asked(tmp_path):
    """As it is, "é" is one unknown word; escaped, \\xe9 are two."""
    seen = []
    source, whole = text_source(), TextEncoder._prepared

    def prepared(self, text):
        seen.append(whole(self, text))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "_prepared", prepared)
        drawn("dpg", tmp_path / "a", ["a é"], source=source)
        assert {*seen} == {"a é", ""}
        seen.clear()
        drawn("dpg", tmp_path / "b", ["a é"], source=source, escape_captions=True)
        assert {*seen} == {"a \\xe9", ""}


def test_whole_batches_differ_in_little(tmp_path):
    alone = drawn("dpg", tmp_path / "a", save_latent=True, cfg_scale=2.0)
    source = text_source()
    calls = sampled(source)
    together = drawn(
        "dpg", tmp_path / "b", source=source, save_latent=True, cfg_scale=2.0,
        batch_invariant=False, per_proc_batch_size=16,
    )  # fmt: skip
    assert sorted(calls) == [4] * 4 + [8] * 4  # a length each; guided in the second step
    for name in contents(alone):
        one, other = (load_file(folder / name)["latent"] for folder in (alone, together))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    settings = json.loads((together / "run.json").read_text())["settings"]
    assert settings["batch_invariant"] is False
    sliced = drawn("imagenet", tmp_path / "c", num_fid_samples=3, batch_invariant=False)
    assert len(contents(sliced)) == 3


def test_exactly_as_many_as_asked_and_more_later(tmp_path):
    folder = drawn("imagenet", tmp_path / "a", num_fid_samples=4)
    before = contents(folder)
    assert len(before) == 4
    drawn("imagenet", tmp_path / "a", num_fid_samples=7)
    after = contents(folder)
    assert len(after) == 7 and before.items() <= after.items()
    assert json.loads((folder / "run.json").read_text())["pictures"] == 7
    with pytest.raises(ValueError, match="2 files that are not of this run, such as 000005.png"):
        drawn("imagenet", tmp_path / "a", num_fid_samples=5)
    assert contents(folder) == after


def test_balanced_labels_go_round(tmp_path):
    source, labels = class_source(), []
    source.network.register_forward_pre_hook(lambda module, args: labels.extend(args[3].tolist()))
    options = dict(num_steps=1, cfg_scale=1.0, balanced=True, num_classes=3, lot_size=1)
    drawn("imagenet", tmp_path / "a", source=source, num_fid_samples=7, **options)
    assert labels == [0, 1, 2, 0, 1, 2, 0]
