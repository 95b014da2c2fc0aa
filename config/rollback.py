"""What follows where a run has diverged (training/divergence.py): it goes back to a checkpoint and goes on, in the same
process, or ends with the command that goes on with a smaller learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import config
from checkpoint import discard_later, find_checkpoint, open_checkpoint, saved_steps
from common.hardware import Hardware
from common.option import option_names
from common.signature import PATHS, SERVICES
from config.resume import READ_WITH, from_json
from config.start import RunConfig
from errors import UserError, quote
from files import read_json
from model_folder import STATE
from parallel.processes import by_first, command
from prepare_data import PrepareOptions
from training.data import TrainBatches
from training.diagnosis import first_not_finite
from training.divergence import (
    MAX_ROLLBACKS,
    ROW_STEPS,
    Diverged,
    make_rollback,
    recent_rollbacks,
    write_rollbacks,
)
from training.logger import log_stopped
from training.metrics import log
from training.state import TrainState

RATES = ("learning_rate", "muon_learning_rate", "min_learning_rate")


def go_back(
    error: Diverged, run: Path, state: TrainState, batches: TrainBatches, recorded: RunConfig, hardware: Hardware,
    stopped: Callable[[], bool],
) -> tuple[int, list[str]]:  # fmt: skip
    """The exit code, and the arguments of train.py with which the run goes on from an earlier checkpoint; none where a
    signal has stopped it. Raises UserError where it ends."""
    if where := first_not_finite(state.model, batches(max(0, state.data_step - 1)), hardware):
        error.reason += f"; not finite first: {where}"
    before, rate = state.progress.rollbacks, recorded.options.values["learning_rate"]
    log(f"step {state.step}: the run has diverged: {error.reason}")

    def write() -> tuple[dict[str, Any] | None, str]:
        rollback = make_rollback(error, state.step, rate, intact_steps(run, error.since), before)
        if rollback is None:
            return None, ""
        try:
            write_rollbacks(run, [*before, rollback])
        except OSError as reason:
            return None, f"; {run} cannot be written: {reason}"
        discard_later(run, rollback["to"])
        return rollback, ""

    rollback, problem = by_first(write)
    if rollback is None:
        raise UserError(describe_end(error, run, state, recorded.options) + problem)
    to = f"step-{rollback['to']}"
    stored = by_first(lambda: read_json(find_checkpoint(run, to) / STATE)["options"])
    if stopped():
        return log_stopped(run), []
    return 0, [f"--resume={run}", f"--from={to}", *changed_flags(recorded, stored)]


def intact_steps(run: Path, last: int) -> list[int]:
    """The steps of the checkpoints up to a step, without damaged ones after the newest that is intact."""
    steps = [step for step in saved_steps(run) if step <= last]
    while steps:
        try:
            open_checkpoint(find_checkpoint(run, f"step-{steps[-1]}"))
            break
        except UserError as error:
            log(f"the run does not go back to step {steps.pop()}: {error}")
    return steps


def changed_flags(recorded: RunConfig, stored: dict[str, Any]) -> list[str]:
    """The flags that give a resumed run the options of now, where those of its checkpoint are others, and the paths and
    services that were named on the command line: the checkpoint may be another user's."""
    options = recorded.options
    before = from_json(options, stored)
    kept = config.fixed_names() | recorded.reasons.keys() | {"run", "resume", "from", "teachers", "plan", "try"}
    kept |= {*option_names(PrepareOptions)} - {"data_dir"}
    named = {name for name in (*PATHS, *SERVICES) if options.origin.get(name) == "flag"} & options.loader.options.keys()
    names = [
        name
        for name, value in options.values.items()
        if name not in kept and (value != before[name] or name in named) and has_effect(name, options)
    ]
    return [flag for name in names for flag in options.loader.options[name].as_flags(options.values[name])]


def has_effect(name: str, options: config.Options) -> bool:
    """Whether an option is read with the values of the others."""
    other, needed = READ_WITH.get(name, ("", ()))
    return not other or options.values[other] in needed


def describe_end(error: Diverged, run: Path, state: TrainState, options: config.Options) -> str:
    """Why the run does not go back by itself, and the command that goes on with a third of the highest learning rate
    before the trouble."""
    usable = [step for step in saved_steps(run) if step <= error.since]
    peak = options.values["learning_rate"]
    in_a_row = recent_rollbacks(state.progress.rollbacks, state.step, peak)
    reached = min(1.0, (error.since + 1) / max(1, options.values["warmup_steps"]))
    rates = {name: rate for name in RATES if (rate := options.values[name]) and has_effect(name, options)}
    flags = " ".join(f"--{name}={rate * reached / 3:.1e}" for name, rate in rates.items())
    why = f"the run has diverged at step {state.step}: {error.reason}"
    if len(in_a_row) >= MAX_ROLLBACKS:
        why += f". It went back {MAX_ROLLBACKS} times within {ROW_STEPS:,} steps, and other data did not help"
    if not usable:
        return f"{why}. It has no checkpoint from before; start it again with {flags}"
    go_on = f"{command()} --resume={quote(str(run))} --from=step-{usable[-1]} {flags}"
    return f"{why}. Nothing was saved after step {usable[-1]}; go on from there with a smaller learning rate: {go_on}"
