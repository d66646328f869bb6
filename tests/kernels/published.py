"""Somebody else's model of TiM's published tree: `eager.EagerTiM` shares names and shapes with TiM,
and no code. With timm's layers it is the published implementation's tree."""

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

import eager
import pytest
import torch
from eager import EagerTiM, randomise
from parity import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

TORCHVISION = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


TINY = dict(
    patch_size=2, in_channels=3, hidden_size=48, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip


@functools.cache
def require_timm() -> ModuleType:
    """`timm.layers`, and nothing else of timm.

    The rest of timm needs torchvision, whose file on the package index no CPU build of PyTorch can
    load; where it lies beside one, transformers and diffusers cannot be imported either. timm is
    therefore installed without what it depends on, and the one class of torchvision that its
    layers name, and that none of ours uses, is stood in for while they are imported.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed: make test does it, or pip install --no-deps timm")
    stand_ins = {name: ModuleType(name) for name in ("timm", *TORCHVISION)}
    stand_ins["timm"].__path__ = spec.submodule_search_locations
    stand_ins[TORCHVISION[-1]].FrozenBatchNorm2d = nn.BatchNorm2d
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("timm.layers")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def with_timm_layers(model: eager.EagerTiM) -> eager.EagerTiM:
    """`model` with timm's PatchEmbed and SwiGLU in place of its own, before it gets its weights."""
    layers, proj = require_timm(), model.x_embedder.proj
    model.x_embedder = layers.PatchEmbed(
        8, proj.kernel_size[0], proj.in_channels, proj.out_channels, strict_img_size=False
    )
    for name, module in list(model.named_modules()):
        if type(module) is eager.SwiGLU:
            hidden, inner = module.fc1_g.weight.shape
            twin = layers.SwiGLU(inner, hidden, module.fc2.out_features)
            model.set_submodule(name, twin)
    return model


def problem(text: bool, timm: bool = False):
    model = EagerTiM(**TINY | dict(cap_feat_dim=7 if text else None))
    model = randomise(with_timm_layers(model) if timm else model)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 6, generator=g)
    y = torch.randn(2, 5, 7, generator=g) if text else torch.tensor([1, 5])
    args = x, torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.6]), y
    return model.to(DEVICE), tuple(argument.to(DEVICE) for argument in args)


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


def idle_layers(**changes):
    """What timm's SwiGLU has beside its three layers."""
    idle = dict(act=nn.SiLU(), drop1=nn.Dropout(0.0), norm=nn.Identity(), drop2=nn.Dropout(0.0))
    return idle | changes
