"""How people run a model of the published tree, ours or accelerated: plain modules' numbers."""

import copy
import threading

import pytest
import torch
from people import close
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

from tim.models import TiMTransformer2DModel
from tim_kernels import use_backend
from tim_kernels.dispatch.backend import requested


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing(case, is_reentrant):
    from torch.utils.checkpoint import checkpoint

    def call(function, *args):
        return checkpoint(function, *args, use_reentrant=is_reentrant)

    if case.kind == "accelerated":
        case.ours.use_checkpoint = True  # the published switch
    else:
        case.ours.enable_gradient_checkpointing(call)
    kept = []

    def saved(model):
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*case.args)

    case.ours.train(), case.plain.train()
    case.each(saved)
    assert kept[1] < 0.7 * kept[0]
    case.same()


# Transforms


def test_tangents_and_jacobians(case):
    def derivatives(model):
        x, t, r, y = (argument[:1] for argument in case.args)

        def f(x, t):
            return model(x, t, r, y, **jvp_flag(model))

        def small(e):
            return f(x + e, t)[:, 0, 0, :2]

        noise, e = torch.linspace(-1, 1, x.numel()).view_as(x), torch.zeros(())
        divergence = (jvp(lambda x: f(x, t), (x,), (noise,))[1] * noise).sum()  # Hutchinson's
        tangent = jvp(f, (x, t), (torch.ones_like(x), torch.ones_like(t)))[1]
        return tangent, jacfwd(small)(e), jacrev(small)(e), divergence

    for theirs, ours in zip(*map(derivatives, case.both), strict=True):
        assert close(ours, theirs, 1e-4)


def jvp_flag(model):
    return {} if isinstance(model, TiMTransformer2DModel) else dict(jvp=True)


def test_per_sample_gradients(case):
    found = []
    for model in case.both:
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(parameters, x, t, r, y, model=model):
            one = (a[None] for a in (x, t, r, y))
            return functional_call(model, parameters, tuple(one)).square().sum()

        found.append(vmap(grad(loss), (None, 0, 0, 0, 0))(parameters, *case.args))
    theirs, ours = found
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * largest, name


def test_an_ensemble(case):
    models = [copy.deepcopy(case.ours) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.05)
    expected = torch.stack([model(*case.args) for model in models])
    parameters, _ = stack_module_state(models)
    out = vmap(lambda p: functional_call(case.ours, p, case.args))(parameters)
    assert close(out, expected, 1e-4)


# Running


def test_compiled(case):
    torch._dynamo.reset()
    case.same()
    expected = case.plain(*case.args)
    assert close(torch.compile(case.ours, backend="aot_eager")(*case.args), expected)
    for block in case.ours.blocks:
        block.compile(backend="aot_eager")
    case.same()


def test_exported(case):
    program = torch.export.export(case.ours, case.args)
    assert close(program.module()(*case.args), case.plain(*case.args))


def test_two_threads(case):
    expected, found = case.plain(*case.args), []
    backend = requested()

    def run():
        with use_backend(backend):
            found.append(case.ours(*case.args))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(close(out, expected) for out in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    exact = case.plain(*case.args)
    errors = []
    for model in case.both:
        with torch.autocast("cpu", dtype):
            out = model(*case.args)
        errors.append((out - exact).norm() / exact.norm())
    assert errors[1] <= 1.5 * errors[0]


def test_inference_mode_and_then_training(case):
    with torch.inference_mode():
        for model in case.both:
            model(*case.args)
    case.same()


def test_channels_last_and_frozen_parts(case):
    x, *others = case.args
    case.args = x.to(memory_format=torch.channels_last), *others
    case.same()
    case.each(lambda model: model.blocks[0].requires_grad_(False) and None)
    case.each(lambda model: model.t_embedder.requires_grad_(False) and None).same()
