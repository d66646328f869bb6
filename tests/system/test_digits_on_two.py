"""Digits as a folder of class folders, by the whole command: latents made in the loop, REPA from a
small RADIO, two processes, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import diffusers
import torch
from digit_folders import save_digits
from golden_files import GOLDEN
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tim import config

TRAINING = GOLDEN / "training"
SETTINGS = [
    "data.data_type=imagefolder", "data.dataset.image_size=16", "data.dataloader.num_workers=0",
    "data.dataloader.batch_size=4", "model.network.params.input_size=8",
    "model.network.params.patch_size=2", "model.network.params.hidden_size=16",
    "model.network.params.num_heads=2", "model.network.params.depth=2",
    "model.network.params.encoder_depth=1", "model.network.params.z_dim=32",
    "model.network.params.projector_dim=8", "model.network.params.lora_hidden_size=8",
    "model.network.params.num_classes=10", f"model.enc_dir={TRAINING / 'radio_tiny.pth.tar'}",
    "training.max_train_steps=6", "training.checkpointing_steps=2", "training.log_steps=1",
    "training.learning_rate=1e-3", "training.mixed_precision=no", "training.parallel=fsdp2",
]  # fmt: skip


def start(folder, output):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "tim", "train", "--config", folder / "digits.yaml", "--output", output, *SETTINGS),
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def steps(output) -> list[int]:
    log = output / "log.jsonl"
    return (
        [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []
    )


def weights(output):
    return load_file(output / "model/diffusion_pytorch_model.safetensors")


def test_a_run_that_was_killed_leads_where_a_whole_one_leads(tmp_path):
    assert save_digits(tmp_path / "pictures", per_class=4) == 40
    facts = json.loads((TRAINING / "facts.json").read_text())["autoencoders"]
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**facts["kl"]).save_pretrained(tmp_path / "vae")
    cfg = config.load("b-256")
    cfg.data.dataset = {"image_dir": str(tmp_path / "pictures"), "image_size": 16}
    cfg.model.vae_dir = str(tmp_path / "vae")
    OmegaConf.save(cfg, tmp_path / "digits.yaml")

    whole = start(tmp_path, tmp_path / "whole")
    out, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, out[-3000:]

    killed = start(tmp_path, tmp_path / "killed")
    while killed.poll() is None and len(steps(tmp_path / "killed")) < 3:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    resumed = start(tmp_path, tmp_path / "killed")
    out, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, out[-3000:]

    assert steps(tmp_path / "whole") == steps(tmp_path / "killed") == [1, 2, 3, 4, 5, 6]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
