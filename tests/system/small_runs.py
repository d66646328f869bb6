"""Runs of `tim train` that never ran: folders of small networks with random weights."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from tim import config
from tim.training import save_export


def run(folder: Path, cfg: DictConfig) -> Path:
    """A run's folder, as `tim train` leaves it."""
    torch.manual_seed(0)
    network = config.build_network(cfg)
    final = network.final_layer  # zero at initialisation, when no input matters
    for weight in (final.linear.weight, final.adaLN_modulation.fc2.weight):
        torch.nn.init.normal_(weight)
    save_export(network, cfg, folder / "model")
    return folder
