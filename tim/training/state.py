"""What a checkpoint holds, read and written whole by one process or in shards by all.

Whole: `network/` and `ema/` as `save_pretrained` writes them (with `training.lora` as diffusers
writes adapters, beside config.json), and `state.pt`. Sharded:
`network/config.json`, `state.pt` without the optimizer, and `sharded/` by
torch.distributed.checkpoint. Either can be read by any number of processes, sharing weights or not.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp_states
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tim.models import TiMTransformer2DModel
from tim.models.lora import FILE as LORA
from tim.training.average import Average
from tim.training.parallel import FROM_FIRST, Parallel
from tim.training.snapshots import Damaged
from tim.training.weights import Whole

SHARDS = "sharded"
_FLAT = dcp_states.StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class State:
    """A run's state. `step` counts optimizer steps, `micro_steps` forward passes, `images` those
    of all processes that the network has seen."""

    network: TiMTransformer2DModel
    average: Average | None
    optimizer: Optimizer
    scheduler: LambdaLR
    weights: Whole = field(default_factory=Whole)
    step: int = 0
    images: int = 0
    micro_steps: int = 0

    @property
    def counts(self) -> dict[str, Any]:
        names = "step", "images", "micro_steps"
        return {
            **{name: getattr(self, name) for name in names},
            "average_step": self.average.step if self.average else 0,
            "scheduler": self.scheduler.state_dict(),
            **({} if self.weights.base is None else {"base": self.weights.base}),
        }

    @property
    def networks(self) -> dict[str, TiMTransformer2DModel]:
        """By their names in a checkpoint."""
        average = {"ema": self.average.network} if self.average else {}
        return {"network": self.network, **average}

    def take_counts(self, counts: dict[str, Any]) -> None:
        """Go on from there, with the learning rate and the settings of now."""
        rates = self.scheduler.base_lrs
        self.scheduler.load_state_dict(counts["scheduler"] | {"base_lrs": rates})
        self.go_to(counts["step"], counts["images"], counts["micro_steps"], counts["average_step"])

    def go_to(
        self, step: int, images: int, micro_steps: int | None = None, averaged: int | None = None
    ) -> None:
        """Set the counts, and with them the learning rate; a micro-step a step by default."""
        self.step, self.images = step, images
        self.micro_steps = step if micro_steps is None else micro_steps
        if self.average:
            self.average.step = step if averaged is None else averaged
        scheduler = self.scheduler
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        scheduler._last_lr = [
            rate * course(step)
            for rate, course in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file it was that could not be written, as on a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_whole(state: State, folder: Path) -> None:
    """Fill `folder`, by the one process that has everything."""
    for name, network in state.networks.items():
        with writing(folder / name / state.weights.file):
            state.weights.write(network, folder / name)
            network.save_config(folder / name)
    with writing(folder / "state.pt"):
        torch.save(state.counts | {"optimizer": state.optimizer.state_dict()}, folder / "state.pt")


def begin_shards(state: State, folder: Path, group: Any, is_first: bool) -> Any:
    """Have all processes fill `folder` in the background; a future. The state is copied first:
    training may go on."""
    if is_first:
        with writing(folder / "state.pt"):
            state.network.save_config(folder / "network")
            torch.save(state.counts, folder / "state.pt")
    return dcp.async_save(_sharded(state), checkpoint_id=folder / SHARDS, process_group=group)


def _sharded(state: State, has_average: bool = True) -> dict[str, Any]:
    parts: dict[str, Any] = {
        name: dcp_states.get_model_state_dict(network)
        for name, network in state.networks.items()
        if name != "ema" or has_average
    }
    parts["optimizer"] = dcp_states.get_optimizer_state_dict(
        state.network, state.optimizer, options=_FLAT
    )
    return parts


def read(state: State, folder: Path, parallel: Parallel, images_per_step: int) -> None:
    """Take up everything of a checkpoint of this network; all processes call it. Early ones do not
    count images: they had `images_per_step`.

    Raises:
        Damaged: a file cannot be read.
        ValueError: the checkpoint is of another network, or of adapters of another base.
    """
    own = [{k: v for k, v in g.items() if k != "params"} for g in state.optimizer.param_groups]
    error = None
    try:
        was = TiMTransformer2DModel.load_config(folder / "network")
        counts = torch.load(folder / "state.pt", "cpu", weights_only=True, mmap=True)
        is_whole = not (folder / SHARDS).exists()
        is_known = counts.get("base") == state.weights.base
        needed = is_whole and is_known and (parallel.is_first or not parallel.is_sharded)
        weights = _read_weights(state, folder) if needed else {}
    except Exception as problem:  # a broken file may raise anything
        error = problem
    if parallel.any(error is not None):
        raise Damaged(f"{folder} is damaged ({error or 'says another process'})") from error
    _check_same_network(folder, was, state.network.config)
    state.weights.check_base(folder, counts.get("base"))
    if not is_whole:
        _read_shards(state, folder)
    elif parallel.is_sharded:
        _share_out(state, weights, counts["optimizer"] if parallel.is_first else {})
    else:
        for name, network in state.networks.items():
            state.weights.take(network, weights[name])
        state.optimizer.load_state_dict(counts["optimizer"])
    for group, settings in zip(state.optimizer.param_groups, own, strict=True):
        group.update(settings)
    step = counts["step"]
    early = {"micro_steps": step, "average_step": step, "images": step * images_per_step}
    state.take_counts(early | counts)


def _read_weights(state: State, folder: Path) -> dict[str, dict[str, Tensor]]:
    """A checkpoint without an average gives the network's weights for it."""
    return {
        name: state.weights.read(folder / (name if (folder / name).exists() else "network"))
        for name in state.networks
    }


