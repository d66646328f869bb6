"""The released weight files, loaded strictly.

A folder written by `save_pretrained` is loaded by `TiMTransformer2DModel.from_pretrained`.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tim import config
from tim.models import TiMTransformer2DModel


def load(
    path: str | Path,
    preset_or_config: str | Path | Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TiMTransformer2DModel:
    """A network with the weights of a `.safetensors` or `.bin` file, in eval mode.

    Args:
        path: safetensors, or a torch pickle of a plain state dict (read with `weights_only=True`).
            What torch.compile, DDP and FSDP put before names is taken off. The file is free
            afterwards: nothing is mapped from it.
        preset_or_config: a preset's name, a YAML file, a configuration, the network's constructor
            arguments alone, or the folder of a saved network or pipeline. The projector serves only
            the feature-alignment loss: a file without any `projector.*` gives a network without.
        device: where the network goes; the CPU by default.
        dtype: of the parameters; the file's own by default.

    Raises:
        ValueError: the file is truncated or foreign; tensors are missing, unexpected or mis-shaped
            (all are listed); or the configuration is refused by `tim.config`.
    """
    path = Path(path)
    state = read_weights(path)
    cfg = _as_config(preset_or_config)
    if not any(name.startswith("projector.") for name in state):
        OmegaConf.update(cfg, "model.network.params.z_dim", None)
    with torch.device("meta"):
        network = config.build_network(cfg)
    _check_fit(state, network.state_dict(), path)
    device = torch.device("cpu" if device is None else device)
    for name in list(state):
        tensor = state.pop(name)
        state[name] = tensor.to(device, dtype or tensor.dtype, copy=True)
    network.load_state_dict(state, assign=True)
    return network.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a `.safetensors` or `.bin` file, by their names in the network.

    Raises:
        ValueError: the file is missing, truncated or holds anything else.
    """
    if path.suffix not in _READERS or path.is_dir():
        raise ValueError(f"a {' or '.join(_READERS)} file is needed, got {path}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        state = _READERS[path.suffix](path)
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(
            f"{path} is truncated or not a {path.suffix} file of tensors alone"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    foreign = [
        f"{name}: {type(value).__name__}"
        for name, value in state.items()
        if not (isinstance(value, Tensor) and value.is_floating_point())
    ]
    if foreign:
        raise ValueError(
            f"{path} must hold floating-point tensors by name, got also {', '.join(foreign)}"
        )
    plain = {_without_wrappers(name): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise ValueError(
            f"{path} holds tensors with and without {', '.join(_WRAPPERS)} before their names"
        )
    return plain


_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _without_wrappers(name: str) -> str:
    """The name of a weight in the network itself, which has no modules of these names."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _read_bin(path: Path) -> Any:
    # Only torch's zip format can be memory-mapped; older files are read whole.
    is_zip = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


_READERS = {".safetensors": safetensors.torch.load_file, ".bin": _read_bin}


def local(
    path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: bool | str | None = None,
) -> Path:
    """The file itself, of a path or of its address on the hub, from which it is fetched.

    Raises:
        OSError: it is not to be had.
    """
    address = _ADDRESS.fullmatch(str(path))
    if address is None:
        return Path(path)
    repository, revision, name = address.groups()
    file = hf_hub_download(
        repository, name, revision=revision, cache_dir=cache_dir, force_download=force_download,
        local_files_only=local_files_only, token=token,
    )  # fmt: skip
    return Path(file)


HUB = "cache_dir", "force_download", "local_files_only", "token"
_ADDRESS = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+)")


def from_single_file(
    path: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    **hub: Any,
) -> TiMTransformer2DModel:
    """What `TiMTransformer2DModel.from_single_file` gives."""
    if config is None:
        raise ValueError(f"{path} holds weights alone: {CONFIG}")
    return load(local(path, **hub), config, device=device, dtype=dtype)


CONFIG = (
    "config is needed, a preset's name "
    f"({', '.join(config.presets())}), a YAML file or the folder of a saved network or pipeline"
)
TiMTransformer2DModel._from_single_file = staticmethod(from_single_file)


def _as_config(preset_or_config: str | Path | Mapping[str, Any]) -> DictConfig:
    if isinstance(preset_or_config, (str, Path)):
        if not Path(preset_or_config).is_dir():
            return config.load(preset_or_config)
        preset_or_config = _saved(Path(preset_or_config))
    cfg = OmegaConf.create(_plain(preset_or_config))
    if "model" in cfg:
        return cfg
    network = {"target": "tim.models.TiMTransformer2DModel", "params": cfg}
    return OmegaConf.create({"model": {"network": network}})


def _saved(folder: Path) -> dict[str, Any]:
    """The constructor arguments of a network that diffusers saved in `folder`."""
    for place in (folder, folder / "transformer"):
        if (place / TiMTransformer2DModel.config_name).is_file():
            saved = TiMTransformer2DModel.load_config(place)
            return {name: value for name, value in saved.items() if not name.startswith("_")}
    raise ValueError(f"{folder} holds no {TiMTransformer2DModel.config_name} of a network")


def _plain(value: Any) -> Any:
    """Of plain containers and scalars; numpy's and torch's scalars are no YAML."""
    if isinstance(value, DictConfig):
        return OmegaConf.to_container(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _check_fit(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: Path) -> None:
    problems = {
        "missing": [name for name in needed if name not in found],
        "unexpected": [name for name in found if name not in needed],
        "mis-shaped": [
            f"{name} {tuple(found[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in needed.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        lines = (f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{path} does not fit the configuration\n" + "\n".join(lines))
