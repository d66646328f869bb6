"""What people do to a model of the published tree, done to ours, to an accelerated one, and to
plain eager modules with the same weights: the same numbers, or a refusal in words."""

import copy
import io
import pickle
import threading

import pytest
import torch
from eager import EagerTiM, randomise
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

from tim.models import TiMTransformer2DModel
from tim_kernels import accelerate, use_backend
from tim_kernels.dispatch.backend import interpreting, requested

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.nightly)]


class Case:
    """`plain` modules and `ours`, ours or accelerated, of the same weights; inputs for both."""

    def __init__(self, kind: str, text: bool):
        config = TINY | dict(cap_feat_dim=8 if text else None)
        self.text, self.kind = text, kind
        self.plain = randomise(EagerTiM(**config)).eval()
        if kind == "ours":
            self.ours = TiMTransformer2DModel(**config).eval()
            self.ours.load_state_dict(self.plain.state_dict())
        else:
            self.ours = copy.deepcopy(self.plain)
            report = accelerate(self.ours)
            assert report.fused == [""], str(report)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 4, 6, generator=g)
        y = torch.randn(2, 3, 8, generator=g) if text else torch.tensor([1, 5])
        self.args = x, torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.6]), y

    @property
    def both(self):
        return self.plain, self.ours

    def each(self, do):
        """`do` to both, with the same random numbers; what it returns replaces the model."""
        for name in ("plain", "ours"):
            torch.manual_seed(0)
            changed = do(getattr(self, name))
            if isinstance(changed, nn.Module):
                setattr(self, name, changed)
        return self

    def same(self, tolerance=2e-5, gradients=True):
        """Outputs agree, and gradients, by name, of whatever has one."""
        found = []
        for model in self.both:
            model.zero_grad()
            with torch.set_grad_enabled(gradients):
                out = model(*self.args)
            if gradients:
                out.square().sum().backward()
            found.append(out.detach())
        assert close(found[1], found[0], tolerance)
        if gradients:
            theirs, ours = (
                {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                for model in self.both
            )
            assert ours.keys() == theirs.keys()
            largest = max(gradient.norm() for gradient in theirs.values())
            for name, gradient in theirs.items():
                assert (ours[name] - gradient).norm() <= 5 * tolerance * largest, name
        return found[0]


def close(a, b, tolerance=2e-5):
    return (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.fixture(params=["ours", "accelerated"])
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["class", "text"])
def text(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def case(request, kind, text):
    if request.param == "triton" and not (interpreting() or torch.cuda.is_available()):
        pytest.fail("Triton cannot run here: set TRITON_INTERPRET=1")
    with use_backend(request.param):
        yield Case(kind, text)


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def on(model, *names):
    """The named modules, by endings; of linear layers, all of them for "*"."""
    wanted = linears(model) if names == ("*",) else [
        name for name, _ in model.named_modules() if name.endswith(names)
    ]  # fmt: skip
    assert wanted
    return [(name, model.get_submodule(name)) for name in wanted]


# Files


def test_saving_writes_every_weight(case, tmp_path):
    from safetensors.torch import load_file, save_model

    before = case.ours.state_dict()
    case.same()
    with torch.no_grad():
        for tensor in before.values():
            tensor.mul_(1.1)  # through a state dict from before the first forward
        for parameter in case.plain.parameters():
            parameter.mul_(1.1)
    case.same()
    save_model(case.ours, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys()
    block = io.BytesIO()
    torch.save(case.ours.blocks[0].state_dict(), block)
    own = sum(p.nbytes for p in case.ours.blocks[0].parameters())
    assert block.tell() < own + 16_000
    case.ours.share_memory()
    case.ours(*case.args)
    assert all(parameter.is_shared() for parameter in case.ours.parameters())


def test_copies_and_pickles(case):
    expected = case.plain(*case.args)
    file = io.BytesIO()
    torch.save(case.ours, file)
    file.seek(0)
    again = [
        copy.deepcopy(case.ours),
        pickle.loads(pickle.dumps(case.ours)),
        torch.load(file, weights_only=False),
        replica(case.ours),
    ]
    with torch.no_grad():
        for parameter in case.ours.parameters():
            parameter.zero_()  # none of them reads the original's
    for model in again:
        assert close(model(*case.args), expected)
        if case.kind == "accelerated":
            assert type(model) is type(case.ours) and type(model) is not EagerTiM


def replica(model):
    """As DataParallel makes one a device: parameters are plain attributes of new modules."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        twin = copies[id(module)]
        for name, child in module._modules.items():
            if child is not None:
                setattr(twin, name, copies[id(child)])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach().clone())
    return copies[id(model)]


def test_weights_that_are_replaced(case):
    """All of it after a first call."""
    case.same()
    scaled = {name: 0.9 * tensor for name, tensor in case.plain.state_dict().items()}
    case.each(lambda model: model.load_state_dict(scaled) and None).same()
    case.each(lambda model: model.load_state_dict(scaled, assign=True) and None).same()
    case.each(lambda model: model.double().float()).same()

    def tie(model):
        model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
        model.blocks[1].mlp = model.blocks[0].mlp

    case.each(tie).same()

    def swap(model):
        for parameter in model.parameters():
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.2))

    case.each(swap).same()


# Adapters and other layers


def test_lora_of_peft(case, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=2, target_modules=linears(case.plain), init_lora_weights=False)
    case.same()  # adapters come after the first call
    base = copy.deepcopy(case.ours)
    case.each(lambda model: get_peft_model(model, config).eval())
    case.ours.load_state_dict(case.plain.state_dict())
    case.same()
    adapters = [p for n, p in case.ours.named_parameters() if "lora_" in n]
    used = [p for n, p in case.ours.named_parameters() if "lora_" in n and "projector" not in n]
    assert len(adapters) > 40 and all(p.grad is not None and p.grad.any() for p in used)

    def step(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and parameter.grad is not None:
                    parameter -= 1e-2 * parameter.grad / (1e-9 + parameter.grad.norm())

    expected = case.each(step).same()
    case.ours.save_pretrained(tmp_path)
    assert close(PeftModel.from_pretrained(base, tmp_path).eval()(*case.args), expected)
    case.each(lambda model: model.add_adapter("second", config))
    case.ours.load_state_dict(case.plain.state_dict())
    case.each(lambda model: model.set_adapter("second")).same()
    case.each(lambda model: model.set_adapter("default"))
    case.each(lambda model: model.merge_and_unload())
    assert close(case.same(gradients=False), expected, 1e-4)


def test_parametrizations(case):
    class Scale(nn.Module):
        def forward(self, weight):
            return 1.5 * weight

    def do(model):
        for _, layer in on(model, "qkv_d", "attn.proj", "fc1_x", "mlp.0", "linear"):
            parametrize.register_parametrization(layer, "weight", Scale())
        for _, layer in on(model, "attn.q_norm", "embedding_table", "y_embedder.norm")[:3]:
            parametrize.register_parametrization(layer, "weight", Scale())
        parametrize.register_parametrization(model.x_embedder.proj, "weight", Scale())

    case.same()
    case.each(do).same()


@pytest.mark.parametrize("norm", [
    nn.utils.weight_norm, nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norms(case, norm):
    case.each(lambda model: [norm(layer) for _, layer in on(model, "*")] and None)
    case.ours.load_state_dict(case.plain.state_dict())
    case.same()


def test_pruning(case):
    case.same()

    def do(model):
        for _, layer in on(model, "*"):
            prune.l1_unstructured(layer, "weight", 0.3)

    case.each(do).same()
    case.each(lambda model: [prune.remove(layer, "weight") for _, layer in on(model, "*")] and None)
    case.same()


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_weights(case, config):
    from torchao import quantization

    make = getattr(quantization, config)
    case.each(lambda model: quantization.quantize_(model, make()))
    case.same(1e-4, gradients=False)


def test_layers_of_other_classes(case):
    class Int8Linear(nn.Module):
        """As bitsandbytes keeps one: int8 rows and their scales."""

        def __init__(self, linear):
            super().__init__()
            self.scale = nn.Parameter(linear.weight.detach().abs().amax(1) / 127)
            rounded = (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8)
            self.weight = nn.Parameter(rounded, requires_grad=False)
            self.bias = linear.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight * self.scale[:, None], self.bias)

    def do(model, is_embedder):
        for name, layer in on(model, "*"):
            if ("t_embedder" in name or "delta_embedder" in name) == is_embedder:
                model.set_submodule(name, Int8Linear(layer))

    case.same()
    expected = case.each(lambda model: do(model, False)).same()
    do(case.ours, True)  # where the plain tree would make its input int8
    assert close(case.ours(*case.args), expected, 0.05)


# Hooks


def test_every_hook_runs(case):
    case.same()
    fired, outputs = [], []
    for model in case.both:
        names, kept = [], {}

        def after(module, args, out, name="", names=names, kept=kept):
            names.append(("after", name))
            kept.setdefault(name, out)

        for name, module in model.named_modules():
            if name and not name.startswith("projector"):
                module.register_forward_hook(lambda m, a, o, n=name, f=after: f(m, a, o, n))
                module.register_forward_pre_hook(
                    lambda m, a, n=name, to=names: to.append(("before", n))
                )
                if not isinstance(module, nn.Embedding):
                    module.register_full_backward_hook(
                        lambda m, i, o, n=name, to=names: to.append(("backward", n))
                    )
        model(*case.args).square().sum().backward()
        fired.append(set(names))
        outputs.append(kept)
    assert fired[1] >= fired[0]
    theirs, ours = outputs
    for name in theirs:
        assert close(ours[name].flatten(), theirs[name].flatten(), 1e-4), name
    case.same()


@pytest.mark.parametrize("name", [
    "attn", "mlp", "norm1", "attn.q_norm", "adaLN_modulation", "blocks.0", "t_embedder",
    "t_embedder.mlp.1", "x_embedder", "y_embedder", "final_layer", "final_layer.norm_final",
])  # fmt: skip
def test_hooks_that_change_an_output(case, name):
    def do(model):
        for found, module in model.named_modules():
            if found == name or found.endswith("." + name):
                module.register_forward_hook(lambda module, args, out: out + out.roll(1, -1))

    before = case.plain(*case.args)
    case.same()
    assert not close(case.each(do).same(), before)


def test_a_global_hook_sees_every_module(case):
    seen = [[], []]
    for model, names in zip(case.both, seen, strict=True):
        by_id = {id(module): name for name, module in model.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, names=names, by_id=by_id: names.append(by_id[id(module)])
        )
        with handle:
            model(*case.args)
    assert set(seen[1]) >= set(seen[0])


# Memory


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting(case, storage):
    from diffusers.hooks import apply_layerwise_casting

    def do(model):
        apply_layerwise_casting(
            model, storage_dtype=storage, compute_dtype=torch.float32,
            skip_modules_pattern=("norm",),
        )  # fmt: skip

    if storage.itemsize == 1:  # the plain tree asks its embedder's weight for its inputs' dtype
        want = case.plain(*case.args)
        do(case.ours)
        assert close(case.ours(*case.args), want, 0.2)
    else:
        do(case.ours)
        with torch.no_grad():
            for name, parameter in case.plain.named_parameters():
                if "norm" not in name:
                    parameter.copy_(parameter.to(storage))
        case.same(gradients=False)


def test_offloading(case):
    import accelerate as hf

    want = case.plain(*case.args)
    hf.cpu_offload(case.ours, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert close(case.ours(*case.args), want)
        assert any(parameter.is_meta for parameter in case.ours.parameters())
        assert close(case.ours(*case.args), want)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(case, level):
    from diffusers.hooks import apply_group_offloading

    want = case.plain(*case.args)
    groups = dict(num_blocks_per_group=1) if level == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(
        case.ours, onload_device=cpu, offload_device=cpu, offload_type=level, **groups
    )
    with torch.no_grad():
        assert close(case.ours(*case.args), want)


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
