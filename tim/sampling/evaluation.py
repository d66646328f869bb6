"""How a run goes from state to state: asking for everything at each step, or for much ahead.

States are (B, C, H, W) in float64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tim.transports import Transport
from tim.transports.base import StepCoefficients
from tim_kernels import transition_step
from tim_kernels.network.attentions import TextKeys
from tim_kernels.network.conditioning import (
    Layout,
    fingerprint,
    is_text,
    most_bytes,
    names_of,
    obstacle,
    parts,
)
from tim_kernels.network.forward import Prepared, predict, prepare, read_text, run

from .graphs import Graphs, Shared
from .steps import Guider, Step

Draw = Callable[[], Tensor | None]


class Formed(NamedTuple):
    """What was formed ahead for a step; where it may be replayed, also as a row of bytes."""

    tree: tuple[Prepared, StepCoefficients]
    row: Tensor | None = None
    layout: Layout | None = None


class StepByStep:
    """The network is asked anew at each step, as any module F(x, t, r, y) can be.

    y and y_null are its conditioning, guidance is each sample's scale, (B,) in float64.
    """

    def __init__(
        self, model: nn.Module, transport: Transport, y: Tensor, y_null: Tensor | None,
        guidance: Tensor, guider: Guider | None = None,
    ):  # fmt: skip
        self.model, self.transport = model, transport
        self.guidance, self.guider = guidance, guider
        self.dtype = next(model.parameters()).dtype
        self.y = {False: y} if y_null is None else {False: y, True: torch.cat((y, y_null))}

    def is_stale(self) -> bool:
        """Whether the model is no longer what it was when things were formed ahead."""
        return False

    def advance(self, x: Tensor, step: Step, draw: Draw) -> Tensor:
        """The state at step.r; `draw` gives the noise of a stochastic step."""
        batch = len(self.guidance)
        now, then = self._times([step], batch)
        if step.is_guided:
            now, then = now.repeat(2), then.repeat(2)
        F = self._network(_tokens(x, step.is_guided, self.dtype), now, then, step.is_guided)
        F, F_uncond = _halves(F, step.is_guided)
        if self.guider is not None:
            both = (each if each is None else each.to(x.dtype) for each in (F, F_uncond))
            F, F_uncond = self.guider(step, *both), None
        coefficients = self._coefficients([step], batch)
        return transition_step(x, F, coefficients, F_uncond, self.guidance, draw())

    def _network(self, x: Tensor, t: Tensor, r: Tensor, is_guided: bool) -> Tensor:
        return self.model(x, t, r, self.y[is_guided])

    def _times(self, steps: Sequence[Step], rows: int) -> tuple[Tensor, Tensor]:
        """c(t) and c(target), (steps·rows,) each, never rounded below float32: t − r is small where
        steps are many."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        times = self._rows([s.t for s in steps], rows), self._rows([s.target for s in steps], rows)
        now, then = (self.transport.network_time(time).to(dtype) for time in times)
        return now, then

    def _coefficients(self, steps: Sequence[Step], rows: int) -> StepCoefficients:
        """Of steps of one stochasticity, (steps·rows,) each."""
        t, r = self._rows([s.t for s in steps], rows), self._rows([s.r for s in steps], rows)
        return self.transport.step_coefficients(t, r, steps[0].stochasticity)

    def _rows(self, times: list[float], rows: int) -> Tensor:
        if len(times) == 1:
            return self.guidance.new_full((rows,), times[0])
        return self.guidance.new_tensor(times).repeat_interleave(rows)


class ReadOnce(StepByStep):
    """Of a network to which there is no `obstacle`: text is read once a run."""

    def __init__(self, *args):
        super().__init__(*args)
        self.names, self._made_of = names_of(self.model), fingerprint(self.model)
        self._keys: dict[bool, list[TextKeys]] = {}
        self._checked: set[tuple] = set()

    def is_stale(self) -> bool:
        return obstacle(self.model) is not None or fingerprint(self.model) != self._made_of

    def advance(self, x: Tensor, step: Step, draw: Draw) -> Tensor:
        if (key := (step.is_guided, x.shape)) not in self._checked:
            self._check(x, step)
            self._checked.add(key)
        return self._advance(x, step, draw)

    def _advance(self, x: Tensor, step: Step, draw: Draw) -> Tensor:
        return super().advance(x, step, draw)

    def _check(self, x: Tensor, step: Step) -> None:
        """What the model checks at each call, once for each shape."""
        if hasattr(self.model, "_check_inputs"):
            x, y = _tokens(x, step.is_guided, self.dtype), self.y[step.is_guided]
            self.model._check_inputs(x, *self._times([step], len(x)), y, False)

    def _network(self, x: Tensor, t: Tensor, r: Tensor, is_guided: bool) -> Tensor:
        return predict(self.model, x, t, r, self._condition(is_guided), **self.names._asdict())[0]

    def _condition(self, is_guided: bool) -> Tensor | list[TextKeys]:
        """Labels, or every block's keys and values: with and without guidance each for itself,
        since on a CPU their bits depend on the rows of a GEMM."""
        if not is_text(self.model):
            return self.y[is_guided]
        if is_guided not in self._keys:
            self._keys[is_guided] = read_text(self.model, self.y[is_guided])
        return self._keys[is_guided]


