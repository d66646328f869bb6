"""Pictures of different sizes in one row: each is as if it were alone."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from eager import EagerTiM, randomise
from golden_files import relative_error

from tim.models import Packing, TiMTransformer2DModel, pack, unpack
from tim_kernels import accelerate, use_backend

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=24, encoder_depth=1, depth=2,
    num_heads=2, num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
SIZES = (4, 6), (2, 2), (6, 4), (4, 10)  # of latents
ALONE = 1e-6  # relative: GEMMs of other sizes add in another order


@pytest.fixture(params=[None, 7], ids=["class", "text"])
def text(request):
    return request.param


def problem(text=None, dtype=torch.float32, sizes=SIZES, **changes):
    """A model with random weights, pictures, t, r and y."""
    config = TINY | dict(cap_feat_dim=text) | changes
    model = TiMTransformer2DModel(**config)
    order = config.pop("rope_order", None)
    model.load_state_dict(randomise(EagerTiM(**config)).state_dict())
    assert order is None or model.config.rope_order == order
    g = torch.Generator().manual_seed(1)
    latents = [
        torch.randn(config["in_channels"], *size, generator=g, dtype=dtype) for size in sizes
    ]
    t, r = torch.rand(2, len(sizes), generator=g, dtype=dtype).sort(0, descending=True).values
    y = torch.arange(len(sizes)) % config["num_classes"]
    if text:
        y = torch.randn(len(sizes), 5, text, generator=g, dtype=dtype)
    return model.to(dtype), latents, t, r, y


def alone(model, latents, t, r, y, **options):
    """Each picture by itself."""
    each = zip(latents, t.split(1), r.split(1), y.split(1), strict=True)
    return [model(x[None], *others, **options) for x, *others in each]


def packed(model, latents, t, r, y, **options):
    tokens, packing = pack(latents, model.config.patch_size)
    out = model(tokens, t, r, y, packing=packing, **options)
    return unpack(out, packing)


def joined(tensors):
    return torch.cat([x.flatten() for x in tensors])


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


def test_packing_and_its_parts():
    latents = [torch.arange(3.0 * h * w).view(3, h, w) + h for h, w in SIZES]
    tokens, packing = pack(latents, 2)
    assert packing.sizes == ((2, 3), (1, 1), (3, 2), (2, 5)) and packing.total == len(tokens) == 23
    assert all(map(torch.equal, unpack(tokens, packing), latents))
    assert torch.equal(tokens[1], latents[0][:, :2, 2:4])  # row-major
    rest = packing[2:]
    assert rest.sizes == packing.sizes[2:] and packing.tokens_of(2) == 7
    assert all(map(torch.equal, unpack(tokens[7:], rest), latents[2:]))
    assert (packing + rest).sizes == packing.sizes + rest.sizes and len(packing + rest) == 6
    rows = torch.arange(4.0)
    spread = packing.spread(rows)
    assert torch.equal(spread, torch.tensor([0.0] * 6 + [1.0] + [2.0] * 6 + [3.0] * 10))
    assert torch.equal(packing.means(torch.stack((spread, -spread))), torch.stack((rows, -rows)))
    spread[6] = float("nan")
    assert packing.means(spread).isnan().tolist() == [False, True, False, False]
    assert packing.to("meta").grids.is_meta and packing.to("meta").segments.lengths == (6, 1, 6, 10)
    batch = torch.randn(2, 3, 4, 4)
    assert torch.equal(torch.stack(unpack(*pack(batch, 2))), batch)


@pytest.mark.parametrize(
    "latents, message",
    [
        ([], "at least one picture, got none"),
        ([torch.zeros(3, 4, 5)], r"multiples of patch_size 2; got \(3, 4, 5\) at 0"),
        ([torch.zeros(3, 4)], r"must be \(channels, H, W\)"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 0, 4)], "at least one token, got 0×2"),
        ([torch.zeros(3, 4, 4), torch.zeros(4, 4, 4)], "one number of channels"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4).double()], "float64.* at 1"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, device="meta")], "'meta'.* at 1"),
    ],
)
def test_what_cannot_be_packed(latents, message):
    with pytest.raises(ValueError, match=message):
        pack(latents, 2)


def test_bad_input_is_refused():
    model, latents, t, r, y = problem()
    tokens, packing = pack(latents, 2)
    for size in ((2, 0), (2,), 3, (2, 1.5)):
        with pytest.raises(ValueError, match="token"):
            Packing.of([(1, 1), size])
    with pytest.raises(ValueError, match=r"tokens must be \(23, channels, p, p\)"):
        unpack(tokens[1:], packing)
    for args, options, message in (
        ((tokens[1:], t, r, y), {}, r"sizes that sum to 23, got \(22, 3, 2, 2\)"),
        ((tokens.flatten(1), t, r, y), {}, r"x must be tokens \(23, 3, 2, 2\)"),
        ((tokens, t[:2], r, y), {}, r"t must be .* shape \(4,\)"),
        ((tokens, r, t, y), {}, "r must not be later than t"),
        ((tokens, t, r, y[:1]), {}, "one integer class label a sample"),
        ((tokens, t, r, y), dict(packing=packing.segments), "what `pack` gives, got a Segments"),
        ((tokens, t, r, y), dict(packing=packing.to("meta")), "must be on cpu like x, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*args, **dict(packing=packing) | options)


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
