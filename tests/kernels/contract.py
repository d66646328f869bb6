"""What every op promises, as tests over tables of its forms.

The test file of an op has one class with those tables, and tests of what is special to the op:

    class TestSwiGLU(Contract):
        problem = staticmethod(problem)
        parity = over(form=[*FORMS], dtype=[*DTYPES], C=[*WIDTHS])

Each entry of a table holds the arguments of `problem`: the form, dtype, sizes and options of one
call. A promise whose table is empty is not tested. parity.py says how an op is held against its
definition.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from parity import (
    BACKEND,
    EMULATED,
    as_tuple,
    assert_adjoint,
    assert_compiles_once,
    assert_gradcheck,
    assert_nonfinite_like_reference,
    assert_parity,
    assert_same_every_run,
    run,
)
from sweep import st, sweep
from torch import Tensor

from tim_kernels.dispatch.backend import use_backend


class Problem(NamedTuple):
    """A call of an op, the same in eager PyTorch, and what both are differentiable in."""

    fused: Callable
    eager: Callable
    inputs: list[Tensor]


def over(**choices) -> list[dict]:
    """Every combination: a list or a dict is of choices, anything else is the only one."""
    lists = [list(c) if isinstance(c, (list, dict)) else [c] for c in choices.values()]
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*lists)]


LAYOUTS = {  # the same numbers, elsewhere in memory
    "in a wider tensor": lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    "columns first": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "with gaps": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


class Contract:
    """The promises. Tests take an entry of the table that their argument names."""

    problem: Callable[..., Problem]
    parity: list[dict] = []
    on_cpu: list[dict] = []  # large enough for what "auto" takes on a CPU
    empty: list[dict] = []  # without samples or tokens
    layout: list[dict] = []
    partial: list[dict] = []  # one argument at a time is differentiated
    tangent_tolerance: dict = {}  # there, between the reference and ours; PyTorch's if empty
    repeated: list[dict] = []  # large enough for reductions over several programs
    small: list[dict] = []  # float64 differences
    nonfinite: list[dict] = []
    float64: list[dict] = []
    float64_tolerance = 0.0  # between the reference and eager
    compiled: list[list[dict]] = []  # served by one graph each
    draws: dict = {}  # strategies of hypothesis by argument

    def poison(self, inputs: list[Tensor]) -> None:
        """Put NaN and infinity among them."""
        raise NotImplementedError

    def operators(self) -> Iterable[tuple]:
        """An operator and its arguments, for torch.library.opcheck."""
        raise NotImplementedError

    def __init_subclass__(cls):
        for name, test in inspect.getmembers(Contract, inspect.isfunction):
            tables = set(inspect.signature(test).parameters) & set(Contract.__annotations__)
            if name.startswith("test_") and not all(getattr(cls, table) for table in tables):
                setattr(cls, name, None)  # no test of the subclass

    def pytest_generate_tests(self, metafunc):
        for name in metafunc.fixturenames:
            if name in Contract.__annotations__:
                table = getattr(self, name)
                metafunc.parametrize(name, table, ids=[*map(_id, table)])

    def test_parity(self, parity):
        assert_parity(*self.problem(**parity))

    def test_parity_of_auto_on_a_cpu(self, on_cpu):
        fused, eager, inputs = self.problem(**on_cpu)
        assert_parity(fused, eager, [x.cpu() for x in inputs], "auto")

    def test_nothing_to_do(self, empty):
        fused, eager, inputs = self.problem(**empty)
        with use_backend("reference"):
            expected = run(fused, inputs, None, not EMULATED)
        with use_backend(BACKEND):
            ours = run(fused, inputs, None, not EMULATED)
        expected["outputs"] = list(as_tuple(eager(*inputs)))
        for kind, tensors in expected.items():
            torch.testing.assert_close(ours[kind], tensors, rtol=0, atol=0, equal_nan=True)
        assert not any(gradient.any() for gradient in ours["gradients"])

    @pytest.mark.parametrize("place", LAYOUTS)
    def test_layouts(self, layout, place):
        fused, _, inputs = self.problem(**layout)
        with use_backend(BACKEND):
            dense = as_tuple(fused(*inputs))
            placed = as_tuple(fused(*map(LAYOUTS[place], inputs)))
        assert all(map(torch.equal, dense, placed))

    def test_only_the_gradients_that_are_needed(self, partial):
        """Each argument alone has the gradient that it has beside the others."""
        fused, _, inputs = self.problem(**partial)
        with use_backend(BACKEND):
            leaves = [x.clone().requires_grad_() for x in inputs]
            sum(out.square().sum() for out in as_tuple(fused(*leaves))).backward()
            for i, leaf in enumerate(leaves):
                alone = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
                sum(out.square().sum() for out in as_tuple(fused(*alone))).backward()
                assert torch.equal(alone[i].grad, leaf.grad)

    def test_a_tangent_of_one_argument_alone(self, partial):
        fused, _, inputs = self.problem(**partial)
        for i, x in enumerate(inputs):

            def alone(value, i=i):
                return fused(*inputs[:i], value, *inputs[i + 1 :])

            tangents = []
            for backend in ("reference", BACKEND):
                with use_backend(backend):
                    tangents.append(as_tuple(torch.func.jvp(alone, (x,), (x + 1,))[1]))
            for expected, ours in zip(*tangents, strict=True):
                torch.testing.assert_close(ours, expected, **self.tangent_tolerance)

    def test_reruns_are_equal_and_derivatives_adjoint(self, repeated):
        fused, _, inputs = self.problem(**repeated)
        assert_adjoint(assert_same_every_run(fused, inputs), inputs)

    def test_gradcheck(self, small):
        fused, _, inputs = self.problem(**small)
        assert_gradcheck(fused, inputs)

    def test_nan_and_infinity(self, nonfinite):
        fused, _, inputs = self.problem(**nonfinite)
        self.poison(inputs)
        assert_nonfinite_like_reference(fused, inputs)

    def test_float64_runs_on_the_reference(self, float64):
        fused, eager, inputs = self.problem(**float64, dtype=torch.float64)
        with use_backend(BACKEND):
            ours = as_tuple(fused(*inputs))
        with use_backend("reference"):
            assert all(map(torch.equal, ours, as_tuple(fused(*inputs))))
        tolerance = dict(rtol=self.float64_tolerance, atol=self.float64_tolerance)
        torch.testing.assert_close(ours, as_tuple(eager(*inputs)), **tolerance)

    def test_compiles_once_for_all_lengths(self, compiled):
        problems = [self.problem(**case) for case in compiled]
        assert_compiles_once(problems[0].fused, [problem.inputs for problem in problems])

    def test_opcheck(self):
        with use_backend(BACKEND):
            for operator, args in self.operators():
                torch.library.opcheck(operator.torch_op, args)

    @sweep(5)
    def test_any_shape(self, data):
        assert_parity(*self.problem(**self.draw(data)))

    @pytest.mark.nightly
    @sweep(25)
    def test_any_shape_at_length(self, data):
        assert_parity(*self.problem(**self.draw(data)))

    def draw(self, data) -> dict:
        return data.draw(st.fixed_dictionaries(self.draws))


def with_gradients(*args) -> tuple:
    """The arguments of an operator, every floating-point tensor a leaf."""
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in args
    )


def _id(case) -> str:
    if isinstance(case, list):
        return _id(case[0])
    return "-".join(_word(name, value) for name, value in case.items())


def _word(name: str, value) -> str:
    if isinstance(value, (str, torch.dtype)):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{name}={value}"
