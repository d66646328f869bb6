"""What ComfyUI (0.3 and later) asks of nodes, as its execution.py, nodes.py and comfy/ have it:
which classes are nodes, which prompts are valid, and how one is run. Stricter where it is lenient.
"""

import inspect
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

Prompt = dict[str, dict[str, Any]]
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
_OPTIONS = {"default", "tooltip", "forceInput", "lazy", "advanced"}
OPTIONS = {
    "INT": _OPTIONS | {"min", "max", "step", "display", "control_after_generate"},
    "FLOAT": _OPTIONS | {"min", "max", "step", "round", "display"},
    "STRING": _OPTIONS | {"multiline", "placeholder", "dynamicPrompts"},
    "BOOLEAN": _OPTIONS | {"label_on", "label_off"},
    "COMBO": _OPTIONS | {"control_after_generate"},
}
HIDDEN = {"UNIQUE_ID", "PROMPT", "EXTRA_PNGINFO", "DYNPROMPT"}


class InterruptProcessingException(Exception):
    pass


class SaveImage:
    """The one that comes with ComfyUI, which fills a list in place of a folder."""

    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image"
    saved: dict[str, list[Image.Image]] = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The images to save."}),
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(self, images, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None):
        levels = (255.0 * images.cpu().numpy()).clip(0, 255).astype("uint8")
        self.saved[filename_prefix] = [Image.fromarray(picture) for picture in levels]
        assert isinstance(prompt, dict)
        return {"ui": {"images": [{"filename": filename_prefix, "type": "output"}]}}


