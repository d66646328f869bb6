"""The network's cut in two, and blocks as modules: however they are conditioned, one network."""

import pytest
import torch
from eager import EagerTiM, randomise
from golden_files import relative_error

from tim.models import TiMTransformer2DModel
from tim_kernels.network.attentions import TextKeys
from tim_kernels.network.blocks import BlockRows
from tim_kernels.network.forward import predict, prepare, read_text, run

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=48, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
NAMES = dict(new_condition="t-r", rope_order="upstream")


@pytest.fixture(params=[False, True], ids=["class", "text"])
def text(request):
    return request.param


def problem(text: bool, **changes):
    config = TINY | dict(cap_feat_dim=7 if text else None) | changes
    model = TiMTransformer2DModel(**config)
    model.load_state_dict(randomise(EagerTiM(**config)).state_dict())
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 6, generator=g)
    y = torch.randn(2, 5, 7, generator=g) if text else torch.tensor([1, 5])
    return model, (x, torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.6]), y)


def gradients(model, args):
    model.zero_grad()
    sample, features = model(*args, return_features=True)
    (sample.square().sum() + features.square().sum()).backward()
    return sample.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("switches", [{}, dict(distance_aware=False), dict(qk_norm=False)])
def test_gradients_pass_through_what_was_prepared(text, switches):
    model, (x, t, r, y) = problem(text, **switches)
    sample, expected = gradients(model, (x, t, r, y))
    model.zero_grad()
    prepared = prepare(model, t, r, y, new_condition="t-r")
    again, features = run(model, x, prepared, rope_order="upstream", features_depth=1)
    (again.square().sum() + features.square().sum()).backward()
    assert relative_error(again, sample) < 1e-5
    largest = max(gradient.norm() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() < 2e-5 * largest, name


def test_a_prepared_network_runs_on_any_tokens(text):
    model, (x, t, r, y) = problem(text)
    with torch.no_grad():
        prepared = prepare(model, t, r, y, new_condition="t-r")
        for tokens in (x, x[..., :4] * 2):
            ours = run(model, tokens, prepared, rope_order="upstream", features_depth=1)
            expected = predict(model, tokens, t, r, y, **NAMES, features_depth=1)
            for one, other in zip(ours, expected, strict=True):
                assert torch.equal(one, other)


def test_text_that_is_read_once_serves_every_time():
    model, (x, t, r, y) = problem(text=True)
    with torch.no_grad():
        keys = read_text(model, y)
        assert len(keys) == 2 and keys[0].k.shape == keys[0].v.shape == (2, 5, 2, 24)
        for time in (t, t + 0.05):
            expected, _ = predict(model, x, time, r, y, **NAMES)
            ours, _ = predict(model, x, time, r, keys, **NAMES)
            assert torch.equal(ours, expected)


def test_gradients_pass_through_text_that_was_read_before():
    model, (x, t, r, y) = problem(text=True)
    expected = gradients(model, (x, t, r, y))[1]
    model.zero_grad()
    sample, features = predict(model, x, t, r, read_text(model, y), **NAMES, features_depth=1)
    (sample.square().sum() + features.square().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_blocks_are_modules_with_hooks(text):
    model, args = problem(text)
    expected, seen = model(*args), []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: seen.append(("before", i)))
        block.register_forward_hook(lambda *_, i=i: seen.append(("after", i)))
    assert torch.equal(model(*args), expected)
    assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]


def test_blocks_can_be_compiled_one_by_one(text):
    model, args = problem(text)
    expected, own = gradients(model, args)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    sample, compiled = gradients(model, args)
    assert relative_error(sample, expected) < 1e-5
    for name, gradient in own.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)


def test_no_parameter_moves(text):
    model, args = problem(text)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    gradients(model, args)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_blocks_take_what_was_formed_for_them(text):
    """Rows and keys that are given are used, and nothing else is read for them."""
    model, (x, t, r, y) = problem(text)
    with torch.no_grad():
        expected, _ = predict(model, x, t, r, y, **NAMES)
        prepared = prepare(model, t, r, y, new_condition="t-r")
        assert all(isinstance(row, BlockRows) for row in prepared.rows)
        assert prepared.text is None or isinstance(prepared.text[0], TextKeys)
        given = prepared._replace(c=None, delta=None)
        ours, _ = run(model, x, given, rope_order="upstream")
    assert relative_error(ours, expected) < 1e-5
