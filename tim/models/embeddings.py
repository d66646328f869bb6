"""The modules that turn latents, times and conditions into tokens and vectors."""

from torch import Tensor, nn

from tim_kernels.network.layers import embed_label, embed_patches, embed_text, embed_time

from ..checks import readable
from .layers import SwiGLU


class PatchEmbed(nn.Module):
    """(B, in_channels, H, W) → (B, H/p·W/p, C), tokens row-major."""

    runs_on_tim_kernels = True

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return embed_patches(self, x)


class TimestepEmbedder(nn.Module):
    """(B,) → (B, C): sinusoid(256), then a two-layer MLP."""

    runs_on_tim_kernels = True

    def __init__(self, hidden_size: int, frequency_dim: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return embed_time(self, t)


class LabelEmbedder(nn.Module):
    """Class labels (B,) → (B, C). With `null_label` one more row stands for "no class"."""

    runs_on_tim_kernels = True

    def __init__(self, num_classes: int, hidden_size: int, null_label: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null_label), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return embed_label(self, y)

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


class CaptionEmbedder(nn.Module):
    """Text features (B, L, cap_feat_dim) → (B, L, C)."""

    runs_on_tim_kernels = True

    def __init__(self, cap_feat_dim: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(cap_feat_dim, eps=1e-5)
        self.mlp = SwiGLU(cap_feat_dim, 4 * hidden_size, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return embed_text(self, y)

    def check(self, y: Tensor, batch: int) -> None:
        width = self.norm.normalized_shape[0]
        if y.ndim != 3 or y.shape[0] != batch or y.shape[2] != width or not y.is_floating_point():
            raise ValueError(
                f"y must hold text features of shape ({batch}, tokens, {width}); "
                f"got {tuple(y.shape)} {y.dtype}"
            )
