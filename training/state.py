"""What a checkpoint of a run holds: the weights, the optimizer's moments, the loss scale and the counters of
`Progress`.

All randomness is derived from (seed, sample number), and the order of the data is a pure function of it too, so
nothing else is needed for a bitwise-exact resume on the same CPU. This module knows neither options nor data: the
caller passes further facts to store.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from checkpoint import Checkpoint
from common.clusters import Clusters
from common.hardware import Hardware
from common.weights import shapes, trained_parameters
from errors import UserError
from model import GPT
from model_folder import Adapter
from parallel.processes import world_size
from parallel.sharding import SHARDED, Layout, first_row, is_written_here, local
from prepare_data.shards import Dataset
from state_file import StateFile, wrong_entry
from tensor_files import Part
from training.average import WeightAverage
from training.divergence import MAX_HIGH, MAX_SKIPPED, MIN_HIGH, RECENT, Diverged, first_limit, limit
from training.evaluation import Evaluation
from training.metrics import log
from training.optim import Optimizer, load_optimizer_tensors, optimizer_tensors
from training.prompt import example_prompt
from training.stored import read_progress


@dataclass
class Progress:
    """The counters of a run, as stored in a checkpoint's state.json."""

    step: int = 0
    evaluated_step: int | None = None
    finished_step: int | None = None  # the last step, once its final records are written
    log_loss: float = 0.0  # sum of the losses since the last logged step
    log_count: int = 0
    eval_loss: float = 0.0  # sum of the losses since the last evaluation
    eval_count: int = 0
    skipped: int = 0  # consecutive updates that were skipped because loss or gradient norm is not finite
    high: int = 0  # consecutive losses far above their running median (divergence.py), skipped updates included
    recent: list[float] = field(default_factory=list)  # the newest losses that were not: those of the running median
    limit: float | None = None  # the lowest limit so far, above which a loss is far above
    rollbacks: list[dict[str, Any]] = field(default_factory=list)  # as make_rollback returns them
    # of each evaluation: step, val_loss, standard_error, train_loss, clear_rise (see overfitting_warning)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)  # Evaluation.compared of the best one in the history
    # of --patience (training/patience.py): the evaluation that others must clearly beat, as {step, val_loss, compared};
    # evaluations in a row that did not; the step at which this began the decay
    bar: dict[str, Any] | None = None
    stale: int = 0
    early_decay: int | None = None
    # of each text that is mixed in (training/kept_text.py), before the first step: {val_loss, compared}
    kept: list[dict[str, Any]] = field(default_factory=list)
    grad_scaler: dict[str, Any] = field(default_factory=dict)


