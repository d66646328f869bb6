"""What a run trains on and with, apart from the network: built from a configuration or given."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Sampler

from tim import config, data
from tim.data import TrainingSet
from tim.encoders import Autoencoder, KeptFeatures, TextEncoder, repa_targets
from tim.models import radio
from tim.training.conditioning import ClassConditioning, Conditioning, TextConditioning
from tim.training.latents import Encoded, Given, Latents
from tim.training.repa import Targets
from tim.training.streams import Position, TokenPacks, check_sides, of_the_set, shuffled


@dataclass
class Parts:
    """Data and what is made of it.

    `sample_shape` (C, h, w) is that of the noise which samples are drawn from while training;
    `decode` makes pictures in [-1, 1] of them, as they are without it, or raises OSError.
    `sampler` gives endless batches of indices; its `seen(n)` are the images that all processes
    have seen after n batches of each. With `is_packed` a batch's pictures are of any sizes, and go
    through the network in one row; `images_per_batch` are then those of one process on average.
    """

    dataset: TrainingSet
    conditioning: Conditioning
    sample_shape: tuple[int, int, int]
    latents: Latents = Given("latent")
    repa: Targets | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    sampler: Callable[[TrainingSet, Position], Sampler] = of_the_set
    is_packed: bool = False
    images_per_batch: float | None = None  # the configuration's batch_size


def build(cfg: DictConfig, network: Mapping[str, Any], device: torch.device) -> Parts:
    """The parts of `cfg` for a network of that `config`, on the device.

    Raises:
        ValueError: `data` or a file that `model` names is wrong or missing.
        OSError: an encoder is neither a folder nor to be had from the hub.
    """
    plain = config.resolved(cfg)
    model, kind = plain["model"], plain["data"]["data_type"]
    dataset = data.make(kind, plain["data"]["dataset"])
    is_bf16 = cfg.training.mixed_precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):  # as in a step
        conditioning = _conditioning(dataset, plain, network, device)
    load = functools.cache(lambda: Autoencoder.load(model["vae_dir"], device=device, tile=2048))
    repa = None
    if model["proj_coeff"] and model["enc_dir"] and network["projector_dim"]:
        vision = radio.load(model["enc_dir"], device=device)
        target = functools.partial(repa_targets, vision)
        repa = Targets(target, network["z_dim"], network["patch_size"])
    side = network["input_size"]
    options: dict[str, Any] = {}
    unit = network["patch_size"]
    if model["vae_dir"] is None or "latent" in dataset.names:
        name = "latent" if "latent" in dataset.names else "image"
        latents, shape = Given(name), tuple(dataset[0][name].shape)
        if model["vae_dir"] is not None:  # for pictures of samples alone
            options["decode"] = lambda z: load().decode(z)
        if dataset.sizes is not None:
            shape = (shape[0], side, side)
    else:
        latents, autoencoder = Encoded(load().encode), load()
        shape, options["decode"] = (autoencoder.channels, side, side), autoencoder.decode
        unit *= autoencoder.factor
        if dataset.sizes is None:
            sides = dataset[0]["image"].shape[1:]
            shape = (autoencoder.channels, *(n // autoencoder.factor for n in sides))
    if kind == "mnist":
        options["sampler"] = shuffled
    options |= _packs(dataset, unit, plain["data"]["pack_tokens"], plain["training"]["seed"])
    if dataset.sizes is not None and not options.get("is_packed"):
        check_sides(dataset.sizes, unit)
    return Parts(dataset, conditioning, shape, latents, repa, **options)


def _packs(dataset: TrainingSet, unit: int, tokens: int | None, seed: int) -> dict[str, Any]:
    """What the parts of packed pictures have; nothing where they are not packed."""
    given = dataset.packs if isinstance(dataset, data.NativeLatents) else None
    if given is not None and tokens is not None:
        raise ValueError("data.pack_tokens and data.dataset.packed_json both make packs: one")
    if given is None and tokens is None:
        return {}
    try:
        packs = TokenPacks(dataset, unit, tokens, given, seed)
    except ValueError as error:
        raise ValueError(f"data.pack_tokens {tokens}: {error}") from error
    return dict(sampler=packs, is_packed=True, images_per_batch=packs.images_per_pack)


def _conditioning(dataset, plain, network, device) -> Conditioning:
    model, run = plain["model"], plain["training"]
    prompts, labels = run["validation_prompts"], run["validation_labels"]
    if network["cap_feat_dim"] is None or "caption" not in dataset.names:
        if prompts is not None:
            raise ValueError("training.validation_prompts are for texts: give validation_labels")
        classes, dropout = network["num_classes"], network["class_dropout_prob"]
        try:
            return ClassConditioning(classes, dropout, labels)
        except ValueError as error:
            raise ValueError(f"training.validation_labels: {error}") from error
    if labels is not None:
        raise ValueError("training.validation_labels are for classes: give validation_prompts")
    if model["text_encoder_dir"] is None:
        raise ValueError("model.text_encoder_dir must be a text encoder's folder, got None")
    names = "max_seq_length", "use_last_hidden_state", "escape_captions", "min_seq_length"
    options = {name: model[name] for name in names}
    if model["escape_captions"] and getattr(dataset, "escape_captions", False):
        raise ValueError("model.escape_captions and data.dataset.escape_captions both escape: one")
    encode = TextEncoder.load(model["text_encoder_dir"], device=device, **options)
    if encode.width != network["cap_feat_dim"]:
        raise ValueError(
            f"model.network.params.cap_feat_dim must be {encode.width}, the text encoder's width, "
            f"got {network['cap_feat_dim']}"
        )
    nothing = encode.nothing
    if model["keep_text_features"]:
        encode = KeptFeatures(encode)
    prompts = prompts or getattr(dataset, "shown", None)  # of a CaptionedFolder its own
    shown = {} if prompts is None else {"shown": prompts}
    return TextConditioning(encode, nothing, model["proportion_empty_prompts"], **shown)
