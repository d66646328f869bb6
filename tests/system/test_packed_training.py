"""`tim train` on pictures of different sizes, packed to a budget of tokens."""

import json
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from small_latents import Ragged, latents, packed_parts, parts
from two_processes import (
    assert_same,
    error,
    gradients,
    gradients_of_one,
    in_two_processes,
    state_of,
)

from benchmarks.cases.ragged import imagenet_sizes
from tim.data import PackedSampler
from tim.data.packing import longest_first, mixed
from tim.training import loop
from tim.training.log import read_log
from tim.training.streams import Position, TokenPacks


@pytest.mark.parametrize("tokens", [4096, 8192, 16384, 32768])
@pytest.mark.parametrize("pack", [longest_first, partial(mixed, seed=0)], ids=["longest", "mixed"])
def test_packs_of_imagenet_are_full(pack, tokens):
    lengths = (imagenet_sizes(30_000) // 32).prod(axis=1)
    packs = pack(lengths, tokens)
    assert sorted(np.concatenate(packs)) == list(range(30_000))
    filled = np.array([lengths[pack].sum() for pack in packs])
    assert filled.max() <= tokens and filled.mean() / tokens >= 0.97
    assert np.mean(filled >= 0.99 * tokens) > 0.99  # all processes have as many


def test_mixed_packs_are_random_batches():
    """Of pictures sorted by size, a pack has long and short ones; of another seed, others."""
    lengths = np.repeat([100, 400], 500)
    packs = mixed(lengths, 5000, seed=3)
    means = [lengths[pack].mean() for pack in packs[:-1]]
    assert 100 < min(means) < max(means) < 400 and sum(map(len, packs)) == 1000
    assert packs == mixed(lengths, 5000, seed=3) != mixed(lengths, 5000, seed=4)
    with pytest.raises(ValueError, match="more than a pack's 300"):
        mixed(lengths, 300, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_have_as_many_tokens(world_size):
    """At every step; over as many epochs as processes each pack comes once an epoch, and a run can
    go on from any step."""
    tokens = [16] * 9 + [14, 14, 12, 12, 11, 9, 7, 3]
    packs = [[i] * (1 + i % 3) for i in range(17)]

    def sampler(rank, start=0):
        return PackedSampler(
            packs, seed=3, start=start, rank=rank, world_size=world_size, tokens=tokens
        )

    steps = list(zip(*(islice(sampler(rank), 34) for rank in range(world_size)), strict=True))
    spreads = []
    for step in steps:
        sizes = [tokens[batch[0]] for batch in step]
        spreads.append(max(sizes) - min(sizes))
    assert max(spreads) <= 4 * (world_size - 1) and sorted(spreads)[11] == 0
    stream = [int(batch[0]) for step in steps for batch in step]
    for epoch in range(2 * world_size):
        assert sorted(stream[17 * epoch : 17 * (epoch + 1)]) == list(range(17))
    assert len({tuple(stream[17 * e : 17 * e + 17]) for e in range(2)}) == 2
    for position in (1, 7, 20):
        start = sampler(0).seen(position)
        again = list(islice(sampler(world_size - 1, start), 34 - position))
        assert again == [step[-1] for step in steps[position:]]


def test_token_packs():
    packs = TokenPacks(Ragged(), 2, 16)
    assert packs.tokens.max() <= 16 and packs.tokens.sum() == Ragged().sizes.prod(1).sum() // 4
    assert packs.images_per_pack == 24 / len(packs.packs)
    assert packs.efficiency == packs.tokens.mean() / 16
    given = TokenPacks(Ragged(), 2, packs=[[0, 1], [2]])
    assert given.tokens.tolist() == [7, 6] and given.efficiency == 6.5 / 7
    one_size = TokenPacks(parts().dataset, 2, 9)
    assert set(one_size.tokens) == {8} and one_size.images_per_pack == 2
    batch = next(iter(packs(Ragged(), Position(5, 0, 0, 0, 1))))
    assert packs.tokens.max() >= sum(Ragged().sizes[i].prod() // 4 for i in batch)
    with pytest.raises(ValueError, match="multiples of 4, a token's; .* of 24 pictures are not"):
        TokenPacks(Ragged(), 4, 16)
    with pytest.raises(ValueError, match="more than a pack's 8"):
        TokenPacks(Ragged(), 2, 8)


def configuration(kind="class", mg=False, derivative="dde", **training):
    cfg = latents(kind, mg=mg, gradient_accumulation_steps=2, **training)
    cfg.model.transition_loss.derivative_type = derivative
    cfg.model.network.params.depth = 1
    return cfg


def train(cfg, output):
    kind = "text" if cfg.model.network.params.get("cap_feat_dim") else "class"
    trainer = loop.Trainer(cfg, output, packed_parts(kind))
    trainer.run()
    return state_of(trainer)


CASES = [("class", True, "dde"), ("text", False, "jvp")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_equals_an_unbroken_one(one_thread, tmp_path, case):
    whole = train(configuration(*case), tmp_path / "whole")
    train(configuration(*case, max_train_steps=2), tmp_path / "resumed")
    assert_same(train(configuration(*case), tmp_path / "resumed"), whole)
    images = whole["counts"].tolist()[1]
    log = read_log(tmp_path / "whole/log.jsonl")
    assert log[-1]["images"] == images > 4 * 2 and all(line["projection"] > 0 for line in log)


def test_every_picture_of_a_step_counts_alike(one_thread, tmp_path):
    """Of its packs, the one with three pictures weighs thrice as much as that with one."""
    trainer = loop.Trainer(configuration(), tmp_path, packed_parts())
    batches = trainer._loader()
    counts = []
    for batch, _ in zip(batches, range(2), strict=False):
        counts.append((len(batch["label"]), trainer._batches_per_step(batch)))
    total = trainer._seen(2)
    assert sum(own for own, _ in counts) == total and len({own for own, _ in counts}) == 2
    assert all(share == total / own for own, share in counts)


def work(rank, folder):
    found = {}
    for way in ("ddp", "fsdp2"):
        for case in CASES:
            cfg = configuration(*case, parallel=way)
            found[case, way] = gradients(cfg, packed_parts(case[0]), folder / "none")
        loop.SAMPLE_STEPS = (1,)
        found["unbroken", way] = train(configuration(parallel=way), folder / f"unbroken-{way}")
        train(configuration(parallel=way, max_train_steps=2), folder / f"resumed-{way}")
        found["resumed", way] = train(configuration(parallel=way), folder / f"resumed-{way}")
    if rank == 0:
        torch.save(found, folder / "found.unfinished")
        (folder / "found.unfinished").rename(folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    in_two_processes(folder, work)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_have_the_gradient_of_one(found, tmp_path, case, way):
    start, gradient = found[case, way]
    cfg = configuration(*case)
    expected_start, expected = gradients_of_one(cfg, packed_parts(case[0]), tmp_path)
    assert_same(start, expected_start)
    assert error(gradient, expected) < 1e-5


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_go_on_exactly(found, way):
    assert_same(found["resumed", way], found["unbroken", way])
    assert error(found["unbroken", way], found["unbroken", "ddp"]) < 1e-4


@pytest.fixture
def native(tmp_path):
    """Files of a native set of twelve latents (3, h, w)."""
    data, lines = Ragged(), []
    (tmp_path / "latents").mkdir()
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        latent, (h, w) = data.latents[i], data.sizes[i].tolist()
        save_file(
            {"latent": torch.stack((latent, latent.flip(2))), "label": torch.tensor(i % 4)},
            tmp_path / f"latents/{i}.safetensors",
        )
        Image.new("RGB", (2 * w, 2 * h), "white").save(tmp_path / f"pictures/{i}.png")
        sizes = {"latent_h": h, "latent_w": w, "image_h": 2 * h, "image_w": 2 * w}
        lines.append({"image_file": f"{i}.png", "latent_file": f"{i}.safetensors", **sizes})
    text = "".join(json.dumps(line | {"type": "native-resolution"}) + "\n" for line in lines)
    (tmp_path / "meta.jsonl").write_text(text)
    (tmp_path / "packs.json").write_text(json.dumps([[0, 1, 2], [3, 4], [5, 6, 7, 8, 9, 10, 11]]))
    return {
        "jsonl_dir": str(tmp_path / "meta.jsonl"), "latent_dirs": [str(tmp_path / "latents")],
        "image_dir": str(tmp_path / "pictures"), "num_classes": 4,
    }  # fmt: skip


@pytest.mark.parametrize("way", ["pack_tokens", "packed_json", "of one size"])
def test_from_a_configuration(one_thread, tmp_path, native, way):
    given = {"data_type": "native", "dataset": native}
    if way == "pack_tokens":
        given["pack_tokens"] = 20
    elif way == "packed_json":
        native["packed_json"] = str(tmp_path / "packs.json")
    cfg = OmegaConf.merge(
        latents(repa=False, max_train_steps=2, scale_lr=True, learning_rate_base_batch_size=1),
        {"data": given},
    )
    trainer = loop.Trainer(cfg, tmp_path / "run")
    assert trainer.parts.is_packed == (way != "of one size")
    each = {"pack_tokens": 12 / 4, "packed_json": 12 / 3, "of one size": 4}[way]
    assert trainer.images_per_step == each
    trainer.run()
    log = read_log(tmp_path / "run/log.jsonl")
    assert log[-1]["denoising"] > 0 and (tmp_path / "run/model").is_dir()


@pytest.mark.parametrize(
    "tokens, packs, message",
    [
        (8, False, "data.pack_tokens 8: line .* has 9 tokens, more than a pack's 8"),
        (20, True, "data.pack_tokens and data.dataset.packed_json both make packs"),
        (0, False, "data.pack_tokens must be a whole number of at least 1 or null, got 0"),
    ],
)
def test_refusals(tmp_path, native, tokens, packs, message):
    if packs:
        native["packed_json"] = str(tmp_path / "packs.json")
    given = {"data_type": "native", "dataset": native, "pack_tokens": tokens}
    with pytest.raises(ValueError, match=message):
        loop.Trainer(OmegaConf.merge(latents(repa=False), {"data": given}), tmp_path / "run")
