"""How well a network trained by `tim train --config mnist` draws the digit it is asked for.

`python -m tim.evaluation.mnist --tim DIR --flow DIR --output results.json` compares TiM with the
same network trained as plain flow matching, at 1 to 32 steps, in the eyes of a classifier trained
on the real images: the share of samples that it recognises as the requested digit, and the Fréchet
distance between its features of the samples and of the held-out images.
"""

import json
import math
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from tim.checks import whole
from tim.data import mnist
from tim.evaluation import curves, statistics
from tim.evaluation.curves import STEPS, percent
from tim.files import replacing
from tim.processes import errors_in_one_line
from tim.sampling import sample
from tim.training import load_export
from tim.transports import Transport

GUIDANCE = (1.0, 1.25)  # classifier-free guidance scales; 1 is none
_CHUNK = 250  # images sampled or classified at once


class DigitClassifier(nn.Module):
    """A small convolutional network: images (B, 1, 28, 28) in [-1, 1] → features (B, 64)."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.convolutions = nn.Sequential(
            *stage(1, 32),
            nn.MaxPool2d(2),
            *stage(32, 64),
            *stage(64, 64),
            nn.MaxPool2d(2),
            *stage(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, mnist.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """The penultimate features (B, 64)."""
        return self.convolutions(images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most likely digit of each image (B,), int64."""
        return torch.cat([self.head(self(chunk)).argmax(1) for chunk in images.split(_CHUNK)])


