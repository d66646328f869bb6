"""Datasets of (image or latent, label) pairs, chosen by a configuration's `data.data_type`."""

from omegaconf import DictConfig
from torch.utils.data import Dataset, TensorDataset

from tim.data import mnist


def build_dataset(cfg: DictConfig) -> Dataset:
    """The training set of `cfg.data`: items (x (C, H, W) float32, label int64).

    Raises:
        ValueError: `data.data_type` names no known dataset.
    """
    if cfg.data.data_type == "mnist":
        return TensorDataset(*mnist.load("train"))
    raise ValueError(f"data.data_type must be 'mnist', got {cfg.data.data_type!r}")
