"""The page of `tim app`: what a pipeline draws, in a browser."""

import dataclasses
import math
import os
import random
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tim.requirements import require

require("gradio", extra="app")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr  # noqa: E402

from tim.app import drawing, record  # noqa: E402
from tim.app.settings import Pipeline, Settings  # noqa: E402
from tim.data.classes import imagenet  # noqa: E402
from tim.images import step_label  # noqa: E402
from tim.pipelines import TiMTextPipeline  # noqa: E402

PICTURES, SIDE_BY_SIDE = "Pictures", "Steps side by side"
STEPS, COMPARED = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 32)
MOST_PICTURES = 8
MOST_POSITIONS = 16384  # of a picture: 4096 × 4096 px, where one is 32 × 32
PROMPTS = (
    "a red fox asleep in fresh snow",
    "a lighthouse in a storm, oil painting",
    "a bowl of ramen on a wooden table, seen from above",
)
LABELS = (207, 88, 387, 417, 963, 979)  # of ImageNet
SMALL = 128  # px: sides up to it are shown enlarged, pixels as squares
FEW = 20  # classes: so many are buttons
OFTEN = 0.5  # s between two looks at what is drawn
QUIET: dict[str, Any] = dict(queue=False, show_progress="hidden", api_visibility="private")
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        body_background_fill="*neutral_100", background_fill_primary="white",
        block_border_width="1px", block_border_color="*neutral_200",
        block_title_background_fill="none", block_title_background_fill_dark="none",
        block_title_text_color="*body_text_color", block_title_text_color_dark="*body_text_color",
        block_title_padding="0", block_label_text_color="*body_text_color",
        input_background_fill="*neutral_50", input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600", input_border_width="1px", input_shadow="none",
        checkbox_label_shadow="none", checkbox_label_background_fill="*neutral_100",
        button_secondary_shadow="none", button_secondary_background_fill="*neutral_100",
        button_primary_shadow="none",
    ),
    "css_paths": Path(__file__).with_suffix(".css"),
    "footer_links": ["api", "settings"],
    "show_error": True,
    "ssr_mode": False,  # which needs Node.js
}  # fmt: skip
_EXPECTED = ValueError, ArithmeticError, torch.OutOfMemoryError
_PROGRESS = gr.Progress()


def page(
    pipeline: Pipeline, model: str, config: str | None = None, *,
    examples: Sequence[Any] | None = None, guidance: float = 1.5,
) -> gr.Blocks:  # fmt: skip
    """A page that draws with `pipeline`, for one visitor at a time; the others wait their turn.

    Args:
        model, config: what it was opened from, which the pictures' metadata names.
        examples: prompts or labels to click.
        guidance: that the page begins with.

    Raises:
        ValueError: the pipeline is without a text encoder.

    Example::

        page(pipeline, "runs/digits").launch(**LAUNCH)
    """
    if isinstance(pipeline, TiMTextPipeline) and pipeline.text_encoder is None:
        raise ValueError("the page needs a pipeline with a text encoder")
    return _Page(pipeline, model, config, examples, guidance).blocks


