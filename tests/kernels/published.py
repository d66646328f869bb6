"""TiM's published tree with the layers that the published code takes from timm."""

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

import eager
import pytest
from torch import nn

TORCHVISION = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


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
