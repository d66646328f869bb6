"""What people do to a model of the published tree, done to ours, to an accelerated one, and to
plain eager modules with the same weights: the same numbers, or a refusal in words."""

import copy

import torch
from eager import EagerTiM, randomise
from torch import nn

from tim.models import TiMTransformer2DModel
from tim_kernels import accelerate

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip


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


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def on(model, *names):
    """The named modules, by endings; of linear layers, all of them for "*"."""
    wanted = linears(model) if names == ("*",) else [
        name for name, _ in model.named_modules() if name.endswith(names)
    ]  # fmt: skip
    assert wanted
    return [(name, model.get_submodule(name)) for name in wanted]
