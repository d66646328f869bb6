"""What the model promises beyond the golden files."""

import itertools
import threading
from functools import partial

import pytest
import torch
from eager import EagerTiM, randomise
from golden_files import relative_error
from torch.autograd import forward_ad

from tim.models import TiMTransformer2DModel
from tim_kernels import CONDITIONS, grid_positions, use_backend
from tim_kernels.dispatch.backend import requested
from tim_kernels.network import blocks

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=24, encoder_depth=1, depth=2,
    num_heads=2, num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
FORWARD, DERIVATIVE = 2e-5, 1e-4  # relative, as for the golden files
SWITCHES = ("use_new_embed", "distance_aware", "qk_norm")


def inputs(config: dict, batch=2, height=4, width=6, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config["in_channels"], height, width, generator=g, dtype=dtype)
    t, r = torch.rand(2, batch, generator=g, dtype=dtype).sort(0, descending=True).values
    if config.get("cap_feat_dim"):
        y = torch.randn(batch, 5, config["cap_feat_dim"], generator=g, dtype=dtype)
    else:
        y = torch.randint(config["num_classes"], (batch,), generator=g)
    return x, t, r, y


def pair(**changes):
    """Our model and the independent one, with the same random weights."""
    config = TINY | changes
    ours, eager = TiMTransformer2DModel(**config), randomise(EagerTiM(**config))
    ours.load_state_dict(eager.state_dict(), strict=True)
    return ours, eager, config


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_configuration_matches_the_independent_model(condition, text):
    for values in itertools.product((False, True), repeat=len(SWITCHES)):
        switches = dict(zip(SWITCHES, values, strict=True))
        ours, eager, config = pair(
            new_condition=condition, cap_feat_dim=7 if text else None, **switches
        )
        x, t, r, y = inputs(config)
        (sample, features), (expected, expected_features) = (
            ours(x, t, r, y, return_features=True), eager(x, t, r, y, return_zs=True)
        )  # fmt: skip
        assert relative_error(sample, expected) < FORWARD, switches
        assert relative_error(features, expected_features) < FORWARD, switches

        for output in ((sample, features), (expected, expected_features)):
            sum(part.square().sum() for part in output).backward()
        largest = max(p.grad.norm() for p in eager.parameters())
        for name, parameter in eager.named_parameters():
            error = (ours.get_parameter(name).grad - parameter.grad).norm()
            assert error / max(parameter.grad.norm(), 1e-3 * largest) < DERIVATIVE, (name, switches)

        tangents = torch.randn_like(x), torch.ones_like(t), torch.full_like(r, 0.5)
        jvps = [
            torch.func.jvp(partial(model, y=y, **options), (x, t, r), tangents)[1]
            for model, options in ((ours, {}), (eager, {"jvp": True}))
        ]
        assert relative_error(*jvps) < DERIVATIVE, switches


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_gradcheck(text):
    ours, _, config = pair(depth=1, cap_feat_dim=7 if text else None)
    ours = ours.double()
    x, t, r, y = inputs(config, batch=1, height=2, width=4, dtype=torch.float64)
    t, r = t + 0.1, r  # away from r = t, where a difference quotient would be refused
    weights = [ours.blocks[0].attn.qkv_d.weight, ours.delta_embedder.mlp[2].bias]
    primals = [p.clone().requires_grad_() for p in (x, t, r, *weights)]

    def forward(x, t, r, qkv_d, bias):
        state = {"blocks.0.attn.qkv_d.weight": qkv_d, "delta_embedder.mlp.2.bias": bias}
        return torch.func.functional_call(ours, state, (x, t, r, y))

    assert torch.autograd.gradcheck(
        forward, primals, check_forward_ad=True, fast_mode=True, atol=1e-7
    )


def test_rope_order_differs_only_off_the_square():
    upstream, _, config = pair()
    grid = TiMTransformer2DModel(**config, rope_order="grid")
    grid.load_state_dict(upstream.state_dict())
    for (height, width), same in (((6, 6), True), ((4, 8), False)):
        args = inputs(config, height=height, width=width)
        assert torch.equal(upstream(*args), grid(*args)) == same


def test_grid_order_is_translation_consistent():
    """With "grid" a token's rotation depends on its own row and column, whatever the width."""
    wide, narrow = grid_positions(4, 9, "grid"), grid_positions(4, 5, "grid")
    assert torch.equal(wide.view(4, 9, 2)[:, :5], narrow.view(4, 5, 2))
    assert wide[10].tolist() == [1, 1] and grid_positions(4, 9, "upstream")[10].tolist() == [2, 2]


def test_positions_past_1024():
    ours, eager, config = pair(patch_size=1, depth=1)
    args = inputs(config, batch=1, height=1, width=1100)
    assert relative_error(ours(*args), eager(*args)) < FORWARD


