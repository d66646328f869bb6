"""dF/dt of other people's networks inside `forward_mode`, against float64 and PyTorch's composite
attention, which has a forward derivative."""

import copy
from unittest.mock import patch

import pytest
import torch
from parity import BACKEND, DERIVATIVE, DEVICE, FORWARD, assert_as_accurate, noise
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim_kernels import forward_mode
from tim_kernels.attention import op
from tim_kernels.dispatch.backend import use_backend

diffusers = pytest.importorskip("diffusers", reason="the networks are its")
SIZE = dict(num_attention_heads=2, num_layers=2)
X, TEXT = (2, 4, 4, 4), (2, 7, 16)
TIME = torch.tensor([0.3, 0.7])


def others(*names):
    """Inputs that have no tangents, by name."""
    made = {
        "class_labels": lambda: torch.tensor([1, 3]),
        "encoder_hidden_states": lambda: noise(*TEXT, seed=3),
        "encoder_attention_mask": lambda: (torch.arange(7) < torch.tensor([[4], [7]])).float(),
        "pooled_projections": lambda: noise(2, 8, seed=4),
        "txt_ids": lambda: torch.zeros(7, 3),
        "img_ids": lambda: torch.cartesian_prod(*map(torch.arange, (1, 4, 4))).float(),
        "r_timestep": lambda: torch.tensor([[0.1], [0.5]]),
        "encoder_hidden_states_image": lambda: noise(2, 5, 12, seed=5),
    }
    return {name: made[name]() for name in names}


# Class, sizes, the shape of the latents, what else it takes, and how often our kernel attends: not
# where Sana and PixArt add a float mask to the scores of the text.
NETWORKS = {
    "AnyFlow": (
        "AnyFlowTransformer3DModel",
        dict(SIZE, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
             ffn_dim=64, rope_max_seq_len=32),
        (2, 1, 4, 4, 4), others("r_timestep", "encoder_hidden_states"), 4,
    ),
    "DiT": (
        "DiTTransformer2DModel",
        dict(SIZE, attention_head_dim=8, sample_size=4, num_embeds_ada_norm=10, norm_num_groups=2),
        X, others("class_labels"), 2,
    ),
    "SD3": (
        "SD3Transformer2DModel",
        dict(SIZE, attention_head_dim=16, sample_size=4, in_channels=4, out_channels=4,
             joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8,
             pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm"),
        X, others("encoder_hidden_states", "pooled_projections"), 3,
    ),
    "Flux": (
        "FluxTransformer2DModel",
        dict(num_attention_heads=2, num_layers=1, num_single_layers=1, attention_head_dim=16,
             in_channels=4, joint_attention_dim=16, pooled_projection_dim=8,
             axes_dims_rope=(4, 6, 6)),
        (2, 16, 4), others("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"), 2,
    ),
    "Sana": (  # linear attention to itself
        "SanaTransformer2DModel",
        dict(SIZE, attention_head_dim=8, in_channels=4, out_channels=4, caption_channels=16,
             num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
             sample_size=4),
        X, others("encoder_hidden_states", "encoder_attention_mask"), 0,
    ),
    "Wan": (
        "WanTransformer3DModel",
        dict(SIZE, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
             ffn_dim=64, rope_max_seq_len=32, image_dim=12, added_kv_proj_dim=48),
        (2, 4, 2, 4, 4), others("encoder_hidden_states", "encoder_hidden_states_image"), 6,
    ),
    "PixArt": (
        "PixArtTransformer2DModel",
        dict(SIZE, attention_head_dim=8, sample_size=4, cross_attention_dim=16, caption_channels=16,
             norm_num_groups=2, use_additional_conditions=False),
        X, others("encoder_hidden_states", "encoder_attention_mask"), 2,
    ),
}  # fmt: skip


def outputs(model, x, tangent, rest, dtype=torch.float32, step=0.0):
    """F at a step along (tangent, 1) of latents and time."""
    rest = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rest.items()}
    x, t = x.to(dtype) + step * tangent.to(dtype), TIME.to(DEVICE, dtype) + step
    t = t[:, None] if "r_timestep" in rest else t
    return model(hidden_states=x, timestep=t, return_dict=False, **rest)[0]


def derivative(model, x, tangent, rest, dtype=torch.float32):
    """F and dF/dstep."""
    zero = torch.zeros((), dtype=dtype, device=DEVICE)
    along = lambda step: outputs(model, x, tangent, rest, dtype, step)  # noqa: E731
    return torch.func.jvp(along, (zero,), (torch.ones_like(zero),))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    """A network with its inputs, its derivative in float64 and in PyTorch's float32, and how often
    it asks for attention that our kernel makes."""
    kind, sizes, shape, rest, attentions = NETWORKS[request.param]
    if not hasattr(diffusers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**sizes).eval().requires_grad_(False).to(DEVICE)
    for parameter in model.parameters():  # some are zero at first
        parameter.add_(0.1 * torch.randn_like(parameter))
    rest = {name: value.to(DEVICE) for name, value in rest.items()}
    x, tangent = (noise(*shape, seed=i, device=DEVICE) for i in range(2))
    double = copy.deepcopy(model).double(), x, tangent, rest, torch.float64
    with sdpa_kernel(SDPBackend.MATH):
        truth = derivative(*double)
        plain = derivative(model, x, tangent, rest)
    difference = (outputs(*double, 1e-4) - outputs(*double, -1e-4)) / 2e-4
    assert (difference - truth[1]).norm() < 5e-3 * truth[1].norm()  # sinusoids are in float32
    return (model, x, tangent, rest), plain, truth, attentions


@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_derivative(case, backend):
    given, plain, truth, attentions = case
    with (
        use_backend(backend),
        forward_mode(),
        patch.object(op, "jvp_op", wraps=op.jvp_op) as kernel,
    ):
        ours = derivative(*given)
    assert kernel.call_count == (0 if backend == "reference" else attentions)
    assert_as_accurate(ours[0], plain[0], truth[0], FORWARD, "output")
    assert_as_accurate(ours[1], plain[1], truth[1], DERIVATIVE, "tangent")


def test_without_it_pytorch_has_none(case):
    with pytest.raises(NotImplementedError, match="forward AD"):
        derivative(*case[0])
