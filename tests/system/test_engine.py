"""The engine against the sampler that calls the network at each step, and against golden files."""

import copy
import functools

import pytest
import torch
from golden_files import relative_error
from small_engines import KINDS, Called, Counter, given, step_by_step, tiny

from tim.models import TiMTransformer2DModel
from tim.sampling import Engine, sample
from tim.transports import TRANSPORTS, make
from tim_kernels.network.conditioning import most_bytes, text_bytes

GUIDED = dict(num_steps=4, cfg_scale=1.5)


@pytest.mark.parametrize("together", [None, True], ids=["default", "together"])
def test_golden_trajectory(golden_sample, together):
    meta, inputs = golden_sample.meta, golden_sample.group("input")
    model = TiMTransformer2DModel(**meta["params"])
    model.load_state_dict(golden_sample.group("state"))
    transport = make(meta["transport"], **meta["transport_params"])
    engine = Engine(model, transport, together=together)
    torch.manual_seed(meta["noise_seed"])
    args = inputs["z"], inputs["y"], inputs["y_null"]
    trajectory = engine.sample(*args, return_trajectory=True, **meta["sample"])
    assert relative_error(trajectory, golden_sample.group("output")["trajectory"]) < 2e-5
    said = engine.explain()
    if meta["sample"]["num_steps"] == 1:
        assert said.startswith("one step")
    elif together:
        assert said.startswith("formed ahead")
    else:
        is_text = meta["params"].get("cap_feat_dim") is not None
        assert said.startswith("text read once" if is_text else "step by step: on a CPU")


OPTIONS = {
    "one step": dict(num_steps=1),
    "steps": dict(num_steps=3),
    "guided": GUIDED | dict(cfg_high=1.1),
    "guided but at first": GUIDED,
    "guided in between": GUIDED | dict(cfg_low=0.3, cfg_high=0.8),
    "diffusion": dict(num_steps=3, sample_type="ddiffusion", cfg_scale=2.0),
    "between": dict(num_steps=2, T_max=0.9, T_min=0.2),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["class", "text"])
def test_bits_of_the_step_by_step_sampler(kind, options, transport):
    model, args = tiny(kind), given(kind, transport=transport)
    for dtype in (torch.float32, torch.bfloat16):
        expected = step_by_step(
            model.to(dtype), transport, *args, return_trajectory=True, **options
        )
        engine = Engine(model, make(transport))
        assert torch.equal(engine.sample(*args, return_trajectory=True, **options), expected)
        assert torch.equal(sample(model, make(transport), *args, **options), expected[-1])
        ahead = Engine(model, make(transport), together=True)
        out = ahead.sample(*args, return_trajectory=True, **options)
        assert relative_error(out, expected) < (1e-5 if dtype == torch.float32 else 3e-2)


def changing(step, time, x):
    return x * (1 + 0.1 * step) - time


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


