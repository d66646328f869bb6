"""What people do to a model of the published tree, done to ours, to an accelerated one, and to
plain eager modules with the same weights: the same numbers, or a refusal in words.

Files, adapters, layers of other kinds, hooks, and where weights are kept."""

import copy
import io
import pickle

import pytest
import torch
from eager import EagerTiM
from people import close, linears, on
from torch import nn
from torch.nn.utils import parametrize, prune

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
