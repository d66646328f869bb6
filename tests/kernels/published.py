"""TiM's published tree with the layers that the published code takes from timm."""

import functools
import sys
from types import ModuleType

import eager
import pytest
import torch


@functools.cache
def timm_layers() -> ModuleType | str:
    """`timm.layers`, or in words why this machine cannot import it.

    It imports torchvision, whose compiled operators need the PyTorch that they were built for. A
    CPU build of PyTorch cannot load those of a CUDA build; torchvision then runs without them,
    but for two whose schemas it expects. Nothing here calls either.
    """
    try:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
            timm_layers.library = library  # its definitions last as long as it does
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        import timm.layers
    except (ImportError, RuntimeError, OSError) as error:
        return f"timm's layers cannot be imported beside torch {torch.__version__}: {error}"
    return timm.layers


def require_timm() -> ModuleType:
    layers = timm_layers()
    if isinstance(layers, str):
        pytest.skip(layers)
    return layers


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