class Comfy:
    """The nodes there are; `modules` are those that nodes import, `progress` what they show."""

    def __init__(self, folder: Path):
        self.nodes: dict[str, type] = {"SaveImage": SaveImage}
        self.progress: list[tuple[int, int]] = []
        self.unloaded, self.interrupted = 0, False
        self.device = torch.device("cpu")
        self.interrupt_after = -1  # updates of a progress bar
        self.outputs: dict[Any, tuple] = {}  # by what they were made of
        self.executed: list[str] = []
        self.modules = self._modules(folder)
        self._objects: dict[tuple[str, str], Any] = {}

    def load_custom_node(self, path: Path) -> None:
        """What a file of the folder custom_nodes has."""
        module = types.ModuleType(str(path.with_suffix("")))
        exec(compile(path.read_text(), path, "exec"), vars(module))
        for name, node in module.NODE_CLASS_MAPPINGS.items():
            check_node(node)
            self.nodes[name] = node
        titles = module.NODE_DISPLAY_NAME_MAPPINGS
        assert {*titles} == {*module.NODE_CLASS_MAPPINGS} and len({*titles.values()}) == len(titles)

    def validate(self, prompt: Prompt) -> dict[str, list[str]]:
        """The errors of each node, as "type: input"."""
        unknown = {
            id: [f"missing_node_type: {node['class_type']}"]
            for id, node in prompt.items()
            if node["class_type"] not in self.nodes
        }
        if unknown:
            return unknown
        is_output = [getattr(self._class(prompt, id), "OUTPUT_NODE", False) for id in prompt]
        assert any(is_output), "prompt_no_outputs"
        found = {id: [*self._errors(prompt, id)] for id in prompt}
        return {id: errors for id, errors in found.items() if errors}

    def run(self, prompt: Prompt) -> dict[str, tuple]:
        """What each node gives, in a thread of its own as in ComfyUI; what did not change is as
        it was."""
        assert self.validate(prompt) == {}
        self.executed, self.interrupted = [], False
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._run, prompt).result()

    @torch.inference_mode()
    def _run(self, prompt: Prompt) -> dict[str, tuple]:
        kept = {id: self._signature(prompt, id) for id in prompt}
        for signature in {*self.outputs} - {*kept.values()}:
            del self.outputs[signature]
        for id in prompt:
            if getattr(self._class(prompt, id), "OUTPUT_NODE", False):
                self._execute(prompt, id)
        return {id: self.outputs[signature] for id, signature in kept.items()}

    def _execute(self, prompt: Prompt, id: str) -> tuple:
        signature = self._signature(prompt, id)
        if signature in self.outputs:
            return self.outputs[signature]
        cls, inputs = self._class(prompt, id), {}
        for name, value in prompt[id]["inputs"].items():
            is_link = isinstance(value, list)
            inputs[name] = self._execute(prompt, value[0])[value[1]] if is_link else value
        hidden = {"UNIQUE_ID": id, "PROMPT": prompt, "EXTRA_PNGINFO": {}, "DYNPROMPT": None}
        for name, kind in cls.INPUT_TYPES().get("hidden", {}).items():
            inputs[name] = hidden[kind]
        node = self._objects.setdefault((id, prompt[id]["class_type"]), cls())
        made = getattr(node, cls.FUNCTION)(**inputs)
        self.executed.append(id)
        result = made.get("result", ()) if isinstance(made, dict) else made
        assert type(result) is tuple and len(result) == len(cls.RETURN_TYPES)
        for kind, value in zip(cls.RETURN_TYPES, result, strict=True):
            check_value(kind, value)
        self.outputs[signature] = result
        return result

    def _class(self, prompt: Prompt, id: str) -> type:
        return self.nodes[prompt[id]["class_type"]]

    def _signature(self, prompt: Prompt, id: str) -> tuple:
        """Of a node and of all that it is made of."""
        node, cls = prompt[id], self._class(prompt, id)
        constants = {k: v for k, v in node["inputs"].items() if not isinstance(v, list)}
        changed = cls.IS_CHANGED(**constants) if hasattr(cls, "IS_CHANGED") else False
        of = [
            (name, (self._signature(prompt, v[0]), v[1]) if isinstance(v, list) else v)
            for name, v in sorted(node["inputs"].items())
        ]
        return node["class_type"], changed, tuple(of)

    def _errors(self, prompt: Prompt, id: str) -> Iterator[str]:
        given, cls = prompt[id]["inputs"], self._class(prompt, id)
        declared = cls.INPUT_TYPES()
        inputs = declared["required"] | declared.get("optional", {})
        own = getattr(cls, "VALIDATE_INPUTS", None)
        own_inputs = [] if own is None else inspect.getfullargspec(own).args[1:]
        yield from (f"unknown_input: {name}" for name in given if name not in inputs)
        for name, (kind, options) in inputs.items():
            if name not in given:
                if name in declared["required"]:
                    yield f"required_input_missing: {name}"
                continue
            value = given[name]
            if isinstance(value, list):
                if len(value) != 2 or value[0] not in prompt:
                    yield f"bad_linked_input: {name}"
                elif self._class(prompt, value[0]).RETURN_TYPES[value[1]] != kind:
                    yield f"return_type_mismatch: {name}"
                continue
            if isinstance(kind, list):
                if value not in kind:
                    yield f"value_not_in_list: {name}"
            elif kind not in WIDGETS:
                yield f"needs_a_link: {name}"
            elif not isinstance(value, (int, float) if kind == "FLOAT" else WIDGETS[kind]):
                yield f"invalid_input_type: {name}"
            elif name not in own_inputs:
                if value < options.get("min", value):
                    yield f"value_smaller_than_min: {name}"
                if value > options.get("max", value):
                    yield f"value_bigger_than_max: {name}"
        if own_inputs:
            constants = {
                name: None if isinstance(given[name], list) else given[name]
                for name in own_inputs
                if name in given
            }
            answer = own(**constants)
            if answer is not True:
                yield f"custom_validation_failed: {answer}"

    def _modules(self, folder: Path) -> dict[str, types.ModuleType]:
        comfy, utils, management, paths = (
            types.ModuleType(name)
            for name in ("comfy", "comfy.utils", "comfy.model_management", "folder_paths")
        )
        comfy.utils, comfy.model_management, comfy.__path__ = utils, management, []
        utils.ProgressBar = lambda total, node_id=None: _ProgressBar(self, total)
        management.InterruptProcessingException = InterruptProcessingException
        management.get_torch_device = lambda: self.device
        management.unload_all_models = self._unload
        management.throw_exception_if_processing_interrupted = self._throw
        names = "checkpoints", "diffusion_models", "diffusers"
        paths.models_dir = str(folder)
        paths.folder_names_and_paths = {name: ([str(folder / name)], set()) for name in names}
        paths.get_folder_paths = lambda name: paths.folder_names_and_paths[name][0][:]
        modules = comfy, utils, management, paths
        return {module.__name__: module for module in modules}

    def _unload(self) -> None:
        self.unloaded += 1

    def _throw(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise InterruptProcessingException


class _ProgressBar:
    def __init__(self, comfy: Comfy, total: int):
        self.comfy, self.total, self.current = comfy, total, 0

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = self.total if total is None else total
        self.current = min(value, self.total)
        self.comfy.progress.append((self.current, self.total))
        self.comfy.interrupted |= len(self.comfy.progress) == self.comfy.interrupt_after

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)


