"""Folders of pictures of small networks, for the tests of `tim.generate`."""

import json
from pathlib import Path

import small_pipelines
import torch

from tim.encoders import Autoencoder, TextEncoder
from tim.generate.benchmarks import DPG, MJHQ, GenEval, ImageNet
from tim.generate.run import generate
from tim.generate.settings import make
from tim.generate.sources import Source
from tim.transports import make as make_transport

TEXTS = ["a red cat", "a dog", "a red cat a dog a cat", "cat"]
FAST = dict(num_steps=2, dtype="float32", per_proc_batch_size=3)


def class_source(**changes) -> Source:
    network = small_pipelines.network(small_pipelines.CLASS | changes)
    vae = Autoencoder(small_pipelines.sd_vae())
    return Source("c2i", network, make_transport("OT_FM"), vae)


def text_source() -> Source:
    pipeline = small_pipelines.text_pipeline()
    text = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, 8)
    return Source(
        "t2i", pipeline.transformer, make_transport("OT_FM"), Autoencoder(pipeline.vae), text
    )


def captions(name: str, folder: Path, texts: list[str]) -> Path:
    """A benchmark's prompts, in the form that it has them."""
    path = folder / f"{name}-{len(texts)}-captions"
    if name == "geneval":
        lines = [{"tag": "counting", "include": [], "prompt": text} for text in texts]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    elif name == "dpg":
        path.mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (path / f"item{number}.txt").write_text(f"{text} \n", encoding="utf-8")
    else:
        categories = ["art", "food"]
        entries = {
            f"id{number}": {"category": categories[number % 2], "prompt": text}
            for number, text in enumerate(texts)
        }
        path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def drawn(
    name: str, output: Path, texts: list[str] = TEXTS, source: Source | None = None, **changes
) -> Path:
    """The folder that the benchmark makes in `output`."""
    output.mkdir(exist_ok=True)
    settings = make(name, **{**FAST, **changes})
    if name == "imagenet":
        return generate(ImageNet(settings), source or class_source(), output)
    kind = {"geneval": GenEval, "dpg": DPG, "mjhq": MJHQ}[name]
    path = captions(name, output.parent, texts)
    return generate(kind(settings, path), source or text_source(), output)


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file but the run's own, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if name not in ("run.json", ".lock")}


def sampled(source: Source) -> list[int]:
    """Grows by the batch of each call of the network from now on."""
    calls: list[int] = []
    source.network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def nan_at(source: Source, call: int) -> None:
    """The network's output is not finite from that call on."""
    calls = sampled(source)

    def spoil(module, args, output):
        return torch.full_like(output, torch.nan) if len(calls) > call else output

    source.network.register_forward_hook(spoil)