def test_gradient_checkpointing_changes_nothing():
    ours, _, config = pair()
    args = inputs(config)
    gradients = []
    for enable in (False, True):
        if enable:
            ours.enable_gradient_checkpointing()
        ours.zero_grad()
        ours(*args).square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert ours.is_gradient_checkpointing


@pytest.mark.parametrize("is_dual", [False, True], ids=["", "forward mode"])
def test_checkpointing_runs_again_on_the_backend_of_the_first_run(is_dual, monkeypatch):
    """Also in the threads that backward has on a GPU, where nobody chose one."""
    ours, _, config = pair(depth=1)
    ours.enable_gradient_checkpointing()
    x, t, r, y = inputs(config)
    seen, norm = [], blocks.ada_layer_norm

    def watched(*args):
        seen.append(requested())
        return norm(*args)

    monkeypatch.setattr(blocks, "ada_layer_norm", watched)
    with use_backend("reference"), forward_ad.dual_level():
        if is_dual:
            x = forward_ad.make_dual(x, torch.ones_like(x))
        out = forward_ad.unpack_dual(ours(x, t, r, y)).primal
    thread = threading.Thread(target=out.square().sum().backward)
    thread.start()
    thread.join()
    assert len(seen) == 2 and set(seen) == {"reference"}
    assert ours.x_embedder.proj.weight.grad.any()


def test_initialisation():
    model = TiMTransformer2DModel(**TINY | dict(hidden_size=256, num_classes=1000))
    x, t, r, y = inputs(TINY)
    assert torch.equal(model(x, t, r, y), torch.zeros_like(x))  # the output layer starts at zero
    for block in model.blocks:
        assert not block.adaLN_modulation.fc2.weight.any()
        assert not block.attn.qkv.bias.any()
    table = model.y_embedder.embedding_table.weight
    assert abs(float(table.detach().std()) - 0.02) < 1e-3
    assert abs(float(model.t_embedder.mlp[2].weight.detach().std()) - 0.02) < 1e-3
    patch = model.x_embedder.proj.weight.detach()  # xavier over (3·2·2, 256)
    assert abs(float(patch.abs().max()) - (6 / (12 + 256)) ** 0.5) < 5e-3


def test_return_dict():
    ours, _, config = pair()
    output = ours(*inputs(config), return_features=True, return_dict=True)
    sample, features = ours(*inputs(config), return_features=True)
    assert torch.equal(output.sample, sample) and torch.equal(output.features, features)


def test_save_pretrained_round_trip(tmp_path):
    ours, _, config = pair()
    ours.save_pretrained(tmp_path)
    loaded = TiMTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs(config)), ours(*inputs(config)))
    for name, value in config.items():
        assert loaded.config[name] == value


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, t, r, y: (x, r, t, y), "r must not be later than t"),
        (lambda x, t, r, y: (x[..., :5], t, r, y), "multiples of the patch size 2, got 4×5"),
        (lambda x, t, r, y: (x[:, :2], t, r, y), r"\(B, 3, H, W\), got \(2, 2, 4, 6\)"),
        (lambda x, t, r, y: (x, t[:1], r, y), r"t must be .* shape \(2,\)"),
        (lambda x, t, r, y: (x, t, r.long(), y), "r must be a floating-point"),
        (lambda x, t, r, y: (x, t, r, y + 50), r"class labels must lie in 0 … 5, got 5"),
        (lambda x, t, r, y: (x, t, r, -1 - y), "class labels must lie in 0 … 5"),
        (lambda x, t, r, y: (x, t, r, y[:1]), "one integer class label a sample"),
    ],
)
def test_bad_input_is_refused(change, message):
    ours, _, config = pair()
    with pytest.raises(ValueError, match=message):
        ours(*change(*inputs(config)))


def test_bad_text_is_refused():
    ours, _, config = pair(cap_feat_dim=7)
    x, t, r, y = inputs(config)
    with pytest.raises(ValueError, match=r"\(2, tokens, 7\); got \(2, 5, 6\)"):
        ours(x, t, r, y[..., :6])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden_size=26), "multiple of 4"),
        (dict(new_condition="t+r"), "new_condition"),
        (dict(rope_order="columns"), "rope_order"),
        (dict(encoder_depth=3), "encoder_depth"),
    ],
)
def test_bad_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TiMTransformer2DModel(**TINY | change)


def test_features_need_a_projector():
    model = TiMTransformer2DModel(**TINY | dict(z_dim=None))
    with pytest.raises(ValueError, match="z_dim"):
        model(*inputs(TINY), return_features=True)


def test_an_attention_backend_of_diffusers_is_refused():
    with pytest.raises(ValueError, match="cannot be set"):
        TiMTransformer2DModel(**TINY).set_attention_backend("_native_math")