def check_node(cls: type) -> None:
    """That a class is a node: its inputs and outputs are of the forms that ComfyUI reads."""
    assert isinstance(inspect.getattr_static(cls, "INPUT_TYPES"), classmethod)
    for name in ("VALIDATE_INPUTS", "IS_CHANGED"):
        assert isinstance(inspect.getattr_static(cls, name, classmethod(len)), classmethod)
    inputs = cls.INPUT_TYPES()
    assert {"required"} <= {*inputs} <= {"required", "optional", "hidden"}
    assert {*inputs.get("hidden", {}).values()} <= HIDDEN
    named = inputs["required"] | inputs.get("optional", {})
    assert len(named) == len(inputs["required"]) + len(inputs.get("optional", {}))
    for name, entry in named.items():
        assert name.isidentifier() and type(entry) is tuple and len(entry) == 2
        check_input(*entry)
    assert type(cls.RETURN_TYPES) is tuple and all(type(kind) is str for kind in cls.RETURN_TYPES)
    for attribute in ("RETURN_NAMES", "OUTPUT_TOOLTIPS"):
        assert len(getattr(cls, attribute, cls.RETURN_TYPES)) == len(cls.RETURN_TYPES)
    assert type(cls.CATEGORY) is str and type(getattr(cls, "DESCRIPTION", "")) is str
    signature = inspect.signature(getattr(cls, cls.FUNCTION))
    optional = {name: None for name in inputs.get("optional", {})}
    for absent in ({}, optional):  # is called with those that the prompt has
        hidden = inputs.get("hidden", {})
        signature.bind(None, **{name: None for name in inputs["required"]}, **hidden, **absent)


def check_input(kind: Any, options: dict[str, Any]) -> None:
    if isinstance(kind, list):
        assert kind and all(type(choice) is str for choice in kind)
        assert options.get("default", kind[0]) in kind and {*options} <= OPTIONS["COMBO"]
    elif kind in WIDGETS:
        assert {*options} <= OPTIONS[kind], options
        assert type(options["default"]) is WIDGETS[kind]
        numbers = [options[name] for name in ("min", "default", "max") if name in options]
        assert kind == "STRING" or (len(numbers) == 3 and numbers == sorted(numbers))
    else:
        assert kind.isupper() and {*options} <= _OPTIONS - {"default"}


def check_value(kind: str, value: Any) -> None:
    if kind == "IMAGE":
        assert isinstance(value, torch.Tensor) and value.dtype == torch.float32
        assert value.ndim == 4 and value.shape[-1] == 3 and value.device.type == "cpu"
        assert value.min() >= 0 and value.max() <= 1 and value.is_contiguous()
