"""Samplers: the published order to the index, from any image count, for any number of processes."""

import json
import pickle
from itertools import chain, islice

import pytest
from golden_files import GOLDEN

from tim.data import FlatSampler, PackedSampler, Visit

SAMPLERS = json.loads((GOLDEN / "training/samplers.json").read_text())
PACKS = SAMPLERS["bucket_sampler"]


def options(case):
    return {name: case[name] for name in ("seed", "rank", "world_size")}


def take(sampler, micro_steps):
    return list(islice(sampler, micro_steps))


@pytest.mark.parametrize("case", SAMPLERS["packed"])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_packed(case, accumulation):
    """A position is step · accumulation + micro; the golden list is one of micro-steps."""
    step, micro = divmod(case["resume_step"], accumulation)
    start = PackedSampler(PACKS, **options(case)).seen(step * accumulation + micro)
    sampler = PackedSampler(PACKS, start=start, **options(case))
    assert take(sampler, case["max_steps"] - case["resume_step"]) == case["batches"]


@pytest.mark.parametrize("case", SAMPLERS["flat"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_flat(case, accumulation):
    batch_size = case["global_batch_size"] // case["world_size"] // accumulation
    sizes = case["images"], batch_size
    position = case["resume_step"] * accumulation
    start = FlatSampler(*sizes, **options(case)).seen(position)
    assert start == case["resume_step"] * case["global_batch_size"]
    sampler = FlatSampler(*sizes, start=start, **options(case))
    batches = take(sampler, case["max_steps"] * accumulation - position)
    assert list(chain(*batches)) == case["indices"]


def samplers(world_size, start=0, batch_size=2):
    for rank in range(world_size):
        options = dict(seed=3, start=start, rank=rank, world_size=world_size)
        yield FlatSampler(23, batch_size, **options), PackedSampler(PACKS, **options)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_micro_step_can_be_gone_on_from(kind, world_size):
    for pair in samplers(world_size):
        whole = take(pair[kind], 30)
        for position in range(30):
            options = dict(seed=3, rank=pair[kind].rank, world_size=world_size)
            start = pair[kind].seen(position)
            rest = [FlatSampler(23, 2, start=start, **options)] if kind == 0 else []
            rest = rest or [PackedSampler(PACKS, start=start, **options)]
            again = take(rest[0], 30 - position)
            assert again == whole[position:]
            assert [i.image for i in chain(*again)] == [i.image for i in chain(*whole[position:])]


@pytest.mark.parametrize("kind", [0, 1])
def test_epochs_are_shared_out(kind):
    """Of any number of processes together, each epoch has every image once, counted in order."""
    num_images = (23, 40)[kind]
    for world_size in (1, 2, 3, 7):
        visits = chain(*(chain(*take(pair[kind], 60)) for pair in samplers(world_size)))
        visits = sorted(visits, key=lambda visit: visit.image)[: 3 * num_images]
        assert [visit.image for visit in visits] == [*range(3 * num_images)]
        for epoch in range(3):
            part = visits[epoch * num_images : (epoch + 1) * num_images]
            assert sorted(part) == [*range(num_images)]


def test_another_number_of_processes_goes_on():
    """Two processes, then three with another batch: no image is left out, none comes twice."""
    before = [take(flat, 2) for flat, _ in samplers(2)]
    (flat, _), *_ = samplers(2)
    after = [take(flat, 5) for flat, _ in samplers(3, start=flat.seen(2), batch_size=1)]
    assert flat.seen(2) == 8
    assert sorted(chain(*chain(*before, *after))) == [*range(23)]


def test_keys_are_of_seed_and_image():
    visit = take(FlatSampler(23, 2, seed=5, start=46, rank=1, world_size=2), 1)[0][1]
    assert (visit.seed, visit.image) == (5, 49)
    again = pickle.loads(pickle.dumps(visit))
    assert again == visit and isinstance(again, Visit) and (again.seed, again.image) == (5, 49)


def test_large_sets_take_no_time():
    """Nothing is listed ahead: the millionth step of ImageNet is as near as the first."""
    sampler = FlatSampler(1_281_167, 64, seed=0, start=10**9, rank=3, world_size=8)
    assert len(next(iter(sampler))) == 64


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: FlatSampler(0, 1, seed=0), "num_images must be at least 1, got 0"),
        (lambda: FlatSampler(5, 0, seed=0), "batch_size must be at least 1, got 0"),
        (lambda: FlatSampler(5, 1, seed=None), "seed must be a whole number, got None"),
        (lambda: FlatSampler(5, 1, seed=0, rank=2, world_size=2), "rank must be less than"),
        (lambda: PackedSampler([], seed=0), "packs must be lists of indices, got 0"),
        (lambda: PackedSampler([[1], []], seed=0), "packs must be lists of indices, got 2"),
        (lambda: PackedSampler([[1]], seed=0, start=-1), "start must be at least 0, got -1"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
