"""When checkpoints are written, and from which a run goes on."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from tim.training import initial, snapshots
from tim.training.parallel import FROM_FIRST, Parallel
from tim.training.state import State, begin_shards, read, write_whole

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run in `root`, of which `keep` and those of `keep_steps` stay.

    One process writes them whole, at once; processes that share weights write their shards in the
    background, and `poll` makes a checkpoint of them when all are there.
    """

    def __init__(
        self, root: Path, state: State, parallel: Parallel, keep: int, keep_steps: list[int]
    ):
        self.root, self.state, self.parallel = root, state, parallel
        self._keep = dict(keep=keep, keep_steps=keep_steps)
        self._future: Any = None
        self._step = -1  # of the last one that was begun
        # In the background, processes talk through a group of its own, from CPU to CPU.
        self._group = dist.new_group(backend="gloo") if parallel.is_sharded else None

    def save(self) -> None:
        """Write one, or begin to; all processes call it.

        Raises:
            OSError: a file cannot be written; the checkpoints before are as they were.
        """
        self.wait()
        if self._step == self.state.step:
            return
        self._step = self.state.step
        if not self.parallel.is_sharded:
            if self.parallel.is_first:
                write = lambda folder: write_whole(self.state, folder)  # noqa: E731
                snapshots.save(self.root, self._step, write, **self._keep)
            return
        if self.parallel.is_first:
            snapshots.begin(self.root, self._step)
        self.parallel.barrier()
        partial = snapshots.partial_folder(self.root, self._step)
        self._future = begin_shards(self.state, partial, self._group, self.parallel.is_first)

    def poll(self) -> None:
        """Complete the checkpoint whose shards have been written meanwhile."""
        if self._future is not None and self._future.done():
            self.wait()

    def wait(self) -> None:
        """Complete the checkpoint that is being written."""
        if self._future is None:
            return
        future, self._future = self._future, None
        partial = snapshots.partial_folder(self.root, self._step)
        try:
            future.result()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if self.parallel.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"{partial} cannot be written: {_reasons(error)}") from error
        if self.parallel.is_first:
            snapshots.finish(self.root, self._step, **self._keep)

    def exist(self) -> bool:
        """Whether the run has any that was once complete."""
        return bool(snapshots.complete(self.root))

    def take_from(self, folder: Path, images_per_step: int) -> None:
        """Begin a run from a checkpoint of another one, ours or a published one's: that has the
        average, the network and the step, and the optimizer begins anew.

        Raises:
            ValueError: it is neither, damaged, or of another network.
        """
        state = self.state
        if not initial.is_published(folder):
            snapshots.check(folder)
            read(state, folder, self.parallel, images_per_step)
            return
        state.weights.check_base(folder, None)
        published = initial.read_published(folder, state.network)
        weights = {"network": published.network, "ema": published.average}
        for name, network in state.networks.items():
            if self.parallel.is_sharded:
                given = weights[name] if self.parallel.is_first else {}
                set_model_state_dict(network, given, options=FROM_FIRST)
            else:
                network.load_state_dict(weights[name])
        state.go_to(published.step, published.step * images_per_step)
        _log.warning("goes on from %s at step %d, the optimizer anew", folder, published.step)

    def restore(self, images_per_step: int) -> Path | None:
        """Go on from the last good checkpoint, whose folder is returned; all processes call it.

        A damaged one is set aside when there is a good one before it.

        Raises:
            ValueError: all are damaged, or the last is of another network.
        """
        found, damaged = list(snapshots.complete(self.root).values()), []
        self.parallel.barrier()
        for folder in reversed(found):
            try:
                snapshots.check(folder)
                read(self.state, folder, self.parallel, images_per_step)
            except snapshots.Damaged as error:
                damaged.append((folder, error))
                continue
            self._step = self.state.step
            for bad, error in damaged:
                if self.parallel.is_first:
                    _log.error("%s; set aside as %s", error, snapshots.set_aside(bad).name)
                    _log.error("goes on from %s", folder)
            self.parallel.barrier()
            return folder
        if damaged:
            raise ValueError(
                f"{damaged[0][1]}; there is no other checkpoint to go on from: delete it to begin "
                "anew"
            )
        return None


def _reasons(error: BaseException) -> str | BaseException:
    """What went wrong in every process, in one line."""
    failures = getattr(error, "failures", {})
    return ", ".join(f"process {rank}: {problem[0]}" for rank, problem in failures.items()) or error
