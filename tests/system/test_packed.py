"""Pictures of different sizes in one row: each is as if it were alone."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from eager import EagerTiM, randomise
from golden_files import relative_error
from small_packs import ALONE, SIZES, TINY, alone, joined, packed, problem
from torch.utils._python_dispatch import TorchDispatchMode

from tim.models import TiMTransformer2DModel, pack, unpack
from tim_kernels import accelerate, use_backend


@pytest.fixture(params=[None, 7], ids=["class", "text"])
def text(request):
    return request.param


@pytest.mark.parametrize("order", ["upstream", "grid"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, ALONE), (torch.float64, 1e-14)])
def test_each_picture_is_as_if_alone(text, order, dtype, bound):
    """Sample, features, and the gradients of weights and of pictures."""
    model, latents, *others = problem(text, dtype, rope_order=order)
    leaves = [x.requires_grad_() for x in latents]
    tokens, packing = pack(leaves, 2)
    sample, features = model(tokens, *others, packing=packing, return_features=True)
    one_by_one = alone(model, leaves, *others, return_features=True)
    samples = unpack(sample, packing)
    assert [x.shape for x in samples] == [x.shape for x in latents]
    assert features.shape == (packing.total, 6)
    for ours, (expected, _) in zip(samples, one_by_one, strict=True):
        assert relative_error(ours, expected[0]) < bound
    assert relative_error(features, torch.cat([z[0] for _, z in one_by_one])) < bound

    parameters = [*model.parameters(), *leaves]
    losses = (
        joined(samples).square().sum() + features.square().sum(),
        sum(x.square().sum() + z.square().sum() for x, z in one_by_one),
    )
    ours, expected = (torch.autograd.grad(loss, parameters) for loss in losses)
    assert relative_error(joined(ours), joined(expected)) < bound
    assert all(g.any() for g in ours)


@pytest.mark.parametrize("order", ["upstream", "grid"])
def test_tangents(text, order):
    model, latents, t, r, y = problem(text, rope_order=order)
    along = [torch.cos(x) for x in latents], torch.ones_like(t), torch.full_like(r, 0.5)
    tokens, packing = pack(latents, 2)
    tangent, _ = pack(along[0], 2)
    ours = torch.func.jvp(
        partial(model, y=y, packing=packing), (tokens, t, r), (tangent, *along[1:])
    )[1]
    for i, picture in enumerate(unpack(ours, packing)):
        one = slice(i, i + 1)
        expected = torch.func.jvp(
            partial(model, y=y[one]), (latents[i][None], t[one], r[one]),
            (along[0][i][None], *(each[one] for each in along[1:])),
        )[1]  # fmt: skip
        assert relative_error(picture, expected[0]) < ALONE


def test_the_independent_model_says_the_same(text):
    model, latents, *others = problem(text)
    eager = EagerTiM(**TINY | dict(cap_feat_dim=text))
    eager.load_state_dict(model.state_dict())
    for ours, expected in zip(
        packed(model, latents, *others), alone(eager, latents, *others), strict=True
    ):
        assert relative_error(ours, expected[0]) < 2e-5


def test_triton(text):
    """Forward, backward and tangent by the kernels, in their interpreter."""
    model, latents, t, r, y = problem(text, sizes=SIZES[:3], depth=1)
    tokens, packing = pack(latents, 2)

    def run():
        model.zero_grad()
        function = partial(model, y=y, packing=packing)
        along = tokens.cos(), torch.ones_like(t), torch.zeros_like(r)
        out, tangent = torch.func.jvp(function, (tokens, t, r), along)
        out.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return out, tangent, joined(gradients)

    expected = run()
    with use_backend("triton"):
        ours = run()
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("switches", [dict(qk_norm=False), dict(distance_aware=False)], ids=str)
def test_other_architectures(text, switches):
    model, latents, *others = problem(text, patch_size=1, **switches)
    for ours, expected in zip(
        packed(model, latents, *others), alone(model, latents, *others), strict=True
    ):
        assert relative_error(ours, expected[0]) < ALONE


class Doubled(torch.nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_are_called(text):
    """Norms of another kind, and hooks on blocks and on the last layer."""
    model, latents, *others = problem(text)
    block = model.blocks[1]
    block.norm1, block.attn.q_norm = Doubled(24, eps=1e-6, elementwise_affine=False), Doubled(12)
    shapes = []
    for module in (model.blocks[0], model.final_layer, model.blocks[0].attn.proj):
        module.register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    ours = packed(model, latents, *others)
    T = sum(h * w for h, w in SIZES) // 4
    assert sorted(shapes) == sorted([(T, 24), (T, 24), (T, 1, 12)])
    for one, expected in zip(ours, alone(model, latents, *others), strict=True):
        assert relative_error(one, expected[0]) < ALONE


@pytest.mark.parametrize("is_dual", [False, True], ids=["", "forward mode"])
def test_gradient_checkpointing_changes_nothing(text, is_dual):
    model, latents, t, r, y = problem(text)
    tokens, packing = pack(latents, 2)
    found = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        out = model(tokens, t, r, y, packing=packing)
        if is_dual:
            function = partial(model, t=t, r=r, y=y, packing=packing)
            out, _ = torch.func.jvp(function, (tokens,), (tokens.cos(),))
        out.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    if is_dual:  # whose second run has no tangents, and so another attention
        assert relative_error(*map(joined, found)) < ALONE
    else:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Seen(TorchDispatchMode):
    """The operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op._overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def test_a_forward_copies_nothing_from_the_host(text):
    """So that it can be captured in a CUDA graph."""
    model, latents, *others = problem(text, depth=1)
    tokens, packing = pack(latents, 2)
    with Seen() as seen:
        model(tokens, *others, packing=packing)
    assert "repeat_interleave" in seen.names and "lift_fresh" not in seen.names


