import copy

import torch
from torch import nn

from tim_kernels.network.packing import pack


def layers(n=3):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 5) for _ in range(n))


def test_packing_is_concatenation_without_a_second_copy():
    stack = layers()
    weights = [layer.weight for layer in stack]
    before = [w.detach().clone() for w in weights]
    packed = pack(weights)
    assert torch.equal(packed, torch.cat(before))
    again = pack(weights)
    assert again.data_ptr() == packed.data_ptr() == weights[0].data_ptr()
    assert all(isinstance(layer.weight, nn.Parameter) for layer in stack)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_gradients_reach_each_weight():
    stack, twin = layers(), layers()
    x = torch.randn(7, 4)
    (x @ pack([layer.weight for layer in stack]).T).square().sum().backward()
    (x @ torch.cat([layer.weight for layer in twin]).T).square().sum().backward()
    for ours, expected in zip(stack, twin, strict=True):
        assert torch.equal(ours.weight.grad, expected.weight.grad)


def test_a_training_step_after_packing_moves_the_packed_weights():
    stack = layers()
    weights = [layer.weight for layer in stack]
    packed = pack(weights).detach()
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    pack(weights).sum().backward()
    optimizer.step()
    assert torch.equal(pack(weights), torch.cat(weights))
    assert torch.equal(packed, torch.cat(weights))  # one memory


def test_state_survives_loading_moving_and_copying():
    stack = layers()
    weights = [layer.weight for layer in stack]
    pack(weights)
    twin = copy.deepcopy(stack)
    twin[0].weight.data.zero_()
    assert bool(stack[0].weight.any())  # a copy shares nothing
    stack.load_state_dict(layers(3).state_dict(), assign=True)
    stack.double()
    weights = [layer.weight for layer in stack]
    assert torch.equal(pack(weights), torch.cat(weights))


def test_safetensors_round_trip(tmp_path):
    from safetensors.torch import load_file, save_file

    stack = layers()
    pack([layer.weight for layer in stack])
    save_file(stack.state_dict(), tmp_path / "w.safetensors")
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        assert torch.equal(tensor, stack.state_dict()[name])


def test_plain_tensors_and_mixed_dtypes_are_concatenated():
    a, b = torch.randn(2, 3), torch.randn(4, 3)
    assert torch.equal(pack([a, b]), torch.cat((a, b)))
    mixed = [nn.Parameter(a), nn.Parameter(b.bfloat16())]
    assert pack(mixed).shape == (6, 3)


def test_functional_call_and_grad_transforms():
    stack = layers(2)

    def loss(parameters, x):
        merged = pack([parameters["0.weight"], parameters["1.weight"]])
        return (x @ merged.T).square().sum()

    parameters = dict(stack.named_parameters())
    gradients = torch.func.grad(loss)(parameters, torch.randn(3, 4))
    assert gradients["1.weight"].shape == (5, 4) and bool(gradients["1.weight"].any())


def test_forward_mode_moves_no_memory():
    stack = layers(2)
    weights = [layer.weight for layer in stack]
    before = [w.data_ptr() for w in weights]
    x = torch.randn(3, 4)
    for _ in range(2):
        _, tangent = torch.func.jvp(lambda x: x @ pack(weights).T, (x,), (torch.ones_like(x),))
        assert torch.allclose(tangent, torch.ones_like(x) @ torch.cat(weights).T)
    assert [w.data_ptr() for w in weights] == before


def test_parameters_that_are_packed_without_autograd_can_still_be_trained():
    stack = layers()
    weights = [layer.weight for layer in stack]
    with torch.inference_mode():
        pack(weights)
    pack(weights).square().sum().backward()
    assert all(torch.equal(weight.grad, 2 * weight) for weight in weights)


def test_what_lies_in_somebody_else_s_buffer_stays_there():
    """Optimizers that keep parameters in flat buffers write there."""
    stack = layers()
    weights = [layer.weight for layer in stack]
    flat = torch.cat([weight.detach().flatten() for weight in reversed(weights)])
    for weight, part in zip(reversed(weights), flat.split(20), strict=True):
        weight.data = part.view(5, 4)
    before = [weight.data_ptr() for weight in weights]
    assert torch.equal(pack(weights), torch.cat(weights))
    flat.add_(1.0)
    assert [weight.data_ptr() for weight in weights] == before
    assert torch.equal(pack(weights), torch.cat(weights))


def test_nothing_is_moved_to_where_it_would_be_misaligned():
    biases = [nn.Linear(4, 5).bias for _ in range(2)]  # 20 bytes each
    before = [bias.data_ptr() for bias in biases]
    assert torch.equal(pack(biases), torch.cat(biases))
    assert [bias.data_ptr() for bias in biases] == before
