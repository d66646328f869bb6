"""A trained network as one self-contained folder."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tim import config
from tim.files import filling
from tim.models import TiMTransformer2DModel
from tim.transports import Transport

_CONFIG = "training.yaml"


def save_export(network: TiMTransformer2DModel, cfg: DictConfig, folder: Path) -> None:
    """Write the network as `save_pretrained` does and `training.yaml` to `folder`."""
    with filling(folder) as new:
        network.save_pretrained(new)
        OmegaConf.save(cfg, new / _CONFIG)


def load_export(folder: str | Path) -> tuple[TiMTransformer2DModel, Transport, DictConfig]:
    """The network (in eval mode), the transport and the configuration that `save_export` wrote.

    Raises:
        FileNotFoundError: `folder` is not such a folder.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {_CONFIG}: expected the `model` folder that `tim train` writes"
        )
    cfg = config.load(folder / _CONFIG)
    network = TiMTransformer2DModel.from_pretrained(folder)
    return network.eval(), config.build_transport(cfg), cfg
