"""A LoRA of a dozen emoji in one style: the dozen, and how the style is drawn for other names.

`python -m tim.evaluation.emoji_style pictures` prints twelve emoji in blue ink on yellow paper,
each with its name for a caption, and `judge` asks a network with and without the adapter for names
that are not among them. A sample is right if, of all real pictures printed so, the nearest by
its pixels is the one that was asked for.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from tim import config
from tim.data import pictures
from tim.data.captioned_folder import METADATA
from tim.data.emoji import TRAIN, read
from tim.evaluation import curves
from tim.evaluation import emoji as of_emoji
from tim.files import filling, replacing
from tim.images import labelled_grid, step_label, to_pil
from tim.pipelines import TiMTextPipeline
from tim.processes import errors_in_one_line
from tim.training.initial import weights_file

NAMES = (
    "red apple", "octopus", "house", "cat face", "rocket", "guitar", "hamburger",
    "umbrella with rain drops", "key", "sunflower", "grinning face with big eyes", "bus",
)  # fmt: skip
SHOWN = ("bear", "bicycle", "birthday cake", "ghost", "penguin", "sailboat", "saxophone", "trophy")
LONG = "waving hand with medium-dark skin"  # as long as the longest of a batch in training
STEPS = (1, 4, 8)
PAPER, INK = (255, 214, 90), (24, 48, 120)  # RGB
_CONTRAST = 1.3

app = typer.Typer()


def printed(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] in blue ink on yellow paper, dark where they are dark."""
    levels = (images + 1) / 2
    grey = (levels * levels.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
    paper, ink = (images.new_tensor(colour).view(3, 1, 1) / 127.5 - 1 for colour in (PAPER, INK))
    return torch.lerp(paper, ink, (_CONTRAST * (1 - grey)).clamp(max=1))


def plain(data: Path) -> dict[str, str]:
    """The picture of every name without a skin tone."""
    return {line["name"]: line["image_file"] for line in read(data / TRAIN) if not line["tone"]}


@app.command("pictures")
def draw_pictures(
    folder: Annotated[Path, typer.Argument(help="Where they go.")] = Path("pictures"),
    data: Annotated[Path, typer.Option(help="What tim.data.emoji made.")] = Path("datasets/emoji"),
) -> None:
    """Print twelve emoji, with captions."""
    files = plain(data)
    images = torch.stack([pictures.to_tensor(pictures.read(data / files[n])) for n in NAMES])
    with filling(folder) as new:
        lines = []
        for name, image in zip(NAMES, printed(images), strict=True):
            line = {"file_name": f"{name.replace(' ', '-')}.png", "text": name}
            to_pil(image).save(new / line["file_name"])
            lines.append(json.dumps(line) + "\n")
        (new / METADATA).write_text("".join(lines))
    typer.echo(f"{folder}: {len(lines)} pictures")


def measure(
    pipeline: TiMTextPipeline, prompts: list[of_emoji.Prompt], real: of_emoji.Real, seed: int
) -> dict[str, dict[str, float]]:
    """At each of STEPS the share that is right, its standard error, and how far in RGB (0 … 255)
    the mean colour of a sample is from that of the picture asked for."""
    asked, found = real.of(prompts), {}
    for steps in STEPS:
        texts = [prompt.text for prompt in prompts]
        samples = of_emoji.draw(pipeline, texts, num_steps=steps, guidance=1.0, seed=seed)
        right, error = curves.share(real.nearest(samples) == asked)
        far = (samples.clamp(-1, 1) - real.images[asked]).mean(dim=(2, 3)).norm(dim=1).mean()
        found[str(steps)] = {
            "right": right, "right_error": error, "colour_distance": 127.5 * float(far)
        }  # fmt: skip
    return found


def evaluate(
    adapter: Path, data: Path, seed: int = 0, most: int = 228
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All figures, and rows of pictures of the names in SHOWN."""
    base = weights_file(config.load(adapter / "training.yaml").model.ckpt).parent
    pipeline = of_emoji.load(base, data / "text_encoder")
    real, files = of_emoji.Real(data), plain(data)
    rows = {"emoji": real.images[real.of([of_emoji.Prompt("", files[name]) for name in SHOWN])]}
    real.images = printed(real.images)
    others = [name for name in files if name not in NAMES]
    others = [others[i * len(others) // most] for i in range(most)]
    asked = {
        kind: [of_emoji.Prompt(name, files[name]) for name in names]
        for kind, names in (("held out", others), ("trained on", NAMES), ("shown", SHOWN))
    }
    shown = asked.pop("shown")
    texts = [*(prompt.text for prompt in shown), LONG]
    results: dict[str, Any] = {"torch": torch.__version__, "seed": seed, "real": len(real.images)}
    results["prompts"] = {kind: len(prompts) for kind, prompts in asked.items()}
    for moment in ("before", "after"):
        if moment == "after":
            pipeline.load_lora_weights(adapter, adapter_name="style")
            adapters = [p for n, p in pipeline.transformer.named_parameters() if ".lora_" in n]
            results["parameters"] = sum(p.numel() for p in adapters)
        results[moment] = {kind: measure(pipeline, of, real, seed) for kind, of in asked.items()}
        for steps in STEPS[:2]:
            drawn = of_emoji.draw(pipeline, texts, num_steps=steps, guidance=1.0, seed=seed)
            rows[f"{moment}, {step_label(steps)}"] = drawn[:-1]
    rows["printed"] = real.images[real.of(shown)]
    return results, rows


@app.command()
def judge(
    adapter: Annotated[Path, typer.Argument(help="The `model` folder of a run with a LoRA.")],
    output: Annotated[Path, typer.Option(help="JSON; the sheet goes beside it.")],
    data: Annotated[Path, typer.Option(help="What tim.data.emoji made.")] = Path("datasets/emoji"),
    seed: int = 0,
) -> None:
    """Measure a network with and without the adapter."""
    results, rows = evaluate(adapter, data, seed)
    with replacing(output) as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    with replacing(output.with_name("sheet.png")) as path:
        labelled_grid(rows, SHOWN, scale=3).save(path)
    for moment in ("before", "after"):
        for kind, found in results[moment].items():
            for steps, of in found.items():
                share = curves.percent(of["right"], of["right_error"])
                far = f"{of['colour_distance']:.1f} from its colour"
                typer.echo(f"{moment}, {kind}, {steps} steps: {share} right, {far}")


if __name__ == "__main__":
    with errors_in_one_line():
        app()
