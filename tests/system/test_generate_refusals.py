"""What `tim.generate` notes in run.json, and what it refuses."""

import json

import pytest
import torch
from PIL import Image
from small_folders import TEXTS, captions, class_source, contents, drawn, nan_at, text_source

from tim.generate import settings as known
from tim.generate.benchmarks import GenEval, ImageNet

pytestmark = pytest.mark.usefixtures("one_thread")


def test_run_json_says_what_the_pictures_depend_on(tmp_path):
    folder = drawn("mjhq", tmp_path / "a", cfg_scale=2.0)
    run = json.loads((folder / "run.json").read_text())
    assert run["benchmark"] == "mjhq" and run["pictures"] == 4
    assert run["settings"].items() >= {
        "height": 16, "width": 16, "num_steps": 2, "cfg_scale": 2.0, "T_max": 1.0, "T_min": 0.0,
        "global_seed": 0, "dtype": "float32", "quality": 75, "batch_invariant": True,
        "published_padding": False, "escape_captions": False,
    }.items()  # fmt: skip
    assert {name: len(hash) for name, hash in run["weights"].items()} == {
        "network": 64, "autoencoder": 64, "text_encoder": 64
    }  # fmt: skip
    assert run["transport"]["name"] == "OTFM" and run["network"]["cap_feat_dim"] == 24
    assert run["text"] == {"max_seq_length": 8, "use_last_hidden_state": True}
    (made,) = run["made_with"]
    assert made["device"] == "cpu" and made["versions"]["torch"] == torch.__version__
    assert "processes" not in made  # no picture depends on them


def test_a_folder_without_pictures_is_nobody_s(tmp_path):
    folder = drawn("imagenet", tmp_path / "a", num_fid_samples=1)
    (folder / "000000.png").unlink()
    drawn("imagenet", tmp_path / "a", num_fid_samples=1, global_seed=1)
    assert json.loads((folder / "run.json").read_text())["settings"]["global_seed"] == 1


def test_pictures_that_are_written_are_let_go(tmp_path, monkeypatch):
    write, held = ImageNet.write, []

    def noted(self, item, drawn, absent, new, old):
        held.append(drawn)
        assert drawn.keys() == {0}
        write(self, item, drawn, absent, new, old)

    monkeypatch.setattr(ImageNet, "write", noted)
    drawn("imagenet", tmp_path / "a", num_fid_samples=3)
    assert held == [{}, {}, {}]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(global_seed=1), "settings.global_seed 0, not 1"),
        (dict(quality=80), "settings.quality 75, not 80"),
        (dict(texts=["a dog", *TEXTS[1:]]), "prompts "),
        (dict(source="other"), "weights.network "),
        (dict(published_padding=True), "settings.per_proc_batch_size None, not 3"),
        (dict(batch_invariant=False), "settings.batch_invariant True, not False"),
        (dict(lot_size=2), "settings.lot_size 1, not 2"),
    ],
)
def test_a_folder_of_other_pictures_is_refused(tmp_path, change, said):
    folder = drawn("mjhq", tmp_path / "a")
    before = contents(folder), (folder / "run.json").read_bytes()
    (folder / "art/id0.jpg").unlink()
    if change.get("source"):
        source = text_source()
        torch.nn.init.zeros_(source.network.final_layer.linear.bias)
        change = dict(source=source)
    with pytest.raises(ValueError, match=f"is of .*{said}.*: give another --output"):
        drawn("mjhq", tmp_path / "a", **change)
    assert (folder / "run.json").read_bytes() == before[1]
    assert contents(folder).items() <= before[0].items()


def test_other_versions_are_warned_of_and_noted(tmp_path, monkeypatch, caplog):
    folder = drawn("imagenet", tmp_path / "a", num_fid_samples=1)
    drawn("imagenet", tmp_path / "a", per_proc_batch_size=9, num_fid_samples=2)
    monkeypatch.setattr("tim.generate.record.versions", lambda: {"torch": "9.9"})
    drawn("imagenet", tmp_path / "a", num_fid_samples=2)  # draws nothing
    assert not caplog.records
    drawn("imagenet", tmp_path / "a", num_fid_samples=3)
    assert "made with other versions" in caplog.text
    made = json.loads((folder / "run.json").read_text())["made_with"]
    assert len(made) == 2 and made[1]["versions"] == {"torch": "9.9"}


