"""Which networks are sampled step by step, and why; how what is formed ahead is kept."""

import functools

import pytest
import torch
from small_engines import Called, given, step_by_step, tiny
from torch import nn

from tim.sampling import Engine
from tim.transports import make
from tim_kernels import accelerate, restore
from tim_kernels.network.conditioning import (
    Layout,
    fingerprint,
    most_bytes,
    obstacle,
    parts,
    text_bytes,
)
from tim_kernels.network.forward import prepare, read_text


def hooked(model):
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)


def offloaded(model):
    model.blocks[0].mlp.forward = functools.partial(type(model.blocks[0].mlp).forward, None)


def adapted(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["fc1_g"]), model)


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attn.proj)


def dropping(model):
    model.projector[1] = nn.Dropout(0.1)
    model.train()


def of_another_class(model):
    class Noisy(type(model.blocks[0])):
        def forward(self, *args):
            return super().forward(*args)

    model.blocks[0].__class__ = Noisy


def compiled(model):
    model.blocks[0].compile(backend="eager")


CHANGES = {
    hooked: "blocks.1.attn.qkv: it has hooks",
    offloaded: "blocks.0.mlp: its forward was replaced, as by offloading",
    adapted: r"fc1_g: of a peft\S*Linear is not known that its input alone matters",
    parametrised: r"blocks.0.attn.proj: of a \S*ParametrizedLinear",
    dropping: r"projector.1: it drops out: call eval\(\) first",
    of_another_class: r"blocks.0: of a \S*Noisy is not known",
    compiled: "blocks.0: it is compiled",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["text", "accelerated text"])
def test_why_a_network_is_called_at_each_step(kind, change):
    model = tiny(kind)
    assert obstacle(model) is None
    change(model)
    with pytest.raises(AssertionError, match=CHANGES[change]):
        assert obstacle(model) is None, obstacle(model)


def test_networks_that_are_not_ours():
    model, args = tiny("class"), given("class")
    stranger = Called(model)
    assert "Called does not run on tim_kernels as a whole" in obstacle(stranger)
    engine = Engine(stranger, make("OT_FM"), together=True)
    out = engine.sample(*args, num_steps=2)
    assert torch.equal(out, step_by_step(model, "OT_FM", *args, num_steps=2))
    assert engine.explain().startswith("step by step: Called does not run on tim_kernels")
    assert obstacle(torch.compile(model, backend="eager")) == "it is compiled"
    accelerated = tiny("accelerated class")
    assert obstacle(accelerated) is None
    restore(accelerated)
    assert "EagerTiM does not run on tim_kernels" in obstacle(accelerated)
    accelerate(accelerated)
    assert obstacle(accelerated) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert obstacle(model) == "a hook on all modules is registered"
    handle.remove()
    assert obstacle(model.train()) is None  # nothing in it drops out


def test_a_hooked_network_is_called_at_each_step():
    for kind in ("class", "text", "accelerated text"):
        model, args, calls = tiny(kind), given(kind), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        Engine(model, make("OT_FM"), together=True).sample(*args, num_steps=3)
        assert len(calls) == 3


class Sampled(nn.Module):
    def __init__(self, engine: Engine):
        super().__init__()
        self.model, self.engine = engine.model, engine

    def forward(self, *args):
        return self.engine.sample(*args, num_steps=2)


def test_a_sampler_has_tangents_of_its_weights():
    """Dual tensors, which lie nowhere: nothing is formed ahead of them."""
    args = [x.double() for x in given("text")[:2]]
    sampled = Sampled(Engine(tiny("text").double(), make("OT_FM"), together=True))
    weights = {name: value.detach() for name, value in sampled.named_parameters()}

    def of(weights):
        return torch.func.functional_call(sampled, weights, tuple(args))

    tangents = {name: torch.sin(torch.arange(value.numel())).view_as(value).double()
                for name, value in weights.items()}  # fmt: skip
    out, tangent = torch.func.jvp(of, (weights,), (tangents,))
    assert "a transform of torch.func is under way" in sampled.engine.explain()
    sides = [of({n: w + e * tangents[n] for n, w in weights.items()}) for e in (1e-5, -1e-5)]
    assert "formed ahead" in sampled.engine.explain()
    torch.testing.assert_close(tangent, (sides[0] - sides[1]) / 2e-5, rtol=1e-3, atol=1e-5)


