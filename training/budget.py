"""How long a run is: its plan of steps, with --budget_minutes how the plan follows from the speed of the machine, and
with --patience from the val loss (the rule is in training/patience.py).

The first plan comes from a few discarded steps (`measure_step_seconds`). With the warm-up–stable–decay schedule the
learning rate before the decay does not depend on max_steps, so until the decay begins the plan is adjusted to the
measured speed, and the final max_steps and decay_steps still repeat the run. Other schedules keep the first plan.
Training stops at 125 % of the budget. With --patience a val loss that no longer falls begins the decay of wsd; under
other schedules, and within the decay, it ends the run.

Knows no data and no files; the caller passes in the step as a function. The clock is time.perf_counter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from common.hardware import Hardware
from common.weights import trained_parameters
from parallel.processes import agree
from parallel.sharding import local
from training.evaluation import Evaluation
from training.metrics import format_duration, log
from training.optim import Plan, learning_rate, make_plan
from training.options import EvalOptions, OptimizerOptions, TrainOptions
from training.patience import advise, count_anew, count_evaluation, describe_stall
from training.state import TrainState

MAX_OVERRUN = 1.25  # of the budget
LENGTHENED = ("constant", "inverse_sqrt", "wsd")  # schedules with which a longer run may continue a finished one
FEW_TOKENS = 2048  # of the val split, below which the standard error of a difference is large
MIN_CHANGE = 0.03  # relative change of max_steps below which a plan is kept
MEASURED_STEPS, MEASURED_SECONDS = 8, 10.0  # measuring ends at whichever comes first, after at least two steps


@dataclass
class Budget:
    """The plan of a run, and the time that it may take: seconds from `start` on time.perf_counter's clock, None
    without a limit."""

    plan: Plan
    options: OptimizerOptions
    eval_interval: int
    seconds: float | None = None
    start: float = 0.0
    step_seconds: float = 0.0  # smoothed over about the last fifty steps
    pause_seconds: float = 0.0  # of the last evaluation, with its sample and checkpoint
    final_eval_seconds: float = 0.0  # reserved for the evaluation of the whole val split after the last step
    patience: int | None = None
    is_early: bool = False  # whether patience has set the plan

    def limit(
        self, seconds: float, started: float, step_seconds: float, now: float, eval_steps: float,
        final_eval_steps: float, step: int = 0,
    ) -> None:  # fmt: skip
        """Sets the time limit from `started` on, and the first plan from the measured seconds of a step. eval_steps,
        final_eval_steps: the evaluations' targets as multiples of a step's; their forward pass is a third of a step.
        step: the current one."""
        self.seconds, self.start, self.step_seconds = seconds, started, step_seconds
        self.pause_seconds, self.final_eval_seconds = eval_steps * step_seconds / 3, final_eval_steps * step_seconds / 3
        self.plan = make_plan(step + self._steps_left(now), self.options)

    def observe(self, step: int, steps: int, seconds: float, now: float) -> bool:
        """Records the time of the last `steps` steps. Returns whether the plan has changed.

        It changes only before the decay of wsd, and only by more than MIN_CHANGE.
        """
        if self.seconds is None:
            return False
        self.plan, is_new = agree(self._observe(step, steps, seconds, now))
        return is_new

    def _observe(self, step: int, steps: int, seconds: float, now: float) -> tuple[Plan, bool]:
        """observe, by this process's clock: the plan, and whether it is another one."""
        plan = self.plan
        weight = 1.0 - 0.98**steps
        self.step_seconds += weight * (seconds / steps - self.step_seconds)
        if self.options.schedule != "wsd" or step >= plan.decay_start:
            return plan, False
        left = self._steps_left(now)
        new = make_plan(step + left, self.options)
        if abs(new.end - plan.end) <= MIN_CHANGE * plan.end:
            return plan, False
        return Plan(new.max_steps, min(left, new.decay_steps)), True  # an overdue decay begins now

    def judge(self, state: TrainState, result: Evaluation) -> str | None:
        """Counts an evaluation of the current step for --patience. Where it was the last one that patience allowed,
        changes the plan, or lets `is_over` be true, and returns what to tell the user."""
        progress, plan, step = state.progress, self.plan, state.step
        if self.patience is None:
            return None
        count_evaluation(progress, result, plan, self.options)
        if progress.stale < self.patience or step >= plan.end:
            return None
        cause, advice = describe_stall(progress, result), advise(progress)
        if self.options.schedule == "wsd" and step < plan.decay_start:
            decay = self.options.decay_steps or max(1, step // 5)
            self.plan, self.is_early = Plan(step + decay, decay), True
            count_evaluation(progress, result, self.plan, self.options)
            progress.early_decay = step
            effect = f"the learning rate decays from here on, and the run ends at step {step + decay}"
        else:
            decay, best = 0, min(progress.history, key=lambda entry: entry["val_loss"])
            of = "" if plan.max_steps is None else f" of {plan.max_steps}"
            effect = f"the run ends here, at step {step}{of}; sample.py takes the checkpoint of step {best['step']}"
        if self.seconds is not None:
            left = self.seconds - (time.perf_counter() - self.start) - decay * self.step_seconds
            effect += f"; about {format_duration(left)} of the {format_duration(self.seconds)} are left"
        return f"{cause}: {effect}\n  {advice}"

    def is_over(self, state: TrainState, now: float) -> bool:
        """Whether the current step is the last one."""
        return state.step >= self.plan.end or self.is_spent(now) or self.is_exhausted(state)

    def is_exhausted(self, state: TrainState) -> bool:
        """Whether patience has ended the run."""
        return self.patience is not None and state.progress.stale >= self.patience

    def is_spent(self, now: float) -> bool:
        """Whether MAX_OVERRUN times the budget has passed."""
        return self.seconds is not None and agree(now - self.start > MAX_OVERRUN * self.seconds)

    def as_options(self) -> dict[str, Any]:
        """The plan that followed from time or val loss as options: a run with them repeats this one without measuring.
        Empty where it is the user's own."""
        if self.seconds is None and not self.is_early:
            return {}
        decay_steps = self.plan.decay_steps if self.options.schedule == "wsd" else self.options.decay_steps
        return {"max_steps": self.plan.max_steps, "decay_steps": decay_steps, "budget_minutes": None}

    def _steps_left(self, now: float) -> int:
        assert self.seconds is not None
        seconds_left = self.seconds - (now - self.start) - self.pause_seconds - self.final_eval_seconds
        return max(1, int(seconds_left / (self.step_seconds + self.pause_seconds / self.eval_interval)))


def make_budget(
    train: TrainOptions,
    evals: EvalOptions,
    optim: OptimizerOptions,
    val_tokens: int,
    state: TrainState,
    update: Callable[[], object],
    hardware: Hardware,
    started: float,
    stored: Mapping[str, Any] | None,
) -> Budget:
    """The plan of a run. With a time budget it follows from the measured time of `update`, one step; the budget counts
    from `started`, before the step was compiled. stored: the options of a resumed checkpoint, by name."""
    budget = Budget(make_plan(train.max_steps, optim), optim, evals.eval_interval, patience=train.patience)
    has_time = train.budget_minutes is not None and (stored is None or stored.get("budget_minutes") is None)
    if stored is not None and (stored["max_steps"] != train.max_steps or has_time):
        count_anew(state.progress)
    if train.budget_minutes is not None and has_time:
        step_seconds = measure_step_seconds(update, state, hardware)
        eval_steps = min(evals.eval_tokens or val_tokens, val_tokens) / train.tokens_per_step
        final_eval_steps = evals.final_eval * val_tokens / train.tokens_per_step
        seconds = 60.0 * train.budget_minutes
        budget.limit(seconds, started, step_seconds, time.perf_counter(), eval_steps, final_eval_steps, state.step)
        budget.plan, budget.step_seconds = agree((budget.plan, budget.step_seconds))
    elif budget.is_over(state, started) and state.progress.evaluated_step == state.step:
        ended = ": its val loss had stopped falling" if budget.is_exhausted(state) else ""
        log(f"the run is complete at step {state.step}{ended}")
    if state.step < budget.plan.end <= optim.warmup_steps:
        log(
            f"note: the learning rate rises until the end of this run of {budget.plan.max_steps} steps "
            f"(warmup_steps={optim.warmup_steps})"
        )
    if train.patience is not None and not budget.is_over(state, started):
        note_patience(budget, evals, val_tokens)
    if stored is not None:
        log_resumed_rate(state.step, stored, budget)
    return budget


def note_patience(budget: Budget, evals: EvalOptions, val_tokens: int) -> None:
    """Logs a note where --patience can have no effect, or judges by little text."""
    assert budget.patience is not None
    least = budget.patience * evals.eval_interval
    if least >= budget.plan.end:
        takes = f"it takes {least:,} steps at least (eval_interval={evals.eval_interval})"
        log(f"note: patience={budget.patience} has no effect: {takes}, and the run has {budget.plan.max_steps:,}")
    tokens = min(evals.eval_tokens or val_tokens, val_tokens)
    if tokens < FEW_TOKENS:
        more = "" if tokens == val_tokens else "; --eval_tokens=none takes all of it"
        log(f"note: patience judges by {tokens:,} tokens of the val split, which show only large changes{more}")


def log_resumed_rate(step: int, stored: Mapping[str, Any], budget: Budget) -> None:
    """Logs what the learning rate does from here on, where another length or rate changes it. stored: the options of
    the resumed checkpoint, by name."""
    names = {field.name for field in fields(OptimizerOptions)} & stored.keys()
    options = OptimizerOptions(**{name: stored[name] for name in names})
    plan, new = make_plan(stored["max_steps"], options), budget.plan
    if (plan, options) == (new, budget.options) or not 0 < step < new.end:
        return
    before, after = learning_rate(step - 1, plan, options), learning_rate(step, new, budget.options)
    schedule, last = budget.options.schedule, ""
    if new.max_steps is not None:
        last = f", {learning_rate(new.max_steps - 1, new, budget.options):.2e} at step {new.max_steps}"
    log(f"learning rate: {before:.2e} so far, {after:.2e} from here{last} ({schedule})")
    if schedule not in LENGTHENED and after > 2 * before:
        log(f"  it had decayed: a new run of {new.max_steps} steps ends at a lower loss (bench/NOTES.md)")


def measure_step_seconds(update: Callable[[], object], state: TrainState, hardware: Hardware) -> float:
    """The median seconds of a few updates, the first one (warm-up, compiling) left out. Their effect on `state` is
    undone."""
    parameters = [local(parameter) for parameter in trained_parameters(state.model).values()]
    weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]  # off a full device
    moments = [tensor for values in state.optimizer.state.values() for tensor in values.values()] if state.step else []
    kept = [tensor.to("cpu", copy=True) for tensor in moments]
    scale = state.scaler.state_dict()
    seconds: list[float] = []
    while len(seconds) < 2 or agree(len(seconds) < MEASURED_STEPS and sum(seconds[1:]) < MEASURED_SECONDS):
        started = time.perf_counter()
        update()
        if hardware.device.type == "cuda":
            torch.cuda.synchronize(hardware.device)
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
        for moment, value in zip(moments, kept, strict=True):
            moment.copy_(value)
    if not moments:  # before the first step
        state.optimizer.reset()
    state.scaler.load_state_dict(scale)
    return statistics.median(seconds[1:])
