"""Every kind of row that a result is made of, what identifies it, and how it is shown.

A row is a dataclass while it is worked with and one flat JSON object, with its `kind`, in a file.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from .table import Column

RESULTS = Path(__file__).parents[1] / "results"
EAGER, COMPILE = "eager", "torch.compile"
FUSED = ("triton", "cuda")
QUACK = "quack"  # whose products end in what follows them
FP8 = "FP8"  # the product of 8 bits

LIMIT = Column("of the limit", lambda row: 100 * row.share_of_limit, "{:.0f} %")
VS_EAGER = Column("eager", "vs_eager", "{:.2f} ×")
VS_COMPILE = Column(COMPILE, "vs_compile", "{:.2f} ×")


@dataclass
class Row:
    kind: ClassVar[str]
    title: ClassVar[str]  # of a table of them

    def json(self) -> dict:
        return {"kind": self.kind, **asdict(self)}


@dataclass
class Facts(Row):
    """What there is once in a result: machine, limits, tuning; state before and after."""

    kind: str
    facts: dict

    def json(self) -> dict:
        return {"kind": self.kind, **self.facts}


@dataclass
class LeftOut(Row):
    kind = "left out"
    what: str
    why: str


@dataclass
class Failure(LeftOut):
    kind = "failure"


@dataclass
class Outcome(Row):
    kind = "test"
    outcome: str
    what: str
    why: str = ""


@dataclass(kw_only=True)
class Timed(Row):
    """A contender's time in a case, which `group` names; the median of rounds, and percentiles."""

    group: ClassVar[tuple[str, ...]]
    contender: str
    ms: float
    ms_10: float | None = None
    ms_90: float | None = None
    timed: str = ""  # how
    dtype: str = "bfloat16"
    tflop_per_s: float = 0.0
    share_of_limit: float = 0.0  # the time at the limits measured in the run, by that taken
    bytes: int = 0
    flops: int = 0
    counted: str = ""  # how bytes and flops are
    error_vs_eager: float | None = None
    vs_eager: float | None = None  # how many times longer that one takes
    vs_compile: float | None = None

    @property
    def case(self) -> tuple:
        return self.kind, *(getattr(self, name) for name in self.group)


@dataclass(kw_only=True)
class Op(Timed):
    kind = "op"
    title = "ops: medians, with the ratio to eager and to torch.compile"
    group = "op", "direction", "shape"
    columns: ClassVar = (
        Column("op"), Column("direction"), Column("shape"), Column("by", "contender"),
        Column("µs", lambda row: 1e3 * row.ms, "{:,.1f}"), Column("GB/s", "gb_per_s", "{:,.0f}"),
        LIMIT, VS_EAGER, VS_COMPILE,
    )  # fmt: skip
    op: str
    direction: str
    shape: str
    gb_per_s: float = 0.0

    @property
    def folder(self) -> str:
        return folder(self.op)


def folder(call: str) -> str:
    """The folder of tim_kernels that a call, such as "swiglu of two tensors", is computed in."""
    name = call.partition(" ")[0].rstrip(",")
    return "ada_layer_norm" if name.startswith("gated_residual") else name


@dataclass(kw_only=True)
class Network(Timed):
    kind = "model"
    title = "networks: medians, with the ratio to eager and to torch.compile"
    group = "model", "batch", "task"
    columns: ClassVar = (
        Column("model"), Column("task"), Column("by", "contender"), Column("batch", form="{}"),
        Column("ms", form="{:,.2f}"), Column("images/s", "samples_per_s", "{:,.1f}"), LIMIT,
        Column("GiB", "peak_gib", "{:.1f}"), Column("J/image", "joules_per_image", "{:.2f}"),
        VS_EAGER, VS_COMPILE,
    )  # fmt: skip
    model: str
    batch: int
    task: str
    samples_per_s: float = 0.0
    peak_gib: float | None = None
    joules_per_image: float | None = None


@dataclass(kw_only=True)
class Turns(Row):
    """Two contenders timed by turns: `ratio` is base / contender, its median over rounds."""

    kind = "turns"
    title = "on a CPU, by turns with PyTorch's own"
    columns: ClassVar = (
        Column("case"), Column("dtype"), Column("against", "base"),
        Column("its ms", "base_ms", "{:,.3f}"), Column("ours, ms", "ms", "{:,.3f}"),
        Column("ratio", form="{:.2f} ×"),
        Column("10–90 %", lambda row: f"{row.ratio_10:.2f}–{row.ratio_90:.2f}"),
    )  # fmt: skip
    subject: str  # "op" or "model"
    case: str
    dtype: str
    contender: str
    base: str
    ms: float
    base_ms: float
    ratio: float
    ratio_10: float
    ratio_90: float
    rounds: int


