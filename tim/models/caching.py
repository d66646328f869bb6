"""diffusers' caches of what blocks computed at earlier steps of a run."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

TAKEN = "FirstBlockCacheConfig", "MagCacheConfig", "TaylorSeerCacheConfig"
WHY_NOT = {
    "TextKVCacheConfig": "the sampler reads a text's keys and values once a run without it",
    "PyramidAttentionBroadcastConfig": "it looks for diffusers' own attention layers",
    "FasterCacheConfig": "it looks for diffusers' own attention layers",
    "SeaCacheConfig": "it looks for the layers of diffusers' own networks",
}


class Cached(CacheMixin):
    """A network whose `enable_cache` takes what fits its blocks. States are kept for each shape of
    input, since steps with guidance are twice as large; a sampler begins each run without any."""

    def enable_cache(self, config: Any) -> None:
        """Keep what blocks computed, by diffusers' `FirstBlockCacheConfig`, `TaylorSeerCacheConfig`
        or `MagCacheConfig`, which counts steps with and without guidance each for themselves.

        Raises:
            ValueError: another cache, or a network of too few blocks.
        """
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        name = type(config).__name__
        if name not in TAKEN:
            why = WHY_NOT.get(name, f"it takes {', '.join(TAKEN)}")
            raise ValueError(f"this network has no {name}: {why}")
        if getattr(config, "use_lite_mode", False):
            raise ValueError("this network has no TaylorSeer of use_lite_mode: it has no proj_out")
        if len(self.blocks) < 2:
            raise ValueError(f"{name} needs two blocks or more, got {len(self.blocks)}")
        for kind in set(map(type, self.blocks)):
            TransformerBlockRegistry.register(kind, TransformerBlockMetadata())
        super().enable_cache(config)

    def disable_cache(self) -> None:
        """Compute every step whole again."""
        super().disable_cache()
        for module in self.modules():  # to which diffusers left its own forward as another's
            if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                del module.forward

    def caching(self, x: Tensor) -> AbstractContextManager[None]:
        """What a call with input x is done in."""
        if not self.is_cache_enabled:
            return contextlib.nullcontext()
        return self.cache_context(str(tuple(x.shape)))
