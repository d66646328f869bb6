"""What tim writes appears whole, over the very file that it was read from too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_pipelines import CLASS, class_pipeline, drawn, network

from tim.files import filling, replacing
from tim.models import TiMTransformer2DModel
from tim.pipelines import TiMClassPipeline

OVER_ITSELF = """
import sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from small_pipelines import CLASS, class_pipeline, drawn, network
from tim import checkpoints
from tim.models import TiMTransformer2DModel
from tim.pipelines import TiMClassPipeline

folder = Path(sys.argv[1])
state = network(CLASS).state_dict()
for path, save in ((folder / "a.bin", torch.save), (folder / "a.safetensors", save_file)):
    save(state, path)
    loaded = checkpoints.load(path, CLASS)
    save(loaded.state_dict(), path)
    path.write_bytes(b"")
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)
for safe in (True, False):
    network(CLASS).save_pretrained(folder / str(safe), safe_serialization=safe)
    loaded = TiMTransformer2DModel.from_pretrained(folder / str(safe), use_safetensors=safe)
    loaded.save_pretrained(folder / str(safe), safe_serialization=safe)
    again = TiMTransformer2DModel.from_pretrained(folder / str(safe), use_safetensors=safe)
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)
pipeline = class_pipeline()
pipeline.save_pretrained(folder / "pipeline", safe_serialization=False)
loaded = TiMClassPipeline.from_pretrained(folder / "pipeline", use_safetensors=False)
loaded.save_pretrained(folder / "pipeline", safe_serialization=False)
assert torch.equal(drawn(loaded), drawn(pipeline))
print("saved")
"""


def test_weights_are_saved_over_the_file_they_come_from(tmp_path):
    """In a process of its own: what is mapped from a file that shrinks ends it by SIGBUS."""
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", OVER_ITSELF, tmp_path],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout == "saved\n", run.stderr


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as new:
        new.write_text("first")
        assert new.name == path.name and not path.exists()
    with path.open() as held:
        with replacing(path) as new:
            new.write_text("second")
            assert path.read_text() == "first"
        assert held.read() == "first"
    with pytest.raises(KeyboardInterrupt), replacing(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_keeps_its_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("mine")
    with filling(".") as new:
        assert new.name == tmp_path.name  # the hub's name by default
        (new / "part").mkdir()
        (new / "part" / "file.txt").write_text("new")
    assert Path("mine.txt").read_text() == "mine" and Path("part/file.txt").read_text() == "new"
    assert sorted(os.listdir()) == ["mine.txt", "part"]


@pytest.mark.parametrize("variant", [None, "half"])
def test_shards_of_an_earlier_save_are_not_read(tmp_path, variant):
    first, second = network(CLASS), network(CLASS)
    torch.nn.init.zeros_(second.x_embedder.proj.weight)
    first.save_pretrained(tmp_path, max_shard_size="50KB", variant=variant)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    second.save_pretrained(tmp_path, variant=variant)
    loaded = TiMTransformer2DModel.from_pretrained(tmp_path, variant=variant)
    assert not loaded.x_embedder.proj.weight.any()
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_that_fails_leaves_the_pipeline_that_was_there(tmp_path, monkeypatch):
    pipeline = class_pipeline()
    pipeline.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(type(pipeline.vae), "save_pretrained", fail)
    torch.nn.init.zeros_(pipeline.transformer.x_embedder.proj.weight)
    with pytest.raises(OSError, match="disk full"):
        pipeline.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert torch.equal(drawn(TiMClassPipeline.from_pretrained(tmp_path)), drawn(class_pipeline()))
