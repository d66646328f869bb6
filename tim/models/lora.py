"""LoRA (arXiv 2106.09685) of the network: diffusers' adapters, and what a file of them must fit."""

import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.loaders import CogVideoXLoraLoaderMixin, PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError
from torch import Tensor, nn

from tim.checks import some

FILE = LORA_WEIGHT_NAME_SAFE
# What adapts by default: attention and the MLPs of all blocks, no conditioning.
TARGETS = (
    "attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj",
    "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2",
)  # fmt: skip
_PREFIX = "transformer"
_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
Loader = CogVideoXLoraLoaderMixin  # diffusers' loader into whichever `transformer`


class LoRAMixin(PeftAdapterMixin):
    """diffusers' `add_adapter`, `set_adapters`, `fuse_lora`, `unload_lora` and so on, with files
    checked before anything changes."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        prefix: str | None = _PREFIX,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """As diffusers does, of a file, a folder, a name on the hub, or weights by their names.

        Raises:
            ValueError: the file is no whole safetensors file, a weight fits no layer, or two do
                not fit each other; the names are said.
            OSError: there is no such file.
            ImportError: peft is not installed.
        """
        needs_peft("a LoRA")
        weights, source = pretrained_model_name_or_path_or_dict, "the LoRA"
        if not isinstance(weights, dict):
            source = str(weights)
            weights, metadata = read(weights, options)
            options.setdefault("metadata", metadata)
        check(self, weights, source, prefix, options.get("metadata"))
        super().load_lora_adapter(weights, prefix=prefix, hotswap=hotswap, **options)

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # diffusers reads its signature
    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """As diffusers does, of a network without adapters.

        Raises:
            ValueError: there are adapters: the folder could not be loaded.
        """
        if adapters := [*getattr(self, "peft_config", {})]:
            raise ValueError(
                f"the network has adapters, {some(adapters)}: save_lora_adapter saves one of them; "
                "fuse_lora and unload_lora make them part of the weights"
            )
        super().save_pretrained(*args, **options)


def needs_peft(what: str) -> None:
    """Raises:
    ImportError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f'{what} needs peft: pip install "tim-kernels[lora]"')


def read(source: str | Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict | None]:
    """The weights of a file, a folder or a name on the hub, and the adapter's metadata.

    `options` are those of diffusers' loaders; what is used of them is taken out.

    Raises:
        ValueError: it is no whole safetensors file.
        OSError: there is none.
    """
    names = (
        "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision",
        "subfolder", "weight_name", "use_safetensors",
    )  # fmt: skip
    given = {name: options.pop(name) for name in names if name in options}
    try:
        return Loader.lora_state_dict(
            str(source), return_lora_metadata=True, **{"use_safetensors": True} | given
        )
    except SafetensorError as error:
        raise ValueError(f"{source} holds no whole {FILE}: {_line(error)}") from error
    except Exception as error:  # without a net the hub's client raises what its own does
        raise OSError(f"no LoRA in {source}: {_line(error)}") from error


def check(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    prefix: str | None = _PREFIX,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Refuse weights that do not fit the network, or each other, or their metadata.

    Raises:
        ValueError: in one line, with their names.
    """
    start = f"{prefix}." if prefix else ""
    own = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
    if not own:
        raise ValueError(
            f"{source} holds no LoRA of a transformer: names must be like "
            f"{start}blocks.0.attn.qkv.lora_A.weight, got {some([*weights]) or 'none'}"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    modules, foreign, wrong = dict(network.named_modules()), [], []
    for name, weight in own.items():
        match = _NAME.fullmatch(name)
        if match is None or getattr(modules.get(match[1]), "weight", None) is None:
            foreign.append(name)
        else:
            layers.setdefault(match[1], {})[match[2]] = weight
    if foreign:
        raise ValueError(f"{source} holds what fits no layer of this network: {some(foreign)}")
    rank = None if metadata is None or metadata.get(f"{start}rank_pattern") else (
        metadata.get(f"{start}r")
    )  # fmt: skip
    for layer, pair in layers.items():
        if (problem := _misfit(pair, modules[layer].weight, rank)) is not None:
            wrong.append(f"{layer}: {problem}")
    if wrong:
        raise ValueError(f"{source} does not fit this network: {some(wrong)}")


def _misfit(pair: dict[str, Tensor], weight: Tensor, rank: int | None) -> str | None:
    if pair.keys() != {"A", "B"}:
        return f"lora_{'A' if 'A' in pair else 'B'} without the other"
    A, B = pair["A"], pair["B"]
    if A.shape[1:2] != weight.shape[1:2] or B.shape[:1] != weight.shape[:1]:
        found = f"{tuple(A.shape)} and {tuple(B.shape)}"
        return f"A and B are {found} for a weight {tuple(weight.shape)}"
    if A.shape[0] != B.shape[1]:
        return f"rank {A.shape[0]} of A, {B.shape[1]} of B"
    return f"rank {len(A)}, but {rank} by the metadata" if rank not in (None, len(A)) else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
