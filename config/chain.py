"""--teachers: models that are trained before the model of a run, one after another, from which it then learns.

Each is an ordinary run, begun in the same process by the command that its predecessor prints. That has the flags of the
first command, or, where there were presets, config.json of the predecessor; then the prepared text, one teacher fewer,
one --teacher more, another seed, and what is left of the time. A run with --teachers hands its --teacher on; the last
one, without, learns from them all. It has the directory RUN, those before it RUN-teacher, RUN-teacher-2 …
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import config
from checkpoint import list_checkpoints, open_latest, run_of, teacher_runs
from common.memory import release_memory
from common.option import show
from common.options import RunOptions
from common.run_directory import claim_run, refuse_used_run
from common.run_state import RunState, telling_failure
from config.start import Chain, Start, passed_on
from errors import UserError, quote
from parallel.processes import by_first, command
from prepare_data.shards import Dataset
from state_file import build
from training import setup
from training.budget import Budget
from training.logger import log_end, naming_what_is_saved
from training.metrics import log
from training.options import EvalOptions, LoggingOptions, TrainOptions
from training.plan import own_share
from training.state import TrainState


def train_all(train: Callable[[Sequence[str]], tuple[int, list[str]]], argv: Sequence[str]) -> int:
    """The run of a command line and those that follow it, by `train`, which returns its exit code and the next command
    line, if there is one. Returns the first exit code that is not 0, else 0."""
    code, next_argv = train(argv)
    while code == 0 and next_argv:
        release_memory()
        run = next(arg.partition("=")[2] for arg in reversed(next_argv) if arg.startswith(("--run=", "--resume=")))
        with telling_failure(Path(run)):
            code, next_argv = train(next_argv)
    return code


def share_time(start: Start, before: Start) -> Start:
    """The start of a new run with its part of the time, where it is trained before others and the plan has not done
    that already, and with what follows it. before: the start without a plan."""
    teachers = start.options.section(TrainOptions).teachers
    if teachers == 0 or start.resumed is not None:
        return start
    minutes = before.options.section(TrainOptions).budget_minutes
    arguments = None if start.options.presets else passed_on(start.argv, start.options)
    length = ["decay_steps"] + ["max_steps"] * (minutes is None)
    flags = [f"--{name}={show(start.options.values[name])}" for name in length]
    chain = Chain("", arguments, flags, minutes, [str(teacher.path.resolve()) for teacher in start.handed_on])
    if minutes is not None and not start.needs_plan:
        options = config.replace(start.options, budget_minutes=minutes * own_share(teachers))
        start = replace(start, options=options)
    return replace(start, chain=chain, began=time.perf_counter())


def open_run(start: Start, dataset: Dataset, stack: ExitStack) -> tuple[Start, Path, RunState]:
    """The directory of the run, locked in `stack` where it is new, and its run_state.json; from here on errors say what
    of it is saved. Where others follow, the directory of the last one is made, too. Raises UserError."""
    run, name = start.options.section(RunOptions).run, start.default_name(dataset)
    if start.chain is not None and start.resumed is None:
        last = by_first(partial(claim_run, run, name, asked=start.asked))
        start, run = (
            replace(start, chain=replace(start.chain, run=str(last.resolve()))),
            by_first(partial(_beside, last)),
        )
    opened = setup.open_run(run, name, start.source, stack, start.asked if start.resumed is None else None)
    stack.enter_context(naming_what_is_saved(opened))
    return start, opened, stack.enter_context(RunState(start.directories(opened), start.argv, start.saved_step))


def _beside(run: Path) -> str:
    names = (f"{run if run.name else run.resolve()}-teacher" + f"-{n}" * (n > 1) for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name) or _is_unused(name))


def _is_unused(run: str) -> bool:
    """Whether a run may begin there: what a killed one has left without a checkpoint is no obstacle."""
    try:
        refuse_used_run(run)
    except UserError:
        return False
    return True


def end_run(start: Start, run: Path, dataset: Dataset, state: TrainState, budget: Budget) -> tuple[int, list[str]]:
    """Logs how a run ended. Returns its exit code, and the arguments of the run to go on with, if there is one."""
    argv, chain = list[str](), start.chain
    if state.is_finished:
        log_teachers(start, state, dataset)
    if state.is_finished and chain is not None:
        if (follows := by_first(partial(following, run, chain))) is not None:
            name = _shown(follows)
            log(f"{name} follows this run; to go on with it: {command()} --resume={quote(name)}")
        else:
            argv = by_first(partial(next_argv, start, chain, run, dataset))
    return log_end(run, state, budget, argv, has_teacher=bool(start.teachers)), argv


def following(run: Path, chain: Chain) -> Path | None:
    """The directory of the run that was begun after `run`, where that has a checkpoint."""
    last = Path(chain.run)
    if list_checkpoints(last):
        return last
    for other in teacher_runs(last):
        state = open_latest(other).state
        known = build(Chain, state, "chain") if state.get("chain") else None
        runs = [run_of(Path(path)) for path in known.teachers] if known else []
        if known and known.run == chain.run and run.resolve() in [path.resolve() for path in runs if path is not None]:
            return other
    return None


def next_argv(start: Start, chain: Chain, run: Path, dataset: Dataset) -> list[str]:
    """The arguments of train.py that begin the run after `run`."""
    teachers = start.options.section(TrainOptions).teachers
    flags = [f"--data={_shown(dataset.folder)}", f"--run={_shown(chain.run)}"]
    flags += [f"--teacher={_shown(path)}" for path in [*chain.teachers, str(run)]]
    flags += [f"--teachers={teachers - 1}", f"--seed={start.options.section(RunOptions).seed + 1}"]
    if chain.minutes is not None:
        own = chain.minutes * own_share(teachers)
        used = own if start.resumed else (time.perf_counter() - start.began) / 60
        flags.append(f"--budget_minutes={max(chain.minutes - used, own):.3g}")
    if chain.arguments is not None:
        return [*chain.arguments, *flags]
    trackers = start.options.section(LoggingOptions).trackers  # which config.json does not pass on
    flags = [f"--{name}={show(value)}" for name, value in trackers.items()] + flags
    return [_shown(run / "config.json"), *chain.length, *flags]


def _shown(path: str | Path) -> str:
    """The path as it is from here, where that is shorter."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def log_teachers(start: Start, state: TrainState, dataset: Dataset) -> None:
    """Logs the val losses of the teachers beside that of the run, where they are of the same tokens."""
    best = min((entry["val_loss"] for entry in state.progress.history), default=math.inf)
    same = dataset.fingerprint, start.options.section(EvalOptions).eval_tokens
    for teacher in start.teachers:
        stored: Mapping[str, Any] = teacher.state() or {}
        loss, name = stored.get("val_loss"), quote(_shown(run_of(teacher.path) or teacher.path))
        known = stored.get("dataset", {}).get("fingerprint"), stored.get("options", {}).get("eval_tokens")
        if loss is None or known != same:
            continue
        better = "" if best < loss else f"; the teacher is better: python sample.py --run={name}"
        log(f"best val loss {best:.4f}, that of the teacher {name} {loss:.4f}{better}")
