"""Datasets of (image or latent, label) pairs, chosen by a configuration's `data.data_type`."""

from pkgutil import extend_path

from omegaconf import DictConfig
from torch.utils.data import Dataset, TensorDataset

from tim.data import mnist

__path__ = extend_path(__path__, __name__)  # the published modules, where they are installed too


def build_dataset(cfg: DictConfig) -> Dataset:
    """The training set of `cfg.data`: items (x (C, H, W) float32, label int64), `num_classes`.

    Raises:
        ValueError: `data.data_type` names no known dataset.
    """
    if cfg.data.data_type == "mnist":
        dataset = TensorDataset(*mnist.load("train"))
        dataset.num_classes = mnist.NUM_CLASSES
        return dataset
    wanted = ", ".join(f"{name} {value}" for name, value in (cfg.data.get("dataset") or {}).items())
    raise ValueError(
        f"data.data_type must be mnist, got {cfg.data.data_type}: tim train cannot read "
        f"data.dataset ({wanted or 'none given'}) yet"
    )
