"""A tangent is right in eager mode and refused everywhere it would be lost in silence."""

import pytest
import torch
from parity import BACKEND, DEVICE
from torch.autograd import forward_ad

from tim_kernels import ada_layer_norm, use_backend
from tim_kernels.ada_layer_norm import op
from tim_kernels.dispatch import operators


@pytest.fixture(autouse=True)
def fused():
    torch._dynamo.reset()
    with use_backend(BACKEND):
        yield


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
ROW = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
ONE = torch.ones_like(X)


def norm(x):
    return ada_layer_norm(x, ROW, ROW)


def dual(function, x=X):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, ONE))).tangent


def test_eager_tangents():
    with use_backend("reference"):
        expected = torch.func.jvp(norm, (X,), (X.cos(),))[1]
    actual = torch.func.jvp(norm, (X,), (X.cos(),))[1]
    torch.testing.assert_close(actual, expected)
    assert bool(actual.any())
    assert dual(norm) is not None


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_tangents_do_not_need_gradients(off):
    """Where there are neither, an operator is called as it is; a tangent alone prevents that."""
    expected, tangent = norm(X), dual(norm)
    with off():
        assert not operators.can_differentiate((X,))
        plain = norm(X.clone().requires_grad_() if off is torch.no_grad else X)
        assert torch.equal(plain, expected) and not plain.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(dual(norm), tangent)
        torch.testing.assert_close(torch.func.jvp(norm, (X,), (ONE,))[1], tangent)
        gradient = torch.func.grad(lambda x: norm(x).square().sum())(X)
    assert gradient.any() and operators.can_differentiate((X.clone().requires_grad_(),))


def test_the_bare_operator_refuses():
    def bare(x):
        return op.forward_op.torch_op(
            x, None, None, None, ROW, ROW, None, None, 1e-6, "layer", None, 0
        )[1]

    with pytest.raises(NotImplementedError, match="no forward derivative"):
        torch.func.jvp(bare, (X,), (ONE,))
    with pytest.raises(NotImplementedError, match="no forward derivative"):
        dual(bare)


def test_compiled_code_refuses():
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    refusals = NotImplementedError, torch._dynamo.exc.Unsupported  # from torch 2.14 on dynamo's own
    with pytest.raises(refusals, match="no forward derivative|dual tensor"):
        dual(compiled)
    torch.testing.assert_close(compiled(X), norm(X))
    with pytest.raises(refusals, match="no forward derivative|dual tensor"):
        dual(compiled)  # compiled by now, without a tangent in sight
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?i)jvp|functorch|forward derivative"):
        torch.func.jvp(compiled, (X,), (ONE,))


def test_forward_mode_inside_compile_refuses():
    def derivative(x):
        return torch.func.jvp(norm, (x,), (torch.ones_like(x),))[1]

    with pytest.raises(Exception, match="(?i)forward derivative|exception"):
        torch.compile(derivative, backend="aot_eager", fullgraph=True)(X)


def test_second_derivatives_refuse():
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)
