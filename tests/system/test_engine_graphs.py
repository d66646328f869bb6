"""Which steps are captured, replayed, captured again or not, and why.

No GPU is needed: a stand-in for CUDA's graph computes the step again on the buffers that the graph
would read. So a buffer that was not filled, or weights that lie elsewhere, show in the numbers.
"""

import copy
import threading

import pytest
import torch
from golden_files import relative_error
from small_engines import KINDS, given, step_by_step, tiny

from tim.sampling import Engine, graphs
from tim.transports import make
from tim_kernels import use_backend
from tim_kernels.attention import choice as attention
from tim_kernels.linear import choice as linear

GUIDED = dict(num_steps=4, cfg_scale=1.5, return_trajectory=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_each_kind_is_captured_in_the_second_run(kind, captures):
    model = tiny(kind)
    engine = Engine(model, make("OT_FM"), together=True)
    for run, expected in enumerate((0, 2, 2, 2)):  # with guidance, and without it
        args = given(kind, seed=run)
        options = GUIDED | dict(cfg_scale=1.5 + run, num_steps=4 + run)
        out = engine.sample(*args, **options)
        assert relative_error(out, step_by_step(model, "OT_FM", *args, **options)) < 1e-5
        assert len(captures) == expected
    assert "no replay" not in engine.explain()


@pytest.mark.parametrize("kind", ["class", "text"])
def test_replays_have_the_bits_of_steps(kind, captures):
    model, args = tiny(kind), given(kind)
    engine, eager = (Engine(model, make("OT_FM"), together=True, graphs=g) for g in (True, False))
    draw = lambda: dict(stochasticity_ratio=0.5, generator=torch.Generator().manual_seed(1))  # noqa: E731
    for hooks in (dict, draw, lambda: dict(on_step=lambda i, r, x: x + r)):
        for _ in range(3):
            expected = eager.sample(*args, **GUIDED, **hooks())
            assert torch.equal(engine.sample(*args, **GUIDED, **hooks()), expected)
    assert len(captures) == 3  # unguided, guided, guided with noise


@pytest.mark.parametrize("kind", ["class", "text"])
def test_kernels_take_rows_as_they_are_kept(kind, captures):
    """Triton's, here in its interpreter: one row for all samples, views of rows of bytes."""
    model, args = tiny(kind, depth=1), given(kind)
    engine = Engine(model, make("OT_FM"), together=True)
    with use_backend("triton"):
        out = engine.sample(*args, num_steps=2)
    assert relative_error(out, step_by_step(model, "OT_FM", *args, num_steps=2)) < 1e-5
    assert "second run" in engine.explain() and not captures


def twice(engine, *args, **options):
    engine.sample(*args, **options)
    return engine.sample(*args, **options)


def test_other_shapes_and_settings_are_captured_anew(captures, monkeypatch):
    model = tiny("class")
    engine = Engine(model, make("OT_FM"), together=True)
    z, y, _ = given("class", batch=3)
    one = dict(num_steps=2)
    changes = [
        lambda: twice(engine, z, y, **one),
        lambda: twice(engine, z[:2], y[:2], **one),
        lambda: twice(engine, z[..., :4], y, **one),
        lambda: twice(engine, z.double(), y, **one),
    ]
    for i, change in enumerate(changes):
        change()
        assert len(captures) == min(i + 1, 3)  # the state is float64 in any case
    with use_backend("reference"):
        twice(engine, z, y, **one)
    assert len(captures) == 4
    twice(engine, z, y, **one)
    assert len(captures) == 4  # those from before are still there
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # of the patches' convolution
    twice(engine, z, y, **one)
    assert len(captures) == 5
    model.bfloat16()
    out = twice(engine, z, y, **one)
    assert len(captures) == 6
    assert relative_error(out, step_by_step(model, "OT_FM", z, y, **one)) < 3e-2


@pytest.mark.parametrize("choice, name", [(linear, "quack"), (attention, "cudnn")])
def test_another_choice_of_kernels_is_captured_anew(choice, name, captures, monkeypatch):
    engine = Engine(tiny("class"), make("OT_FM"), together=True)
    z, y, _ = given("class", batch=3)
    twice(engine, z, y, num_steps=2)
    monkeypatch.setattr(choice, "_process", name)
    twice(engine, z, y, num_steps=2)
    assert len(captures) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_elsewhere_are_captured_again(kind, captures):
    model, args = tiny(kind), given(kind)
    engine = Engine(model, make("OT_FM"), together=True)
    before = twice(engine, *args, **GUIDED)
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(2)  # in place: the graph reads it
    after = engine.sample(*args, **GUIDED)
    assert len(captures) == 2 and relative_error(after, before) > 1e-2
    assert relative_error(after, step_by_step(model, "OT_FM", *args, **GUIDED)) < 1e-5
    layer = model.final_layer.linear
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    again = twice(engine, *args, **GUIDED)
    assert len(captures) == 4 and relative_error(again, after) > 1e-2
    assert relative_error(again, step_by_step(model, "OT_FM", *args, **GUIDED)) < 1e-5


def test_batches_padded_to_captured_sizes(captures):
    model = tiny("text")
    engine = Engine(model, make("OT_FM"), together=True, batch_sizes=(4,))
    for batch in (4, 3, 2, 1, 4):
        args = given("text", batch=batch)
        out = engine.sample(*args, **GUIDED)
        assert relative_error(out, step_by_step(model, "OT_FM", *args, **GUIDED)) < 1e-5
    assert len(captures) == 2


def test_why_a_step_is_not_replayed(captures, monkeypatch):
    model, args = tiny("class"), given("class")
    engine = Engine(model, make("OT_FM"), together=True)
    engine.sample(*args, **GUIDED)
    assert "captured when its shape comes in a second run" in engine.explain()
    refusing = Engine(model, make("OT_FM"), together=True, graphs=False)
    expected = twice(refusing, *args, **GUIDED)
    assert "no replay: graphs=False" in refusing.explain()

    def fails(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    def idle(function, device):  # as where kernels went to another stream than that of the capture
        return lambda: None, function()

    for capture, why in ((fails, "its capture failed: operation not"), (idle, "gave other bits")):
        monkeypatch.setattr(graphs, "capture", capture)
        failing = Engine(model, make("OT_FM"), together=True)
        assert torch.equal(twice(failing, *args, **GUIDED), expected)
        assert why in failing.explain()
    assert not captures


def test_where_nothing_can_be_captured():
    assert "need a CUDA device, the state is on cpu" in graphs.obstacle(torch.device("cpu"))
    model, args = tiny("class"), given("class")
    engine = Engine(model, make("OT_FM"), together=True)
    twice(engine, *args, **GUIDED)
    assert "no replay: CUDA graphs need a CUDA device" in engine.explain()


def test_graphs_captured_where_tensors_are_made_to_infer(captures):
    model, args = tiny("text"), given("text")
    engine = Engine(model, make("OT_FM"), together=True)
    with torch.inference_mode():
        expected = twice(engine, *args, **GUIDED)
    assert torch.equal(engine.sample(*args, **GUIDED), expected) and len(captures) == 2
    with torch.inference_mode():
        assert torch.equal(engine.sample(*args, **GUIDED), expected)


def test_the_graphs_used_last_are_kept(captures, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    engine, (z, y, _) = Engine(tiny("class"), make("OT_FM"), together=True), given("class", batch=3)
    for batch, captured in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        twice(engine, z[:batch], y[:batch], num_steps=2)
        assert len(captures) == captured


def test_one_run_at_a_time_has_the_graphs(captures):
    """One within a callback of the other, and in another thread."""
    model, args = tiny("class"), given("class")
    engine = Engine(model, make("OT_FM"), together=True)
    expected, inner = twice(engine, *args, **GUIDED), []

    def on_step(step, time, x):
        if step == 2:
            inner.append(engine.sample(*args, **GUIDED))
            thread = threading.Thread(target=lambda: inner.append(engine.sample(*args, **GUIDED)))
            thread.start()
            thread.join()
            assert "no replay: another run has the graphs" in engine.explain()
        return x

    assert torch.equal(engine.sample(*args, on_step=on_step, **GUIDED), expected)
    assert all(torch.equal(out, expected) for out in inner) and len(inner) == 2
    engine.sample(*args, **GUIDED)
    assert "no replay" not in engine.explain()


def test_a_copy_captures_for_itself(captures):
    model, args = tiny("class"), given("class")
    engine = Engine(model, make("OT_FM"), together=True)
    expected = twice(engine, *args, **GUIDED)
    twin = copy.deepcopy(engine)
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(2)
    assert torch.equal(twice(twin, *args, **GUIDED), expected)
    assert len(captures) == 4
