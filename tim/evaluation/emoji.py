"""How well a network trained by `tim train --config emoji` draws what a text says.

`python -m tim.evaluation.emoji --tim DIR --flow DIR --data datasets/emoji --output results.json`
compares TiM with the same network trained as plain flow matching, at 1 to 32 steps. A sample is
right if of all real pictures the nearest, by its pixels, is the one that was asked for; its base
and its tone count on their own, too. Prompts are of three kinds: pairs of a base and a skin tone
and paraphrases, neither of which was trained on, and captions that were.
"""

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from tim import config
from tim.checks import whole
from tim.data import pictures
from tim.data.emoji import HELD_OUT, TRAIN, read
from tim.evaluation import curves
from tim.evaluation.curves import STEPS, percent
from tim.evaluation.statistics import Moments, distance
from tim.files import replacing
from tim.opening import open_pipeline
from tim.pipelines import TiMTextPipeline
from tim.processes import errors_in_one_line

GUIDANCE = (1.0, 1.5)  # classifier-free guidance scales; 1 is none
KINDS = ("pair", "paraphrase", "seen")
# What there is to print, a kind and a factor each.
TABLES = [("pair", "right"), ("pair", "base"), ("pair", "tone"), ("paraphrase", "right")]
TABLES += [("seen", "right"), ("frechet_distance", ""), ("unprompted_distance", "")]
UNPROMPTED = 256  # samples of the empty prompt, without guidance
_CHUNK = 64  # prompts drawn at once


class Prompt(NamedTuple):
    """`file` is the real picture that `text` asks for."""

    text: str
    file: str


class Real:
    """All real pictures (N, 3, H, W) in [-1, 1], with their names and tones.

    Those that are the same, as of somebody whose skin is covered, have the place of the first.
    """

    def __init__(self, folder: Path):
        lines = {line["image_file"]: line for line in read(folder / HELD_OUT)}
        lines |= {line["image_file"]: line for line in read(folder / TRAIN)}
        images = [pictures.to_tensor(pictures.read(folder / file)) for file in lines]
        if len(shapes := {image.shape for image in images}) > 1:
            raise ValueError(
                f"pictures of one size are needed, got {len(shapes)} sizes in {folder}: "
                "python -m tim.data.emoji makes them without --trim"
            )
        self.images, first = torch.stack(images), {}
        places = [first.setdefault(image.numpy().tobytes(), i) for i, image in enumerate(images)]
        self._first = torch.tensor(places)
        self._place = dict(zip(lines, places, strict=True))
        self._factors = [(line["name"], line["tone"]) for line in lines.values()]

    def of(self, prompts: list[Prompt]) -> Tensor:
        """The places of the pictures that are asked for, (B,)."""
        return torch.tensor([self._place[prompt.file] for prompt in prompts])

    def nearest(self, samples: Tensor) -> Tensor:
        """The places of the pictures that `samples` (B, 3, H, W) are nearest to, (B,)."""
        return self._first[torch.cdist(samples.flatten(1), self.images.flatten(1)).argmin(1)]

    def judge(self, samples: Tensor, prompts: list[Prompt]) -> dict[str, float]:
        """Shares of `samples` (B, 3, H, W) whose nearest picture is the right one, has the right
        base, and, of those with a tone, the right tone; with standard errors."""
        nearest, asked = self.nearest(samples), self.of(prompts)
        got, wanted = ([self._factors[i] for i in which.tolist()] for which in (nearest, asked))
        pairs = list(zip(got, wanted, strict=True))
        trues = {
            "right": nearest == asked,
            "base": torch.tensor([g[0] == w[0] for g, w in pairs]),
            "tone": torch.tensor([g[1] == w[1] for g, w in pairs if w[1]]),
        }
        found = {}
        for name, of in trues.items():
            found[name], found[f"{name}_error"] = curves.share(of)
        return found


