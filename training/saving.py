"""When and how the checkpoints of a run are written: never in trouble (divergence.py), and where memory has room for a
copy, while the training goes on.

A save first copies what the checkpoint holds, which takes the time of a memory copy; a thread writes, verifies and
prunes then. One is in flight at a time: the next one waits for it. What went wrong is logged before the next step; the
end of the run waits for the last one. So the checkpoints are the same to the bit, written or not while training goes
on. Of several processes rank 0 writes; a sharded checkpoint is written by all ranks together, which wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from checkpoint import SaveFailed, prune_checkpoints, save_checkpoint
from common.hardware import Hardware
from common.memory import OutOfMemory, attempt, available_memory
from common.run_state import RunState
from common.signature import signed
from model_folder import HeldBase
from parallel.processes import Team, agree, any_of, by_first, is_first, world_size
from parallel.sharding import SHARDED
from prepare_data.shards import Dataset
from sharded_checkpoint import save_sharded_checkpoint
from training.diagnosis import first_bad_weight
from training.divergence import Diverged
from training.metrics import keep_and_tell, log
from training.options import EvalOptions
from training.state import TrainState

MEMORY_SHARE = 0.5  # of the memory that is free, which a copy may take
Tensors = dict[str, dict[str, torch.Tensor]]


class CheckpointWriter:
    """Calling it saves the current step, within `averaged`. facts: further entries of state.json. told: learns of each
    save. Failures are logged and do not stop the training: the checkpoint before remains, and the next one is tried
    when it is due."""

    def __init__(
        self, run: Path, state: TrainState, dataset: Dataset, hardware: Hardware, evals: EvalOptions,
        facts: Callable[[], dict[str, Any]], told: RunState,
    ) -> None:  # fmt: skip
        self.run, self.state, self.dataset, self.hardware = run, state, dataset, hardware
        self.evals, self.facts, self.told = evals, facts, told
        told.steps = lambda: (state.step, state.saved_step)
        self.is_pending = False  # a save was due when the run was in trouble
        self.last = time.perf_counter()  # when the last save began
        self.late = (-1, False)  # the step at which the time was looked at last, and what that showed
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.flying: tuple[int, Future[None]] | None = None
        self.base = HeldBase(run) if state.adapter is not None and is_first() else None

    def __call__(self) -> None:
        state, step = self.state, self.state.step
        self.is_pending, self.last = False, time.perf_counter()
        self.join()
        if reason := state.trouble() or first_bad_weight(state.model) or by_first(self._restore_base):
            saved = "" if state.saved_step is None else f"; the last checkpoint is that of step {state.saved_step}"
            log(f"step {step}: not saved: {reason}{saved}")
            self.is_pending, state.unsound = state.trouble() is not None, reason
            return
        state.unsound = None
        state.begun_step = step
        if state.layout in SHARDED:
            self._outcome(step, self._write_shards)
            return
        others, copied = self._others(), self._copy()
        if not agree(copied is not None):
            write = partial(attempt, lambda: self._write(step, state.tensors(), others))
            self._outcome(step, lambda: by_first(write))  # which tells all ranks of an OutOfMemory, too
        elif copied is not None:
            self.flying = step, self.thread.submit(self._write, step, copied, others)

    def is_due(self) -> bool:
        """Whether a checkpoint of the current step is wanted. Its time is looked at once per step, of several processes
        at every eighth: all of them wait for each other then."""
        state, evals = self.state, self.evals
        if self.is_pending and state.trouble() is None:
            return True
        return state.save_is_due(evals.save_interval, evals.keep_interval) or self._is_late()

    def poll(self) -> None:
        """Logs how the save in flight ended, if it has."""
        if self.flying is not None and self.flying[1].done():
            self.join()

    def join(self) -> None:
        """Waits for the save in flight, and logs how it ended where it failed."""
        if self.flying is not None:
            (step, future), self.flying = self.flying, None
            self._outcome(step, future.result)

    def try_again(self) -> None:
        """Saves the current step where its save has failed: a disk may fail for a moment."""
        self.join()
        self.state.saved_step = agree(self.state.saved_step)
        if self.state.begun_step == self.state.step != self.state.saved_step:
            with self.state.averaged():
                self()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save in flight. All processes know then which step is the last one that is saved, unless an
        error has ended one of them."""
        self.join()
        self.thread.shutdown()
        if self.base is not None:
            self.base.close()
        if error is None or isinstance(error, Diverged):
            self.state.saved_step = agree(self.state.saved_step)

    def _restore_base(self) -> str | None:
        """Writes again what was removed of the weights that adapters belong to. Returns why that is not possible."""
        if self.base is None:
            return None
        try:
            keep_and_tell(self.run)
            if names := self.base.restore():
                log(f"{self.base.folder}: {', '.join(names)} was removed, and is written again")
        except OSError as error:
            return f"{self.base.folder} was removed, and cannot be written again: {error}"
        return None

    def _is_late(self) -> bool:
        minutes, state = self.evals.save_minutes, self.state
        if minutes is None or state.begun_step == state.step or (world_size() > 1 and state.step % 8):
            return False
        if self.late[0] != state.step:
            is_late = any_of(lambda: is_first() and time.perf_counter() - self.last >= 60 * minutes)
            self.late = state.step, is_late
        return self.late[1]

    def _outcome(self, step: int, write: Callable[[], object]) -> None:
        state = self.state
        try:
            attempt(write)
            state.saved_step = step
            self.told.saved()
        except (SaveFailed, OutOfMemory) as error:
            what = "not saved" if state.saved_step != step else "saved without its final records"
            log(f"step {step}: {what}: {error}")

    def _write(self, step: int, tensors: Tensors, others: dict[str, Any]) -> None:
        contents: dict[str, Any] = {**tensors, **others}
        save_checkpoint(self.run, step, **contents)
        prune_checkpoints(self.run, self.evals.keep_interval)

    def _write_shards(self) -> None:
        save_sharded_checkpoint(self.run, self.state.step, Team(), **self.state.parts(), **self._others())
        if is_first():
            prune_checkpoints(self.run, self.evals.keep_interval)

    def _others(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors, as it is now."""
        facts = signed(self.state.facts(self.dataset, self.hardware) | self.facts())
        config, tokenizer = self.state.model.config.to_dict(), self.dataset.tokenizer.to_dict()
        return {"config": config, "tokenizer": tokenizer, "adapter": self.state.adapter, "state": facts}

    def _copy(self) -> Tensors | None:
        """The tensors of a checkpoint in memory of their own, of rank 0; None elsewhere, and where memory is short."""
        if not is_first() or not self.evals.async_save:
            return None
        try:
            return attempt(self._copy_tensors)
        except OutOfMemory:
            return None

    def _copy_tensors(self) -> Tensors | None:
        tensors, available = self.state.tensors(), available_memory()
        needed = sum(tensor.nbytes for some in tensors.values() for tensor in some.values())
        if available is None or needed > MEMORY_SHARE * available:
            return None
        return {kind: _copied(some) for kind, some in tensors.items()}


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous."""
    form = torch.contiguous_format
    return {name: tensor.detach().to("cpu", copy=True, memory_format=form) for name, tensor in tensors.items()}