def test_whole_batches_are_noted(tmp_path):
    given = dict(batch_invariant=False, num_fid_samples=1)
    folder = drawn("imagenet", tmp_path / "a", **given)
    drawn("imagenet", tmp_path / "a", per_proc_batch_size=9, **given | {"num_fid_samples": 2})
    made = json.loads((folder / "run.json").read_text())["made_with"]
    assert [(each["processes"], each["per_proc_batch_size"]) for each in made] == [(1, 3), (1, 9)]


def test_pictures_of_nobody_are_refused(tmp_path):
    folder = drawn("imagenet", tmp_path / "a", num_fid_samples=1)
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"has pictures but no run\.json"):
        drawn("imagenet", tmp_path / "a", num_fid_samples=1)
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no record of tim generate"):
        drawn("imagenet", tmp_path / "a", num_fid_samples=1)


def test_what_is_not_finite_is_named_and_nothing_of_it_written(tmp_path):
    source = class_source()
    nan_at(source, 3)
    said = r"^one of 000006 \(0\), 000007 \(0\): the samples are not finite"
    options = dict(num_fid_samples=9, num_steps=1, lot_size=2)
    with pytest.raises(FloatingPointError, match=said):
        drawn("imagenet", tmp_path / "a", source=source, **options)
    (folder,) = (tmp_path / "a").iterdir()
    assert set(contents(folder)) == {f"{i:06d}.png" for i in range(6)}


def test_a_writer_s_error_ends_the_run(tmp_path, monkeypatch):
    write = ImageNet.write

    def full(self, item, drawn, absent, new, old):
        write(self, item, drawn, absent, new, old)
        if item.name == "000002":
            raise OSError(28, "No space left on device", "000002.png")

    monkeypatch.setattr(ImageNet, "write", full)
    with pytest.raises(OSError, match="No space left"):
        drawn("imagenet", tmp_path / "a", num_fid_samples=40)
    (folder,) = (tmp_path / "a").iterdir()
    there = contents(folder)
    assert "000002.png" not in there and "000001.png" in there
    assert not [name for name in there if "partial" in name]
    for name in there:
        Image.open(folder / name).load()


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("imagenet", dict(height=9), "height and width must be multiples of 4, got 9×8"),
        ("imagenet", dict(num_classes=11), "num_classes must be at most the network's 10: 11"),
        ("imagenet", dict(num_fid_samples=0), "num_fid_samples must be at least 1"),
        ("imagenet", dict(cfg_scale=0.5), "cfg_scale must be at least 1, got 0.5"),
        ("imagenet", dict(cfg_scale=float("nan")), "cfg_scale must be at least 1, got nan"),
        ("imagenet", dict(sample_type="ode"), "sample_type must be one of transition, ddiff"),
        ("imagenet", dict(dtype="int8"), "dtype must be one of bfloat16"),
        ("imagenet", dict(dtype="bfloat16"), "network is in torch.float32: load it in bfloat16"),
        ("mjhq", dict(quality=96), "quality must be at most 95, got 96"),
        ("mjhq", dict(T_max=-1.0), "T_max must exceed T_min"),
    ],
)
def test_refusals(tmp_path, name, changes, said):
    with pytest.raises(ValueError, match=said):
        drawn(name, tmp_path / "a", **changes)


def test_the_other_kind_of_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="geneval needs a network of prompts: c2i is not"):
        drawn("geneval", tmp_path / "a", source=class_source())
    with pytest.raises(ValueError, match="imagenet needs a network of classes: t2i is not"):
        drawn("imagenet", tmp_path / "a", source=text_source())
    with pytest.raises(ValueError, match="trained with class_dropout_prob = 0"):
        drawn("imagenet", tmp_path / "a", source=class_source(class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="preset must be one of dpg, dpg-16, got 'mjhq'"):
        known.make("dpg", "mjhq")
    with pytest.raises(ValueError, match="geneval needs TextSettings, got ClassSettings"):
        GenEval(known.make("imagenet"), captions("geneval", tmp_path, TEXTS))