HOOKS = {
    "stochastic": lambda: dict(stochasticity_ratio=0.5, generator=generators()[0]),
    "a generator a picture": lambda: dict(stochasticity_ratio=0.5, generator=generators()),
    "noise of one's own": lambda: dict(stochasticity_ratio=0.5, generator=torch.sin),
    "a callback": lambda: dict(on_step=changing),
    "stopped": lambda: dict(should_stop=iter([False, False, True]).__next__),
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_and_noise(kind, hooks):
    model, args = tiny(kind), given(kind)
    options = GUIDED | dict(return_trajectory=True)
    expected = step_by_step(model, "OT_FM", *args, **options, **hooks())
    engine = Engine(model, make("OT_FM"))
    assert torch.equal(engine.sample(*args, **options, **hooks()), expected)
    ahead = Engine(model, make("OT_FM"), together=True)
    assert relative_error(ahead.sample(*args, **options, **hooks()), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_formed_ahead_have_the_bits_of_rows_formed_by_as_many(kind):
    """A window of one step: the same GEMMs, so only where they are kept is another."""
    batch = 1 if "text" in kind else 2  # rows of text are one a step
    model, args = tiny(kind), given(kind, batch)
    room = most_bytes(model, batch, torch.float32) * 3 // 2
    room += text_bytes(model, args[1], torch.float32) if "text" in kind else 0
    engine = Engine(model, make("OT_FM"), together=True, cache_bytes=room)
    with Counter(model) as counter:
        out = engine.sample(*args, num_steps=3, return_trajectory=True)
    assert counter.gemms["final_layer.adaLN_modulation.fc2.weight"] == 3
    expected = step_by_step(model, "OT_FM", *args, num_steps=3, return_trajectory=True)
    assert torch.equal(out, expected)
    assert "formed ahead" in engine.explain()
    Engine(model, make("OT_FM"), together=True, cache_bytes=room // 3).sample(*args, num_steps=3)


CONDITIONING = ("adaLN_modulation", "qkv_d", "embedder.mlp", ".kv.")


def conditioning(gemms: dict) -> dict:
    return {n: c for n, c in gemms.items() if any(part in n for part in CONDITIONING)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [2, 8])
def test_conditioning_is_formed_once_a_run(kind, num_steps):
    model, args = tiny(kind), given(kind)
    engine = Engine(model, make("OT_FM"), together=True)
    with Counter(model) as counter:
        engine.sample(*args, num_steps=num_steps, cfg_scale=1.5, cfg_high=1.1)
    rest = counter.gemms.keys() - conditioning(counter.gemms).keys()
    assert set(conditioning(counter.gemms).values()) == {1}
    assert {counter.gemms[name] for name in rest if "attn.proj" not in name} == {num_steps}
    with Counter(model) as plain:
        step_by_step(model, "OT_FM", *args, num_steps=num_steps, cfg_scale=1.5, cfg_high=1.1)
    assert set(conditioning(plain.gemms).values()) == {num_steps}
    assert conditioning(plain.gemms).keys() == conditioning(counter.gemms).keys()


@pytest.mark.parametrize("kind", ["text", "accelerated text"])
def test_text_is_read_once_on_a_cpu_too(kind):
    model, args = tiny(kind), given(kind)
    for interval, times in ((dict(cfg_high=1.1), 1), (dict(), 2)):  # with guidance, and without it
        with Counter(model) as counter:
            Engine(model, make("OT_FM")).sample(*args, **GUIDED, **interval)
        of_text = {n: c for n, c in counter.gemms.items() if ".kv." in n or "y_embedder" in n}
        assert set(of_text.values()) == {times}


@pytest.mark.parametrize("kind, least", [("class", 1.3), ("text", 1.3)])
def test_operations_of_a_step(kind, least):
    """Those of a step alone, by the difference of two runs."""
    model, args = tiny(kind, depth=4), given(kind, batch=1)

    def of_a_step(run) -> float:
        counts = []
        for num_steps in (4, 8):
            with Counter(model) as counter:
                run(*args, num_steps=num_steps)
            counts.append(counter.operations)
        return (counts[1] - counts[0]) / 4

    before = of_a_step(functools.partial(step_by_step, model, "OT_FM"))
    after = of_a_step(Engine(model, make("OT_FM"), together=True).sample)
    assert before > least * after


def replace(model):
    with torch.no_grad():
        layer = model.final_layer.adaLN_modulation.fc2
        layer.weight = torch.nn.Parameter(layer.weight * 9)


def write(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def load(model):
    model.load_state_dict({n: 0.7 * value for n, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [replace, write, load])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [None, True])
def test_weights_that_change(kind, change, together):
    """Between runs, and in a callback of one."""
    model, args = tiny(kind), given(kind, batch=1 if together else 2)
    same = torch.equal if not together else lambda a, b: relative_error(a, b) < 1e-5
    engine, options = Engine(model, make("OT_FM"), together=together), GUIDED
    before = engine.sample(*args, **options)
    change(model)
    after = engine.sample(*args, **options)
    assert relative_error(after, before) > 1e-3
    assert same(after, step_by_step(model, "OT_FM", *args, **options))

    def on_step(step, time, x):
        change(model) if step == 1 else None
        return x

    twin = copy.deepcopy(model)
    changed = engine.sample(*args, on_step=on_step, **options)
    model = twin
    assert same(changed, step_by_step(model, "OT_FM", *args, on_step=on_step, **options))
    assert relative_error(changed, after) > 1e-3


def test_a_hook_that_a_callback_sets_is_called():
    model, args, seen = tiny("text"), given("text"), []

    def on_step(step, time, x):
        if step == 0:
            model.register_forward_hook(lambda *_: seen.append(step))
        return x

    Engine(model, make("OT_FM"), together=True).sample(*args, num_steps=3, on_step=on_step)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [None, True])
def test_a_batch_is_padded_where_asked(kind, together):
    model, args = tiny(kind), given(kind, batch=3)
    options = dict(num_steps=3, stochasticity_ratio=0.5, return_trajectory=True)
    engine = Engine(model, make("OT_FM"), together=together, batch_sizes=(1, 4, 2))
    with Counter(model) as counter:
        out = engine.sample(*args, generator=generators()[0], **options)
    assert counter.rows["final_layer.linear.weight"] == {4 * 6}
    expected = step_by_step(model, "OT_FM", *args, generator=generators()[0], **options)
    assert out.shape == expected.shape and relative_error(out, expected) < 1e-5
    assert engine.sample(*given(kind, batch=5), num_steps=1).shape[0] == 5


def test_a_copy_of_an_engine():
    model, args = tiny("class"), given("class")
    engine = Engine(model, make("OT_FM"), together=True)
    twin = copy.deepcopy(engine)
    write(model)
    assert not torch.equal(twin.sample(*args, num_steps=2), engine.sample(*args, num_steps=2))


def test_what_does_not_fit_is_refused():
    model, transport = tiny("class"), make("OT_FM")
    z, y, _ = given("class")
    for together in (None, True):
        engine = Engine(model, transport, together=together)
        with pytest.raises(ValueError, match="one integer class label a sample"):
            engine.sample(z, y[:1], num_steps=2)
        with pytest.raises(ValueError, match="labels must lie in"):
            engine.sample(z, y + 7, num_steps=2)
        with pytest.raises(ValueError, match="latents of shape"):
            engine.sample(z[:, :2], y, num_steps=2)
        with pytest.raises(ValueError, match="multiples of the patch size"):
            engine.sample(z[..., :5], y, num_steps=2)
        with pytest.raises(ValueError, match="needs y_null"):
            engine.sample(z, y, num_steps=2, cfg_scale=2.0)
        with pytest.raises(ValueError, match="num_steps must be at least 1"):
            engine.sample(z, y, num_steps=0)
        with pytest.raises(TypeError, match="guidance_scale"):
            engine.sample(z, y, num_steps=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="a batch size must be at least 1, got 0"):
        Engine(model, transport, batch_sizes=(0,))
    with pytest.raises(ValueError, match="cache_bytes"):
        Engine(model, transport, cache_bytes=1.5)
    assert "nothing was sampled" in Engine(Called(model), transport).explain()


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("together", [None, True])
def test_what_a_callback_returns_must_fit(kind, together):
    """As where the network is called at each step."""
    model, args = tiny(kind), given(kind)
    for run in (
        Engine(model, make("OT_FM"), together=together).sample,
        functools.partial(step_by_step, model, "OT_FM"),
    ):
        for cut, message in ((lambda x: x[..., :5], "patch size"), (lambda x: x[:, :2], "latents")):
            with pytest.raises(ValueError, match=message):
                run(*args, num_steps=3, on_step=lambda step, time, x, cut=cut: cut(x))