@dataclass(kw_only=True)
class Host(Row):
    """What a call costs the host, as a multiple of F.layer_norm on a tiny tensor."""

    kind = "host"
    title = "host time of a call, without the launch"
    columns: ClassVar = (
        Column("op"), Column("gradients", lambda row: "with" if row.has_gradients else "without"),
        Column("µs", "us", "{:.1f}"), Column("F.layer_norm, µs", "layer_norm_us", "{:.1f}"),
        Column("multiple", form="{:.1f} ×"), Column("at most", "most", "{:.1f} ×"),
    )  # fmt: skip
    op: str
    has_gradients: bool
    us: float
    layer_norm_us: float
    multiple: float
    most: float


@dataclass(kw_only=True)
class Derivative(Row):
    """dF/dt of a network, or the tangent of attention: an error against float64 and a price."""

    kind = "derivative"
    cost: ClassVar = (
        Column("error", form="{:.1e}"), Column("GFLOP", lambda row: row.flops / 1e9, "{:,.1f}"),
        Column("ms", form="{:,.2f}"),
        Column("MiB", lambda row: None if row.ms is None else row.peak_bytes / 2**20, "{:,.0f}"),
    )  # fmt: skip
    columns: ClassVar = {
        "dF/dt": (
            Column("dF/dt of", "network"), Column("blocks", "depth", "{}"),
            Column("by", "derivative"), Column("dtype"), Column("contender"), *cost,
        ),
        "attention": (
            Column("tangent of attention, bfloat16", "shape"), Column("contender"), *cost,
        ),
    }  # fmt: skip
    what: str
    contender: str
    dtype: str = "bfloat16"
    backend: str | None = None
    error: float | None = None
    flops: int = 0
    ms: float | None = None  # on a GPU alone, as what follows
    ms_10: float | None = None
    ms_90: float | None = None
    timed: str = ""
    peak_bytes: int = 0
    network: str | None = None  # of dF/dt, as what follows
    depth: int | None = None
    tokens: int | None = None
    batch: int | None = None
    derivative: str | None = None  # "dde" or "jvp"
    shape: str | None = None  # of attention, as what follows
    sizes: list[int] | None = None


@dataclass(kw_only=True)
class Fp8Error(Row):
    """‖difference‖ / ‖other‖ of one evaluation of a network."""

    kind = "fp8"
    columns: ClassVar = (
        Column("network"), Column("width", form="{}"),
        Column("bfloat16 to float64", "bfloat16", "{:.2%}"),
        Column("FP8 to float64", "fp8", "{:.2%}"), Column("FP8 to bfloat16", "apart", "{:.2%}"),
    )  # fmt: skip
    network: str
    width: int
    bfloat16: float
    fp8: float
    apart: float


ALL = LeftOut, Failure, Outcome, Op, Network, Turns, Host, Derivative, Fp8Error
KINDS = {cls.kind: cls for cls in ALL}
FACTS = "machine", "limits", "state", "tuning"


def read(entry: dict) -> Row:
    """A row from its JSON."""
    fields = dict(entry)
    kind = fields.pop("kind")
    return Facts(kind, fields) if kind in FACTS else KINDS[kind](**fields)


def fill_ratios(rows: Iterable[Row]) -> None:
    """Give each timed row `vs_eager` and `vs_compile`."""
    timed = [row for row in rows if isinstance(row, Timed)]
    times = {(row.case, row.contender): row.ms for row in timed}
    for row in timed:
        eager, compiled = (times.get((row.case, name)) for name in (EAGER, COMPILE))
        row.vs_eager = None if eager is None else eager / row.ms
        row.vs_compile = None if compiled is None else compiled / row.ms


def load(folder: Path = RESULTS) -> list[dict]:
    """The committed results, oldest first; dry runs are none."""
    results = [json.loads(path.read_text()) | {"file": path.name} for path in folder.glob("*.json")]
    results = [result for result in results if not result.get("dry_run")]
    return sorted(results, key=lambda result: (result["started"], result["file"]))
