"""The MNIST configuration, shrunk until a step takes milliseconds."""

from omegaconf import DictConfig, OmegaConf

from tim import config

NETWORK = {
    "patch_size": 14,
    "hidden_size": 32,
    "depth": 2,
    "encoder_depth": 1,
    "num_heads": 2,
    "lora_hidden_size": 8,
}


def small(**training) -> DictConfig:
    """With these settings of the section `training`."""
    changes = {
        "model": {"ema_decay": 0.9, "network": {"params": NETWORK}},
        "data": {"dataloader": {"batch_size": 16}},
        "training": {
            "max_train_steps": 8,
            "checkpointing_steps": 4,
            "log_steps": 2,
            "validation_steps": 100,
            "lr_scheduler": "constant_with_warmup",
            "lr_scheduler_params": None,
            "lr_warmup_steps": 2,
            **training,
        },
    }
    return OmegaConf.merge(config.load("mnist"), changes)
