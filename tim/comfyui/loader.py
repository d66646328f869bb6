"""The node that opens a network."""

from pathlib import Path
from typing import Any

import torch

from tim import config
from tim.app import assets
from tim.app.common import DTYPES, dtype_of
from tim.opening import is_pipeline, weight_files
from tim.pipelines import TiMClassPipeline, TiMTextPipeline

CATEGORY = "TiM"
PIPELINE = "TIM_PIPELINE"
_OWN = "its own"
_DEFAULT = "default"
_FOLDERS = ("tim", "checkpoints", "diffusion_models", "diffusers")  # of ComfyUI's models


class TiMLoader:
    """Opens a network; ComfyUI keeps it for as long as nothing here changes, its files included."""

    DESCRIPTION = "Opens a network with all that it draws pictures with."
    CATEGORY = CATEGORY
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    OUTPUT_TOOLTIPS = ("For a TiM sampler: of classes or of texts, as the network was trained.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        source = (
            "mnist; emoji; the folder of a run or of a saved pipeline; a weight file; or a "
            "pipeline's name on the hub. A path, or a name in ComfyUI's folders "
            f"models/{', models/'.join(_FOLDERS)}."
        )
        preset = "Of a weight file alone: how its network is built."
        dtype = "Of network and text encoder. Default: bfloat16, on the CPU float32."
        device = "Default: where ComfyUI computes."
        other = "In place of the network's own: a folder or a name on the hub."
        return {
            "required": {
                "source": ("STRING", {"default": "mnist", "tooltip": source}),
                "preset": ([_OWN, *config.presets()], {"default": _OWN, "tooltip": preset}),
                "dtype": ([_DEFAULT, *DTYPES], {"default": _DEFAULT, "tooltip": dtype}),
                "device": ([_DEFAULT, "cpu"], {"default": _DEFAULT, "tooltip": device}),
            },
            "optional": {
                "vae": ("STRING", {"default": "", "tooltip": other}),
                "text_encoder": ("STRING", {"default": "", "tooltip": other}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, source: str | None) -> bool | str:
        """Whether there is such a source, before anything runs; None comes from another node."""
        if source is None or assets.is_name(source):
            return True
        path = _located(source)
        is_there = bool(path) and (Path(path).exists() or is_pipeline(path))
        return is_there or f"there is no network {source!r}"

    @classmethod
    def IS_CHANGED(cls, source: str, **others: Any) -> str:
        """Which files the network is read from, and since when."""
        path = assets.folder(source) if assets.is_name(source) else _located(source)
        stats = [(file, file.stat()) for file in weight_files(path)]
        return " ".join(f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats)

    def load(
        self, source: str, preset: str, dtype: str, device: str, vae: str = "",
        text_encoder: str = "",
    ) -> tuple[TiMClassPipeline | TiMTextPipeline]:  # fmt: skip
        from comfy import model_management  # ComfyUI's own

        where = torch.device("cpu")
        if device == _DEFAULT:
            where = model_management.get_torch_device()
        if where.type != "cpu":
            model_management.unload_all_models()  # makes room
        pipeline = assets.open_pipeline(
            source if assets.is_name(source) else _located(source),
            None if preset == _OWN else preset,
            dtype=dtype_of(None if dtype == _DEFAULT else dtype),
            device=where, vae=vae or None, text_encoder=text_encoder or None,
        )  # fmt: skip
        return (pipeline,)


def _located(source: str) -> str:
    """The path of a name in ComfyUI's folders of models, else what was given."""
    import folder_paths  # ComfyUI's own

    roots = [Path(folder_paths.models_dir, name) for name in _FOLDERS]
    for name in _FOLDERS:  # extra_model_paths.yaml adds some
        if name in folder_paths.folder_names_and_paths:
            roots += map(Path, folder_paths.get_folder_paths(name))
    found = (root / source for root in roots if source and (root / source).exists())
    return str(next(found, source))
