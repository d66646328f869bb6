"""The training loop of `tim train`."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from tim import config
from tim.data import Loader
from tim.files import locked, replacing
from tim.images import step_grid
from tim.models import TiMTransformer2DModel, pack
from tim.training import draws, lora, profiling, settings, signals, trackers
from tim.training.average import Average
from tim.training.checkpoints import Checkpoints
from tim.training.export import save_export
from tim.training.figures import DISTANCES, TERMS, Window, by_distance, means_by_distance
from tim.training.log import LossLog
from tim.training.parallel import Parallel, clip_gradients
from tim.training.parts import Parts, build
from tim.training.state import State
from tim.training.streams import Position

SAMPLE_STEPS = (1, 2, 4, 8, 32)
_log = logging.getLogger(__name__)


def train(
    cfg: DictConfig, output: str | Path, *, parts: Parts | None = None, profile: bool = False
) -> Path:
    """Train as `cfg` says, resuming from the latest good checkpoint in `output`.

    `output` receives `checkpoints/`, `log.jsonl`, `samples/` and, at the end, the averaged
    network in `model/`, whose path is returned. All randomness comes from `training.seed`, the
    rank and the number of images seen: a stopped and resumed run equals an unbroken one (on a GPU
    up to the order in which attention's backward adds). What `cfg` says counts for a resumed run
    too; a warning names what differs from before. `parts` are the data and encoders, those of
    `cfg` by default. `profile` writes a trace of some steps to `profile/`.

    SIGTERM and SIGINT end it after the step that it is at (of several processes, at the next line
    of the log), with a checkpoint.

    Raises:
        ValueError: a setting is unknown or wrong, or a checkpoint is damaged or of another network.
        OSError: a checkpoint cannot be written, as on a full disk; those before are whole.
        FileExistsError: `output` holds checkpoints and `training.resume_from_checkpoint` is null.
        BlockingIOError: another process trains in `output`.
        FloatingPointError: a loss term or the gradient is not finite.
        Stopped: a signal ended the run; a KeyboardInterrupt.
    """
    return Trainer(cfg, Path(output), parts, profile).run()


class Trainer:
    """A run: its state, its parts and its log."""

    def __init__(
        self, cfg: DictConfig, output: Path, parts: Parts | None = None, profile: bool = False
    ):
        cfg = settings.checked(cfg)
        self.cfg, self.run_cfg, self.output = cfg, cfg.training, output
        run = self.run_cfg
        trackers.check(run)
        # Its precision is one for the whole process: runs have their own.
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=_are_many_cpus(), log_with=run.tracker, project_dir=output
        )
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.objective = config.build_objective(cfg)
        self.weights = lora.weights(cfg)
        with torch.device("meta"):
            plan = config.build_network(cfg)
        self.parts = parts or build(cfg, plan.config, self.device)
        settings.check_fit(cfg, plan, self.objective, self.parts)
        self.parallel = Parallel(self.accelerator, run)
        self.profiler = profiling.Profiler(output / "profile", self.rank) if profile else None
        torch.backends.cuda.matmul.allow_tf32 = run.allow_tf32
        set_seed(run.seed)

        copies, trained = 1 + cfg.model.use_ema, self.weights.trained
        network, *averages = self.parallel.place(self._fresh, copies, self.weights.have_base)
        average = None
        if averages:
            decay = cfg.model.ema_decay, cfg.model.ema_warmup
            average = Average(averages[0], *decay, trained=trained)
        optimizer = config.build_optimizer(cfg, trained(network))
        if run.scale_lr:
            for group in optimizer.param_groups:
                group["lr"] *= self.images_per_step / run.learning_rate_base_batch_size
        scheduler = settings.build_schedule(run, optimizer)
        self.state = State(network, average, optimizer, scheduler, self.weights)
        if run.compile:
            network.compile_repeated_blocks()
        self.model = self.parallel.wrap(network)

    def _fresh(self) -> TiMTransformer2DModel:
        """The network before the first step; where nothing aligns its features, the projector
        stays as it is."""
        network = self.weights.fresh(self.cfg)
        if network.projector is not None and self.parts.repa is None:
            network.projector.requires_grad_(False)
        return network

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def averaged_network(self) -> TiMTransformer2DModel:
        """What is sampled from and exported; the network itself where there is no average."""
        return self.state.average.network if self.state.average else self.state.network

    @property
    def images_per_micro_step(self) -> int:
        """Images of one forward pass on all devices; of packs on average."""
        each = self.parts.images_per_batch or self.cfg.data.dataloader.batch_size
        return round(each * self.accelerator.num_processes)

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
            if self.profiler is not None:
                stack.enter_context(self.profiler)
            return self._run()

    def _run(self) -> Path:
        self._resume()
        run, is_main = self.run_cfg, self.accelerator.is_main_process
        if is_main:
            self.log = LossLog(self.output / "log.jsonl", self.step)
        trackers.start(self.accelerator, self.cfg, self.output)
        batches = iter(self._loader())
        self._window = Window(self.device, self.state.images)
        options = dict(total=run.max_train_steps, initial=self.step, disable=not is_main)
        with tqdm(desc="train", **options) as bar:
            while self.step < run.max_train_steps:
                try:
                    self._window.terms.append(self._train_step(batches))
                except (RuntimeError, OSError, EOFError):
                    # A signal to the whole group ends what loads the data, too.
                    time.sleep(1)
                    if not self._signals:
                        raise
                    self._stop(self._signals[0])
                self.state.step += 1
                self.state.micro_steps += run.gradient_accumulation_steps
                self.state.images = self._seen(self.state.micro_steps)
                bar.update()
                if self.profiler is not None:
                    self.profiler.step()
                self.checkpoints.poll()
                is_last = self.step == run.max_train_steps
                is_checkpoint = is_last or self.step % run.checkpointing_steps == 0
                is_line = is_checkpoint or self.step % run.log_steps == 0
                if is_line:
                    bar.set_postfix(self._close_window())
                if is_checkpoint:
                    self.checkpoints.save()
                if not is_last and (signal := self._signal(is_line)):
                    self._stop(signal)
                if is_last or self.step % run.validation_steps == 0:
                    self._draw_samples()
        self._end()
        return self.output / "model"

    def _end(self) -> None:
        """Export what was trained."""
        self.checkpoints.wait()
        network = self.averaged_network
        if self.parallel.is_sharded:
            weights = self.parallel.whole_weights(network)
            if self.accelerator.is_main_process:
                network = TiMTransformer2DModel.from_config(network.config)
                network.load_state_dict(weights)
        if self.accelerator.is_main_process:
            save_export(network, self.cfg, self.output / "model", self.weights)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.parallel.barrier()

    def _signal(self, is_line: bool) -> int:
        """The signal that ends the run now, or 0; several processes agree at lines of the log."""
        number = self._signals[0] if self._signals else 0
        if self.accelerator.num_processes == 1:
            return number
        return self.parallel.any(number) if is_line else 0

    def _stop(self, signal: int) -> NoReturn:
        """End the run for a signal, with a checkpoint of the steps that are done."""
        if self._window.terms:
            self._close_window()
        self.checkpoints.save()
        self.checkpoints.wait()
        raise signals.Stopped(signal, self.step)

    def _loader(self) -> Loader:
        """The batches from now on; `self._seen` counts the images from here."""
        dataloader, parts = self.cfg.data.dataloader, self.parts
        at = Position(
            dataloader.batch_size,
            self.run_cfg.seed,
            self.state.images,
            self.rank,
            self.accelerator.num_processes,
        )
        sampler = parts.sampler(parts.dataset, at)
        began = self.state.micro_steps
        self._seen = lambda micro_steps: sampler.seen(micro_steps - began)
        return Loader(
            parts.dataset,
            sampler,
            num_workers=dataloader.num_workers,
            worker_init_fn=signals.leave_to_parent,
            pin_memory=self.device.type == "cuda",
        )

    def _on_device(self, loaded: dict[str, Any]) -> dict[str, Any]:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(self.device, non_blocking=True)
            return list(map(moved, value)) if isinstance(value, list) else value

        return {name: moved(value) for name, value in loaded.items()}

    def _train_step(self, batches: Iterator[Any]) -> Tensor:
        """One optimizer step; its TERMS and what `by_distance` gives, left on the device."""
        accumulation = self.run_cfg.gradient_accumulation_steps
        terms = torch.zeros(len(TERMS) - 1 + 2 * len(DISTANCES), device=self.device)
        for micro in range(accumulation):
            images_seen = self._seen(self.state.micro_steps + micro)
            with self._window.loading.span():
                loaded = next(batches)
            with self.parallel.accumulating(self.model, micro == accumulation - 1):
                batch = self._on_device(loaded)
                loss, micro_terms = self._loss(batch, images_seen)
                count = self._batches_per_step(batch)
                (loss / count).backward()
            terms += micro_terms / count
        state = self.state
        grad_norm = clip_gradients(state.network, self.run_cfg.max_grad_norm)
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad()
        if state.average:
            state.average.update(state.network)
        last = len(TERMS) - 1
        return torch.cat([terms[:last], grad_norm.reshape(1), terms[last:]])

    def _batches_per_step(self, batch: dict[str, Any]) -> float:
        """How many like this one this process has in a step; of packs, which have unlike numbers of
        pictures, by these, so that every picture of all processes counts alike."""
        accumulation, before = self.run_cfg.gradient_accumulation_steps, self.state.micro_steps
        if not self.parts.is_packed:
            return accumulation
        pictures = self._seen(before + accumulation) - self._seen(before)
        own = len(next(iter(batch.values())))
        return pictures / (own * self.accelerator.num_processes)

    def _loss(self, batch: dict[str, Any], images_seen: int) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and detached TERMS without the last and `by_distance`."""
        parts, coeff = self.parts, self.cfg.model.proj_coeff
        chance = draws.Draws.of(self.run_cfg.seed, self.rank, images_seen, device=self.device)
        if self.weights.dropout:  # which draws from torch's own generator
            torch.manual_seed(chance.host.initial_seed())
        with torch.autocast(
            self.device.type, torch.bfloat16, self.run_cfg.mixed_precision == "bf16"
        ):
            with self._window.encoding.span():
                x = latents = parts.latents(batch, chance)
            packing = None
            if parts.is_packed:
                latents = list(x)
                x, packing = pack(latents, self.state.network.config.patch_size)
            z = torch.randn(x.shape, generator=chance.device, device=self.device)
            t, r, n_diffusion = self.objective.sample_times(
                len(latents), generator=chance.device, device=self.device
            )
            with self._window.encoding.span():
                condition = parts.conditioning(batch, chance)
                features = None if parts.repa is None else parts.repa(batch["image"], latents)
            losses = self.objective(
                self.model,
                x,
                z,
                condition.y,
                features,
                ema_model=self.state.average and self.state.average.network,
                y_null=condition.y_null,
                t=t,
                r=r,
                n_diffusion=n_diffusion,
                y_ema=condition.y_ema,
                packing=packing,
            )
        loss = losses.weighted + coeff * losses.projection
        terms = torch.stack([loss, *losses[:3], *losses.terms.mean(dim=1)]).detach()
        transport = self.objective.transport
        time = transport.T_max - transport.T_min
        return loss, torch.cat([terms, by_distance(losses.terms.sum(dim=0), t, r, time)])

    def _close_window(self) -> dict[str, str]:
        """Log the means since the last line and open the next window."""
        window, stacked = self._window, torch.stack(self._window.terms)
        if (broken := window.first_not_finite()) is not None:
            raise FloatingPointError(
                f"loss or gradient is not finite at step {self.step - len(stacked) + 1 + broken}; "
                f"the last checkpoint is from before it: {self.output / 'checkpoints'}"
            )
        means = self.accelerator.reduce(stacked.mean(dim=0), "mean").tolist()
        record = {
            "step": self.step,
            "images": self.state.images,
            **dict(zip(TERMS, means, strict=False)),
            **means_by_distance(means[len(TERMS) :]),
            "lr": self.state.scheduler.get_last_lr()[0],
            **window.machine(self.state.images),
        }
        if self.accelerator.is_main_process:
            self.log.append(record)
        self.accelerator.log(record, step=self.step)
        self._window = Window(self.device, self.state.images)
        shown = ("denoising", *DISTANCES)
        return {name: f"{record[name]:.3f}" for name in shown if name in record}

    def _draw_samples(self) -> None:
        """A PNG of the averaged network's samples, from the same noise at every call."""
        if not (self.accelerator.is_main_process or self.parallel.is_sharded):
            return
        y, names = self.parts.conditioning.examples(self.device)
        shape = (len(y), *self.parts.sample_shape)
        noise = torch.randn(shape, generator=draws.generator(self.run_cfg.seed)).to(self.device)
        network, transport = self.averaged_network, self.objective.transport
        was_training = network.training
        network.eval()
        try:
            grid = step_grid(network, transport, noise, y, SAMPLE_STEPS, names, self.parts.decode)
        except OSError as error:  # training goes on without pictures
            _log.warning("no samples: %s", " ".join(str(error).split()))
            return
        finally:
            network.train(was_training)
        if self.accelerator.is_main_process:
            with replacing(self.output / "samples" / f"step-{self.step:08d}.png") as path:
                grid.save(path)

    def _resume(self) -> None:
        """Go on from the last good checkpoint, if there is one, or from a published one."""
        run, root = self.run_cfg, self.output / "checkpoints"
        self.checkpoints = Checkpoints(
            root, self.state, self.parallel, run.checkpoints_total_limit, run.checkpoint_list or []
        )
        found, differs, path = None, [], self.output / "config.yaml"
        if self.checkpoints.exist():
            if run.resume_from_checkpoint is None:
                raise FileExistsError(
                    f"{self.output} holds checkpoints: set training.resume_from_checkpoint=latest "
                    "or choose another output folder"
                )
            if path.is_file():
                differs = settings.changes(path, self.cfg)
            settings.check_changes(differs, self.output)
            found = self.checkpoints.restore(self.images_per_step)
        elif run.resume_from_checkpoint not in (None, "latest"):
            self.checkpoints.take_from(Path(run.resume_from_checkpoint), self.images_per_step)
        if self.step > run.max_train_steps:
            raise ValueError(
                f"training.max_train_steps must be at least {self.step}, the step of {found}; "
                f"got {run.max_train_steps}"
            )
        if self.accelerator.is_main_process:
            if differs:
                _log.warning("goes on from step %d with %s", self.step, ", ".join(differs))
            with replacing(path) as new:
                OmegaConf.save(self.cfg, new)


def _are_many_cpus() -> bool:
    """Whether a launcher began several processes on a machine without an accelerator."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
