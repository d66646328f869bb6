"""The nodes that draw pictures."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from tim.comfyui.loader import CATEGORY, PIPELINE
from tim.pipelines import TiMClassPipeline, TiMTextPipeline

P = TypeVar("P", TiMClassPipeline, TiMTextPipeline)
_LARGEST_SEED = 2**64 - 1
_LONGEST_SIDE = 16384  # px, ComfyUI's


class TiMTextSampler:
    """Pictures of a prompt."""

    DESCRIPTION = "Draws pictures of what a prompt says."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The pictures, batch_size of them.",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        text: dict[str, Any] = {"default": "", "multiline": True, "dynamicPrompts": True}
        negative = "What guidance leads away from; it needs guidance above 1."
        return _inputs(
            prompt=("STRING", {**text, "tooltip": "What the pictures are to show."}),
            negative_prompt=("STRING", {**text, "tooltip": negative}),
        )

    def sample(
        self, pipeline: TiMTextPipeline, prompt: str, negative_prompt: str, guidance: float,
        batch_size: int, **options: Any,
    ) -> tuple[Tensor]:  # fmt: skip
        pipeline = _of_kind(pipeline, TiMTextPipeline, "texts", "TiM Class Sampler")
        if negative_prompt and guidance <= 1:
            raise ValueError(f"negative_prompt needs a guidance above 1, got {guidance:g}")
        return _drawn(
            pipeline, prompt=prompt, negative_prompt=negative_prompt, guidance=guidance,
            num_images_per_prompt=batch_size, **options,
        )  # fmt: skip


class TiMClassSampler:
    """Pictures of classes."""

    DESCRIPTION = "Draws pictures of classes."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The pictures, batch_size of each class, those of a class side by side.",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        return _inputs(
            labels=("STRING", {"default": "0", "tooltip": "Numbers of classes, such as 3, 1, 4."})
        )

    def sample(
        self, pipeline: TiMClassPipeline, labels: str, batch_size: int, **options: Any
    ) -> tuple[Tensor]:
        pipeline = _of_kind(pipeline, TiMClassPipeline, "classes", "TiM Text Sampler")
        try:
            classes = [int(label) for label in labels.split(",")]
        except ValueError:
            raise ValueError(f"labels must be numbers such as 3, 1, 4; got {labels!r}") from None
        each = [label for label in classes for _ in range(batch_size)]
        return _drawn(pipeline, class_labels=each, **options)


def _inputs(**conditions: tuple) -> dict[str, dict[str, tuple]]:
    side = {"default": 0, "min": 0, "max": _LONGEST_SIDE, "step": 4}
    share = {"min": 0.0, "max": 2.0, "step": 0.05, "round": 0.001}
    own = "In px; 0 is the size that the network was trained at."
    low, high = (
        f"Guidance acts where the noise is {how}, as a share of all there is."
        for how in ("more than this", "less than this; above 1, on the first step too")
    )
    return {
        "required": {
            "pipeline": (PIPELINE, {"tooltip": "What a TiM Loader opened."}),
            **conditions,
            "width": ("INT", {**side, "tooltip": own}),
            "height": ("INT", {**side, "tooltip": own}),
            "steps": ("INT", {"default": 8, "min": 1, "max": 10000, "tooltip": "1 and more."}),
            "guidance": ("FLOAT", {
                "default": 1.5, "min": 1.0, "max": 100.0, "step": 0.1, "round": 0.01,
                "tooltip": "Classifier-free guidance; 1 is none.",
            }),
            "guidance_low": ("FLOAT", {**share, "default": 0.0, "tooltip": low}),
            "guidance_high": ("FLOAT", {**share, "default": 1.0, "tooltip": high}),
            "seed": ("INT", {
                "default": 0, "min": 0, "max": _LARGEST_SEED, "control_after_generate": True,
                "tooltip": "Of the noise that the pictures begin as.",
            }),
            "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "Pictures."}),
        }
    }  # fmt: skip


def _of_kind(pipeline: Any, kind: type[P], of: str, other: str) -> P:
    if not isinstance(pipeline, kind):
        got = type(pipeline).__name__
        raise ValueError(f"a network of {of} is needed, got a {got}: that is for a {other}")
    return pipeline


def _drawn(
    pipeline: TiMClassPipeline | TiMTextPipeline, *, width: int, height: int, steps: int,
    guidance: float, guidance_low: float, guidance_high: float, seed: int, **conditions: Any,
) -> tuple[Tensor]:  # fmt: skip
    """The pictures as ComfyUI has them: (B, H, W, 3) float32 in [0, 1] on the CPU."""
    from comfy import model_management, utils  # ComfyUI's own

    bar = utils.ProgressBar(steps)

    def on_step(*state: Any) -> None:
        bar.update(1)
        model_management.throw_exception_if_processing_interrupted()

    images = pipeline(
        **conditions, width=width or None, height=height or None, num_inference_steps=steps,
        guidance_scale=guidance, guidance_interval=(guidance_low, guidance_high),
        generator=torch.Generator().manual_seed(seed), output_type="pt",
        callback_on_step_end=on_step,
    ).images  # fmt: skip
    assert isinstance(images, Tensor)  # of one size
    return (images.expand(-1, 3, -1, -1).movedim(1, -1).float().cpu().contiguous(),)
