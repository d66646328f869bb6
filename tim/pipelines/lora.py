"""LoRA files in pipelines."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tim.models.lora import Loader


class LoRALoader(Loader):
    """diffusers' `load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights`,
    `save_lora_weights` and so on, of the pipeline's `transformer`."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Add an adapter of a folder that `tim train` wrote, a file, a name on the hub, or weights.

        `set_adapters(adapter_name, 0.7)` scales it, and chooses among several;
        `unload_lora_weights()` leaves the network as it was.

        Raises:
            ValueError: the file is damaged or does not fit the network; it has not changed then.
            OSError: there is no such file.
            ImportError: peft is not installed.
        """
        self.transformer.load_lora_adapter(
            pretrained_model_name_or_path_or_dict, hotswap=hotswap, adapter_name=adapter_name,
            _pipeline=self, **options,
        )  # fmt: skip