def _check_same_network(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    differs = [
        f"{name} {was[name]}, not {value}"
        for name, value in now.items()
        if not name.startswith("_") and name in was and was[name] != value
    ]
    if differs:
        raise ValueError(f"{folder} is of a network with {', '.join(differs)}")


def _read_shards(state: State, folder: Path) -> None:
    reader = dcp.FileSystemReader(folder / SHARDS)
    try:
        names = reader.read_metadata().state_dict_metadata
        has_average = any(name.startswith("ema.") for name in names)
        parts = _sharded(state, has_average)
        dcp.load(parts, storage_reader=reader)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise Damaged(f"{folder / SHARDS} is damaged ({error})") from error
    for name, network in state.networks.items():
        weights = parts[name if has_average else "network"]
        dcp_states.set_model_state_dict(network, weights)
    dcp_states.set_optimizer_state_dict(
        state.network, state.optimizer, parts["optimizer"], options=_FLAT
    )


def _share_out(state: State, weights: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Give every process its share of what the first one read."""
    for name, network in state.networks.items():
        dcp_states.set_model_state_dict(network, weights.get(name, {}), options=FROM_FIRST)
    if optimizer:  # by position; by name for the others
        names = [name for name, _ in state.network.named_parameters()]
        optimizer = {
            "state": {names[i]: moments for i, moments in optimizer["state"].items()},
            "param_groups": [
                group | {"params": [names[i] for i in group["params"]]}
                for group in optimizer["param_groups"]
            ],
        }
    dcp_states.set_optimizer_state_dict(
        state.network, state.optimizer, optimizer, options=FROM_FIRST
    )


def merged(folder: str | Path, average: bool = True) -> dict[str, Tensor]:
    """The weights of a checkpoint, whole or sharded, under the published names.

    Example:
        safetensors.torch.save_file(merged("runs/xl/checkpoints/step-00002000"), "xl.safetensors")

    Raises:
        FileNotFoundError: it is no folder.
        ValueError: it holds no average, or adapters alone.
    """
    folder, name = Path(folder), "ema" if average else "network"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / name / LORA).exists():
        raise ValueError(f"{folder} holds adapters: {folder / name / LORA} is their file")
    if not (folder / SHARDS).exists():
        if not (folder / name).exists():
            raise ValueError(f"{folder} holds no {name}")
        return Whole().read(folder / name)
    with torch.device("meta"):
        config = TiMTransformer2DModel.load_config(folder / "network")
        weights = TiMTransformer2DModel.from_config(config).state_dict()
    parts = {name: {key: torch.empty_like(w, device="cpu") for key, w in weights.items()}}
    reader = dcp.FileSystemReader(folder / SHARDS)
    if not any(key.startswith(f"{name}.") for key in reader.read_metadata().state_dict_metadata):
        raise ValueError(f"{folder} holds no {name}")
    dcp.load(parts, storage_reader=reader, no_dist=True)
    return parts[name]
