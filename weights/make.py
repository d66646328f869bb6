"""Fill tim_emoji/ from a run: python weights/make.py runs/emoji/model datasets/emoji"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tim.evaluation.emoji import load
from tim.training import load_export, save_export

PROMPTS = [  # of those with a colon neither picture nor words were trained on
    "waving hand: medium-dark skin tone", "thumbs up: medium-light skin tone",
    "raised fist: medium-light skin tone", "police officer: dark skin tone",
    "person surfing: medium-light skin tone", "baby: medium skin tone",
    "heart in green", "green coloured apple", "grinning face with big eyes", "cat face",
    "octopus", "rocket",
]  # fmt: skip


def main(model: Path, data: Path) -> None:
    folder = Path(__file__).with_name("tim_emoji")
    network, _, cfg = load_export(model)
    save_export(network.half(), cfg, folder)
    y, y_null = load(model, data / "text_encoder").encode_prompt(PROMPTS)
    features = {"y": y, "y_null": y_null}
    save_file({k: v.to(torch.float16).contiguous() for k, v in features.items()},
              folder / "prompts.safetensors")  # fmt: skip
    (folder / "prompts.json").write_text(json.dumps(PROMPTS, indent=2) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
