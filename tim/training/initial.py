"""Weights that a run begins with: a file of somebody's, or a published run's folder."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from tim.checkpoints import read_weights
from tim.models import TiMTransformer2DModel

_log = logging.getLogger(__name__)
_AVERAGE, _NETWORK = "model.safetensors", "model_1.safetensors"
_STEP = re.compile(r"(?:save-)?checkpoint-(\d+)")


def weights_file(path: str | Path) -> Path:
    """The file itself, or that in a folder of `save_pretrained`, of a network or a pipeline."""
    path, name = Path(path), SAFETENSORS_WEIGHTS_NAME
    if not path.is_dir():
        return path
    within = path / "transformer" / name
    return within if within.is_file() else path / name


def start_from(network: TiMTransformer2DModel, path: str | Path) -> None:
    """Load what fits of a file (or of a folder of `save_pretrained`) into a fresh network.

    As published, a class network keeps its own `delta_embedder`, so that it may start from a plain
    diffusion model. A warning names what stays fresh and what is not used.

    Raises:
        ValueError: nothing in the file is of this network, or a weight has another shape.
    """
    file = weights_file(path)
    weights, own = read_weights(file), network.state_dict()
    is_kept = network.config.cap_feat_dim is None
    used = {
        name: weight
        for name, weight in weights.items()
        if name in own and not (is_kept and "delta_embedder" in name)
    }
    _check_shapes(file, used, own)
    if not used:
        raise ValueError(f"{file} holds no weight of this network")
    network.load_state_dict(used, strict=False)
    for said, names in (
        ("keeps fresh", [name for name in own if name not in used]),
        ("does not use", [name for name in weights if name not in used]),
    ):
        if names:
            _log.warning("starting from %s, the network %s %s", file, said, _some(names))


class Published(NamedTuple):
    """A checkpoint folder of the published trainer, without its optimizer."""

    network: dict[str, Tensor]
    average: dict[str, Tensor]
    step: int


def is_published(folder: Path) -> bool:
    """Whether it is one that accelerate wrote for the published trainer."""
    return (folder / _AVERAGE).is_file() and (folder / _NETWORK).is_file()


def read_published(folder: Path, network: TiMTransformer2DModel) -> Published:
    """`model.safetensors` is the average there, `model_1.safetensors` the network.

    Raises:
        ValueError: the folder's name has no step, or the files are not of this network.
    """
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"a published checkpoint must be named checkpoint-STEP, got {folder.name}")
    own, parts = network.state_dict(), []
    for file in (folder / _NETWORK, folder / _AVERAGE):
        weights = read_weights(file)
        odd = [name for name in {**own, **weights} if (name in own) != (name in weights)]
        if odd:
            raise ValueError(f"{file} is of another network: {_some(odd)} differ")
        _check_shapes(file, weights, own)
        parts.append(weights)
    return Published(*parts, int(match[1]))


def _check_shapes(file: Path, weights: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    wrong = [
        f"{name} {tuple(weight.shape)}, not {tuple(own[name].shape)}"
        for name, weight in weights.items()
        if weight.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{file} is of another network: {_some(wrong)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