class _Page:
    """Its components, by their names, and what they do."""

    def __init__(
        self, pipeline: Pipeline, model: str, config: str | None, examples: Sequence[Any] | None,
        guidance: float,
    ):  # fmt: skip
        self.pipeline = pipeline
        device = str(pipeline.transformer.device)
        self.usual = Settings(model, ("0",), config, device=device).filled(pipeline)
        self.origin = {
            "weights": drawing.weights_of(pipeline, model), "made_with": drawing.made_with()
        }  # fmt: skip
        self.is_text = isinstance(pipeline, TiMTextPipeline)
        network = pipeline.transformer.config
        self.can_guide = self.is_text or network.class_dropout_prob > 0
        self.unit = pipeline.vae_scale_factor * network.patch_size  # px
        self.is_small = self.usual.height <= SMALL
        self.waiting: set[str] = set()  # sessions
        self.stopped: set[str] = set()
        with gr.Blocks(
            title="Transition Models", analytics_enabled=False, delete_cache=(600, 3600)
        ) as blocks:  # s: old pictures leave the disk
            gr.Markdown(self._headline())
            with gr.Row(elem_classes="tim"):
                with gr.Column(elem_classes="ask"):
                    self._ask(examples)
                with gr.Column(elem_classes="drawn"):
                    self._show()
                with gr.Column(elem_classes="settings"):
                    self._settings(guidance)
                    self._more()
            self._wire(blocks)
        self.blocks = blocks.queue(max_size=64)

    def _headline(self) -> str:
        usual, network = self.usual, self.pipeline.transformer
        size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        return (
            f"# Transition Models\n**{usual.model}** · {size:,.1f} M parameters · "
            f"{usual.height} × {usual.width} px · {usual.dtype} on {usual.device}"
        )

    def _ask(self, examples: Sequence[Any] | None) -> None:
        classes = 0 if self.is_text else self.pipeline.transformer.config.num_classes
        is_named = classes == len(imagenet())
        if examples is None:
            examples = PROMPTS if self.is_text else LABELS if is_named else ()
        first = examples[0] if examples else "" if self.is_text else 0
        if self.is_text:
            self.what = gr.Textbox(
                first, label="Prompt", placeholder="What to draw", lines=2, max_lines=6
            )
        elif is_named:
            names = [(f"{label} · {', '.join(of)}", label) for label, of in enumerate(imagenet())]
            self.what = gr.Dropdown(names, value=first, label="Class")
        elif classes <= FEW:
            self.what = gr.Radio(list(range(classes)), value=first, label="Class")
        else:
            self.what = gr.Number(first, label="Class", info=f"0 to {classes - 1}")
        self.generate = gr.Button("Generate", variant="primary")
        self.stop = gr.Button("Stop", variant="stop", visible=False)
        if examples:
            labels = [imagenet()[label][0] for label in examples] if is_named else None
            gr.Examples([[one] for one in examples], self.what, example_labels=labels)

    def _show(self) -> None:
        squares = ["squares"] if self.is_small else []
        self.gallery = gr.Gallery(
            label="Pictures", show_label=False, format="png", object_fit="contain", height="auto",
            fit_columns=False, interactive=False, buttons=["download", "fullscreen"],
            elem_classes=["pictures", *squares],
        )  # fmt: skip
        self.again = gr.Textbox(
            label="The same again", info="A downloaded picture holds its settings, too: tim sample "
            "--like image.png", buttons=["copy"], max_lines=3, interactive=False, visible=False,
        )  # fmt: skip

    def _settings(self, guidance: float) -> None:
        with gr.Group():
            self.mode = gr.Radio([PICTURES, SIDE_BY_SIDE], value=PICTURES, show_label=False)
            with gr.Group() as self.alike:
                steps = dict(step=1, label="Steps", buttons=[])
                self.steps = gr.Slider(STEPS[0], STEPS[-1], self.usual.steps, **steps)
                with gr.Row(elem_classes="natural"):
                    for steps in STEPS:
                        gr.Button(str(steps), size="sm").click(
                            None, None, self.steps, js=f"() => {steps}", **QUIET
                        )
                count = dict(step=1, label="Number of pictures", buttons=[])
                self.count = gr.Slider(1, MOST_PICTURES, 4, **count)
            self.compared = gr.CheckboxGroup(
                list(STEPS), value=list(COMPARED), label="Steps", visible=False
            )
            self.guidance = gr.Slider(
                1, 10, guidance if self.can_guide else 1, step=0.1, label="Guidance", buttons=[],
                visible=self.can_guide,
            )  # fmt: skip
            self.seed = gr.Number(0, label="Seed")
            self.is_random = gr.Checkbox(True, label="Random")

    def _more(self) -> None:
        is_guided, usual = self.can_guide, self.usual
        with gr.Accordion("Size" + " and guidance interval" * is_guided, open=False):
            with gr.Row():
                sides = dict(step=self.unit, info=f"multiples of {self.unit} px", min_width=120)
                self.height = gr.Number(usual.height, label="Height", **sides)
                self.width = gr.Number(usual.width, label="Width", **sides)
            with gr.Row(visible=is_guided):
                ends = dict(step=0.05, min_width=120, buttons=[])
                self.low = gr.Slider(0, 1, 0, label="Guidance above time", **ends)
                self.high = gr.Slider(0, 1, 1, label="and below", **ends)

    def _wire(self, blocks: gr.Blocks) -> None:
        asked = [
            self.what, self.mode, self.steps, self.compared, self.count, self.guidance, self.low,
            self.high, self.height, self.width, self.seed, self.is_random,
        ]  # fmt: skip
        buttons = [self.generate, self.stop]
        self.mode.change(_switched, self.mode, [self.alike, self.compared], **QUIET)
        asks = [self.generate.click, *([self.what.submit] if self.is_text else [])]
        drawn = gr.on(asks, self._begin, None, buttons, **QUIET).then(
            self._draw, asked, [self.gallery, self.again, self.seed], api_name="generate",
            show_progress_on=self.gallery, concurrency_limit=1,
        )  # fmt: skip
        drawn.success(self._end, None, buttons, **QUIET)
        drawn.failure(self._end, None, buttons, **QUIET)
        self.stop.click(self._stop, None, None, **QUIET)
        blocks.unload(self._stop)

    def _begin(self, request: gr.Request) -> tuple[gr.Button, gr.Button]:
        self.waiting.add(request.session_hash)
        return gr.Button(visible=False), gr.Button(visible=True)

    def _stop(self, request: gr.Request) -> None:
        """The visitor's own pictures, drawn now or waited for."""
        self.stopped |= self.waiting & {request.session_hash}

    def _goes_on(self, session: str) -> bool:
        return session not in self.stopped

    def _end(self, request: gr.Request) -> tuple[gr.Button, gr.Button]:
        self.waiting.discard(request.session_hash)
        self.stopped.discard(request.session_hash)
        return gr.Button(visible=True), gr.Button(visible=False)

    def _draw(
        self, what: Any, mode: str, steps: int, compared: list[int], count: int, guidance: float,
        low: float, high: float, height: int, width: int, seed: int, is_random: bool,
        request: gr.Request, progress: gr.Progress = _PROGRESS,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Pictures with captions, the commands that draw them, and the seed of the first."""
        seed = random.randrange(2**32) if is_random else seed
        given = dict(
            what=(str(what),), steps=steps, guidance=guidance, guidance_interval=(low, high),
            height=height, width=width, seed=seed,
        )  # fmt: skip
        try:
            asked = dataclasses.replace(self.usual, **given).filled(self.pipeline)
            runs = self._runs(asked, sorted(compared) if mode == SIDE_BY_SIDE else count)
            most = len(runs) if mode == SIDE_BY_SIDE else 4 if self.is_small else 2
            columns = min(len(runs), most)
            again = runs if mode == SIDE_BY_SIDE else [dataclasses.replace(asked, count=count)]
            again = "\n".join(map(self._command, again))
            if self.is_text and (unread := self.pipeline._encoder().beyond(what)):
                gr.Warning(f"The prompt is too long, the network does not read “{unread}”")
            goes_on = partial(self._goes_on, request.session_hash)
            if mode == SIDE_BY_SIDE and goes_on():  # what is slow but once is in nobody's time
                self._picture(dataclasses.replace(asked, steps=2), lambda taken: goes_on())
            shown, told = [], time.monotonic()
            for captioned in self._drawn(runs, goes_on, progress):
                shown.append(captioned)
                if time.monotonic() > told + OFTEN:
                    yield gr.Gallery(shown, columns=columns), gr.skip(), seed
                    told = time.monotonic()
            yield gr.Gallery(shown, columns=columns), gr.Textbox(again, visible=True), seed
        except _EXPECTED as error:
            raise gr.Error(str(error), title="Not drawn", print_exception=False) from error

    def _runs(self, asked: Settings, several: int | list[int]) -> list[Settings]:
        """One for each picture: of so many, or at each number of steps."""
        if asked.height * asked.width > MOST_POSITIONS * self.unit**2:
            side = math.isqrt(MOST_POSITIONS) * self.unit
            raise ValueError(
                f"height × width must be at most {side} × {side} px, got {asked.height} × "
                f"{asked.width}"
            )
        if several == []:
            raise ValueError("choose at least one number of steps")
        if isinstance(several, list):
            return [dataclasses.replace(asked, steps=steps) for steps in several]
        return [
            asked.single(asked.what[0], seed) for seed in range(asked.seed, asked.seed + several)
        ]

    def _drawn(
        self, runs: list[Settings], goes_on: Callable[[], bool], progress: gr.Progress
    ) -> Iterator[tuple[Image.Image, str]]:  # fmt: skip
        """Each picture, with its caption."""
        total, before = sum(run.steps for run in runs), 0
        for run in runs:
            if not goes_on():
                return

            def at_step(taken: int, run: Settings = run, before: int = before) -> bool:
                progress((before + taken, total), desc=step_label(run.steps))
                return goes_on()

            yield self._picture(run, at_step)
            before += run.steps

    def _picture(self, run: Settings, at_step: Callable[[int], bool]) -> tuple[Image.Image, str]:
        taken = 0

        def on_step(pipeline: Pipeline, step: int, time: float, state: dict[str, Any]) -> None:
            nonlocal taken
            taken = step + 1
            pipeline._interrupt = not at_step(taken)

        start = time.perf_counter()
        (drawn,) = drawing.draw(self.pipeline, run, on_step=on_step)
        seconds = time.perf_counter() - start
        if taken < run.steps:
            return drawn.picture, f"stopped at {taken} of {step_label(run.steps)}"
        written = record.written({"settings": dataclasses.asdict(run), **self.origin})
        drawn.picture.info |= written  # gradio writes it into the file
        return drawn.picture, f"{step_label(run.steps)}\n{seconds:.2f} s"

    def _command(self, run: Settings) -> str:
        """The one that draws the same picture on the same machine."""
        options = []
        for name, usual in dataclasses.asdict(self.usual).items():
            value = getattr(run, name)
            if value != usual and name not in ("model", "what"):
                values = value if isinstance(value, tuple) else [value]
                options += [f"--{name.replace('_', '-')}", *map(str, values)]
        return shlex.join(["tim", "sample", run.model, *run.what, *options])


def _switched(mode: str) -> tuple[gr.Group, gr.CheckboxGroup]:
    return gr.Group(visible=mode == PICTURES), gr.CheckboxGroup(visible=mode == SIDE_BY_SIDE)
