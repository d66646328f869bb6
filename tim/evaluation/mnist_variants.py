"""What other settings or a longer run make of the network that `tim train --config mnist` trains.

`python -m tim.evaluation.mnist_variants NAME=DIR … --output variants.json` measures each network
without guidance, as `tim.evaluation.mnist` does, and prints one table. A file that is there keeps
the networks that are not named, so that one may come after the other.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from tim import config
from tim.checks import whole
from tim.data import mnist
from tim.evaluation import report
from tim.evaluation.curves import STEPS, percent
from tim.evaluation.mnist import (
    DigitClassifier,
    draw,
    frechet_distance,
    frechet_error,
    recognised,
    train_classifier,
    trained_images,
)  # fmt: skip
from tim.files import replacing
from tim.images import step_label
from tim.processes import errors_in_one_line
from tim.training import load_export

RECOGNISED_AT, FRECHET_AT = (1, 2, 4, 32), (1, 4)  # steps in the table


def measure(
    folder: Path, classifier: DigitClassifier, *, per_class: int, seed: int
) -> dict[str, Any]:
    """At each of `STEPS`, of the network that `tim train` exported to `folder`."""
    network, transport, cfg = load_export(folder)
    preset, real = config.flat(config.load("mnist")), mnist.load("held_out")[0]
    by_steps = {}
    for steps in tqdm(STEPS, desc=str(folder)):
        images, labels = draw(network, transport, num_steps=steps, per_class=per_class, seed=seed)
        by_steps[str(steps)] = {
            **recognised(classifier, images, labels),
            "frechet_distance": frechet_distance(classifier, images, real),
            "frechet_error": frechet_error(classifier, images, real),
        }
    return {
        "trained_images": trained_images(cfg),
        "settings": {  # that are not the preset's
            key: value
            for key, value in config.flat(cfg).items()
            if (key.startswith("model.") or key == "training.seed")
            and preset.get(key, value) != value
        },
        "by_steps": by_steps,
    }


def table(results: dict[str, Any]) -> str:
    """One line a network, in Markdown; the longest run comes last."""
    networks = sorted(results["networks"].items(), key=lambda item: item[1]["trained_images"])
    head = ["", "images seen", *(f"recognised, {step_label(n)}" for n in RECOGNISED_AT)]
    head += [f"Fréchet, {step_label(n)}" for n in FRECHET_AT]
    rows = []
    for name, network in networks:
        shares = [network["by_steps"][str(n)] for n in RECOGNISED_AT]
        distances = [network["by_steps"][str(n)] for n in FRECHET_AT]
        rows.append(
            [name, f"{network['trained_images']:,}"]
            + [percent(m["recognised"], m["standard_error"]) for m in shares]
            + [f"{m['frechet_distance']:.2f} ± {m['frechet_error']:.2f}" for m in distances]
        )
    return report.table(head, rows)


def named(networks: Iterable[str]) -> dict[str, Path]:
    """The folders of NAME=DIR, by name."""
    folders: dict[str, Path] = {}
    for given in networks:
        name, _, folder = given.rpartition("=")
        if not name or not folder or name in folders:
            raise ValueError(f"networks must be NAME=DIR, each name once, got {given!r}")
        folders[name] = Path(folder)
    return folders


def main(
    networks: Annotated[list[str], typer.Argument(help="NAME=DIR, a run's `model` folder.")],
    output: Annotated[Path, typer.Option(help="JSON, which may hold networks already.")],
    per_class: Annotated[int, typer.Option(help="Samples of each digit.")] = 100,
    seed: int = 0,
) -> None:
    """Measure networks, one after the other, and print the table of all in the file."""
    folders, per_class = named(networks), whole("per_class", per_class, 1)
    classifier, accuracy = train_classifier(seed=seed)
    judged_by = {
        "torch": torch.__version__,
        "seed": seed,
        "samples_per_step_count": per_class * mnist.NUM_CLASSES,
        "classifier_accuracy": accuracy,
    }
    results = json.loads(output.read_text()) if output.exists() else judged_by | {"networks": {}}
    there = {key: results.get(key) for key in judged_by}
    if there != judged_by:
        raise ValueError(f"{output} has networks measured with {there}, not {judged_by}")
    for name, folder in folders.items():
        results["networks"][name] = measure(folder, classifier, per_class=per_class, seed=seed)
        with replacing(output) as path:
            path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    typer.echo(table(results))


if __name__ == "__main__":
    with errors_in_one_line():
        typer.run(main)
