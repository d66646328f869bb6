"""Networks of others that judge: loaded whole, their licences said, named beside the numbers."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tim.data.prompts import PAGE
from tim.processes import Processes
from tim.provenance import weights_hash

_log = logging.getLogger(__name__)
# As their pages on the hub say.
LICENCES = {
    "facebook/mask2former-swin-small-coco-instance": "CC BY-NC 4.0, for non-commercial use",
    "openai/clip-vit-large-patch14": "MIT",
    "Salesforce/blip-vqa-capfilt-large": "BSD-3-Clause",
    "Salesforce/blip-vqa-base": "BSD-3-Clause",
    "Qwen/Qwen2.5-VL-3B-Instruct": "the Qwen Research licence, for non-commercial use",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Apache-2.0",
}
_said: set[str] = set()


def load(
    cls: Any, name: str | Path, device: torch.device | str | None = None, **options: Any
) -> nn.Module:
    """A network of transformers from a folder or the hub, in eval mode; says the licence once.

    Raises:
        FileNotFoundError: it is neither a folder with weights nor to be had from the hub.
        ValueError: weights are missing or of other shapes.
    """
    _say_licence(str(name))
    what = f"{name} cannot be loaded as {cls.__name__}"
    try:
        model, info = cls.from_pretrained(name, output_loading_info=True, **options)
    except OSError as error:
        raise _not_found(name) from error
    except RuntimeError as error:
        raise ValueError(f"{what}: {error}") from error
    parameters = {key for key, _ in model.named_parameters()}
    missing = sorted(parameters & {*info["missing_keys"]})
    wrong = [*missing, *map(str, info["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{what}: {len(wrong)} weights are missing, such as {wrong[0]}")
    return model.to(device).eval()


def pretrained(cls: Any, name: str | Path) -> Any:
    """A tokenizer, processor or configuration of transformers from a folder or the hub.

    Raises:
        FileNotFoundError: it is in neither.
    """
    try:
        return cls.from_pretrained(name)
    except (OSError, ValueError) as error:  # the latter where a folder holds something else
        raise _not_found(name) from error


def _not_found(name: str | Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name} is neither a folder of a network nor to be had from the hub: see {PAGE}"
    )


def described(role: str, name: str | Path, model: nn.Module) -> dict[str, str]:
    """What tells a network apart in a result."""
    return {role: str(name), f"{role}_weights": weights_hash(model)}


def settings_of(role: str, function: Any, name: str | None) -> Mapping[str, Any]:
    """What a judge says of itself in `settings`, or the name that was given for it.

    Raises:
        ValueError: neither is there.
    """
    if name is not None:
        return {role: name}
    settings = getattr(function, "settings", None)
    if settings is None:
        raise ValueError(
            f"a {role} of your own needs {role}_name=…: it stands beside the number, and work that "
            "was done under another name is done again"
        )
    return settings


def _say_licence(name: str) -> None:
    if name in _said or not Processes.here().is_first:
        return
    _said.add(name)
    licence = LICENCES.get(name, f"a licence of their own: {PAGE} names the published ones")
    _log.warning("%s: weights under %s", name, licence)
