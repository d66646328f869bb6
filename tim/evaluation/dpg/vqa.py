"""Networks that answer a question about a picture."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from tim.checks import check_computed
from tim.evaluation.weights import described, load, pretrained

VQA = Callable[[Image.Image, str], str]
MODELS = {
    "blip": "Salesforce/blip-vqa-capfilt-large", "qwen2.5-vl": "Qwen/Qwen2.5-VL-7B-Instruct",
}  # fmt: skip
_IMAGE = "<|image_pad|>"


class BlipVQA:
    """BLIP (arXiv 2201.12086): an RGB picture and a question → a short answer, greedily.

    Args:
        model, processor: of transformers.
        name: what it is called in results.
    """

    def __init__(
        self, model: transformers.BlipForQuestionAnswering, processor: transformers.BlipProcessor,
        name: str | Path,
    ):  # fmt: skip
        self.model, self.processor = model, processor
        self.settings = described("vqa", name, model)

    @classmethod
    def load(
        cls, name: str | Path = MODELS["blip"], device: torch.device | str | None = None
    ) -> "BlipVQA":
        """From a folder or the hub, float32.

        Raises:
            FileNotFoundError: it is in neither.
        """
        model = load(transformers.BlipForQuestionAnswering, name, device, dtype=torch.float32)
        return cls(model, pretrained(transformers.BlipProcessor, name), name)

    @torch.no_grad()
    def __call__(self, picture: Image.Image, question: str) -> str:
        inputs = self.processor(images=picture, text=question, return_tensors="pt")
        tokens = _generated(self.model, **inputs.to(self.model.device), max_new_tokens=20)
        return self.processor.decode(tokens, skip_special_tokens=True)


class QwenVQA:
    """Qwen2.5-VL (arXiv 2502.13923), told to answer yes or no, greedily.

    Args:
        model, tokenizer, images: of transformers; `images` is the image processor.
        name: what it is called in results.
        ask: what is asked, with a place for the question.
    """

    def __init__(
        self,
        model: transformers.Qwen2_5_VLForConditionalGeneration,
        tokenizer: transformers.PreTrainedTokenizerBase,
        images: transformers.BaseImageProcessor,
        name: str | Path,
        ask: str = "{} Answer with yes or no only.",
    ):
        self.model, self.tokenizer, self.images, self.ask = model, tokenizer, images, ask
        self.settings = described("vqa", name, model) | {
            "vqa_ask": ask, "vqa_dtype": str(model.dtype).removeprefix("torch.")
        }  # fmt: skip
        # Transformers 5 wants to be told which tokens are of a picture; 4 finds them itself.
        self._tells = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls, name: str | Path = MODELS["qwen2.5-vl"], device: torch.device | str | None = None
    ) -> "QwenVQA":
        """From a folder or the hub, bfloat16 on a GPU and float32 on a CPU.

        Raises:
            FileNotFoundError: it is in neither.
        """
        is_cpu = torch.device(device or "cpu").type == "cpu"
        dtype = torch.float32 if is_cpu else torch.bfloat16
        model = load(transformers.Qwen2_5_VLForConditionalGeneration, name, device, dtype=dtype)
        tokenizer = pretrained(transformers.AutoTokenizer, name)
        return cls(model, tokenizer, pretrained(transformers.AutoImageProcessor, name), name)

    @torch.no_grad()
    def __call__(self, picture: Image.Image, question: str) -> str:
        # Not by the model's processor: it needs torchvision, for videos.
        images = self.images(images=picture, return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": self.ask.format(question)}]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        patches = int(images["image_grid_thw"].prod()) // self.images.merge_size**2
        inputs = self.tokenizer(prompt.replace(_IMAGE, _IMAGE * patches), return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")} | dict(images)
        if self._tells:
            is_image = inputs["input_ids"] == self.model.config.image_token_id
            inputs["mm_token_type_ids"] = is_image.int()
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        tokens = _generated(self.model, **inputs, max_new_tokens=8)
        answer = tokens[inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(answer, skip_special_tokens=True)


def _generated(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    """The tokens of one answer, greedily.

    Raises:
        FloatingPointError: the network's logits are not finite, of which any token would come.
    """
    options = dict(do_sample=False, num_beams=1, return_dict_in_generate=True, output_logits=True)
    output = model.generate(**inputs, **options)
    check_computed("logits of the answer", torch.cat(output.logits), "the network", model.dtype)
    return output.sequences[0]


def load_vqa(name: str | Path, device: torch.device | str | None = None) -> BlipVQA | QwenVQA:
    """A network by its short name, its name on the hub or its folder.

    Raises:
        FileNotFoundError: it is in neither place.
        ValueError: it is neither a BLIP nor a Qwen2.5-VL.
    """
    name = name if Path(name).is_dir() else MODELS.get(str(name), name)
    kinds = {"blip": BlipVQA, "qwen2_5_vl": QwenVQA}
    kind = pretrained(transformers.AutoConfig, name).model_type
    if kind not in kinds:
        raise ValueError(f"{name} must be one of {', '.join(kinds)}, its config says {kind}")
    return kinds[kind].load(name, device)