def test_a_published_model_that_is_accelerated():
    config = TINY | dict(depth=1)
    model = randomise(EagerTiM(**config))
    latents, *others = problem(depth=1)[1:]
    expected = alone(model, latents, *others)
    assert accelerate(model).fused == [""]
    tokens, packing = pack(latents, 2)
    for ours, one in zip(
        unpack(model(tokens, *others, packing=packing), packing), expected, strict=True
    ):
        assert relative_error(ours, one[0]) < 2e-5


def test_what_an_accelerated_model_refuses(text):
    """What would be spread over all pictures, or read as something else."""
    config = TINY | dict(depth=1, cap_feat_dim=text)
    model = randomise(EagerTiM(**config))
    accelerate(model)
    latents, t, r, y = problem(text, depth=1)[1:]
    tokens, packing = pack(latents, 2)
    for args, given, message in (
        ((tokens, t[:1], r[:1], y), packing, r"t must be of 4 pictures, got \(1,\)"),
        ((tokens, t, r[:1], y), packing, "r must be of 4 pictures"),
        ((tokens, t, r, y[:1]), packing, "y must be of 4 pictures"),
        ((tokens[1:], t, r, y), packing, "sizes that sum to 23"),
        ((tokens.int(), t, r, y), packing, "got .* torch.int32"),
        ((tokens, t, r, y), packing.segments, "packing must be what `pack` gives"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*args, packing=given)


@pytest.mark.parametrize("order", ["upstream", "grid"])
def test_positions_past_1024(order):
    model, latents, *others = problem(
        patch_size=1, depth=1, rope_order=order, sizes=((1, 1100), (2, 3), (1100, 1))
    )
    for ours, expected in zip(
        packed(model, latents, *others), alone(model, latents, *others), strict=True
    ):
        assert relative_error(ours, expected[0]) < ALONE


def test_pictures_of_4096_pixels():
    """128×128 tokens of DC-AE's latents beside others: T2I-XL on meta, and a small one for real."""
    sizes = (128, 128), (16, 24)
    xl = dict(
        input_size=16, patch_size=1, in_channels=32, cap_feat_dim=1152, lora_hidden_size=384
    )  # fmt: skip
    with torch.device("meta"):
        model = TiMTransformer2DModel(**xl).to(torch.bfloat16)
        latents = [torch.empty(32, *size, dtype=torch.bfloat16) for size in sizes]
        tokens, packing = pack(latents, 1)
        times, y = torch.empty(2), torch.empty(2, 7, 1152, dtype=torch.bfloat16)
        out, features = model(tokens, times, times, y, packing=packing, return_features=True)
    assert out.shape == tokens.shape and features.shape == (128 * 128 + 16 * 24, 768)

    model, latents, *others = problem(patch_size=1, depth=1, sizes=sizes)
    with torch.no_grad():
        for ours, expected in zip(
            packed(model, latents, *others), alone(model, latents, *others), strict=True
        ):
            assert relative_error(ours, expected[0]) < ALONE


def test_compiled_blocks_serve_every_packing(one_thread):
    """As `training.compile` has them: one graph, with gradients, whatever is packed."""
    model, *_ = problem(depth=1)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    model.blocks[0].compile(backend=counter, fullgraph=True, dynamic=True)
    plain = problem(depth=1)[0]
    for sizes in (SIZES, ((6, 8), (4, 4), (2, 2)), ((2, 6), (4, 2), (8, 8), (2, 4), (6, 6))):
        _, latents, t, r, y = problem(sizes=sizes)
        tokens, packing = pack(latents, 2)
        out, expected = (each(tokens, t, r, y, packing=packing) for each in (model, plain))
        assert relative_error(out, expected) < ALONE
        gradients = [
            torch.autograd.grad(each.square().sum(), network.blocks.parameters())
            for each, network in ((out, model), (expected, plain))
        ]
        assert relative_error(*map(joined, gradients)) < 2e-6
    assert counter.frame_count == 1


def test_the_whole_model_without_a_graph_break(text, one_thread):
    """With other numbers and sizes of pictures, and the text's lengths."""
    torch._dynamo.reset()
    compiled = torch.compile(problem(text, depth=1)[0], backend="aot_eager", fullgraph=True)
    for sizes in (SIZES[:2], SIZES[:3]):
        model, latents, *others = problem(text, sizes=sizes, depth=1)
        tokens, packing = pack(latents, 2)
        if text:
            packing = packing.reading([1 + i % 5 for i in range(len(sizes))], 5)
        out, expected = (f(tokens, *others, packing=packing) for f in (compiled, model))
        assert relative_error(out, expected) < 2e-5