class TrainState:
    """The state of a run between two steps. rows: windows per step. pretrained: the run starts from weights of another
    run. compiler: of the training step, or "none". average: of the weights, which takes their place within `averaged`,
    or None. adapter: where adapters are trained. rounding: the resolved options on which the bits of a step depend.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        rows: int,
        pretrained: bool = False,
        compiler: str = "none",
        average: WeightAverage | None = None,
        adapter: Adapter | None = None,
        layout: Layout = "none",
        rounding: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.rows, self.pretrained, self.compiler = rows, pretrained, compiler
        self.average, self.adapter, self.layout, self.rounding = average, adapter, layout, dict(rounding or {})
        self.module: torch.nn.Module = model  # DDP's around the model, where there is one
        self.progress = Progress()
        self.val_loss: float | None = None  # of the current step
        self.val_bits_per_byte: float | None = None
        self.new_rollbacks: list[dict[str, Any]] = []  # those that have led here since the checkpoint was written
        self.blamed = ""  # the ranks whose loss is not finite in the update at hand
        self.is_best = False  # whether the current step has the lowest val loss so far
        self.unsound: str | None = None  # why the last save was refused
        self.begun_step: int | None = None  # the last one whose checkpoint is written, or about to be
        self.saved_step: int | None = None  # the last one whose checkpoint is known to be written

    @property
    def step(self) -> int:
        """Number of updates done."""
        return self.progress.step

    @property
    def data_step(self) -> int:
        """The place in the order of the data, in steps: rollbacks pass over some."""
        return self.step + sum(entry["passed_over"] for entry in self.progress.rollbacks)

    @property
    def is_finished(self) -> bool:
        """Whether this step was the last one, and its final records are written."""
        return self.progress.finished_step == self.step

    @property
    def is_trained(self) -> bool:
        """Whether the weights are more than random numbers."""
        return self.pretrained or self.step > 0

    def describe_rank(self) -> str:
        """How the current weights rank in the run by val loss, for the title of a sample; "" where that is unknown."""
        if self.step == 0:
            return "before training"
        best = min(self.progress.history, key=lambda entry: entry["val_loss"], default=None)
        if best is None:
            return ""
        return "the best so far" if best["step"] == self.step else f"the best is step {best['step']:.0f}"

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the average of the weights, where there is one: to evaluate, to sample and to save."""
        if self.average is None or self.step == 0:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def advance(self, loss: float, grad_norm: float) -> bool:
        """Counts an update. Returns False where it was skipped because loss or gradient norm is not finite. Raises
        Diverged."""
        progress = self.progress
        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)
        self.val_loss, self.val_bits_per_byte, self.is_best = None, None, False
        if math.isfinite(loss) and math.isfinite(grad_norm):
            progress.skipped = 0
            progress.log_loss, progress.log_count = progress.log_loss + loss, progress.log_count + 1
            progress.eval_loss, progress.eval_count = progress.eval_loss + loss, progress.eval_count + 1
            if loss > self.limit:
                progress.high += 1
            else:
                progress.high, progress.recent = 0, [*progress.recent[1 - RECENT :], loss]
                progress.limit = min(self.limit, limit(progress.recent))
            return True
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            # a float16 overflow: the scaler has halved its scale, which was above 1, and the next step tries again
            return True
        progress.skipped, progress.high = progress.skipped + 1, progress.high + 1
        return False

    @property
    def limit(self) -> float:
        """The loss above which one is far above the running median, nats."""
        return first_limit(self.model.config.vocab_size) if self.progress.limit is None else self.progress.limit

    def trouble(self) -> str | None:
        """Why the current step is not to be saved; None where nothing is wrong with the losses."""
        progress = self.progress
        if progress.skipped:
            return "updates are being skipped, since loss or gradient norm is not finite"
        if progress.high >= MIN_HIGH:
            return f"for {progress.high} steps the loss has been above {self.limit:.2f}, far above its running median"
        return None

    def raise_if_diverged(self, ends: bool = False) -> None:
        """Raises Diverged where too many updates in a row were skipped, or had a loss far above the running median.
        ends: the run would end now, in trouble or not."""
        progress = self.progress
        if progress.skipped >= MAX_SKIPPED:
            self.diverge(f"{progress.skipped} updates in a row had no finite gradient")
        if progress.high >= MAX_HIGH:
            self.diverge(f"for {progress.high} steps the loss was far above its running median, above {self.limit:.2f}")
        if ends and (reason := self.trouble()) is not None:
            self.diverge(f"at the end of the run {reason}")

    def diverge(self, reason: str) -> None:
        raise Diverged(reason, self.step - max(self.progress.high, self.progress.skipped))

    def blame(self, ranks: str) -> None:
        """Notes where the loss of an update that is about to be skipped comes from."""
        self.blamed = ranks

    def discard_update(self) -> None:
        """Drops what a failed update has left: gradients, and the scaler's note that they are unscaled already."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=next(self.model.parameters()).device))  # update needs a first use
            self.scaler.update(self.scaler.get_scale())

    def take_log_loss(self) -> float:
        """The mean loss since the last call; NaN where all updates were skipped."""
        progress = self.progress
        mean = progress.log_loss / progress.log_count if progress.log_count else math.nan
        progress.log_loss, progress.log_count = 0.0, 0
        return mean

    def record_evaluation(self, result: Evaluation) -> float | None:
        """Adds the evaluation of the current step to the history. Returns the mean train loss since the previous one
        (None: no update since). Raises Diverged where the val loss is not finite."""
        progress = self.progress
        if not math.isfinite(result.loss):
            self.diverge(f"the val loss is {result.loss}")
        train_loss = progress.eval_loss / progress.eval_count if progress.eval_count else None
        progress.eval_loss, progress.eval_count = 0.0, 0
        self.is_best = result.loss < min((entry["val_loss"] for entry in progress.history), default=math.inf)
        if train_loss is not None or (self.pretrained and self.step == 0):
            entry: dict[str, Any] = {"step": self.step, "val_loss": result.loss, "train_loss": train_loss}
            clear_rise = result.clear_rise([Clusters(**kind) for kind in progress.best])
            entry |= {"standard_error": result.standard_error, "clear_rise": clear_rise}
            progress.history.append(entry)
            if self.is_best:
                progress.best = [asdict(kind) for kind in result.compared]
        progress.evaluated_step = self.step
        self.val_loss, self.val_bits_per_byte = result.loss, result.bits_per_byte
        return train_loss

    def save_is_due(self, interval: int | None, kept: int | None = None) -> bool:
        """Whether a checkpoint of the current step is wanted: every `interval` steps (None: at every evaluation), every
        `kept` steps, and for a new best."""
        if kept is not None and self.step % kept == 0:
            return True
        if interval is None:
            return self.progress.evaluated_step == self.step
        return self.is_best or self.step % interval == 0

    def facts(self, dataset: Dataset, hardware: Hardware) -> dict[str, Any]:
        """What state.json holds of the current step."""
        self.progress.grad_scaler = self.scaler.state_dict()
        return {
            "progress": asdict(self.progress),
            "val_loss": self.val_loss if self.is_trained else None,  # random weights are never the best ones
            "val_bits_per_byte": self.val_bits_per_byte if self.is_trained else None,
            "samples": self.data_step * self.rows,
            "tokens": self.step * self.rows * self.model.config.block_size,
            "dataset": {
                "name": dataset.name,
                "path": str(dataset.folder.resolve()),
                "fingerprint": dataset.fingerprint,
                "example_prompt": example_prompt(dataset),
            },
            "environment": environment(hardware, self.compiler, self.layout),
        }

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds, without the rows that pad the vocabulary; of a sharded model this process's rows."""
        trained = trained_parameters(self.model).items()
        model = {name: self.model.unpad(name, local(p), first_row(p)) for name, p in trained}
        return {"model": model, "optimizer": self._moments()}

    def parts(self) -> dict[str, Any]:
        """The same rows as Parts; none where another process has them, too, and writes them."""
        sizes, parameters = shapes(self.model), trained_parameters(self.model)

        def part(name: str, rows: torch.Tensor) -> Part:
            of = name if name in sizes else name.rpartition("/")[0]
            return Part(rows, tuple(sizes[of])[: rows.dim()], first_row(parameters[of]) if rows.dim() else 0)

        is_written = all(is_written_here(parameter) for parameter in parameters.values())
        return {
            kind: {name: part(name, rows) for name, rows in tensors.items() if is_written}
            for kind, tensors in self.tensors().items()
        }

    def _stored_moments(self, saved: Checkpoint) -> dict[str, torch.Tensor]:
        """The optimizer's tensors of a checkpoint; of a sharded model this process's rows."""
        if self.layout not in SHARDED:
            return saved.optimizer_tensors()
        reader, parameters, found = saved.reader("optimizer"), trained_parameters(self.model), {}
        for name, (_, size) in reader.layout.items():
            parameter = parameters.get(name.rpartition("/")[0])
            if parameter is None:
                raise ValueError(f"the optimizer's state names {name!r}, which this model does not have")
            first = first_row(parameter) if size else 0
            last = min(first + len(local(parameter)), size[0]) if size else 1
            found[name] = reader.rows(name, min(first, last), last)
        return found

    def _moments(self) -> dict[str, torch.Tensor]:
        """What continues training besides the model's folder: the optimizer's moments, and the weights where the model
        holds their average. Empty before the first step, when all of it follows from the options."""
        if self.step == 0:
            return {}
        weights = {} if self.average is None else self.average.stored()
        return optimizer_tensors(self.optimizer, self.model) | weights

    def restore(self, saved: Checkpoint, hardware: Hardware) -> None:
        """Loads a checkpoint's state except the weights, which the model has already. Raises UserError where it
        does not fit."""
        try:
            tensors = self._stored_moments(saved)
            if self.average is not None and saved.step > 0:
                self.average.restore(tensors)
            load_optimizer_tensors(self.optimizer, self.model, tensors)
            self.progress = read_progress(Progress, saved.state)
            self._restore_scale(saved.state)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{saved.path}: its state is not in this version's format ({error}); "
                "resume it with the version that wrote it"
            ) from error
        self.val_loss, self.begun_step, self.saved_step = saved.state["val_loss"], self.step, self.step
        self.val_bits_per_byte = saved.state.get("val_bits_per_byte")  # later than the first checkpoints
        before = {"compiler": "none", "parallel": "none", **saved.state["environment"]}
        now = environment(hardware, self.compiler, self.layout) | self.rounding
        before |= {name: saved.state["options"].get(name, value) for name, value in self.rounding.items()}
        if changed := [f"{name} {before.get(name)} → {now[name]}" for name in now if now[name] != before.get(name)]:
            log(f"the resume may not be bitwise exact: {', '.join(changed)}")
        log(f"resumed {saved.path} at step {self.step}")

    def _restore_scale(self, state: StateFile) -> None:
        """The scale of the loss, of a run in float16. Raises WrongEntry."""
        if self.progress.grad_scaler and self.scaler.is_enabled():
            stored, names = self.progress.grad_scaler, {*self.scaler.state_dict()}
            if {*stored} != names or not 0 < stored["scale"] < 2.0**127 or max(stored.values()) >= 2.0**127:
                expected = f"{', '.join(sorted(names))}, with a scale above 0 and below 2**127"
                raise wrong_entry(state.path, "progress.grad_scaler", f"is {stored}, expected {expected}")
            self.scaler.load_state_dict(stored)


def environment(hardware: Hardware, compiler: str, layout: Layout) -> dict[str, Any]:
    """What a bitwise-exact repetition depends on besides the options. compiler: of the training step, or "none"."""
    device = hardware.device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        "threads": hardware.threads,
        "compiler": compiler,
        "world_size": world_size(),
        "parallel": layout,
    }
