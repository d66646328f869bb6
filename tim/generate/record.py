"""`run.json` beside the pictures: all that is needed to draw them again."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tim import config
from tim.files import replacing
from tim.generate.benchmarks import Benchmark, ImageNet
from tim.generate.settings import TextSettings
from tim.generate.sources import Source
from tim.processes import Processes
from tim.provenance import versions
from tim_kernels.dispatch import backend

NAME = "run.json"
_log = logging.getLogger(__name__)


def record(
    folder: Path, benchmark: Benchmark, source: Source, processes: Processes, *,
    adds_to: Collection[str], draws: bool,
) -> None:  # fmt: skip
    """Write the run's record, or see that the one that is there is of the same pictures.

    Args:
        adds_to: the pictures that are there.
        draws: whether this run makes some itself, and is to be noted.

    Raises:
        ValueError: the pictures are of other settings, or of unknown ones.
    """
    path, made_with = folder / NAME, _made_with(benchmark, source, processes)
    run = _plain({**_pictures(benchmark, source), "made_with": [made_with]})
    if adds_to:
        before = _read(path)
        _refuse_others(folder, before, run)
        run["made_with"] = list(before["made_with"])
        if draws and made_with not in run["made_with"]:
            if _exact(made_with) not in map(_exact, run["made_with"]):
                _log.warning(
                    "%s has pictures made with other versions or on another device: theirs may "
                    "differ in their last bits", folder,
                )  # fmt: skip
            run["made_with"].append(made_with)
        if run == before:
            return
    with replacing(path) as new:
        new.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pictures(benchmark: Benchmark, source: Source) -> dict[str, Any]:
    """What the pictures depend on, and how many there are."""
    settings = dataclasses.asdict(benchmark.settings)
    size = settings.pop("per_proc_batch_size")
    settings.pop("num_fid_samples", None)  # more can be drawn later
    if isinstance(benchmark.settings, TextSettings) and benchmark.settings.published_padding:
        settings["per_proc_batch_size"] = size  # prompts are padded to the longest of so many
    if benchmark.settings.batch_invariant:
        settings.pop("slice_vae")
    else:
        settings.pop("lot_size")
    run = {"benchmark": benchmark.name, "settings": settings, **source.described()}
    if not isinstance(benchmark, ImageNet):
        run["prompts"] = _hash([list(item) for item in benchmark.items])
    run["pictures"] = len(benchmark.items) * benchmark.pictures
    return run


def _made_with(benchmark: Benchmark, source: Source, processes: Processes) -> dict[str, Any]:
    made_with = {
        "versions": versions(), "device": source.device.type, "backend": backend.requested()
    }  # fmt: skip
    if not benchmark.settings.batch_invariant:
        made_with["processes"] = processes.world_size
        made_with["per_proc_batch_size"] = benchmark.settings.per_proc_batch_size
    return made_with


def _exact(made_with: dict[str, Any]) -> dict[str, Any]:
    """What a picture's last bits may depend on."""
    return {name: made_with.get(name) for name in ("versions", "device", "backend")}


def _refuse_others(folder: Path, before: dict[str, Any], run: dict[str, Any]) -> None:
    kept = ("made_with", "pictures")
    old, new = (
        dict(config.leaves({k: v for k, v in each.items() if k not in kept}))
        for each in (before, run)
    )
    wrong = [
        f"{name} {old.get(name)!r}, not {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if wrong:
        raise ValueError(f"{folder} is of {'; '.join(wrong)}: give another --output")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has pictures but no {NAME}: give another --output")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("made_with"), list):
        raise ValueError(f"{path} is no record of tim generate: give another --output")
    return run


def _plain(value: Any) -> Any:
    """As it is read again."""
    return json.loads(json.dumps(value))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
