"""`tim train` refuses a wrong setting in one line, before it begins."""

import pytest
import yaml
from small_mnist import small
from typer.testing import CliRunner

from tim import config
from tim.app.cli import app
from tim.training import loop, settings


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    def begun(self):
        raise AssertionError("training began")

    monkeypatch.setattr(loop.Trainer, "run", begun)


@pytest.fixture
def small_yaml(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config.resolved(small())))
    return path


def refusal(*arguments) -> str:
    """The one line that `tim train` ends with."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


NETWORK, LOSS, RUN = "model.network.params", "model.transition_loss", "training"


@pytest.mark.parametrize(
    "override, said",
    [
        (f"{RUN}.max_train_stps=3", f"is no setting (did you mean {RUN}.max_train_steps?)"),
        ("traning.seed=1", f"(did you mean {RUN}.seed?)"),
        (f"{NETWORK}.dpth=3", "no parameter dpth (did you mean depth?)"),
        (f"{LOSS}.diffusion_ration=1", "(did you mean diffusion_ratio?)"),
        ("model.transport.target=tim.schedulers.transports.OTFM", "transports.OT_FM?)"),
        (f"{RUN}.optimizer.params.beta=[0.9,0.9]", "(did you mean betas?)"),
        # of another kind
        (f"{RUN}.max_train_steps=abc", "max_train_steps must be a whole number"),
        (f"{RUN}.max_train_steps=1.5", "max_train_steps must be a whole number"),
        (f"{RUN}.seed=true", "seed must be a whole number of at least 0, got True"),
        (f"{RUN}.max_grad_norm=null", "max_grad_norm must be a number, 0 or more, got None"),
        (f"{RUN}.allow_tf32=maybe", "allow_tf32 must be true or false"),
        (f"{RUN}.checkpoint_list=[1,x]", "checkpoint_list must be a list of steps"),
        (f"{RUN}=3", "training must be a section, got 3"),
        (f"{RUN}=[]", "training=[]"),
        (f"{NETWORK}=3", "model.network must have a target and its params"),
        (f"{NETWORK}.qk_norm=7", "qk_norm must be bool, got 7"),
        (f"{NETWORK}.depth=2.0", "depth must be int, got 2.0"),
        (f"{RUN}.optimizer.params.betas=0.9", f"{RUN}.optimizer.params.betas must be tuple"),
        (f"{RUN}.optimizer.params.betas=[0.9]", f"{RUN}.optimizer.params.betas must be tuple"),
        # out of range
        (f"{NETWORK}.depth=-1", "depth must be at least 1, got -1"),
        (f"{NETWORK}.patch_size=0", "patch_size must be at least 1, got 0"),
        (f"{NETWORK}.mlp_ratio=-1", "mlp_ratio must be positive, got -1"),
        (f"{NETWORK}.class_dropout_prob=2", "class_dropout_prob must be in [0, 1], got 2"),
        ("data.dataloader.batch_size=0", "batch_size must be a whole number of at least 1, got 0"),
        ("data.dataloader.num_workers=-1", "num_workers must be a whole number of at least 0"),
        ("model.ema_decay=2", "ema_decay must be a number in [0, 1], got 2"),
        ("model.ema_decay=.nan", "ema_decay must be a number in [0, 1], got nan"),
        ("model.transport.params.sigma_d=0", "sigma_d must be positive, got 0"),
        (f"{RUN}.log_steps=0", "log_steps must be a whole number of at least 1, got 0"),
        (f"{RUN}.optimizer.params.betas=[0.9,2]", "Invalid beta parameter at index 1: 2"),
        # names
        (f"{RUN}.lr_scheduler=nope", "lr_scheduler must be one of linear, "),
        (f"{RUN}.lr_scheduler=cosine_with_min_lr", "lr_scheduler_params None do not fit"),
        (f"{RUN}.lr_scheduler_params.x=1", "lr_scheduler_params {'x': 1} do not fit"),
        (f"{RUN}.mixed_precision=fp16", "mixed_precision must be one of no, False, bf16"),
        (f"{RUN}.resume_from_checkpoint=best", "latest, null or a checkpoint's folder, got 'best'"),
        (f"{LOSS}.derivative_type=jpv", "derivative_type must be one of dde, jvp, got 'jpv'"),
        # what does not fit each other
        (f"{NETWORK}.num_heads=5", "num_heads times a multiple of 4, got 32 with 5 heads"),
        (f"{NETWORK}.patch_size=5", "patch_size must divide the input_size 28, got 5"),
        (f"{NETWORK}.in_channels=3", "must be those of mnist, (1, 28, 28); got (3, 28, 28)"),
        (f"{NETWORK}.num_classes=5", "num_classes must be at least 10 for mnist, got 5"),
        ("model.proj_coeff=1.0", "model.proj_coeff must be 0, got 1.0"),
        ("model.ckpt=mine.safetensors", "model.ckpt must be null or a file of weights, got"),
        (f"{RUN}.validation_labels=[]", "must be a list of labels or null, got []"),
        (f"{RUN}.validation_labels=[3,-1]", "must be a list of labels or null, got [3, -1]"),
        (f"{RUN}.validation_labels=[3,11]", "validation_labels: labels must be below 10, got 11"),
        (f"{RUN}.validation_prompts=[a,a]", "must be a list of different texts or null, got"),
        (f"{RUN}.validation_prompts=[a cat]", "are for texts: give validation_labels"),
        # no key=value
        (f"{RUN}.learning_rate", "must be key=value"),
        (f"{RUN}.learning_rate=", "must be key=value"),
        (f"{RUN}..seed=3", "must be key=value"),
        ("=3", "must be key=value"),
        (f"{RUN}.seed=???", "must be key=value"),
        (f"{RUN}.seed=[1", "cannot be read"),
        (f"{RUN}.seed=${{nothing}}", "'nothing' not found"),
    ],
)
def test_wrong_overrides(small_yaml, tmp_path, override, said):
    output = tmp_path / "run"
    assert said in refusal("--config", small_yaml, "--output", output, override)
    assert not output.exists()


ANYTHING = ["abc", "-7", "1.5", "true", "null", ".nan", "[x]", "{a: 1}"]


@pytest.mark.parametrize("key", settings.RULES)
def test_every_setting_refuses_another_kind(small_yaml, key):
    """Also those that a command line writes as text, flag, list or section."""
    rule, said = settings.RULES[key], []
    for text in ANYTHING:
        value = yaml.safe_load(text)
        if not rule.fits(value) and not isinstance(value, dict):  # which is merged
            said.append(refusal("--config", small_yaml, f"{key}={text}"))
            assert key.rpartition(".")[0] in said[-1] and len(said[-1]) < 400
    assert said


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "neither a preset"),
        ("", "the configuration has no model.transport, "),
        ("training:\nmodel:\ndata:\n", "training must be a section, got None"),
        ("- a\n", "is not a YAML mapping"),
        ("seed: 3\n", "seed is no setting"),
    ],
)
def test_wrong_files(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    assert said in refusal("--config", path, "--output", tmp_path / "run")


def test_an_enhanced_target_needs_the_label_of_no_class(small_yaml):
    changes = [f"{NETWORK}.class_dropout_prob=0", "model.transport.params.enhance_target=true"]
    assert "class_dropout_prob must be positive" in refusal("--config", small_yaml, *changes)


def test_a_preset_is_suggested():
    assert "did you mean xl-256?" in refusal("--config", "xl-265")


@pytest.mark.parametrize("preset", ["b-256", "xl-256-mg", "xl-512", "t2i"])
@pytest.mark.parametrize("by_path", [False, True])
def test_published_files_say_which_data_is_missing(caplog, tmp_path, preset, by_path):
    cfg, path = config.load(preset), tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(config.resolved(cfg)))
    line = refusal("--config", path if by_path else preset, "training.seed=0")
    assert line.startswith("error: data.dataset of data_type ") and "datasets/" in line
    assert line.endswith("tim download and tim preprocess make such folders")
    (unused,) = [record.getMessage() for record in caplog.records]
    for key in config.leaves(config.resolved(cfg), {*settings.RULES, *settings.UNUSED}):
        assert key[0] in settings.RULES or key[0] in unused, key
    assert "training.proportion_empty_prompts" in unused


def test_published_block_checkpointing():
    cfg = small()
    cfg.model.network.params.use_checkpoint = True
    assert config.build_network(cfg).is_gradient_checkpointing
    cfg.model.network.params.use_checkpoint = 1
    with pytest.raises(ValueError, match="use_checkpoint must be true or false, got 1"):
        config.build_network(cfg)


def test_settings_whose_warmup_is_not_used(caplog):
    loop.Trainer(small(lr_scheduler="constant"), "unused")
    assert "not used: training.lr_warmup_steps, of which constant has none" in caplog.text