class Ahead(ReadOnce):
    """Of such a network: the rows of many steps too, by one pass of GEMMs, and steps replayed.

    Rows of at most `budget` bytes are formed at a time, and of one step at least.
    """

    def __init__(self, *args, steps: Sequence[Step], budget: int, graphs: Graphs):
        super().__init__(*args)
        self._steps, self._budget, self._graphs = steps, budget, graphs
        self._formed: dict[int, Formed] = {}  # of steps to come
        self._shared: dict[bool, Shared] = {}  # with guidance and without
        graphs.begin(self._made_of.places)

    def _advance(self, x: Tensor, step: Step, draw: Draw) -> Tensor:
        if step.index not in self._formed:
            self.form(step)
        formed, guided = self._formed.pop(step.index), step.is_guided
        if guided not in self._shared:
            text = self._condition(guided) if is_text(self.model) else None
            self._shared[guided] = Shared((text, self.guidance))
        shared, noise = self._shared[guided], draw()
        eager = functools.partial(self._step, guided, formed.tree, shared.tree, x, noise)
        if formed.row is None:
            return eager()

        def from_row(tree, inputs) -> Tensor:
            x, row, noise = inputs
            return self._step(guided, formed.layout.trees(row[None])[0], tree, x, noise)

        key = guided, formed.layout.places
        return self._graphs.step(eager, from_row, key, shared, (x, formed.row, noise))

    def _step(self, is_guided: bool, tree, shared, x: Tensor, noise: Tensor | None) -> Tensor:
        (prepared, coefficients), (text, guidance) = tree, shared
        tokens, prepared = _tokens(x, is_guided, self.dtype), prepared._replace(text=text)
        out, _ = run(self.model, tokens, prepared, rope_order=self.names.rope_order)
        F, F_uncond = _halves(out, is_guided)
        return transition_step(x, F, coefficients, F_uncond, guidance, noise)

    def _condition(self, is_guided: bool) -> Tensor | list[TextKeys]:
        if is_guided or True not in self.y or not is_text(self.model):
            return super()._condition(is_guided)
        if False not in self._keys:  # those of both hold those of one
            half = len(self.guidance)
            keys = super()._condition(True)
            self._keys[False] = [TextKeys(k[:half], v[:half]) for k, v in keys]
        return self._keys[False]

    def form(self, step: Step) -> None:
        """Rows of the steps of this kind that come and that there is room for."""
        has_text, batch = is_text(self.model), len(self.guidance)
        rows = 1 if has_text else batch * (1 + step.is_guided)  # text is not in what modulates
        room = max(1, self._budget // most_bytes(self.model, rows, self.dtype))
        steps = [s for s in self._steps[step.index :] if s.kind == step.kind][:room]
        condition = [] if has_text else self.y[step.is_guided].repeat(len(steps))
        times, names = self._times(steps, rows), self.names
        prepared = prepare(self.model, *times, condition, new_condition=names.new_condition)
        known, count = (prepared, self._coefficients(steps, batch)), len(steps)
        if self._graphs.obstacle(self.guidance.device) is None:
            layout = Layout(known, count)
            packed = layout.pack(known, count)
            trees = zip(layout.trees(packed), packed, [layout] * count, strict=True)
        else:
            trees = ((tree,) for tree in parts(known, count))
        for s, formed in zip(steps, trees, strict=True):
            self._formed[s.index] = Formed(*formed)


def _tokens(x: Tensor, is_guided: bool, dtype: torch.dtype) -> Tensor:
    """What the network is given of a state, twice for guidance."""
    return x.to(dtype).repeat(2, 1, 1, 1) if is_guided else x.to(dtype)


def _halves(F: Tensor, is_guided: bool) -> tuple[Tensor, Tensor | None]:
    if not is_guided:
        return F, None
    F, F_uncond = F.chunk(2)
    return F, F_uncond
