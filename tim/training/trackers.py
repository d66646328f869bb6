"""Figures sent to TensorBoard, Weights & Biases or Trackio, through accelerate."""

import importlib.util
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig

from tim import config

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check(run: DictConfig) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        ValueError: with the name of the package.
    """
    package = PACKAGES.get(run.tracker)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"training.tracker {run.tracker} needs a package that is not installed: "
            f"pip install {package}"
        )


def start(accelerator: Accelerator, cfg: DictConfig, output: Path) -> None:
    """Open `training.tracker`, if there is one, with the settings of the run."""
    run = cfg.training
    if run.tracker is None:
        return
    settings = config.flat(cfg)
    if run.tracker == "tensorboard":  # it takes numbers, flags and texts alone
        settings = {
            key: value if isinstance(value, (int, float, str)) else str(value)
            for key, value in settings.items()
        }
    options: dict[str, Any] = dict(config.resolved(cfg)["training"]["tracker_kwargs"] or {})
    name = run.tracker_project_name or output.name
    accelerator.init_trackers(name, config=settings, init_kwargs={run.tracker: options})