def _warp(images: Tensor) -> Tensor:
    """Turn, scale and shift each image (up to 15 degrees, 10 % and 2 pixels)."""
    angle, scale, dx, dy = torch.rand(4, len(images)) * 2 - 1
    angle, scale = angle * math.radians(15), 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    to_x, to_y = torch.stack([cos, -sin, dx / 7], 1), torch.stack([sin, cos, dy / 7], 1)
    grid = F.affine_grid(torch.stack([to_x, to_y], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_classifier(*, seed: int = 0, epochs: int = 25) -> tuple[DigitClassifier, float]:
    """Train on the training split; the classifier in eval mode and its held-out accuracy."""
    seed, epochs = whole("seed", seed), whole("epochs", epochs, 1)
    images, labels = mnist.load("train")
    batch = 100
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
        total = epochs * len(images) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total)
        for _ in tqdm(range(epochs), desc="classifier"):
            for chosen in torch.randperm(len(images)).split(batch):
                logits = classifier.head(classifier(_warp(images[chosen])))
                F.cross_entropy(logits, labels[chosen], label_smoothing=0.05).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    classifier.eval()
    return classifier, recognised(classifier, *mnist.load("held_out"))["recognised"]


def recognised(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of images (N, 1, 28, 28) classified as their label, with its standard error."""
    share, error = curves.share(classifier.predict(images) == labels)
    return {"recognised": share, "standard_error": error}


@torch.no_grad()
def features(classifier: DigitClassifier, images: Tensor) -> Tensor:
    """The classifier's, (N, 64), of images (N, 1, 28, 28) in [-1, 1]."""
    return torch.cat([classifier(chunk) for chunk in images.split(_CHUNK)])


def frechet_distance(classifier: DigitClassifier, images: Tensor, real: Tensor) -> float:
    """Fréchet distance between the classifier's features of two sets (N, 1, 28, 28) in [-1, 1]."""
    one, other = (_moments(features(classifier, each)) for each in (images, real))
    return statistics.distance(one, other)


def frechet_error(
    classifier: DigitClassifier, images: Tensor, real: Tensor, *, groups: int = 20
) -> float:
    """The standard error that `frechet_distance` has for there being so few images, with `real` as
    it is: the jackknife's (Tukey, 1958), without every 20th image, from each of the first on. Of
    images in the order of their classes each group has as many of each."""
    rows, other = features(classifier, images), _moments(features(classifier, real))
    group = torch.arange(len(rows)) % groups
    without = [statistics.distance(_moments(rows[group != k]), other) for k in range(groups)]
    return (groups - 1) / math.sqrt(groups) * torch.tensor(without).std().item()


def _moments(rows: Tensor) -> statistics.Moments:
    moments = statistics.Moments()
    moments.add(rows)
    return moments


@torch.no_grad()
def draw(
    network: nn.Module,
    transport: Transport,
    *,
    num_steps: int,
    per_class: int,
    seed: int,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`per_class` samples of every digit; the noise depends on `seed` alone.

    Guidance acts on every step, the first too: two network evaluations a step.

    Returns:
        Images (N, 1, 28, 28) float32, clipped to [-1, 1], and the requested digits (N,).
    """
    seed, per_class = whole("seed", seed), whole("per_class", per_class, 1)
    labels = torch.arange(mnist.NUM_CLASSES).repeat_interleave(per_class)
    noise = torch.randn(len(labels), 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    state = transport.initial_state(noise)
    options = dict(num_steps=num_steps, cfg_scale=guidance, cfg_low=-1.0, cfg_high=2.0)
    images = [
        sample(network, transport, z, y, torch.full_like(y, mnist.NUM_CLASSES), **options)
        for z, y in zip(state.split(_CHUNK), labels.split(_CHUNK), strict=True)
    ]
    return torch.cat(images).float().clamp(-1, 1), labels


def trained_images(cfg: DictConfig) -> int:
    """How many images, the same ones again counted, a run of this configuration trains on."""
    images = cfg.training.max_train_steps * cfg.training.gradient_accumulation_steps
    return images * cfg.data.dataloader.batch_size


def evaluate(folders: dict[str, Path], *, per_class: int = 100, seed: int = 0) -> dict[str, Any]:
    """All measurements of the networks in `folders` (name → the folder `tim train` exported)."""
    seed, per_class = whole("seed", seed), whole("per_class", per_class, 1)
    classifier, accuracy = train_classifier(seed=seed)
    train_images, train_labels = mnist.load("train")
    real, _ = mnist.load("held_out")
    # As many training images as samples: the distance's bias depends on the number.
    chosen = [torch.where(train_labels == k)[0][:per_class] for k in range(mnist.NUM_CLASSES)]
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "seed": seed,
        "samples_per_step_count": per_class * mnist.NUM_CLASSES,
        "real_images": {"train": len(train_images), "held_out": len(real)},
        "classifier_accuracy": accuracy,
        "frechet_distance_of_train_images": frechet_distance(
            classifier, train_images[torch.cat(chosen)], real
        ),
        "networks": {},
    }
    for name, folder in folders.items():
        network, transport, cfg = load_export(folder)
        by_guidance: dict[str, dict] = {str(guidance): {} for guidance in GUIDANCE}
        for guidance, steps in tqdm(list(product(GUIDANCE, STEPS)), desc=name):
            images, labels = draw(
                network,
                transport,
                num_steps=steps,
                per_class=per_class,
                seed=seed,
                guidance=guidance,
            )
            by_guidance[str(guidance)][str(steps)] = {
                **recognised(classifier, images, labels),
                "frechet_distance": frechet_distance(classifier, images, real),
            }
        results["networks"][name] = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "trained_images": trained_images(cfg),
            "diffusion_ratio": cfg.model.transition_loss.diffusion_ratio,
            "by_guidance": by_guidance,
        }
    return results


def table(results: dict[str, Any], guidance: float = 1.0) -> str:
    """The measurements at one guidance scale as a Markdown table."""
    networks = results["networks"]
    measured = {n: of["by_guidance"][str(guidance)].values() for n, of in networks.items()}
    shares = {
        f"{name}: recognised": [percent(m["recognised"], m["standard_error"]) for m in of]
        for name, of in measured.items()
    }
    distances = {
        f"{name}: Fréchet": [f"{m['frechet_distance']:.2f}" for m in of]
        for name, of in measured.items()
    }
    return curves.markdown(shares | distances)


def plot(results: dict[str, Any], path: Path) -> None:
    """Both measurements over the number of steps, as a PNG."""

    def measured(value: str, error: str = "", factor: float = 1) -> curves.Curves:
        return {
            name: {
                guidance: [(factor * m[value], factor * m.get(error, 0)) for m in of.values()]
                for guidance, of in network["by_guidance"].items()
            }
            for name, network in results["networks"].items()
        }

    share = curves.Panel(
        "recognised as the requested digit, %",
        measured("recognised", "standard_error", 100),
        ("real, held out", 100 * results["classifier_accuracy"]),
    )
    distance = curves.Panel(
        "Fréchet distance to held-out images",
        measured("frechet_distance"),
        ("real, train", results["frechet_distance_of_train_images"]),
        "log",
    )
    curves.plot([share, distance], path)


def main(
    tim: Annotated[Path, typer.Option(help="The trained TiM, a `model` folder.")],
    flow: Annotated[Path, typer.Option(help="The same, trained as flow matching.")],
    output: Annotated[Path, typer.Option(help="JSON; the plot goes beside it as PNG.")],
    per_class: Annotated[int, typer.Option(help="Samples of each digit.")] = 100,
    seed: int = 0,
) -> None:
    """Measure two trained networks and print a Markdown table."""
    results = evaluate({"TiM": tim, "flow matching": flow}, per_class=per_class, seed=seed)
    with replacing(output) as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, output.with_suffix(".png"))
    for guidance in GUIDANCE:
        typer.echo(f"\nguidance {guidance}\n{table(results, guidance)}")


if __name__ == "__main__":
    with errors_in_one_line():
        typer.run(main)
