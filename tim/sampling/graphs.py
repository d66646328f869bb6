"""Steps captured in CUDA graphs: a replay costs the host a few launches instead of all of a step's.

A graph is captured when its key comes in a second run, so that a single run pays for none. The key
is all that a replay cannot follow: shapes, dtypes, devices, settings of torch and of the backend.
Where weights lie elsewhere, all graphs are dropped; weights that change in place are read as they
are. A replay that gives other bits than the step itself is not used.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from tim_kernels.attention import choice as attention
from tim_kernels.dispatch.backend import requested
from tim_kernels.dispatch.torch_private import (
    dispatch_modes,
    is_forward_mode,
    is_functorch_active,
    pytree,
)
from tim_kernels.linear import choice as linear

MOST = 16  # graphs that are kept, each with the memory of its step
Function = Callable[[object, object], Tensor]  # of what a run and what a step has, trees of tensors
Eager = Callable[[], Tensor]


class Graphs:
    """The graphs of one model; one run at a time has them, others go on without."""

    def __init__(self, why_not: str | None = None):
        self._why_not, self._lock = why_not, threading.Lock()
        self._replays: dict[Hashable, Replay | str] = {}
        self._first: dict[Hashable, int] = {}  # the run in which a key came first
        self._places, self._run = None, 0
        self.reasons: dict[str, None] = {}  # why a step of the latest run was no replay

    def __reduce__(self):
        return Graphs, (self._why_not,)  # a copy captures anew

    def begin(self, places: Hashable) -> None:
        """A run begins, of a model whose weights lie at `places`."""
        if places != self._places:
            self._replays, self._first, self._places = {}, {}, places
        self._run += 1

    @contextlib.contextmanager
    def held(self) -> Iterator["Graphs"]:
        """These for a run; none while another run has them."""
        if not self._lock.acquire(blocking=False):
            yield Graphs("another run has the graphs")
            return
        try:
            self.reasons = {}
            yield self
        finally:
            self._lock.release()

    def obstacle(self, device: torch.device) -> str | None:
        """Why no step can be captured or replayed now."""
        why = self._why_not or obstacle(device)
        if why is not None:
            self.reasons[why] = None
        return why

    def step(
        self, eager: Eager, function: Function, key: Hashable, shared: "Shared", inputs
    ) -> Tensor:
        """eager(), which is function(shared.tree, inputs): of what a run's steps share, and of
        what is the step's own."""
        key = key, shared.kinds, kinds(inputs), _settings()
        why = self.obstacle(inputs[0].device)
        if why is None and self._first.setdefault(key, self._run) == self._run:
            why = "a step is captured when its shape comes in a second run"
        if why is None:  # the one used last stands last
            replay = self._replays.pop(key, None) or self._captured(eager, function, shared, inputs)
            self._replays[key] = replay
            if len(self._replays) > MOST:
                del self._replays[next(iter(self._replays))]
            if isinstance(replay, Replay):
                return replay(shared.tree, inputs, self._run)
        self.reasons[why or replay] = None
        return eager()

    def _captured(
        self, eager: Eager, function: Function, shared: "Shared", inputs
    ) -> "Replay | str":
        """A replay, or why there is none."""
        try:
            with torch.inference_mode(False), torch.no_grad():  # buffers that can be filled later
                replay = Replay(function, shared.tree, inputs)
            if torch.equal(replay(shared.tree, inputs, self._run), eager()):
                return replay
            return "its replay gave other bits"
        except RuntimeError as error:
            return f"its capture failed: {error}"


class Shared:
    """A tree of tensors that the steps of a run share, and of which kinds they are."""

    def __init__(self, tree):
        self.tree, self.kinds = tree, kinds(tree)


class Replay:
    """A function captured on buffers of its own."""

    def __init__(self, function: Function, shared, inputs):
        # Zeros: so that what a replay gives cannot be what was there when it was captured.
        self._shared, self._inputs = (pytree.tree_map(_zeros, tree) for tree in (shared, inputs))
        device = inputs[0].device
        self._replay, self._out = capture(lambda: function(self._shared, self._inputs), device)
        self._run = None

    def __call__(self, shared, inputs, run: int) -> Tensor:
        if run != self._run:
            _copy(self._shared, shared)
            self._run = run
        _copy(self._inputs, inputs)
        self._replay()
        return self._out.clone()


def capture(
    function: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """What replays `function`, whose tensors are on `device`, and where its result then lies."""
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()  # what libraries set up at their first call on a stream
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = function()
        current.wait_stream(stream)
    return graph.replay, out


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be captured here and now."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, the state is on {device}"
    if torch.cuda.is_current_stream_capturing():
        return "a graph is being captured around it"
    if torch.is_autocast_enabled(device.type):
        return "autocast casts weights at each call"
    if is_forward_mode() or is_functorch_active() or dispatch_modes():
        return "a transform or a mode looks at each operation"
    return None


def _settings() -> Hashable:
    """What chooses kernels, beside their arguments."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision,
        requested(), attention.requested(), linear.requested(),
        torch.are_deterministic_algorithms_enabled(), cuda.matmul.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )  # fmt: skip


def kinds(tree) -> Hashable:
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in pytree.tree_leaves(tree)
    )


def _zeros(leaf):
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def _copy(own, tree) -> None:
    for mine, given in zip(pytree.tree_leaves(own), pytree.tree_leaves(tree), strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(given)
