"""Fill emoji/ from a run: python tim/assets/make_emoji.py runs/emoji/model datasets/emoji"""

import json
import sys
from pathlib import Path

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
    folder = Path(__file__).with_name("emoji")
    network, _, cfg = load_export(model)
    save_export(network.half(), cfg, folder)
    settings = json.loads((folder / "config.json").read_text())
    del settings["_name_or_path"]  # where the run was
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    pipeline = load(model, data / "text_encoder")
    y, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    save_file({"y": y.half().contiguous()}, folder / "prompts.safetensors")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS, indent=2) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
