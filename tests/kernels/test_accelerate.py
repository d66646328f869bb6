"""Somebody else's model: `eager.EagerTiM` shares names and shapes with TiM, and no code.

With timm's layers it is the published implementation's tree.
"""

import copy
import functools
import gc
import weakref

import pytest
import torch
from eager import EagerTiM, SwiGLU, randomise
from golden_files import relative_error
from parity import BACKEND, DEVICE
from published import require_timm, with_timm_layers
from torch import nn
from torch.utils.checkpoint import checkpoint

from tim_kernels import accelerate, restore, use_backend

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=48, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip


def problem(text: bool, timm: bool = False):
    model = EagerTiM(**TINY | dict(cap_feat_dim=7 if text else None))
    model = randomise(with_timm_layers(model) if timm else model)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 6, generator=g)
    y = torch.randn(2, 5, 7, generator=g) if text else torch.tensor([1, 5])
    args = x, torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.6]), y
    return model.to(DEVICE), tuple(argument.to(DEVICE) for argument in args)


@pytest.mark.parametrize("backend", ["reference", BACKEND])
@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
@pytest.mark.parametrize("timm", [False, True], ids=["", "timm"])
def test_same_numbers_and_back(timm, text, backend):
    model, args = problem(text, timm)
    own = type(model).forward
    expected, expected_zs = model(*args, return_zs=True)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with use_backend(backend):
        report = accelerate(model)
        assert report.fused == [""] and not report.left, str(report)
        assert model.forward.__func__ is not own
        model.zero_grad()
        sample, zs = model(*args, attn_type="fused_attn", return_zs=True, jvp=False)
        sample.square().sum().backward()
        tangents = tuple(torch.ones_like(a) for a in args[:3])
        call = lambda x, t, r: model(x, t, r, args[3])  # noqa: E731
        jvp = torch.func.jvp(call, args[:3], tangents)[1]
    assert relative_error(sample, expected) < 2e-5 and relative_error(zs, expected_zs) < 2e-5
    largest = max(g.norm() for g in gradients.values())
    for name, gradient in gradients.items():
        error = (model.get_parameter(name).grad - gradient).norm()
        assert error / max(gradient.norm(), 1e-3 * largest) < 1e-4, name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name

    restore(model)
    assert model.forward.__func__ is own
    assert torch.equal(model(*args), expected)
    own_jvp = torch.func.jvp(lambda x, t, r: model(x, t, r, args[3], jvp=True), args[:3], tangents)[
        1
    ]
    assert relative_error(jvp, own_jvp) < 1e-4


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_three_steps_of_training_lead_where_the_model_s_own_lead(text):
    model, args = problem(text, timm=True)
    left_alone, start = copy.deepcopy(model), copy.deepcopy(model)
    assert accelerate(model).fused == [""]
    losses = []
    for network in (model, left_alone):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-6)
        for _ in range(3):
            sample, zs = network(*args, return_zs=True)
            loss = (sample - args[0]).square().mean() + zs.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert losses[2] < losses[0]
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-5, atol=0)
    ours, theirs, before = (
        nn.utils.parameters_to_vector(network.parameters())
        for network in (model, left_alone, start)
    )
    assert (ours - theirs).norm() < 1e-3 * (theirs - before).norm()


def test_a_block_called_as_published_is_still_the_published_block():
    model, _ = problem(text=False)
    x, c = torch.randn(2, 6, 48, device=DEVICE), torch.randn(2, 1, 48, device=DEVICE)
    turn = torch.ones(6, 24, device=DEVICE), torch.zeros(6, 24, device=DEVICE)
    expected = model.blocks[0](x, c, *turn, c, None, False)
    assert accelerate(model).fused == [""]
    assert torch.equal(model.blocks[0](x, c, *turn, c, None, False), expected)


def test_hooks_on_blocks_run():
    model, args = problem(text=False)
    assert accelerate(model).fused == [""]
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(block))
    model(*args)
    assert seen == list(model.blocks)


def test_modules_are_called_as_published():
    model, (x, t, r, y) = problem(text=False)
    c = torch.randn(2, 1, 48, device=DEVICE)
    calls = {
        "x_embedder": (x,), "t_embedder": (t,), "delta_embedder": (t - r,), "y_embedder": (y,),
        "blocks.0.mlp": (torch.randn(2, 6, 48, device=DEVICE),),
        "final_layer": (torch.randn(2, 6, 48, device=DEVICE), c),
    }  # fmt: skip
    expected = {name: model.get_submodule(name)(*args) for name, args in calls.items()}
    assert accelerate(model).fused == [""]
    for name, args in calls.items():
        torch.testing.assert_close(model.get_submodule(name)(*args), expected[name])


