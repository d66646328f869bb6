import torch
from torch import Tensor, nn

from tim_kernels import CONDITIONS, sinusoid

from ..checks import readable
from .layers import SwiGLU


class PatchEmbed(nn.Module):
    """(B, in_channels, H, W) → (B, H/p·W/p, C), tokens row-major."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """(B,) → (B, C): sinusoid(256), then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(
            nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.frequency_dim).to(self.mlp[0].weight.dtype))


def time_pair_embedding(
    t: Tensor, r: Tensor, t_embedder: nn.Module, delta_embedder: nn.Module, condition: str
) -> tuple[Tensor, Tensor]:
    """T(t) and the delta embedding of the pair (t, r), each (B, C).

    `condition` lists what the delta embedding sums: its last term goes through the delta
    embedder D, the others through T. "t,t-r" is T(t) + D(t−r).
    """
    if condition not in CONDITIONS:
        raise ValueError(f"new_condition must be one of {CONDITIONS}, got {condition!r}")
    times = {"t": t, "r": r, "t-r": t - r}
    t_embedding = t_embedder(t)
    *summands, last = condition.split(",")
    delta = delta_embedder(times[last])
    for name in summands:
        delta = delta + (t_embedding if name == "t" else t_embedder(times[name]))
    return t_embedding, delta


class LabelEmbedder(nn.Module):
    """Class labels (B,) → (B, C). With `null_label` one more row stands for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int, null_label: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null_label), hidden_size)

    def check(self, y: Tensor, batch: int) -> None:
        rows = self.embedding_table.num_embeddings
        if y.shape != (batch,) or y.is_floating_point():
            raise ValueError(
                f"y must hold one integer class label a sample, shape ({batch},); "
                f"got {tuple(y.shape)} {y.dtype}"
            )
        if readable(y) and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < rows:
            raise ValueError(
                f"class labels must lie in 0 … {rows - 1}, got {int(y.min())} … {int(y.max())}"
            )

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class CaptionEmbedder(nn.Module):
    """Text features (B, L, cap_feat_dim) → (B, L, C)."""

    def __init__(self, cap_feat_dim: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(cap_feat_dim, eps=1e-5)
        self.mlp = SwiGLU(cap_feat_dim, 4 * hidden_size, hidden_size)

    def check(self, y: Tensor, batch: int) -> None:
        width = self.norm.normalized_shape[0]
        if y.ndim != 3 or y.shape[0] != batch or y.shape[2] != width or not y.is_floating_point():
            raise ValueError(
                f"y must hold text features of shape ({batch}, tokens, {width}); "
                f"got {tuple(y.shape)} {y.dtype}"
            )

    def forward(self, y: Tensor) -> Tensor:
        return self.mlp(self.norm(y.to(self.norm.weight.dtype)))


def unpatchify(x: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """(B, h·w, p·p·c) → (B, c, h·p, w·p); a token is laid out (p_row, p_col, channel)."""
    x = x.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, (height, width))
    return torch.einsum("bhwpqc->bchpwq", x).flatten(4, 5).flatten(2, 3)
