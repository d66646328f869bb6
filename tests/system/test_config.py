import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tim import config, transports
from tim.models import TiMTransformer2DModel

# A file as a user of the published code would write it, in its first spelling of the loss section.
UPSTREAM = """
model:
  transport:
    target: tim.schedulers.transports.TrigFlow
    params: {P_mean: -1.0, P_std: 1.4, sigma_d: 1.0, enhance_target: True, w_cond: 0.5}
  unified_dcm_loss:
    diffusion_ratio: 0.25
    derivative_type: jvp
    weight_time_type: sqrt
    weight_time_tangent: True
  network:
    target: tim.models.c2i.tim_model.TiM
    params:
      input_size: 8
      patch_size: 2
      in_channels: 4
      class_dropout_prob: 0.1
      num_classes: 10
      depth: 2
      hidden_size: 32
      num_heads: 2
      encoder_depth: 1
      new_condition: t,r
training:
  learning_rate: 3e-4
  optimizer:
    target: torch.optim.AdamW
    params: {betas: [0.9, 0.95], weight_decay: 1.0e-2, eps: 1.0e-6}
"""


@pytest.fixture
def upstream(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(UPSTREAM)
    return config.load(path)


def millions_of_parameters(network: TiMTransformer2DModel) -> float:
    """The projector left out."""
    named = network.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith("projector.")) / 1e6


@pytest.mark.parametrize(
    "preset, millions",
    [
        ("b-256", 128.8),
        ("xl-256", 664.1),
        ("xl-256-mg", 664.1),
        ("xl-512", 664.2),  # 32 values a patch, not 16
        ("xl-512-mg", 664.2),
        ("t2i", 865.0),
    ],
)
def test_presets_build_the_published_models(preset, millions):
    cfg = config.load(preset)
    with torch.device("meta"):
        network = config.build_network(cfg)
    assert preset in config.presets()
    assert round(millions_of_parameters(network), 1) == millions
    assert network.config.rope_order == "upstream"
    assert (network.config.z_dim, network.config.projector_dim) == (768, 2048)
    assert isinstance(config.build_transport(cfg), transports.OTFM)
    assert config.build_objective(cfg).weight_time_tangent
    assert all(name in config.TARGETS for name in targets(cfg))


def targets(cfg) -> list[str]:
    return [cfg.model.network.target, cfg.model.transport.target, cfg.training.optimizer.target]


@pytest.mark.parametrize("preset", ["xl-256", "xl-512"])
def test_enhanced_presets_differ_in_their_target_alone(preset):
    plain, enhanced = config.load(preset), config.load(f"{preset}-mg")
    transport = config.build_transport(enhanced)
    weights = (transport.w_gt, transport.w_cond, transport.w_start, transport.w_end)
    assert transport.enhance_target and weights == (1.0, 0.75, 0.3, 0.8)
    assert not config.build_transport(plain).enhance_target
    del plain.model.transport, enhanced.model.transport
    assert plain == enhanced


def test_an_upstream_file_loads_unchanged(upstream):
    objective = config.build_objective(upstream)
    assert isinstance(objective.transport, transports.TrigFlow)
    assert (objective.transport.P_std, objective.transport.w_cond) == (1.4, 0.5)
    assert (objective.diffusion_ratio, objective.derivative_type) == (0.25, "jvp")

    network = config.build_network(upstream)
    assert (network.config.depth, network.config.new_condition) == (2, "t,r")

    optimizer = config.build_optimizer(upstream, network.parameters())
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["eps"], tuple(group["betas"])) == (3e-4, 1e-6, (0.9, 0.95))
    assert len(group["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("name, cls", transports.TRANSPORTS.items())
def test_published_and_own_transport_names(name, cls):
    assert config.resolve(f"tim.schedulers.transports.{name}") is cls
    assert (
        config.resolve(f"tim.transports.{cls.__name__}") is cls is getattr(transports, cls.__name__)
    )


@pytest.mark.parametrize("target", ["os.system", "torch.optim.SGD", "tim.models", "", None])
def test_targets_outside_the_table_are_refused(upstream, target):
    upstream.model.transport.target = target
    with pytest.raises(ValueError, match="unknown target .*tim.schedulers.transports.OT_FM"):
        config.build_transport(upstream)


def test_nothing_is_imported_from_a_target(upstream, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    upstream.model.network.target = "planted.Network"
    with pytest.raises(ValueError, match="planted.Network"):
        config.build_network(upstream)


def test_a_target_of_the_wrong_kind_is_refused(upstream):
    upstream.model.transport.target = "torch.optim.AdamW"
    with pytest.raises(ValueError, match="model.transport.target must be a Transport"):
        config.build_transport(upstream)


@pytest.mark.parametrize(
    "section, build",
    [
        ("model.network.params", config.build_network),
        ("model.transport.params", config.build_transport),
        ("model.transition_loss", config.build_objective),
        ("training.optimizer.params", lambda cfg: config.build_optimizer(cfg, [])),
    ],
)
def test_unknown_parameters_are_named(upstream, section, build):
    for name in ("depht", "lerning_rate"):
        OmegaConf.update(upstream, f"{section}.{name}", 1)
    with pytest.raises(
        ValueError, match=f"{section} has no parameter depht.*, lerning_rate.*; it takes "
    ):
        build(upstream)


def test_transport_parameters_of_the_base_are_offered(upstream):
    upstream.model.transport.params.w_conditional = 0.5
    with pytest.raises(ValueError, match="it takes P_mean, .*w_cond, w_start"):
        config.build_transport(upstream)


@pytest.mark.parametrize(
    "key, build",
    [
        ("model.network", config.build_network),
        ("model.transport", config.build_transport),
        ("model.transition_loss", config.build_objective),
        ("training.optimizer", lambda cfg: config.build_optimizer(cfg, [])),
    ],
)
def test_missing_sections_are_named(upstream, key, build):
    without = copy.deepcopy(upstream)
    parent, name = key.split(".")
    del without[parent][name]
    with pytest.raises(ValueError, match=f"no section {key}"):
        build(without)


def test_target_and_text_width_must_agree(upstream):
    upstream.model.network.target = "tim.models.t2i.tim_model.TiM"
    with pytest.raises(ValueError, match="needs a text width as cap_feat_dim, got None"):
        config.build_network(upstream)
    upstream.model.network.params.cap_feat_dim = 16
    assert config.build_network(upstream).config.cap_feat_dim == 16
    upstream.model.network.target = "tim.models.c2i.tim_model.TiM"
    with pytest.raises(ValueError, match="needs none as cap_feat_dim, got 16"):
        config.build_network(upstream)
    upstream.model.network.target = "tim.models.TiMTransformer2DModel"
    assert config.build_network(upstream).config.cap_feat_dim == 16


@pytest.mark.parametrize("name", ["xl-1024", "nowhere/mine.yaml", "."])
def test_neither_preset_nor_file(name):
    with pytest.raises(ValueError, match="neither a preset .*b-256.*xl-512-mg.* nor a YAML file"):
        config.load(name)


@pytest.mark.parametrize("text", [b"model: [unclosed", b"- a\n- list\n", b"3", b"\xff\xfe\x00PK"])
def test_files_that_are_no_mapping_are_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="broken.yaml is not a YAML mapping"):
        config.load(path)


def test_presets_are_self_contained_files():
    for path in Path(config.__file__).parent.joinpath("configs").glob("*.yaml"):
        assert config.load(str(path)) == config.load(path.stem)