class Checkpointed(EagerTiM):
    """As published: a switch, and checkpoints around blocks."""

    def __init__(self, use_reentrant=False, **config):
        super().__init__(**config)
        self.use_checkpoint = True
        self.blocks = nn.ModuleList(map(self.wrapped, self.blocks))
        self.use_reentrant = use_reentrant

    def wrapped(self, block):
        own, model = type(block), self

        class Wrapped(own):
            def forward(self, *args):
                if not getattr(model, "use_checkpoint", model.training):
                    return own.forward(self, *args)
                run = functools.partial(own.forward, self)
                return checkpoint(run, *args, use_reentrant=model.use_reentrant)

        block.__class__ = Wrapped
        return block


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_is_kept(use_reentrant):
    _, args = problem(text=False)
    model = randomise(Checkpointed(use_reentrant, **TINY)).to(DEVICE)
    assert accelerate(model).fused == [""]
    kept = {}
    for model.use_checkpoint in (True, False):
        count = [0]

        def pack(tensor, count=count):
            count[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept[model.use_checkpoint] = model(*args), count
    assert kept[True][1][0] < 0.7 * kept[False][1][0]
    assert relative_error(kept[True][0], kept[False][0]) < 1e-6


def test_checkpointing_without_a_switch_is_named_and_left():
    model = randomise(Checkpointed(**TINY)).to(DEVICE)
    del model.use_checkpoint
    report = accelerate(model)
    assert "checkpoints its blocks" in report.left[""] and "" not in report.fused


def test_a_compiled_model_is_told_apart():
    model, _ = problem(text=False)
    for compiled in (torch.compile(model, backend="eager"), model):
        model.compile(backend="eager")
        report = accelerate(compiled)
        assert not report.fused and "then compile it" in report.left[""] and len(report.left) == 1


def test_a_forward_of_the_instance_is_named():
    model, _ = problem(text=False)
    model.blocks[0].forward = model.blocks[0].forward
    assert "replaced on the instance" in accelerate(model).left["blocks.0"]


def test_a_model_before_training_is_tried_with_weights():
    """Zero layers would hide what it computes."""

    class Other(SwiGLU):
        def forward(self, x):
            return super().forward(x) + self.fc2(x.roll(1, -1)[..., : self.fc2.in_features])

    model, _ = problem(text=False)
    mlp = model.blocks[0].adaLN_modulation
    mlp.__class__ = Other
    for layer in (mlp.fc2, model.final_layer.linear, model.final_layer.adaLN_modulation.fc2):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    report = accelerate(model)
    assert "computes something else" in report.left[""]
    assert not model.final_layer.linear.weight.any()


def test_hooks_on_layers_that_compute_nothing_run():
    model, args = problem(text=False, timm=True)
    expected = model(*args)
    assert accelerate(model).fused == [""]
    seen = []
    for name in ("x_embedder.norm", "blocks.0.mlp.act", "blocks.1.mlp.drop1"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert relative_error(model(*args), expected) < 2e-5
    assert set(seen) == {"x_embedder.norm", "blocks.0.mlp.act", "blocks.1.mlp.drop1"}


def test_arguments_it_does_not_know_are_refused():
    class Masked(EagerTiM):
        def forward(self, x, t, r, y, attn_type=None, return_zs=False, jvp=False, mask=None):
            return super().forward(x, t, r, y, return_zs=return_zs)

    model = randomise(Masked(**TINY)).to(DEVICE)
    assert accelerate(model).fused == [""]
    _, args = problem(text=False)
    with pytest.raises(ValueError, match="mask"):
        model(*args, mask=torch.ones(2))


def test_an_accelerated_model_can_be_forgotten():
    model, _ = problem(text=False)
    assert accelerate(model).fused == [""]
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_float32_model_is_tried_without_tf32():
    """cuDNN's default would make its patch convolution something else than our GEMM."""
    model, args = problem(text=False)
    seen = []
    model.x_embedder.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)
    )
    before = torch.backends.cudnn.conv.fp32_precision
    assert accelerate(model).fused == [""]
    assert seen[0] == "ieee" and torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.parametrize("precision, is_fused", [("ieee", False), ("tf32", True)])
def test_gemms_in_tf32_are_no_difference(precision, is_fused):
    class Rounded(EagerTiM):
        def forward(self, x, t, r, y, attn_type=None, return_zs=False, jvp=False):
            return 1.001 * super().forward(x, t, r, y)  # as far off as TF32

    model = randomise(Rounded(**TINY)).to(DEVICE)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        assert (accelerate(model).fused == [""]) == is_fused
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_block_that_is_not_tim_s_is_named_and_left():
    model, args = problem(text=False)
    model.blocks[1].attn.temperature = nn.Linear(24, 24)
    expected = model(*args)
    report = accelerate(model)
    assert "blocks.1.attn.temperature" in report.left and "" not in report.fused
    assert "blocks.0.mlp" in report.fused  # what can be is fused all the same
    assert relative_error(model(*args), expected) < 2e-5
    restore(model)
    assert torch.equal(model(*args), expected)


def idle_layers(**changes):
    """What timm's SwiGLU has beside its three layers."""
    idle = dict(act=nn.SiLU(), drop1=nn.Dropout(0.0), norm=nn.Identity(), drop2=nn.Dropout(0.0))
    return idle | changes


def test_layers_that_compute_nothing_are_no_obstacle():
    model, args = problem(text=True)
    expected = model(*args)
    model.x_embedder.norm = nn.Identity()
    for block in model.blocks:
        for name, layer in idle_layers().items():
            block.mlp.add_module(name, layer)
    report = accelerate(model)
    assert report.fused == [""], str(report)
    assert relative_error(model(*args), expected) < 2e-5


