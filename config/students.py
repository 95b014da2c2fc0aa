"""--students: models that follow the model of a run, one after another, each of which learns from all before it.

Each is an ordinary run, begun by the command that its predecessor prints: the one that began that, with the finished
run as a further --teacher, one student fewer, another seed, and the rest of the time budget. The last one has the
directory of --run, those before it have one beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import config
from checkpoint import ModelFolder
from common.memory import release_memory
from common.options import RunOptions
from config.start import Start, resolve_length
from errors import quote
from prepare_data.shards import Dataset
from training.budget import Budget
from training.logger import log_end
from training.metrics import log
from training.options import TrainOptions
from training.plan import own_share
from training.state import TrainState


def train_all(train: Callable[[Sequence[str]], tuple[int, list[str]]], argv: Sequence[str]) -> int:
    """The run of a command line and those that follow it, by `train`, which returns its exit code and the next command
    line, if there is one. Returns the first exit code that is not 0, else 0."""
    code, following = train(argv)
    while code == 0 and following:
        release_memory()
        code, following = train(following)
    return code


def with_own_share(start: Start) -> Start:
    """The start of a new run with its own part of what is shared with its students: the time, where a plan has not done
    that, and a directory beside that of --run."""
    students = start.options.section(TrainOptions).students
    run, minutes = start.options.section(RunOptions).run, start.options.section(TrainOptions).budget_minutes
    if students == 0 or start.resumed is not None:
        return start
    changed = dict[str, object]()
    if run is not None:
        number = len(start.teachers)
        changed["run"] = f"{Path(run)}-teacher" + f"-{number + 1}" * (number > 0)
    if minutes is not None and not start.needs_plan:
        changed["budget_minutes"] = minutes * own_share(students)
    return replace(start, options=config.replace(start.options, **changed))


def end(start: Start, run: Path, dataset: Dataset, state: TrainState, budget: Budget) -> tuple[int, list[str]]:
    """Logs how a run ended. Returns its exit code, and the arguments of the run to go on with; none where there is
    none, or this process has only found the run complete."""
    following = next_command(start, run, dataset) if state.is_finished else []
    if state.is_finished:
        log_teachers(start.teachers, state, dataset)
    code = log_end(run, state, budget, following)
    is_new = start.resumed is None or start.resumed.step < state.step
    return code, following if is_new else []


def next_command(start: Start, run: Path, dataset: Dataset) -> list[str]:
    """The arguments of train.py that begin the next student; none where there is none. The text is named by its
    dataset, since a pipe is read once."""
    students, seed = start.options.section(TrainOptions).students, start.options.section(RunOptions).seed
    if students == 0 or not start.command:
        return []
    flags: dict[str, object] = {"students": students - 1, "seed": seed + 1}
    if any(arg.startswith("--data=") for arg in start.command):
        flags["data"] = dataset.folder
    minutes = resolve_length(config.load("train.py", start.command)).section(TrainOptions).budget_minutes
    if minutes is not None:
        used = minutes * own_share(students) if start.resumed else (time.perf_counter() - start.began) / 60
        flags["budget_minutes"] = f"{max(minutes - used, minutes / 10):.3g}"
    kept = [arg for arg in start.command if arg.partition("=")[0].removeprefix("--") not in flags]
    return [*kept, *(f"--{name}={value}" for name, value in flags.items()), f"--teacher={run}"]


def log_teachers(teachers: Sequence[ModelFolder], state: TrainState, dataset: Dataset) -> None:
    """Logs the val losses of the teachers that were trained on the same text, beside that of the run."""
    best = min((entry["val_loss"] for entry in state.progress.history), default=math.inf)
    for teacher in teachers:
        stored = teacher.state() or {}
        folder = teacher.path.parents[2] if teacher.path.parts[-3:-2] == ("checkpoints",) else teacher.path
        loss, name = stored.get("val_loss"), quote(str(folder))
        if loss is None or stored["dataset"]["fingerprint"] != dataset.fingerprint:
            continue
        better = "" if best < loss else f"; the teacher is better: python sample.py --run={name}"
        log(f"best val loss {best:.4f}, that of the teacher {name} {loss:.4f}{better}")
