from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from tim_kernels import CONDITIONS, Packing
from tim_kernels.attention.choice import obstacle, set_attention
from tim_kernels.network.forward import predict
from tim_kernels.network.packing import check_packed
from tim_kernels.qk_norm_rope.reference import ORDERS

from ..checks import check_times, whole_sizes
from ..files import saved_whole
from .caching import Cached
from .embeddings import CaptionEmbedder, LabelEmbedder, PatchEmbed, TimestepEmbedder
from .layers import BlockShape, ClassBlock, FinalLayer, TextBlock, projector, zero_
from .lora import LoRAMixin

Condition = Literal["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"]
RopeOrder = Literal["upstream", "grid"]


@dataclass
class TiMTransformer2DModelOutput(BaseOutput):
    """sample is (B, in_channels, H, W); features is (B, N, z_dim) or None."""

    sample: Tensor
    features: Tensor | None = None


@saved_whole
class TiMTransformer2DModel(LoRAMixin, Cached, ModelMixin, ConfigMixin):
    """The TiM network F(x_t, t, r, y) (arXiv 2509.04394, section 3 and appendix).

    Arguments bear the published names. With `cap_feat_dim` it is conditioned on text features
    (B, L, cap_feat_dim), else on class labels (B,); with `class_dropout_prob` > 0 the label
    `num_classes` means "no class" (dropping labels is the training loop's work).
    `lora_hidden_size` is the hidden width of every block's adaLN MLP, (hidden_size//4)·3 by
    default. `z_dim` or `projector_dim` None builds no projector. `rope_order` is "upstream" as
    the released weights need it, or "grid" for each token's true (column, row).
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["ClassBlock", "TextBlock"]
    # In and out stay in the dtype of computing, which the first weight tells a sampler.
    _skip_layerwise_casting_patterns = ["embedder", "norm", "final_layer"]
    runs_on_tim_kernels = True
    _from_single_file: Callable[..., "TiMTransformer2DModel"] | None = None  # of tim.checkpoints

    @whole_sizes
    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        encoder_depth: int = 8,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        cap_feat_dim: int | None = None,
        z_dim: int | None = 768,
        projector_dim: int | None = 2048,
        new_condition: Condition = "t-r",
        use_new_embed: bool = True,
        qk_norm: bool = True,
        distance_aware: bool = True,
        lora_hidden_size: int | None = None,
        rope_order: RopeOrder = "upstream",
    ):
        super().__init__()
        _check_config(self.config)
        mlp_hidden = int(hidden_size * mlp_ratio) * 2 // 3
        lora_hidden = lora_hidden_size or hidden_size // 4 * 3

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.delta_embedder = TimestepEmbedder(hidden_size) if use_new_embed else None
        if cap_feat_dim is None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob > 0)
        else:
            self.y_embedder = CaptionEmbedder(cap_feat_dim, hidden_size)
        block = ClassBlock if cap_feat_dim is None else TextBlock
        shape = BlockShape(hidden_size, num_heads, mlp_hidden, lora_hidden, qk_norm, distance_aware)
        self.blocks = nn.ModuleList(block(shape) for _ in range(depth))
        has_projector = z_dim is not None and projector_dim is not None
        self.projector = projector(hidden_size, projector_dim, z_dim) if has_projector else None
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier-uniform linears, N(0, 0.02) embedders, zero modulation and output."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    module.bias.zero_()
        embedders = [self.t_embedder, self.y_embedder]
        for module in (m for embedder in embedders for m in embedder.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            zero_(layer.adaLN_modulation.fc2)
        zero_(self.final_layer.linear)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        return_features: bool = False,
        return_dict: bool = False,
        packing: Packing | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | TiMTransformer2DModelOutput:
        """F(x, t, r, y).

        x is (B, in_channels, H, W) with H and W multiples of patch_size; t and r ≤ t are (B,)
        network times, best kept in float32; y is (B,) labels or (B, L, cap_feat_dim) features.
        Returns the sample, shaped as x, and with `return_features` also the projected output of
        block `encoder_depth`, (B, N, z_dim). Raises ValueError for inputs that do not fit.

        With a `packing` of B pictures, of any sizes, x is what `pack` made of them, tokens
        (T, in_channels, patch_size, patch_size), and features are (T, z_dim); each picture has its
        own t, r and y, and the result of being alone.

        Example:
            >>> tokens, packing = pack(latents, model.config.patch_size)
            >>> latents = unpack(model(tokens, t, r, y, packing=packing), packing)
        """
        self._check_inputs(x, t, r, y, return_features, packing)
        with self.caching(x):
            sample, features = predict(
                self,
                x,
                t,
                r,
                y,
                new_condition=self.config.new_condition,
                rope_order=self.config.rope_order,
                features_depth=self.config.encoder_depth if return_features else None,
                packing=packing,
            )
        if return_dict:
            return TiMTransformer2DModelOutput(sample, features)
        return (sample, features) if return_features else sample

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **hub: Any,
    ) -> "TiMTransformer2DModel":
        """Of a released weight file, or its address on the hub, as `tim.checkpoints.load`.

        `config` is a preset's name, a YAML file, constructor arguments, or the folder of a saved
        network or pipeline; the dtype is the file's unless given. `hub` are options of
        `huggingface_hub.hf_hub_download`, such as `local_files_only`.

        Raises:
            ValueError: see `tim.checkpoints.load`, which names every weight that does not fit.
            ImportError: `tim.checkpoints` (which `tim.pipelines` imports) was not imported.
        """
        if cls._from_single_file is None:
            raise ImportError("from_single_file is there after `import tim.checkpoints`")
        dtype = torch_dtype if dtype is None else dtype
        given = dict(config=config, dtype=dtype, device=device)
        return cls._from_single_file(pretrained_model_link_or_path, **given, **hub)

    def set_attention_backend(self, backend: str) -> None:
        """Choose by diffusers' names, for the whole process: "native", "_native_cudnn" or
        "_native_flash" of PyTorch, "flash" or "_flash_3" of flash-attn; see
        `tim_kernels.set_attention`.

        Raises:
            ValueError: it names another, or one that cannot run here.
        """
        names = {theirs: ours for ours, theirs in _DIFFUSERS.items()}
        ours = names.get(backend)
        reason = f"TiM has {', '.join(names)}" if ours is None else obstacle(ours)
        if reason:
            raise ValueError(f"attention backend {backend!r} cannot be set: {reason}")
        set_attention(ours)

    def _check_inputs(self, x, t, r, y, features: bool, packing: Packing | None = None) -> None:
        channels, patch = self.config.in_channels, self.config.patch_size
        if packing is not None:
            check_packed(x, packing, channels, patch)
        elif x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
            raise ValueError(
                f"x must be latents of shape (B, {channels}, H, W), got {tuple(x.shape)} {x.dtype}"
            )
        elif x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(
                f"height and width must be multiples of the patch size {patch}, "
                f"got {x.shape[2]}×{x.shape[3]}"
            )
        pictures = x.shape[0] if packing is None else len(packing)
        check_times(t, r, pictures)
        self.y_embedder.check(y, pictures)
        if y.device != x.device:
            raise ValueError(f"y must be on {x.device} like x, got {y.device}")
        if features and self.projector is None:
            raise ValueError("features need a projector: build the model with z_dim, projector_dim")


_DIFFUSERS = {
    "native": "native", "cudnn": "_native_cudnn", "flash": "_native_flash",
    "flash_attn": "flash", "flash_attn_interface": "_flash_3",
}  # fmt: skip


def _check_config(config) -> None:
    heads, width = config.num_heads, config.hidden_size
    if width % heads or width // heads % 4:
        raise ValueError(
            f"hidden_size must be num_heads times a multiple of 4, got {width} with {heads} heads"
        )
    if config.new_condition not in CONDITIONS:
        raise ValueError(f"new_condition must be one of {CONDITIONS}, got {config.new_condition!r}")
    if config.rope_order not in ORDERS:
        raise ValueError(f"rope_order must be one of {ORDERS}, got {config.rope_order!r}")
    if not config.mlp_ratio > 0:
        raise ValueError(f"mlp_ratio must be positive, got {config.mlp_ratio}")
    if not 0 <= config.class_dropout_prob <= 1:
        raise ValueError(f"class_dropout_prob must be in [0, 1], got {config.class_dropout_prob}")
    if not 1 <= config.encoder_depth <= config.depth:
        raise ValueError(
            f"encoder_depth must lie in 1 … depth, got {config.encoder_depth} of {config.depth}"
        )
