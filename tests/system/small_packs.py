"""Pictures of several sizes, and a small network with random weights that reads them packed."""

import torch
from eager import EagerTiM, randomise

from tim.models import TiMTransformer2DModel, pack, unpack

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=24, encoder_depth=1, depth=2,
    num_heads=2, num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
SIZES = (4, 6), (2, 2), (6, 4), (4, 10)  # of latents
ALONE = 1e-6  # relative: GEMMs of other sizes add in another order


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