def prompts(folder: Path, *, per_pair: int = 4, most: int = 228) -> dict[str, list[Prompt]]:
    """Of each of KINDS: every pair `per_pair` times, of the others at most so many, evenly."""
    per_pair, most = whole("per_pair", per_pair, 1), whole("most", most, 1)
    held_out = read(folder / HELD_OUT)
    by_kind = {
        kind: [Prompt(line["caption"], line["image_file"]) for line in held_out
               if line["factor"] == kind]
        for kind in KINDS[:2]
    }  # fmt: skip
    by_kind["seen"] = [
        Prompt(line["captions"][0], line["image_file"]) for line in read(folder / TRAIN)
    ]
    for kind in KINDS[1:]:
        found = by_kind[kind]
        count = min(most, len(found))
        by_kind[kind] = [found[i * len(found) // count] for i in range(count)]
    return by_kind | {"pair": [prompt for prompt in by_kind["pair"] for _ in range(per_pair)]}


def load(folder: Path, text_encoder: Path) -> TiMTextPipeline:
    """The pipeline of the network that `tim train` exported to `folder`, in float32."""
    pipeline = open_pipeline(folder, dtype=torch.float32, text_encoder=text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: TiMTextPipeline, texts: list[str], *, num_steps: int, guidance: float, seed: int
) -> Tensor:
    """A sample of each text (B, 3, H, W) in [-1, 1]; the noise depends on `seed` alone.

    Guidance acts on every step, the first too: two network evaluations a step.
    """
    network = pipeline.transformer.config
    shape = (len(texts), network.in_channels, network.input_size, network.input_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(whole("seed", seed)))
    options = dict(num_inference_steps=num_steps, guidance_scale=guidance, output_type="pt")
    drawn = [
        pipeline(
            texts[at : at + _CHUNK], latents=noise[at : at + _CHUNK],
            guidance_interval=(0.0, 2.0), **options,
        ).images
        for at in range(0, len(texts), _CHUNK)
    ]  # fmt: skip
    return torch.cat(drawn) * 2 - 1


def frechet_distance(samples: Tensor, real: Tensor) -> float:
    """Between two sets of pictures (B, 3, H, W), of their pixels at half the side."""
    moments = Moments(), Moments()
    for each, images in zip(moments, (samples, real), strict=True):
        each.add(F.avg_pool2d(images, 2).flatten(1))
    return distance(*moments)


def unprompted(pipeline: TiMTextPipeline, real: Real, num_steps: int, seed: int) -> float:
    """The Fréchet distance between samples of the empty prompt and all real pictures."""
    texts = [""] * UNPROMPTED
    samples = draw(pipeline, texts, num_steps=num_steps, guidance=1.0, seed=seed)
    return frechet_distance(samples, real.images)


def evaluate(
    folders: dict[str, Path], data: Path, *, seed: int = 0, per_pair: int = 4, most: int = 228
) -> dict[str, Any]:
    """All measurements of the networks in `folders` (name → the folder `tim train` exported)."""
    real, asked = Real(data), prompts(data, per_pair=per_pair, most=most)
    everything = [prompt for kind in KINDS for prompt in asked[kind]]
    counts = [len(asked[kind]) for kind in KINDS]
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "seed": whole("seed", seed),
        "real_pictures": len(real.images),
        "prompts": dict(zip(KINDS, counts, strict=True)),
        "networks": {},
    }
    for name, folder in folders.items():
        pipeline = load(folder, data / "text_encoder")
        cfg = config.load(folder / "training.yaml")
        by_guidance: dict[str, dict] = {str(guidance): {} for guidance in GUIDANCE}
        for guidance, steps in tqdm(list(product(GUIDANCE, STEPS)), desc=name):
            texts = [prompt.text for prompt in everything]
            samples = draw(pipeline, texts, num_steps=steps, guidance=guidance, seed=seed)
            kinds = zip(KINDS, samples.split(counts), strict=True)
            measured = {kind: real.judge(of, asked[kind]) for kind, of in kinds}
            wanted = real.images[real.of(everything)]
            measured["frechet_distance"] = frechet_distance(samples, wanted)
            if guidance == 1:
                measured["unprompted_distance"] = unprompted(pipeline, real, steps, seed)
            by_guidance[str(guidance)][str(steps)] = measured
        results["networks"][name] = {
            "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
            "trained_pictures": cfg.training.max_train_steps * cfg.data.dataloader.batch_size,
            "diffusion_ratio": cfg.model.transition_loss.diffusion_ratio,
            "by_guidance": by_guidance,
        }
    return results


def table(results: dict[str, Any], kind: str, factor: str = "right") -> str:
    """The shares of one kind of prompts as a Markdown table; of a distance's name that."""
    columns = {}
    for name, network in results["networks"].items():
        for guidance, by_steps in network["by_guidance"].items():
            head = f"{name}{'' if float(guidance) == 1 else f', guidance {guidance}'}"
            measured = [m[kind] for m in by_steps.values() if kind in m]
            if not measured:  # of guidance
                continue
            columns[head] = [
                percent(m[factor], m[f"{factor}_error"]) if isinstance(m, dict) else f"{m:.1f}"
                for m in measured
            ]
    return curves.markdown(columns)


def plot(results: dict[str, Any], path: Path) -> None:
    """What share of each kind is right, and the Fréchet distance, over the steps, as a PNG."""

    def of_networks(value) -> curves.Curves:
        return {
            name: {g: [value(m) for m in of.values()] for g, of in network["by_guidance"].items()}
            for name, network in results["networks"].items()
        }

    def share(kind: str) -> curves.Curves:
        return of_networks(lambda m: (100 * m[kind]["right"], 100 * m[kind]["right_error"]))

    panels = [curves.Panel(f"right, {kind}, %", share(kind)) for kind in KINDS]
    distances = of_networks(lambda m: (m["frechet_distance"], 0))
    curves.plot([*panels, curves.Panel("Fréchet distance", distances, yscale="log")], path)


def main(
    tim: Annotated[Path, typer.Option(help="The trained TiM, a `model` folder.")],
    flow: Annotated[Path, typer.Option(help="The same, trained as flow matching.")],
    output: Annotated[Path, typer.Option(help="JSON; the plot goes beside it as PNG.")],
    data: Annotated[Path, typer.Option(help="What tim.data.emoji made.")] = Path("datasets/emoji"),
    seed: int = 0,
) -> None:
    """Measure two trained networks and print Markdown tables."""
    results = evaluate({"TiM": tim, "flow matching": flow}, data, seed=seed)
    with replacing(output) as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, output.with_suffix(".png"))
    for kind, factor in TABLES:
        typer.echo(f"\n{kind} {factor}\n{table(results, kind, factor)}")


if __name__ == "__main__":
    with errors_in_one_line():
        typer.run(main)
