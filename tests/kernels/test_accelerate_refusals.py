"""What `accelerate` leaves alone, and the words that say why."""

import pytest
import torch
from eager import EagerTiM, SwiGLU, randomise
from golden_files import relative_error
from parity import DEVICE
from published import TINY, Checkpointed, idle_layers, problem, require_timm
from torch import nn

from tim_kernels import accelerate, restore


def test_checkpointing_without_a_switch_is_named_and_left():
    model = randomise(Checkpointed(**TINY)).to(DEVICE)
    del model.use_checkpoint
    report = accelerate(model)
    assert "checkpoints its blocks" in report.left[""] and "" not in report.fused


def test_a_compiled_model_is_told_apart():
    model, _ = problem(text=False)
    for compiled in (torch.compile(model, backend="eager"), model):
        model.compile(backend="eager")
        report = accelerate(compiled)
        assert not report.fused and "then compile it" in report.left[""] and len(report.left) == 1


def test_a_forward_of_the_instance_is_named():
    model, _ = problem(text=False)
    model.blocks[0].forward = model.blocks[0].forward
    assert "replaced on the instance" in accelerate(model).left["blocks.0"]


def test_a_model_before_training_is_tried_with_weights():
    """Zero layers would hide what it computes."""

    class Other(SwiGLU):
        def forward(self, x):
            return super().forward(x) + self.fc2(x.roll(1, -1)[..., : self.fc2.in_features])

    model, _ = problem(text=False)
    mlp = model.blocks[0].adaLN_modulation
    mlp.__class__ = Other
    for layer in (mlp.fc2, model.final_layer.linear, model.final_layer.adaLN_modulation.fc2):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    report = accelerate(model)
    assert "computes something else" in report.left[""]
    assert not model.final_layer.linear.weight.any()


def test_arguments_it_does_not_know_are_refused():
    class Masked(EagerTiM):
        def forward(self, x, t, r, y, attn_type=None, return_zs=False, jvp=False, mask=None):
            return super().forward(x, t, r, y, return_zs=return_zs)

    model = randomise(Masked(**TINY)).to(DEVICE)
    assert accelerate(model).fused == [""]
    _, args = problem(text=False)
    with pytest.raises(ValueError, match="mask"):
        model(*args, mask=torch.ones(2))


@pytest.mark.parametrize("precision, is_fused", [("ieee", False), ("tf32", True)])
def test_gemms_in_tf32_are_no_difference(precision, is_fused):
    class Rounded(EagerTiM):
        def forward(self, x, t, r, y, attn_type=None, return_zs=False, jvp=False):
            return 1.001 * super().forward(x, t, r, y)  # as far off as TF32

    model = randomise(Rounded(**TINY)).to(DEVICE)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        # On a CPU float32 is float32, whatever a training in this process has set.
        assert (accelerate(model).fused == [""]) == (is_fused and DEVICE != "cpu")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_block_that_is_not_tim_s_is_named_and_left():
    model, args = problem(text=False)
    model.blocks[1].attn.temperature = nn.Linear(24, 24)
    expected = model(*args)
    report = accelerate(model)
    assert "blocks.1.attn.temperature" in report.left and "" not in report.fused
    assert "blocks.0.mlp" in report.fused  # what can be is fused all the same
    assert relative_error(model(*args), expected) < 2e-5
    restore(model)
    assert torch.equal(model(*args), expected)


@pytest.mark.parametrize(
    "name, layer, reason",
    [
        ("act", nn.GELU(), "GELU"),
        ("drop1", nn.Dropout(0.1), "dropout of 0.1"),
        ("norm", nn.LayerNorm(128, elementwise_affine=False), "LayerNorm, SwiGLU has none"),
        ("drop2", nn.AlphaDropout(0.2), "dropout of 0.2"),
        ("extra", nn.Tanh(), "Tanh, SwiGLU has none"),
    ],
)
def test_layers_that_compute_something_are_named_and_left(name, layer, reason):
    model, _ = problem(text=False)
    for child, idle in idle_layers(**{name: layer}).items():
        model.blocks[1].mlp.add_module(child, idle)
    report = accelerate(model)
    assert reason in report.left[f"blocks.1.mlp.{name}"]
    assert "blocks.0.mlp" in report.fused and "blocks.1.mlp" not in report.fused


def test_dropped_paths_are_named():
    class DropPath(nn.Identity):
        drop_prob = 0.1

    model, _ = problem(text=False)
    model.blocks[0].drop_path = DropPath()
    assert "dropout of 0.1" in accelerate(model).left["blocks.0.drop_path"]


def test_layers_named_as_swiglu_s_that_compute_something_else_are_left():
    class GeGLU(SwiGLU):
        def forward(self, x):
            return self.fc2(nn.functional.gelu(self.fc1_g(x)) * self.fc1_x(x))

    model = nn.ModuleDict(dict(one=SwiGLU(4, 6, 4), other=GeGLU(4, 6, 4)))
    assert accelerate(model).fused == ["one"]


def test_timm_s_embedder_that_pads_is_named():
    layers = require_timm()
    model, _ = problem(text=False)
    model.x_embedder = layers.PatchEmbed(8, 2, 3, 48, dynamic_img_pad=True).to(DEVICE)
    assert "pads its input" in accelerate(model).left["x_embedder"]


def test_extra_parameters_are_named():
    model, _ = problem(text=False)
    model.blocks[0].layer_scale = nn.Parameter(torch.ones(48))
    report = accelerate(model)
    assert "layer_scale is (48,)" in report.left["blocks.0"]


def test_a_model_that_computes_something_else_is_left():
    class Twice(EagerTiM):
        def forward(self, x, t, r, y, attn_type=None, return_zs=False, jvp=False):
            return 2 * super().forward(x, t, r, y)

    model = randomise(Twice(**TINY))
    report = accelerate(model)
    assert "computes something else" in report.left[""] and "" not in report.fused


def test_what_is_no_tim_at_all():
    report = accelerate(nn.Linear(3, 3))
    assert not report.fused and "not the published tree" in report.left[""]
    with pytest.raises(ValueError, match="not accelerated"):
        restore(nn.Linear(3, 3))


def test_refusals():
    model, _ = problem(text=False)
    with pytest.raises(ValueError, match="new_condition"):
        accelerate(model, new_condition="t+r")
    with pytest.raises(ValueError, match="rope_order"):
        accelerate(model, rope_order="rows")
    assert accelerate(model).fused and "already" in accelerate(model).left[""]
