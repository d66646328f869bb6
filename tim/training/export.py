"""A trained network as one self-contained folder."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tim import config
from tim.files import filling
from tim.models import TiMTransformer2DModel
from tim.training import lora
from tim.training.weights import Whole
from tim.transports import Transport

_CONFIG = "training.yaml"


def save_export(
    network: TiMTransformer2DModel, cfg: DictConfig, folder: Path, weights: Whole | None = None
) -> None:
    """Write the network as `save_pretrained` does, or what of it `weights` keeps, and
    `training.yaml` to `folder`."""
    with filling(folder) as new:
        (weights or Whole()).write(network, new)
        OmegaConf.save(cfg, new / _CONFIG)


def load_export(folder: str | Path) -> tuple[TiMTransformer2DModel, Transport, DictConfig]:
    """The network (in eval mode), the transport and the configuration that `save_export` wrote.

    Of a run with `training.lora` the network is its base, `model.ckpt`, with the adapter.

    Raises:
        FileNotFoundError: `folder` is not such a folder.
        ValueError: the base of an adapter is not where it was.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {_CONFIG}: expected the `model` folder that `tim train` writes"
        )
    cfg = config.load(folder / _CONFIG)
    if (folder / lora.Adapters.file).is_file():
        network = lora.opened(folder, cfg)
    else:
        network = TiMTransformer2DModel.from_pretrained(folder)
    return network.eval(), config.build_transport(cfg), cfg
