"""The sampler as something to keep: what is known before the first step is formed before it."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm import tqdm

from tim.checks import check_computed, check_finite, whole
from tim.transports import Transport
from tim_kernels.network.conditioning import is_text, most_bytes, obstacle, text_bytes

from .evaluation import Ahead, ReadOnce, StepByStep
from .graphs import Graphs
from .requests import Request, check_guidance, in_batches
from .steps import Guider, Options, Step

Generators = torch.Generator | list[torch.Generator] | Callable[[Tensor], Tensor] | None
Progress = bool | Callable[[Iterable[Step]], Iterable[Step]]
StepCallback = Callable[[int, float, Tensor], Tensor]
BITS = "on a CPU the bits of a GEMM depend on its rows (together=True takes others)"
GUIDED = "a guider looks at every step"


class Engine:
    """Samples of one network and transport (arXiv 2509.04394, section 3.4), as `sample` makes them.

    Of a network that is TiM and nothing else (`tim_kernels.network.conditioning.obstacle`) it forms
    keys and values of the text once a run. With `together` it also forms the conditioning rows of
    all steps by one pass of GEMMs, and on a GPU captures a step in a CUDA graph when its shape
    comes in a second run. Any other network is called step by step; `explain` says why.

    What is kept for a run, at width C, depth D and the weights' b bytes an element: 12·C·D·b bytes
    a step and row at most, with a row a sample and two with guidance, for text one in all; and
    2·L·C·D·b bytes for L tokens of text. Of TiM-XL in bfloat16 these are 0.8 MB a step and row, and
    33 MB for 256 tokens. Weights that are replaced or written to are noticed, but those that a
    callback writes through `.data` only by the next run.

    Args:
        model: the network F(x, t, r, y), any module.
        together: whether rows of many steps are formed by one pass. By default on every device
            but a CPU, whose GEMMs give other bits for other numbers of rows: there, without it, an
            engine gives the bits of a sampler that calls the network at each step.
        graphs: False captures nothing.
        batch_sizes: a batch is padded to the next of these, so that fewer shapes are captured.
        cache_bytes: what may be kept; where less than a step needs, nothing is formed ahead.

    Example:
        >>> engine = Engine(network, transport)
        >>> images = engine.sample(z, y, y_null, num_steps=4, cfg_scale=1.5)
        >>> text = engine.explain()
    """

    def __init__(
        self,
        model: nn.Module,
        transport: Transport,
        *,
        together: bool | None = None,
        graphs: bool = True,
        batch_sizes: Sequence[int] = (),
        cache_bytes: int = 1 << 30,
    ):
        self.model, self.transport = model, transport
        self._together = together
        self._graphs = self._latest_graphs = Graphs(None if graphs else "graphs=False")
        self._sizes = sorted(whole("a batch size", size, 1) for size in batch_sizes)
        self._cache_bytes = whole("cache_bytes", cache_bytes, 0)
        self._latest = "nothing was sampled yet"

    def sample(
        self,
        z: Tensor,
        y: Tensor,
        y_null: Tensor | None = None,
        *,
        generator: Generators = None,
        return_trajectory: bool = False,
        progress: Progress = False,
        on_step: StepCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Tensor:
        """See `tim.sampling.sample`, which has the same arguments."""
        options = Options(**options)
        steps = options.steps(self.transport)
        if options.is_guided:
            check_guidance(options, y, y_null)
        given = z, y, y_null if options.is_guided else None, [options.cfg_scale] * len(z)
        hooks = progress, on_step, should_stop
        return self._carry(steps, *given, generator, return_trajectory, *hooks, options.guider)

    def stream(
        self,
        requests: Iterable[Request | None],
        *,
        max_batch: SupportsIndex = 8,
        max_waiting: SupportsIndex = 64,
        batch_invariant: bool = False,
    ) -> Iterator[tuple[Request, Tensor]]:
        """Each request and its picture (C, H, W), as they are done.

        Requests of one size, number of steps and kind of condition go in one batch, of `max_batch`
        at most; each keeps its noise and its guidance. While `max_waiting` wait, no more are taken.
        A None among the requests says that no other is there yet: what waits is then drawn.

        A picture is that which its request alone would give, up to rounding: GEMMs may sum in
        another order for another number of rows. With `batch_invariant` each is drawn in a batch
        of its own, and has the bits that it has alone, for the price of batches of one.

        Raises:
            ValueError: options that the transport does not have, tensors that do not fit the model.
            FloatingPointError: a batch's samples are not finite.
        """
        largest = 1 if batch_invariant else whole("max_batch", max_batch, 1)
        waiting = whole("max_waiting", max_waiting, 1)
        for batch in in_batches(requests, largest, waiting):
            options = batch[0].options
            steps = options.steps(self.transport)
            z, y = (torch.stack([getattr(r, name) for r in batch]) for name in ("z", "y"))
            y_null = torch.stack([r.y_null for r in batch]) if options.is_guided else None
            generators = [r.generator for r in batch] if options.stochasticity_ratio else None
            scales = [r.options.cfg_scale for r in batch]
            pictures = self._carry(steps, z, y, y_null, scales, generators, guider=options.guider)
            yield from zip(batch, pictures, strict=True)

    def explain(self) -> str:
        """Print, and return, what was formed ahead in the latest run, and why not the rest."""
        reasons = (f"no replay: {why}" for why in self._latest_graphs.reasons)
        text = "\n".join((self._latest, *reasons))
        print(text)
        return text

    @torch.no_grad()
    def _carry(
        self, steps: list[Step], z: Tensor, y: Tensor, y_null: Tensor | None, scales: list[float],
        generator: Generators = None, return_trajectory: bool = False, progress: Progress = False,
        on_step: StepCallback | None = None, should_stop: Callable[[], bool] | None = None,
        guider: Guider | None = None,
    ) -> Tensor:  # fmt: skip
        _check(z, y, y_null, generator)
        _forget(self.model)
        batch, x = len(z), z.to(torch.float64)
        more = next((size - batch for size in self._sizes if size >= batch), 0)
        is_one = len(set(scales)) == 1
        guidance = x.new_full((batch,), scales[0]) if is_one else x.new_tensor(scales)
        guidance = _padded(guidance, more)
        conditions = _padded(y, more), _padded(y_null, more)

        def draw(stochasticity: float) -> Tensor | None:
            if not stochasticity:
                return None
            return _padded(drawn(x, generator), more)

        states, is_watched = [x], on_step is not None or should_stop is not None
        with self._graphs.held() as graphs:
            given = steps, *conditions, guidance, graphs, guider
            evaluation = self._evaluation(*given)
            shown = progress(steps) if callable(progress) else tqdm(steps, disable=not progress)
            for step in shown:
                if should_stop is not None and should_stop():
                    break
                if is_watched and evaluation.is_stale():
                    evaluation = self._evaluation(*given)
                noise = functools.partial(draw, step.stochasticity)
                x = evaluation.advance(_padded(x, more), step, noise)[:batch]
                if on_step is not None:
                    x = on_step(step.index, step.r, x).to(torch.float64)
                if return_trajectory:
                    states.append(x)
        check_computed("the samples", x, "the network", evaluation.dtype)
        return torch.stack(states).to(z.dtype) if return_trajectory else x.to(z.dtype)

    def _evaluation(
        self, steps: list[Step], y: Tensor, y_null: Tensor | None, guidance: Tensor, graphs: Graphs,
        guider: Guider | None,
    ) -> StepByStep:  # fmt: skip
        """The one that forms most ahead of what may be."""
        self._latest_graphs = graphs
        args = self.model, self.transport, y, y_null, guidance, guider
        device, not_together = guidance.device, BITS if guider is None else GUIDED
        together = device.type != "cpu" if self._together is None else self._together
        together = together and guider is None
        if len(steps) == 1 and graphs.obstacle(device):
            self._latest = "one step: nothing is formed twice"
            return StepByStep(*args)
        if why := obstacle(self.model):
            self._latest = f"step by step: {why}"
            return StepByStep(*args)
        if not together and not is_text(self.model):
            self._latest = f"step by step: {not_together}"
            return StepByStep(*args)
        text, rows = self._needed(y, y_null, guidance, together)
        told = f"{text / 1e6:,.1f} MB of keys and values of the text, {rows / 1e6:,.2f} MB of rows"
        if text + rows > self._cache_bytes:
            self._latest = f"step by step: {told} a step are more than cache_bytes"
            return StepByStep(*args)
        if not together:
            self._latest = (
                f"text read once, {text / 1e6:,.1f} MB; rows at each step: {not_together}"
            )
            return ReadOnce(*args)
        self._latest = f"formed ahead: {told} a step"
        return Ahead(*args[:-1], steps=steps, budget=self._cache_bytes - text, graphs=graphs)

    def _needed(self, y, y_null, guidance, together: bool) -> tuple[int, int]:
        """Bytes of keys and values, and of a step's rows if they are formed ahead, at most."""
        dtype, copies = next(self.model.parameters()).dtype, 1 + (y_null is not None)
        if not is_text(self.model):
            return 0, most_bytes(self.model, len(guidance) * copies, dtype)
        rows = most_bytes(self.model, 1, dtype) if together else 0
        forms = copies if together or copies == 1 else copies + 1
        return forms * text_bytes(self.model, y, dtype), rows


