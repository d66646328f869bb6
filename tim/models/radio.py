"""The vision encoder RADIO-v2.5 (arXiv 2412.07679), as far as its spatial features need it.

A plain pre-norm ViT under the names of the published weight files, which are under NVIDIA's own
non-commercial licence.
"""

import argparse
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HEADS = {"vit_base_patch16_224": 12, "vit_large_patch16_224": 16}
_log = logging.getLogger(__name__)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchGenerator(nn.Module):
    """Normalised pictures (B, 3, H, W) → (B, prefix + h·w, C): prefix tokens, then patches."""

    def __init__(self, dim: int, patch_size: int, grid: int, prefix: int):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.embedder = nn.Linear(3 * patch_size**2, dim, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2, dim))
        self.cls_token = nn.Module()
        self.cls_token.token = nn.Parameter(torch.zeros(prefix, dim))

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        x = x.reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        x = self.embedder(x.flatten(3).flatten(1, 2)) + self.positions(h, w)
        return torch.cat([self.cls_token.token.expand(len(x), -1, -1), x], dim=1)

    def positions(self, h: int, w: int) -> Tensor:
        """(h·w, C): the corner of the table after it is resized to the larger side, squared."""
        table = self.pos_embed.unflatten(1, (self.grid, self.grid)).movedim(3, 1)
        size = [max(h, w)] * 2
        table = F.interpolate(table, size, mode="bilinear", align_corners=True)
        return table[0, :, :h, :w].flatten(1).T


class Radio(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] → spatial features (B, h·w, C), row-major.

    h, w are H, W over `patch_size` (16). Of RADIO-v2.5-B C is 768, of 12 blocks of 12 heads, with
    positions for 128×128 patches and 8 prefix tokens, which are read but not returned.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_hidden: int = 3072,
        patch_size: int = 16,
        grid: int = 128,
        prefix: int = 8,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.input_conditioner = nn.Module()
        for name in ("norm_mean", "norm_std"):
            self.input_conditioner.register_buffer(name, torch.ones(3, 1, 1))
        self.base_model = nn.Module()
        self.base_model.patch_generator = PatchGenerator(dim, patch_size, grid, prefix)
        self.base_model.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_hidden) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3 or any(side % self.patch_size for side in x.shape[2:]):
            raise ValueError(
                f"pictures must be (B, 3, H, W), sides multiples of {self.patch_size}; "
                f"got {tuple(x.shape)}"
            )
        x = (x - self.input_conditioner.norm_mean) / self.input_conditioner.norm_std
        x = self.base_model.patch_generator(x)
        for block in self.base_model.blocks:
            x = block(x)
        return x[:, len(self.base_model.patch_generator.cls_token.token) :]


def load(path: str | Path, *, device: torch.device | str | None = None) -> Radio:
    """The encoder of a published file, such as nvidia/RADIO's `radio-v2.5-b_half.pth.tar`.

    In float32, eval mode, without gradients. The file is read with `weights_only=True`; its heads
    and adaptors are left out, of two sets of weights the averaged one is taken.

    Raises:
        ValueError: there is no such file, it is damaged, or it is of another architecture.

    Example::

        encoder = radio.load("radio-v2.5-b_half.pth.tar")
        features = encoder(pictures)  # (B, 3, 256, 256) in [0, 1] → (B, 256, 768)
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}: radio-v2.5-b_half.pth.tar of the hub's nvidia/RADIO")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, map_location="cpu", weights_only=True)
        state = file.get("state_dict_ema") or file["state_dict"]
        args = vars(file["args"])
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(
            f"{path} is damaged or holds other than weights (state_dict) and settings (args): "
            f"{type(error).__name__}"
        ) from error
    kept = {name: value for name, value in state.items() if name.startswith(_READ)}
    if others := state.keys() - kept.keys():
        _log.debug("not read from %s: %s", path, ", ".join(sorted(others)))
    with torch.device("meta"):
        encoder = Radio(**_shape(path, kept, args))
    wanted = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in kept.items()}
    if differing := sorted({name for name, _ in wanted.items() ^ found.items()}):
        raise ValueError(
            f"{path} does not fit RADIO-v2.5: missing, unexpected or mis-shaped are "
            f"{', '.join(differing)}"
        )
    encoder.load_state_dict({name: value.float() for name, value in kept.items()}, assign=True)
    return encoder.to(device).eval().requires_grad_(False)


# What the forward reads; the rest are heads and adaptors.
_READ = ("base_model.patch_generator.", "base_model.blocks.", "input_conditioner.")


def _shape(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, int]:
    """The constructor's arguments; weights tell all but the heads."""
    model, given = args.get("model"), args.get("model_kwargs") or {}
    num_heads = given.get("num_heads") or _HEADS.get(model)
    if num_heads is None or args.get("model_norm"):
        raise ValueError(
            f"{path} must be of {' or '.join(_HEADS)} without a last norm, got {model}, "
            f"model_norm {args.get('model_norm')}"
        )
    try:
        embedder, pos_embed, prefix = (
            state[f"base_model.patch_generator.{name}"].shape
            for name in ("embedder.weight", "pos_embed", "cls_token.token")
        )
        mlp_hidden = len(state["base_model.blocks.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ValueError(f"{path} does not fit RADIO-v2.5: missing is {error}") from error
    return dict(
        dim=embedder[0],
        depth=len({name.split(".")[2] for name in state if ".blocks." in name}),
        num_heads=num_heads,
        mlp_hidden=mlp_hidden,
        patch_size=math.isqrt(embedder[1] // 3),
        grid=math.isqrt(pos_embed[1]),
        prefix=prefix[0],
    )