def test_what_an_engine_says():
    said = {
        ("class", None): "step by step: on a CPU the bits of a GEMM depend on its rows",
        ("text", None): "text read once, 0.0 MB; rows at each step: on a CPU",
        ("class", True): "formed ahead: 0.0 MB of keys and values of the text, 0.00 MB of rows",
        ("text", True): "formed ahead: 0.0 MB of keys",
    }
    for (kind, together), text in said.items():
        engine = Engine(tiny(kind), make("OT_FM"), together=together)
        engine.sample(*given(kind), num_steps=2)
        assert engine.explain().startswith(text)
        assert engine.explain() == engine.explain()


@pytest.mark.parametrize("together", [None, True])
def test_what_there_is_no_room_for_is_formed_at_each_step(together, capsys):
    model, args = tiny("text"), given("text", length=300)
    guided = dict(num_steps=2, cfg_scale=1.5)
    forms = 2 if together else 3  # on a CPU those without guidance are their own
    needed = forms * text_bytes(model, args[1], torch.float32)
    needed += most_bytes(model, 1, torch.float32) if together else 0
    for room, fits in ((needed, True), (needed - 1, False)):
        engine = Engine(model, make("OT_FM"), together=together, cache_bytes=room)
        out = engine.sample(*args, **guided)
        assert fits == ("more than cache_bytes" not in engine.explain())
        torch.testing.assert_close(out, step_by_step(model, "OT_FM", *args, **guided))
    assert "MB of keys and values" in capsys.readouterr().out


def bytes_of(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(map(bytes_of, tree)) if isinstance(tree, (list, tuple)) else 0


@pytest.mark.parametrize("kind", ["class", "text"])
def test_bytes_are_what_is_said(kind):
    model, (_, y, _) = tiny(kind), given(kind, batch=3)
    t = torch.rand(3)
    prepared = prepare(model, t, t, y, new_condition="t-r")
    rows = bytes_of(prepared._replace(text=None))
    assert rows <= most_bytes(model, 3, torch.float32) < 1.5 * rows
    if kind == "text":
        assert bytes_of(read_text(model, y)) == text_bytes(model, y, torch.float32)
        assert most_bytes(model, 3, torch.float32) < 1.05 * rows


def test_memory_of_a_published_network():
    """What the documentation states of TiM-XL in bfloat16."""
    from benchmarks.cases.shapes import MODELS
    from tim.models import TiMTransformer2DModel

    with torch.device("meta"):
        model = TiMTransformer2DModel(**MODELS["t2i-xl"].network_params())
        y = torch.empty(1, 256, 2304)
    assert round(most_bytes(model, 1, torch.bfloat16) / 1e6, 1) == 0.8
    assert round(text_bytes(model, y, torch.bfloat16) / 1e6) == 33


def test_a_layout_keeps_every_dtype_and_shape():
    tree = (torch.rand(6, 5), [torch.rand(6, 2, 3).bfloat16(), None], torch.rand(3).double())
    layout = Layout(tree, 3)
    rows = layout.pack(tree, 3)
    assert rows.shape == (3, layout.bytes) and rows.dtype == torch.uint8
    for packed, part in zip(layout.trees(rows), parts(tree, 3), strict=True):
        assert packed[1][1] is None and part[1][1] is None
        for a, b in zip(
            (packed[0], packed[1][0], packed[2]), (part[0], part[1][0], part[2]), strict=True
        ):
            assert a.dtype == b.dtype and torch.equal(a, b) and a.data_ptr() % 16 == 0
    assert layout.places == Layout(tree, 3).places != Layout(tree, 1).places


def test_a_fingerprint_tells_where_weights_are_and_what_was_written():
    model = tiny("class")
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.blocks[0].attn.proj.bias.add_(1)
    written = fingerprint(model)
    assert written.places == before.places and written.versions != before.versions
    model.blocks[0].attn.proj.bias = nn.Parameter(torch.zeros(16))
    assert fingerprint(model).places != written.places
    with torch.inference_mode():
        assert fingerprint(tiny("class")).versions  # those of inference count nothing
