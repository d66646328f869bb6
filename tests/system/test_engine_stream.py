"""Requests drawn together: which are one batch, and that each gets what it would get alone."""

import pytest
import torch
from golden_files import relative_error
from small_engines import KINDS, Called, given, tiny

from tim.sampling import Engine, Options, Request
from tim.sampling.requests import in_batches
from tim.transports import make

STOCHASTIC = dict(num_steps=3, stochasticity_ratio=0.5)


def requests(kind: str, count: int, **options) -> list[Request]:
    """Each with a generator and a guidance of its own."""
    z, y, y_null = given(kind, batch=count)
    return [
        Request(
            z[i], y[i], Options(cfg_scale=1.5 + i, **options), y_null[i],
            torch.Generator().manual_seed(i), name=i,
        )
        for i in range(count)
    ]  # fmt: skip


def alone(engine: Engine, kind: str, i: int, count: int, **options) -> torch.Tensor:
    """By `sample`, as a batch of one."""
    request = requests(kind, count, **options)[i]
    args = request.z[None], request.y[None], request.y_null[None]
    scale = request.options.cfg_scale
    return engine.sample(*args, cfg_scale=scale, generator=request.generator, **options)[0]


@pytest.mark.parametrize("together", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_does_not_depend_on_its_batch(kind, together):
    engine = Engine(tiny(kind), make("OT_FM"), together=together)
    options = STOCHASTIC
    for invariant, most in ((True, 8), (False, 8), (False, 2)):
        done = dict(
            (request.name, picture)
            for request, picture in engine.stream(
                requests(kind, 5, **options), max_batch=most, batch_invariant=invariant
            )
        )
        assert set(done) == set(range(5))
        for i, picture in done.items():
            expected = alone(engine, kind, i, 5, **options)
            assert relative_error(picture, expected) < 1e-5
            assert not invariant or torch.equal(picture, expected)


def test_batches_are_of_one_kind():
    z, y, y_null = given("class", batch=9)
    kinds = [
        dict(num_steps=2), dict(num_steps=4), dict(num_steps=2, cfg_scale=2.0),
        dict(num_steps=2, cfg_scale=3.0), dict(num_steps=2, T_max=0.9),
    ]  # fmt: skip
    every = [
        Request(z[i], y[i], Options(**kinds[i % 5]), y_null[i], name=i % 5) for i in range(9)
    ] + [Request(z[0, :, :2], y[0], Options(num_steps=2), name="small")]
    names = [[r.name for r in batch] for batch in in_batches(every, 8, 64)]
    assert names == [[0, 0], [1, 1], [2, 3, 2, 3], [4], ["small"]]


def test_when_a_batch_is_drawn():
    z, y, _ = given("class", batch=1)
    two, four = (Request(z[0], y[0], Options(num_steps=n)) for n in (2, 4))

    def drawn(order, **limits):
        taken = []
        source = (taken.append(r) or r for r in order)
        limits = dict(max_batch=2, max_waiting=8) | limits
        return [(len(taken), [b.options.num_steps for b in batch])
                for batch in in_batches(source, **limits)]  # fmt: skip

    assert drawn([two, four, two, four]) == [(3, [2, 2]), (4, [4, 4])]  # as soon as it is full
    assert drawn([two, None, four]) == [(2, [2]), (3, [4])]  # nobody else is there yet
    assert drawn([four, two, four, two], max_batch=9, max_waiting=2) == [
        (2, [4]), (3, [2]), (4, [4]), (4, [2])
    ]  # fmt: skip
    assert drawn([]) == drawn([None]) == []


def test_results_come_before_all_requests_are_there():
    engine, pending = Engine(tiny("class"), make("OT_FM")), iter(requests("class", 4, num_steps=1))
    results = engine.stream(pending, max_batch=2)
    request, picture = next(results)
    assert request.name == 0 and picture.shape == (3, 4, 6)
    assert next(pending).name == 2


def test_any_network_can_be_streamed():
    model = tiny("class")
    engine = Engine(Called(model), make("OT_FM"))
    for request, picture in engine.stream(requests("class", 3, num_steps=2)):
        expected = alone(engine, "class", request.name, 3, num_steps=2)
        assert relative_error(picture, expected) < 1e-5


def test_bad_requests_are_refused():
    z, y, y_null = (x[0] for x in given("class", batch=1))
    plain, guided = Options(num_steps=2), Options(num_steps=2, cfg_scale=2.0)
    refused = [
        (dict(z=z[None]), r"z must be one state \(C, H, W\), got \(1, 3, 4, 6\)"),
        (dict(z=z.int()), "z must be one state"),
        (dict(z=z / 0), "initial state z must be finite"),
        (dict(y=y[None]), r"a label \(\) or features \(L, D\), got \(1,\)"),
        (dict(options=guided), "needs y_null"),
        (dict(options=guided, y_null=y_null[None]), "y_null must be shaped as y"),
        (dict(options=Options(**STOCHASTIC)), "needs a generator of its own"),
    ]
    for changed, message in refused:
        with pytest.raises(ValueError, match=message):
            Request(**dict(z=z, y=y, options=plain) | changed)
    engine = Engine(tiny("class"), make("VP_SDE"))
    stochastic = Request(z, y, Options(**STOCHASTIC), generator=torch.Generator())
    with pytest.raises(ValueError, match="VPSDE has no stochastic step|VP_SDE has no stochastic"):
        next(engine.stream([stochastic]))
    for limits in (dict(max_batch=0), dict(max_waiting=0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            next(engine.stream([], **limits))
