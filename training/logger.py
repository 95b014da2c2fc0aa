"""What is recorded of a run, and when: a line per logged step, evaluation, skipped update and change of plan, and the
samples.

`RunLogger` writes each record to the console, metrics.jsonl (metrics.py) and the trackers (trackers.py). It measures
throughput and does not influence the training.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from checkpoint import find_checkpoint, saved_steps
from common.clusters import Clusters
from common.hardware import Hardware
from common.weights import flops_per_token
from errors import OutOfResources, UserError, quote
from parallel.launch import naming_saved
from parallel.processes import by_first, command, is_first, world_size
from training.budget import LENGTHENED, Budget
from training.data import naming_lost_text
from training.evaluation import Evaluation, overfitting_warning
from training.interrupt import STOPPED
from training.metrics import RunLog, TrainClock, console_line, format_duration, log
from training.optim import Plan
from training.options import LoggingOptions
from training.reference import Reference
from training.state import TrainState
from training.trackers import Trackers


class RunLogger:
    """The records of one run, as a context manager that closes its files. `settings`: all options by name, for the
    trackers.

    lengths: see RunLog; none of a new run. Raises UserError where a tracker is requested but not available.
    """

    def __init__(
        self,
        run: Path,
        options: LoggingOptions,
        settings: Mapping[str, Any],
        hardware: Hardware,
        state: TrainState,
        reference: Reference,
        lengths: Mapping[str, int],
    ) -> None:
        self.hardware, self.reference, self.log_interval = hardware, reference, options.log_interval
        self.tokens_per_step = int(settings["tokens_per_step"])
        self.flops_per_token = flops_per_token(state.model)
        self.clock = TrainClock()
        self.trackers = Trackers(run, options if is_first() else LoggingOptions(), settings)
        self.files = RunLog(run, lengths)
        self.trackers.start(state.step + 1 if lengths else 0)
        self._rollbacks(state)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()
        self.trackers.finish()

    def facts(self) -> dict[str, dict[str, int]]:
        """Bytes of each log file, for a checkpoint; they are synced to disk."""
        return {"logs": self.files.lengths()}

    def start(self, step: int) -> None:
        """Marks the beginning of the first step: throughput is measured from here."""
        self._started = time.perf_counter()
        self._last = (self.clock.seconds(), step)

    def is_due(self, step: int, plan: Plan) -> bool:
        return step % self.log_interval == 0 or step == plan.max_steps

    def step(self, state: TrainState, plan: Plan, learning_rate: float, grad_norm: float) -> tuple[int, float]:
        """Records the current step; the loss is the mean since the last record. Returns the number of steps since then
        and their seconds."""
        now, step = self.clock.seconds(), state.step
        before, since = self._last
        self._last = (now, step)
        steps, seconds = step - since, max(1e-9, now - before)
        loss = state.take_log_loss()
        tokens_per_second = steps * self.tokens_per_step / seconds
        memory, peak = self.hardware.memory_bytes(), self.hardware.peak_flops()
        mfu = None if peak is None else tokens_per_second * self.flops_per_token / (peak * world_size())
        fields: dict[str, float | None] = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        fields |= {"tokens": step * self.tokens_per_step}
        timing: dict[str, float | None] = {
            "tokens_per_second": round(tokens_per_second),
            "seconds": round(time.perf_counter() - self._started, 3),
            "train_seconds": round(now, 3),
            "memory_bytes": memory,
            "mfu": mfu,
        }
        self.files.metrics("step", step, timing=timing, **fields)
        self.trackers.log({f"train/{name}": value for name, value in fields.items()} | timing, step)
        left = None if plan.max_steps is None else (plan.max_steps - step) * seconds / steps
        shown_mfu = "" if self.hardware.device.type == "cpu" else "unknown" if mfu is None else f"{mfu:.1%}"
        numbers = (loss, learning_rate, grad_norm, tokens_per_second, left, memory)
        log(console_line(step, plan.max_steps, *numbers, shown_mfu))
        return steps, seconds

    def evaluation(
        self, state: TrainState, plan: Plan, result: Evaluation, train_loss: float | None, event: str = "eval"
    ) -> None:
        """Records an evaluation of the current step. event: "final" for that of the whole val split after the last
        step."""
        fields: dict[str, Any] = {
            "val_loss": result.loss,
            "standard_error": result.standard_error,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "targets": result.targets,
            "train_loss": train_loss,
        }
        step, is_final = state.step, event == "final"
        self.files.metrics(event, step, timing={"train_seconds": round(self.clock.seconds(), 3)}, **fields)
        folder = "final" if is_final else "val"
        self.trackers.log({f"{folder}/{name}": value for name, value in fields.items() if value is not None}, step)
        compared = None if is_final else self.reference.describe(step, result.loss, plan)
        scored = "whole val split: " if is_final else ""
        log(f"step {step}: {scored}{result.describe()}" + (f"; {compared}" if compared else ""))
        if not is_final and (warning := overfitting_warning(state.progress.history)):
            log(warning)

    def samples(self, state: TrainState, samples: Sequence[tuple[str, str]]) -> None:
        """Records samples of the current weights, each a text and the reason of its end."""
        for number, (text, reason) in enumerate(samples, 1):
            title = f"sample {number} of {len(samples)}" if len(samples) > 1 else "sample"
            end = "cut at its maximum length" if reason == "length" else f"ended by {reason}"
            facts = ", ".join(fact for fact in (title, state.describe_rank(), end) if fact)
            self.files.sample(state.step, text, facts)
            self.trackers.log({f"sample/{number}": text}, state.step)
            log(f"---- step {state.step} ({facts}) ----\n{text}\n----")

    def skip(self, step: int, loss: float, grad_norm: float, ranks: str = "") -> None:
        """Records an update that was skipped because loss or gradient norm is not finite. ranks: of several processes
        those that have such a loss."""
        self.files.metrics("skip", step, loss=loss, grad_norm=grad_norm)
        where = f" ({ranks})" if ranks else ""
        log(f"step {step}: loss {loss}{where}, gradient norm {grad_norm}: update skipped")

    def _rollbacks(self, state: TrainState) -> None:
        """Records that the run, which has diverged, goes on from the current step with other data."""
        for entry in state.new_rollbacks:
            self.files.metrics("rollback", state.step, diverged=entry["step"], reason=entry["reason"])
            end = entry["passed_over"] + state.step
            log(
                f"rolled back to step {state.step}; the data of steps {state.step} to {end} is passed over. At step"
                f" {entry['step']} the run had diverged: {entry['reason']}"
            )

    def plan(self, step: int, budget: Budget) -> None:
        """Records a plan that follows from the time budget; nothing without one."""
        plan, seconds = budget.plan, budget.seconds
        if seconds is None:
            return
        self.files.metrics("plan", step, timing=asdict(plan))
        log(
            f"budget {format_duration(seconds)}: {budget.step_seconds * 1e3:.1f} ms a step → "
            f"max_steps={plan.max_steps}, decay_steps={plan.decay_steps}"
        )

    def kept_text(self, step: int, name: str, result: Evaluation, before: Mapping[str, Any] | None) -> None:
        """Records an evaluation of a text that is mixed in. before: {val_loss, compared} at the start of the run."""
        fields: dict[str, Any] = {"name": name, "val_loss": result.loss, "before": before and before["val_loss"]}
        fields |= {"bits_per_byte": result.bits_per_byte, "targets": result.targets}
        self.files.metrics("kept", step, **fields)
        if before is None:
            log(f"old text {name}: {result.describe()}")
            return
        error = result.change_error([Clusters(**kind) for kind in before["compared"]])
        spread = "" if error is None else f" ± {error:.4f}"
        change = f"{result.loss - before['val_loss']:+.4f}{spread}"
        log(f"old text {name}: val loss {before['val_loss']:.4f} → {result.loss:.4f} ({change})")

    def patience(self, step: int, plan: Plan, verdict: str) -> None:
        """Records that the val loss has stopped falling, and the plan that follows."""
        self.files.metrics("patience", step, **asdict(plan))
        log(f"step {step}: {verdict}")


def describe_saved(run: Path) -> str:
    """What remains of a run that ends now."""
    if not (steps := saved_steps(run)):
        return f"nothing of {run} is saved; start it again with the same command"
    resume = f"{command()} --resume={quote(str(run))}"
    return f"the last checkpoint of {run} is that of step {steps[-1]}; continue with: {resume}"


def log_stopped(run: Path) -> int:
    """Logs that a signal ends a run that has just gone back to a checkpoint. Returns the exit code."""
    log(f"stopped; {describe_saved(run)}")
    return STOPPED


@contextmanager
def naming_what_is_saved(run: Path) -> Iterator[None]:
    """A context whose errors, of lost processes and of a text that cannot be read, say what of the run is saved."""
    with naming_saved(partial(describe_saved, run)), naming_lost_text(partial(describe_saved, run)):
        yield


def _best_of(run: Path) -> str:
    try:
        return find_checkpoint(run, "best").name
    except (OSError, UserError):  # the disk fails, or they were removed
        return "--checkpoint=best"


def log_end(run: Path, state: TrainState, budget: Budget, next_argv: Sequence[str], has_teacher: bool) -> int:
    """Logs how the run ended and the next commands. Returns the exit code. next_argv: of the run that begins now, if
    one does. Raises OutOfResources where its last step is not saved."""
    name, step, end = quote(str(run)), state.step, budget.plan.end
    resume, config = f"{command()} --resume={name}", run / "config.json"
    again = f"{command()} {quote(str(config))}"
    if state.saved_step is None:
        start_again = again if os.path.exists(config) else "with the same command"
        raise OutOfResources(
            f"nothing is saved: {run} has no checkpoint; free disk space or memory, then start again: {start_again}"
        )
    if state.saved_step != step and state.trouble() is not None:
        log(f"stopped; step {step} is not saved: {state.trouble()}. From step {state.saved_step} on: {resume}")
        return STOPPED
    if state.saved_step != step and state.unsound is not None:
        raise UserError(
            f"the weights of step {step} are not saved: {state.unsound}; the last checkpoint is that of step"
            f" {state.saved_step}, from which the run goes on with {resume}"
        )
    if state.saved_step != step:
        kept = f"the last checkpoint is that of step {state.saved_step}"
        raise OutOfResources(
            f"the weights of step {step} are not saved ({kept}): free disk space or memory, then {resume}"
        )
    if not state.is_finished:
        log(f"stopped; everything up to step {step} is saved; continue with: {resume}")
        return STOPPED
    is_exhausted = budget.is_exhausted(state)
    if step < end and not is_exhausted:
        log(f"the time budget was spent at step {step} of {end}: the machine got slower in the decay")
    if is_exhausted or state.progress.early_decay is not None:
        log(f"sample.py takes {by_first(partial(_best_of, run))}, the best of the run by val loss")
    history = state.progress.history
    if history and history[0]["step"] == 0:  # of weights that were trained before
        best = min(entry["val_loss"] for entry in history)
        log(f"val loss {history[0]['val_loss']:.4f} before the first step, {best:.4f} at best")
    if next_argv:
        what = "a model that learns from this one, too" if "--teachers=0" in next_argv else "another teacher"
        log(f"\nnow {what}: {' '.join(['python train.py', *map(quote, next_argv)])}")
        return 0
    log(f"\nnext: python sample.py --run={name} --num_samples=3 --top_p=0.95")
    log(f"      python sample.py --run={name} --serve   (a page to try prompts)")
    log(f"      python -m training.report {name}")
    log(f"      python -m interop export {name} --to=hf   (for other programs; --to=gguf: for llama.cpp, Ollama)")
    if not has_teacher and (is_exhausted or state.progress.early_decay is not None):
        log(f"      {again} --teacher={name} --seed=2   (a second model, which learns from this one, too)")
    if is_exhausted and step < end:
        longer = f"--max_steps={2 * step}" if end == math.inf else "--patience=none"
        log(f"      {resume} {longer}   (trains on all the same)")
    elif step < end:
        log(f"      {resume}   (the rest of its decay)")
    elif state.progress.early_decay is not None:
        return 0  # more steps would not lower the loss
    elif step > 0 and budget.options.schedule in LENGTHENED:
        log(f"      {resume} --max_steps={2 * step}")
    elif step > 0:
        log(f"      {again} --max_steps={2 * step}   (a longer run; this one's learning rate has decayed)")
    return 0
