"""The training loop of `tim train`."""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tim import config
from tim.data import build_dataset
from tim.files import locked, replacing
from tim.images import step_grid
from tim.models import TiMTransformer2DModel
from tim.training import draws, settings, signals, snapshots
from tim.training.export import save_export
from tim.training.log import LossLog

SAMPLE_STEPS = (1, 2, 4, 8, 32)
_log = logging.getLogger(__name__)


def train(cfg: DictConfig, output: str | Path) -> Path:
    """Train as `cfg` says, resuming from the latest complete checkpoint in `output`.

    `output` receives `checkpoints/`, `log.jsonl`, `samples/` and, at the end, the averaged
    network in `model/`, whose path is returned. All randomness comes from `training.seed`, the
    rank and the number of images seen: a stopped and resumed run equals an unbroken one (on a GPU
    up to the order in which attention's backward adds). What `cfg` says counts for a resumed run
    too; a warning names what differs from before.

    SIGTERM and SIGINT end it after the step that it is at (of several processes, at the next line
    of the log), with a checkpoint.

    Raises:
        ValueError: a setting is unknown or wrong, or a checkpoint is damaged or of another network.
        FileExistsError: `output` holds checkpoints and `training.resume_from_checkpoint` is null.
        BlockingIOError: another process trains in `output`.
        FloatingPointError: a loss term or the gradient is not finite.
        Stopped: a signal ended the run; a KeyboardInterrupt.
    """
    return Trainer(cfg, Path(output)).run()


