"""A training step recorded as CUDA graphs: the GPU repeats it without Python.

A small model's step is several hundred kernels that the GPU ends sooner than Python can launch them: on an H200 a step
of 4 layers, 128 wide, took 20 ms, of 2,048 tokens as of 65,536 (bench/NOTES.md). Two graphs, since the host reads loss
and gradient norm in between: `gradients` (forward and backward pass, clipping) and the optimizer's `step`. What changes
from step to step is copied to where they read it: micro-batch, number of targets, learning rates. Dropout draws anew,
since a replay reads the seed of torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from common.hardware import Hardware
from common.memory import is_out_of_memory, release_memory
from errors import UserError
from parallel.processes import world_size
from training.data import MicroBatch
from training.metrics import log
from training.optim import Optimizer

if TYPE_CHECKING:
    from training.state import TrainState  # which needs more packages than GPU machines have

T = TypeVar("T")
Gradients = Callable[[Sequence[MicroBatch], int | Tensor], Tensor]

WARM_UP = 2  # steps before the recording; the first one may compile
RECORDED_KINDS = ("adamw", "muon")  # optimizers that take a learning rate on the device
MEMORY_SHARE = 0.4  # of the device's: recorded steps keep their memory, beside which evaluations need theirs


class Records(Protocol):
    """The interface of common.cuda_graphs.Recorder that is used here."""

    def on_stream(self) -> Any: ...
    def record(self, work: Callable[[], T]) -> Callable[[], T]: ...


def obstacle(optimizer: Optimizer, hardware: Hardware) -> str | None:
    """What of a step asks the host for something, so that it cannot be recorded; None where nothing does."""
    kinds = {group["kind"] for group in optimizer.param_groups} - {*RECORDED_KINDS}
    if world_size() > 1:
        return "the processes of a step wait for each other"
    if hardware.device.type != "cuda":
        return f"there are none on {hardware.device.type}"
    if hardware.dtype == torch.float16:
        return "the loss scale of float16 asks for infinite gradients"
    return f"the optimizer's {' and '.join(sorted(kinds))} cannot be" if kinds else None


class StepGraphs:
    """`gradients` and `step`, as they are for WARM_UP updates, then recorded and replayed. A step of several
    micro-batches, or one that cannot be recorded, runs as it is, after a line that says so. In both ways number of
    targets and learning rates are tensors, so that the result is the same to the bit."""

    def __init__(self, gradients: Gradients, state: TrainState, device: torch.device, recorder: Records) -> None:
        self.run, self.optimizer, self.device, self.recorder = gradients, state.optimizer, device, recorder
        self.parameters = [*state.model.parameters()]
        self.n_targets = torch.ones((), device=device)
        self.rates = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self.shapes: list[torch.Size] = []  # of the micro-batches that `calls` counts
        self.calls, self.is_given_up = 0, False
        self.replay: Callable[[], Tensor] | None = None
        self.replay_step: Callable[[], object] | None = None
        self.kept: list[Tensor | None] = []  # what the recordings use beside their own memory

    def gradients(self, batches: Sequence[MicroBatch], n_targets: int | Tensor) -> Tensor:
        """Like the function that is recorded."""
        shapes = [batch.x.shape for batch in batches]
        if shapes != self.shapes:
            if self.replay is not None:
                self._give_up("memory ran out")
            self.shapes, self.calls = shapes, 0
        self.calls += 1
        self.n_targets.fill_(n_targets)
        if self.replay is None and self.calls > WARM_UP and not self.is_given_up:
            self._try_to_record(batches)
        if self.replay is None:
            with self.recorder.on_stream():
                return self.run(batches, self.n_targets)
        x, y, dropout_seed = batches[0]
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        return self.replay()

    def step(self) -> None:
        """The optimizer's step with the gradients of the last call."""
        with self._rates_as_tensors():
            if self.replay_step is not None:
                self.replay_step()
                return
            with self.recorder.on_stream():
                self.optimizer.step()

    @contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        values = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate, value in zip(self.optimizer.param_groups, self.rates, values, strict=True):
            rate.fill_(value)
            group["lr"] = rate
        try:
            yield
        finally:
            for group, value in zip(self.optimizer.param_groups, values, strict=True):
                group["lr"] = value

    def _try_to_record(self, batches: Sequence[MicroBatch]) -> None:
        """Records both graphs for batches of this shape. Raises UserError where a step with dropout cannot be recorded,
        since torch's generator cannot be used after that."""
        if len(batches) > 1:
            self._give_up("it has several micro-batches")
            return
        if self._takes_too_much():
            self._give_up(f"it takes more than {MEMORY_SHARE:.0%} of the memory")
            return
        self.optimizer.zero_grad(set_to_none=True)  # the recorded pass is to write gradients, not to add to them
        x, y, dropout_seed = batches[0]
        self.x, self.y = (torch.zeros(ids.shape, dtype=ids.dtype, device=self.device) for ids in (x, y))
        try:
            replay = self.recorder.record(lambda: self.run([MicroBatch(self.x, self.y, None)], self.n_targets))
            self.kept = [parameter.grad for parameter in self.parameters]  # the second graph reads them
            with self._rates_as_tensors():
                self.replay_step = self.recorder.record(self.optimizer.step)
            self.replay = replay
        except RuntimeError as error:
            reason = "out of memory" if is_out_of_memory(error) else str(error).strip().splitlines()[0]
        else:
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.optimizer.abandon_step()
        self._give_up(reason)
        if dropout_seed is not None:
            raise UserError(f"the step cannot be recorded as a CUDA graph ({reason}); give --cuda_graphs=false")

    def _takes_too_much(self) -> bool:
        if self.device.type != "cuda":
            return False
        total = torch.cuda.get_device_properties(self.device).total_memory
        return torch.cuda.max_memory_allocated(self.device) > MEMORY_SHARE * total

    def _give_up(self, reason: str) -> None:
        """From here on steps run as they are."""
        log(f"the step is not recorded as a CUDA graph: {reason}")
        self.optimizer.zero_grad(set_to_none=True)
        self.is_given_up, self.kept, self.replay, self.replay_step = True, [], None, None
        self.x = self.y = torch.zeros(0)
        release_memory()
