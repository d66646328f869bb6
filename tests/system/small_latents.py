"""Networks of milliseconds on random latents, with classes or text, REPA and an enhanced target."""

import dataclasses

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from small_mnist import small

from tim.data import TrainingSet
from tim.training import Parts
from tim.training.conditioning import ClassConditioning, TextConditioning
from tim.training.repa import Targets
from tim.training.streams import TokenPacks

CLASSES, SHAPE, WIDTH, Z = 4, (3, 4, 4), 5, 6


class Items(TrainingSet):
    """`latent`, `image`, `label` and `caption` of 24 pictures that differ."""

    names = ("latent", "image", "label", "caption")
    num_classes = CLASSES

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.latents = torch.randn(24, *SHAPE, generator=g)
        self.images = torch.rand(24, 3, 8, 8, generator=g) * 2 - 1

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return {
            "latent": self.latents[i],
            "image": self.images[i],
            "label": int(i) % CLASSES,
            "caption": "ab" * (i % 3) + "c",
        }


class Ragged(Items):
    """24 of five sizes; pictures are 2 px a latent."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        shapes = [(4, 6), (2, 2), (6, 4), (4, 8), (6, 6)]
        self.sizes = np.array([shapes[i % 7 % 5] for i in range(24)])
        sizes = self.sizes.tolist()
        self.latents = [torch.randn(3, h, w, generator=g) for h, w in sizes]
        self.images = [torch.rand(3, 2 * h, 2 * w, generator=g) * 2 - 1 for h, w in sizes]


def encode(texts):
    """(B, L, WIDTH), L the longest's letters and one; padding is alike everywhere."""
    longest = max(map(len, texts)) + 1
    y = torch.full((len(texts), longest, WIDTH), 0.1)
    for row, text in zip(y, texts, strict=True):
        for i, letter in enumerate("^" + text):
            row[i] = torch.sin(torch.arange(WIDTH) * float(ord(letter)))
    return y


def vision(images, grid):
    """Features of the picture's patches, projected."""
    g = torch.Generator().manual_seed(1)
    patches = torch.nn.functional.interpolate(images, size=grid, mode="area")
    return patches.flatten(2).transpose(1, 2) @ torch.randn(3, Z, generator=g)


def parts(kind: str = "class", repa: bool = True) -> Parts:
    conditioning = ClassConditioning(CLASSES, 0.3)
    if kind == "text":
        conditioning = TextConditioning(encode, encode(["", "x" * 8])[:1], 0.3, shown=("a", "b"))
    targets = Targets(vision, Z, 2) if repa else None
    return Parts(Items(), conditioning, SHAPE, repa=targets, decode=lambda z: z.clamp(-1, 1))


def packed_parts(kind: str = "class", tokens: int = 16) -> Parts:
    """Of pictures of several sizes, packed."""
    data, given = Ragged(), parts(kind)
    packs = TokenPacks(data, 2, tokens)
    return dataclasses.replace(
        given, dataset=data, sampler=packs, is_packed=True, images_per_batch=packs.images_per_pack
    )


def latents(kind: str = "class", repa: bool = True, mg: bool = False, **training) -> DictConfig:
    """With these settings of the section `training`."""
    cfg = small(**{"checkpointing_steps": 2, "max_train_steps": 4, **training})
    params = {
        "input_size": 4, "patch_size": 2, "in_channels": 3, "num_classes": CLASSES,
        "hidden_size": 16, "class_dropout_prob": 0.3, "z_dim": Z, "projector_dim": 8,
    }  # fmt: skip
    network = {"params": params}
    if kind == "text":
        network["target"] = "tim.models.t2i.tim_model.TiM"
        params["cap_feat_dim"] = WIDTH
    model = {"network": network, "proj_coeff": 0.5 * repa, "ema_warmup": False}
    if mg:
        model["transport"] = {"params": {"enhance_target": True, "w_gt": 1.0, "w_cond": 0.75}}
    data = {"data_type": "latent", "dataloader": {"batch_size": 4}}
    return OmegaConf.merge(cfg, {"model": model, "data": data})