class Trainer:
    """The state of a run: network, average, optimizer, schedule and step."""

    def __init__(self, cfg: DictConfig, output: Path):
        cfg = settings.checked(cfg)
        self.cfg, self.run_cfg, self.output = cfg, cfg.training, output
        run = self.run_cfg
        self.dataset = build_dataset(cfg)
        self.accelerator = Accelerator(
            mixed_precision=run.mixed_precision or "no",
            gradient_accumulation_steps=run.gradient_accumulation_steps,
        )
        torch.backends.cuda.matmul.allow_tf32 = run.allow_tf32
        set_seed(run.seed)

        self.objective = config.build_objective(cfg)
        network = config.build_network(cfg)
        settings.check_fit(cfg, network, self.objective, self.dataset)
        if network.projector is not None:  # nothing to align its features with: it stays as it is
            network.projector.requires_grad_(False)
        self.ema_network = copy.deepcopy(network).eval().requires_grad_(False)
        self.ema_network.to(self.accelerator.device)
        # The average's storage is ema_network itself, ready to be sampled from and saved.
        decay = cfg.model.ema_decay if cfg.model.use_ema else 0.0
        self.ema = EMAModel([], decay=decay, foreach=True)  # a few launches, not one a parameter
        self.ema.shadow_params = list(self.ema_network.parameters())
        optimizer = config.build_optimizer(cfg, network.parameters())
        if run.scale_lr:
            for group in optimizer.param_groups:
                group["lr"] *= self.images_per_step / run.learning_rate_base_batch_size
        self.scheduler = settings.build_schedule(run, optimizer)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.step = self.images = 0

    @property
    def network(self) -> TiMTransformer2DModel:
        """The trained network without wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def images_per_micro_step(self) -> int:
        """Images of one forward pass on all devices."""
        return self.cfg.data.dataloader.batch_size * self.accelerator.num_processes

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step on all devices."""
        return self.images_per_micro_step * self.run_cfg.gradient_accumulation_steps

    def run(self) -> Path:
        """Train to `max_train_steps`; the folder of the averaged network is returned."""
        self.output.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.accelerator.is_main_process:
                stack.enter_context(locked(self.output))
            self._signals = stack.enter_context(signals.noted())
            return self._run()

    def _run(self) -> Path:
        self._resume()
        run, is_main = self.run_cfg, self.accelerator.is_main_process
        if is_main:
            self.log = LossLog(self.output / "log.jsonl", self.step)
        batches = iter(self._loader())
        self._open_window()
        options = dict(total=run.max_train_steps, initial=self.step, disable=not is_main)
        with tqdm(desc="train", **options) as bar:
            while self.step < run.max_train_steps:
                try:
                    self._window.append(self._train_step(batches))
                except RuntimeError:  # a signal to the whole group ends what loads the data, too
                    time.sleep(1)
                    if not self._signals:
                        raise
                    self._stop(self._signals[0])
                self.step += 1
                self.images += self.images_per_step
                bar.update()
                is_last = self.step == run.max_train_steps
                is_checkpoint = is_last or self.step % run.checkpointing_steps == 0
                is_line = is_checkpoint or self.step % run.log_steps == 0
                if is_line:
                    bar.set_postfix(self._close_window())
                if is_main and is_checkpoint:
                    self._save()
                if not is_last and (signal := self._signal(is_line)):
                    self._stop(signal)
                if is_main and (is_last or self.step % run.validation_steps == 0):
                    self._draw_samples()
        if is_main:
            save_export(self.ema_network, self.cfg, self.output / "model")
        self.accelerator.wait_for_everyone()
        return self.output / "model"

    def _signal(self, is_line: bool) -> int:
        """The signal that ends the run now, or 0; several processes agree at lines of the log."""
        number = self._signals[0] if self._signals else 0
        if self.accelerator.num_processes == 1:
            return number
        if not is_line:
            return 0
        return int(
            self.accelerator.gather(torch.tensor([number]).to(self.accelerator.device)).max()
        )

    def _stop(self, signal: int) -> NoReturn:
        """End the run for a signal, with a checkpoint of the steps that are done."""
        if self._window:
            self._close_window()
        is_saved = self.step in snapshots.complete(self.output / "checkpoints")
        if self.accelerator.is_main_process and not is_saved:
            self._save()
        raise signals.Stopped(signal, self.step)

    def _loader(self) -> DataLoader:
        dataloader = self.cfg.data.dataloader
        stream = draws.ImageStream(
            len(self.dataset),
            dataloader.batch_size,
            seed=self.run_cfg.seed,
            start=self.images,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=stream,
            num_workers=dataloader.num_workers,
            worker_init_fn=signals.leave_to_parent,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _train_step(self, batches: Iterator[list[Tensor]]) -> Tensor:
        """One optimizer step; the loss terms and the gradient norm (4,), left on the device."""
        accumulation = self.run_cfg.gradient_accumulation_steps
        terms = torch.zeros(3, device=self.accelerator.device)
        for micro in range(accumulation):
            images_seen = self.images + micro * self.images_per_micro_step
            with self.accelerator.accumulate(self.model):
                loss, micro_terms = self._loss(*next(batches), images_seen)
                self.accelerator.backward(loss)
            terms += micro_terms / accumulation
        grad_norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.run_cfg.max_grad_norm or math.inf
        )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return torch.cat([terms, grad_norm.detach().reshape(1)])

    def _loss(self, x: Tensor, y: Tensor, images_seen: int) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch and its detached terms (loss, weighted, denoising)."""
        device, params = self.accelerator.device, self.cfg.model.network.params
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        generator = draws.generator(
            self.run_cfg.seed, self.accelerator.process_index, images_seen, device=device
        )
        z = torch.randn(x.shape, generator=generator, device=device)
        t, r, n_diffusion = self.objective.sample_times(len(x), generator=generator, device=device)
        y_null = torch.full_like(y, params.num_classes)
        is_dropped = torch.rand(len(x), generator=generator, device=device)
        y = torch.where(is_dropped < params.class_dropout_prob, y_null, y)
        with self.accelerator.autocast():
            losses = self.objective(
                self.model,
                x,
                z,
                y,
                ema_model=self.ema_network,
                y_null=y_null,
                t=t,
                r=r,
                n_diffusion=n_diffusion,
            )
        loss = losses.weighted + self.cfg.model.proj_coeff * losses.projection
        return loss, torch.stack([loss, losses.weighted, losses.denoising]).detach()

    def _open_window(self) -> None:
        """Begin the steps that the next line of the log averages."""
        self._window: list[Tensor] = []
        self._window_start = time.perf_counter()

    def _close_window(self) -> dict[str, float]:
        """Log the means since the last line and open the next window."""
        stacked = torch.stack(self._window)
        finite = stacked.isfinite().all(dim=1)
        if not finite.all():
            first = self.step - len(stacked) + 1 + int(finite.int().argmin())
            raise FloatingPointError(
                f"loss or gradient is not finite at step {first}; "
                f"the last checkpoint is from before it: {self.output / 'checkpoints'}"
            )
        means = self.accelerator.reduce(stacked.mean(dim=0), "mean").tolist()
        seconds = time.perf_counter() - self._window_start
        record = {
            "step": self.step,
            "images": self.images,
            **dict(zip(("loss", "weighted", "denoising", "grad_norm"), means, strict=True)),
            "lr": self.scheduler.get_last_lr()[0],
            "images_per_second": round(len(stacked) * self.images_per_step / seconds, 1),
        }
        if self.accelerator.is_main_process:
            self.log.append(record)
        self._open_window()
        return {"loss": f"{record['loss']:.4f}", "denoising": f"{record['denoising']:.4f}"}

    def _draw_samples(self) -> None:
        """A PNG of the averaged network's samples, from the same noise at every call."""
        device = self.accelerator.device
        y = torch.arange(min(10, self.cfg.model.network.params.num_classes), device=device)
        shape = (len(y), *self.dataset[0][0].shape)
        generator = draws.generator(self.run_cfg.seed)
        noise = torch.randn(shape, generator=generator).to(device)
        grid = step_grid(self.ema_network, self.objective.transport, noise, y, SAMPLE_STEPS)
        with replacing(self.output / "samples" / f"step-{self.step:08d}.png") as path:
            grid.save(path)

    def _save(self) -> None:
        def write(folder: Path) -> None:
            self.network.save_pretrained(folder / "network")
            self.ema_network.save_pretrained(folder / "ema")
            state = {
                "step": self.step,
                "images": self.images,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
            torch.save(state, folder / "state.pt")

        snapshots.save(
            self.output / "checkpoints",
            self.step,
            write,
            keep=self.run_cfg.checkpoints_total_limit,
            keep_steps=self.run_cfg.checkpoint_list or (),
        )

    def _resume(self) -> None:
        """Load the latest complete checkpoint, if there is one."""
        found = snapshots.complete(self.output / "checkpoints")
        if found and self.run_cfg.resume_from_checkpoint != "latest":
            raise FileExistsError(
                f"{self.output} holds checkpoints: set training.resume_from_checkpoint=latest "
                "or choose another output folder"
            )
        if found:
            self._load(list(found.values())[-1])
        if self.accelerator.is_main_process:
            path = self.output / "config.yaml"
            if found and path.is_file() and (differs := settings.changes(path, self.cfg)):
                _log.warning("goes on from step %d with %s", self.step, ", ".join(differs))
            with replacing(path) as new:
                OmegaConf.save(self.cfg, new)

    def _load(self, folder: Path) -> None:
        """Go on from a checkpoint, with the settings of now."""
        try:
            was = TiMTransformer2DModel.load_config(folder / "network")
            weights = [
                TiMTransformer2DModel.from_pretrained(folder / name).state_dict()
                for name in ("network", "ema")
            ]
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # a broken file may raise anything
            raise ValueError(
                f"{folder} is damaged ({type(error).__name__}); without it the run goes on from "
                "the checkpoint before"
            ) from error
        differs = [
            f"{name} {was[name]}, not {now}"
            for name, now in self.network.config.items()
            if not name.startswith("_") and name in was and was[name] != now
        ]
        if differs:
            raise ValueError(f"{folder} is of a network with {', '.join(differs)}")
        self.step = self.ema.optimization_step = state["step"]
        self.images = state.get("images", self.step * self.images_per_step)
        if self.step > self.run_cfg.max_train_steps:
            raise ValueError(
                f"training.max_train_steps must be at least {self.step}, the step of {folder}; "
                f"got {self.run_cfg.max_train_steps}"
            )
        for network, loaded in zip((self.network, self.ema_network), weights, strict=True):
            network.load_state_dict(loaded)
        groups, rates = self.optimizer.param_groups, self.scheduler.base_lrs
        own = [{name: group[name] for name in group if name != "params"} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"] | {"base_lrs": rates})
        for i, group in enumerate(self.optimizer.param_groups):
            schedule = self.scheduler.lr_lambdas[i]
            group.update(own[i], lr=rates[i] * schedule(self.step))