@pytest.mark.parametrize(
    "name, layer, reason",
    [
        ("act", nn.GELU(), "GELU"),
        ("drop1", nn.Dropout(0.1), "dropout of 0.1"),
        ("norm", nn.LayerNorm(128, elementwise_affine=False), "LayerNorm, SwiGLU has none"),
        ("drop2", nn.AlphaDropout(0.2), "dropout of 0.2"),
        ("extra", nn.Tanh(), "Tanh, SwiGLU has none"),
    ],
)
def test_layers_that_compute_something_are_named_and_left(name, layer, reason):
    model, _ = problem(text=False)
    for child, idle in idle_layers(**{name: layer}).items():
        model.blocks[1].mlp.add_module(child, idle)
    report = accelerate(model)
    assert reason in report.left[f"blocks.1.mlp.{name}"]
    assert "blocks.0.mlp" in report.fused and "blocks.1.mlp" not in report.fused


@pytest.mark.parametrize(
    "name, norm",
    [
        ("blocks.0.norm1", nn.Identity()),
        ("blocks.1.norm2", nn.LayerNorm(48)),
        ("blocks.1.attn.q_norm", nn.RMSNorm(24)),
        ("blocks.0.attn.k_norm", nn.LayerNorm(24, eps=1e-2)),
        ("blocks.0.attn.k_norm", nn.LayerNorm(24, elementwise_affine=False)),
        ("final_layer.norm_final", nn.LayerNorm(48, bias=False)),
    ],
)
def test_norms_of_other_kinds_are_called(name, norm):
    model, args = problem(text=False)
    model.set_submodule(name, norm.to(DEVICE))
    randomise(model)
    expected = model(*args)
    report = accelerate(model)
    assert report.fused == [""], str(report)
    assert relative_error(model(*args), expected) < 2e-5


def test_dropped_paths_are_named():
    class DropPath(nn.Identity):
        drop_prob = 0.1

    model, _ = problem(text=False)
    model.blocks[0].drop_path = DropPath()
    assert "dropout of 0.1" in accelerate(model).left["blocks.0.drop_path"]


def test_layers_named_as_swiglu_s_that_compute_something_else_are_left():
    class GeGLU(SwiGLU):
        def forward(self, x):
            return self.fc2(nn.functional.gelu(self.fc1_g(x)) * self.fc1_x(x))

    model = nn.ModuleDict(dict(one=SwiGLU(4, 6, 4), other=GeGLU(4, 6, 4)))
    assert accelerate(model).fused == ["one"]


@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_timm_s_layers_one_by_one(backend):
    """A tree that is not TiM's, since a block has timm's plain Mlp."""
    layers = require_timm()
    model, args = problem(text=False, timm=True)
    model.blocks[1].mlp = layers.Mlp(48, 96).to(DEVICE)
    expected = model(*args)
    with use_backend(backend):
        report = accelerate(model)
        assert "blocks.1.mlp" in report.left and "blocks.1.mlp" not in report.fused
        assert {"blocks.0.mlp", "blocks.1.adaLN_modulation"} <= set(report.fused)
        assert relative_error(model(*args), expected) < 2e-5


@pytest.mark.parametrize("size", [8, (4, 6)])
def test_timm_s_embedder_of_one_image_size(size):
    layers = require_timm()
    model, _ = problem(text=False)
    model.x_embedder = layers.PatchEmbed(size, 2, 3, 48).to(DEVICE)
    assert accelerate(model).fused == [""]


def test_timm_s_embedder_that_pads_is_named():
    layers = require_timm()
    model, _ = problem(text=False)
    model.x_embedder = layers.PatchEmbed(8, 2, 3, 48, dynamic_img_pad=True).to(DEVICE)
    assert "pads its input" in accelerate(model).left["x_embedder"]


def test_extra_parameters_are_named():
    model, _ = problem(text=False)
    model.blocks[0].layer_scale = nn.Parameter(torch.ones(48))
    report = accelerate(model)
    assert "layer_scale is (48,)" in report.left["blocks.0"]


def test_a_model_that_computes_something_else_is_left():
    class Twice(EagerTiM):
        def forward(self, x, t, r, y, attn_type=None, return_zs=False, jvp=False):
            return 2 * super().forward(x, t, r, y)

    model = randomise(Twice(**TINY))
    report = accelerate(model)
    assert "computes something else" in report.left[""] and "" not in report.fused


def test_what_is_no_tim_at_all():
    report = accelerate(nn.Linear(3, 3))
    assert not report.fused and "not the published tree" in report.left[""]
    with pytest.raises(ValueError, match="not accelerated"):
        restore(nn.Linear(3, 3))


def test_refusals():
    model, _ = problem(text=False)
    with pytest.raises(ValueError, match="new_condition"):
        accelerate(model, new_condition="t+r")
    with pytest.raises(ValueError, match="rope_order"):
        accelerate(model, rope_order="rows")
    assert accelerate(model).fused and "already" in accelerate(model).left[""]