def _check(z: Tensor, y: Tensor, y_null: Tensor | None, generator: Generators) -> None:
    """What the network does not see, or sees too late."""
    if not z.is_floating_point():
        raise ValueError(f"the initial state z must be floating-point, got {z.dtype}")
    for name, condition in (("y", y), ("y_null", y_null)):
        if isinstance(condition, Tensor) and condition.device != z.device:
            raise ValueError(f"{name} must be on {z.device} like z, got {condition.device}")
    if isinstance(generator, (list, tuple)) and len(generator) not in (1, len(z)):
        raise ValueError(
            f"{len(z)} generators are needed, one a sample, or one for all; got {len(generator)}"
        )
    check_finite("the initial state z", z)


def _forget(model: nn.Module) -> None:
    """Let diffusers' caches in a model, or in what a wrapper holds, begin a run anew."""
    for part in (model, *model.children()):
        if getattr(part, "is_cache_enabled", False):
            part._reset_stateful_cache()


def drawn(x: Tensor, generator: Generators) -> Tensor:
    """Noise shaped as x."""
    if generator is not None and not isinstance(generator, (torch.Generator, list, tuple)):
        return generator(x)
    generator = list(generator) if isinstance(generator, tuple) else generator
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _padded(x: Tensor | None, more: int) -> Tensor | None:
    """x (B, …) and its last sample `more` times."""
    return torch.cat((x, x[-1:].expand(more, *x.shape[1:]))) if more and x is not None else x
