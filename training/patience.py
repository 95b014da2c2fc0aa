"""--patience: when the val loss has stopped falling.

`count_evaluation` compares an evaluation with the bar: the last one that was better than the bar before it by more
than the standard error of their difference. That is neither the previous evaluation nor the lowest one, so improvements
that are each within the noise add up until one counts. Evaluations before the end of the warm-up are not counted, and
where wsd's decay begins the bar is set anew, since the loss has another course from there on. training/budget.py ends
the run or begins the decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from common.clusters import Clusters
from training.evaluation import Evaluation
from training.optim import Plan
from training.options import OptimizerOptions
from training.state import Progress

# shares of the val loss by which a memorizing model has its train loss below it, or its last one above its best
MEMORIZED, RISEN = 0.05, 0.02


def count_evaluation(progress: Progress, result: Evaluation, plan: Plan, options: OptimizerOptions) -> None:
    """Counts the evaluation of the current step, which is in the history unless no update preceded it."""
    step, bar = progress.step, progress.bar
    in_decay = options.schedule == "wsd" and step >= plan.decay_start
    if bar is None or (in_decay and bar["step"] < plan.decay_start) or is_better(result, bar):
        compared = [asdict(kind) for kind in result.compared]
        progress.bar, progress.stale = {"step": step, "val_loss": result.loss, "compared": compared}, 0
    elif step >= options.warmup_steps and progress.history and progress.history[-1]["step"] == step:
        progress.stale += 1


def is_better(result: Evaluation, bar: Mapping[str, Any]) -> bool:
    """Whether the loss is below that of the bar by more than the standard error of the difference. True where the bar
    was of other tokens (a changed --eval_tokens)."""
    error = change_error(result, bar)
    if error is None and (result.compared or bar["compared"]):
        return True
    return result.loss < bar["val_loss"] - (error or 0.0)  # a single target has no error


def change_error(result: Evaluation, bar: Mapping[str, Any]) -> float | None:
    return result.change_error([Clusters(**kind) for kind in bar["compared"]])


def count_anew(progress: Progress) -> None:
    """Counts anew from the next evaluation: the run has another length."""
    progress.bar, progress.stale, progress.early_decay = None, 0, None


def describe_stall(progress: Progress, result: Evaluation) -> str:
    """What the last evaluations have shown, for a sentence that goes on with what follows from it."""
    bar = progress.bar
    assert bar is not None
    error = change_error(result, bar)
    spread = "" if error is None else f" by more than the standard error of the difference, {error:.4f}"
    n = progress.stale
    which = f"none of the last {n} evaluations was" if n > 1 else "the last evaluation was not"
    return f"val loss has stopped falling ({which} better than step {bar['step']}'s {bar['val_loss']:.4f}{spread})"


def advise(progress: Progress) -> str:
    """What would let the model learn more, by its loss on the text that it has seen; dropout raises that."""
    last, best = progress.history[-1], min(entry["val_loss"] for entry in progress.history)
    train_loss = f"train loss is {last['train_loss']:.4f}"
    if last["train_loss"] < (1 - MEMORIZED) * last["val_loss"] or last["val_loss"] > (1 + RISEN) * best:
        helps = "more text or more regularization (--weight_decay, --dropout)"
        return f"{train_loss}: the model memorizes its text; it learns more with {helps}"
    return f"{train_loss}, close to it: a larger model (--n_layer, --n_embd) or a lower --learning_rate may learn more"
