"""A small network of each kind, what it is sampled with, and the sampler that calls it anew."""

import torch
from eager import EagerTiM, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tim.models import TiMTransformer2DModel
from tim.sampling import sample
from tim.transports import make
from tim_kernels import accelerate

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
KINDS = ["class", "text", "accelerated class", "accelerated text"]


class Called(nn.Module):
    """The model as a stranger's: nothing is known of it but its call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x, t, r, y):
        return self.model(x, t, r, y)


def tiny(kind: str, **params) -> nn.Module:
    config = TINY | dict(cap_feat_dim=8 if "text" in kind else None) | params
    plain = randomise(EagerTiM(**config)).eval()
    if "accelerated" in kind:
        assert accelerate(plain).fused == [""]
        return plain
    model = TiMTransformer2DModel(**config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def given(kind: str, batch: int = 2, transport: str = "OT_FM", seed: int = 0, length: int = 3):
    """z, y, y_null of some samples."""
    g = torch.Generator().manual_seed(seed)
    z = make(transport).initial_state(torch.randn(batch, 3, 4, 6, generator=g))
    if "text" not in kind:
        return z, torch.arange(batch) % 5, torch.full((batch,), 5)
    y, y_null = torch.randn(2, batch, length, 8, generator=g)
    return z, y, y_null


def step_by_step(model: nn.Module, transport: str, *args, **options) -> Tensor:
    return sample(Called(model), make(transport), *args, **options)


class Counter(TorchDispatchMode):
    """How often operations ran, how often GEMMs by a weight, and of how many rows."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.operations, self.gemms, self.rows = 0, {}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.operations += 1
        if op._overloadpacket.__name__ in ("mm", "addmm", "linear"):
            for x in args:
                name = self.names.get(x.data_ptr()) if isinstance(x, Tensor) else None
                if name is not None and name.endswith("weight"):
                    self.gemms[name] = self.gemms.get(name, 0) + 1
                    self.rows.setdefault(name, set()).add(args[-2].shape[0])
        return op(*args, **(kwargs or {}))
