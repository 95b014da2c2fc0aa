"""Is this normal? Compares a run's val loss with recorded runs that had the same options and the same tokens.

    python -m training.reference runs/A runs/B runs/C      adds finished runs of several seeds to reference_curves.json

Owns reference_curves.json and the comparison. A run is compared if at least three recorded runs have its dataset
fingerprint and all its options that affect the loss, and only at steps up to which their learning rates were equal; for
any other run there is no output. Device, dtype and micro-batch size are ignored: they change the loss by
much less than the width of a band (figures in bench/NOTES.md). Do not record runs extended by --resume with
--max_steps: their learning rate did not follow a single plan. Reading order: Reference, then read_run and main.
"""

from __future__ import annotations

from errors import UserError, run_script, start_script

if __name__ == "__main__":
    start_script()  # before the imports that take seconds

import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from filelock import lock_descriptor

from checkpoint import list_checkpoints, run_hint, with_checkpoint
from common.option import option_names, section_from
from files import DamagedFile, read_json, replace_file
from json_types import conform
from model import GPTConfig
from model_folder import CONFIG, STATE
from state_file import StateFile, read_state
from training.metrics import METRICS
from training.optim import Plan, make_plan
from training.options import EvalOptions, OptimizerOptions, TrainOptions
from training.records import read_lines
from training.state import Progress
from training.stored import read_progress

CURVES = Path(__file__).with_name("reference_curves.json")
FORMAT, VERSION = "sprout-reference", 1
IGNORED = {"data", "resume", "budget_minutes", "patience", "micro_batch_size", "compile", "deterministic"}  # options
IN_PLAN = {"max_steps", "decay_steps"}  # options that are compared as a Plan
MIN_RUNS = 3  # that make a band
T_975 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles of Student's t for 3 … 10 runs

RESTORE = "restore it (git checkout training/reference_curves.json) or delete it"

Run = dict[str, Any]
# dataset: its fingerprint; options: those that affect the loss
FIELDS = {"dataset": str, "options": dict, "seed": int, "max_steps": int, "decay_steps": int}
FIELDS |= {"steps": list, "val_loss": list}


def _compared_options() -> dict[str, Any]:
    """The options that must be equal, with their defaults."""
    defaults = {
        field.name: field.default
        for section in (TrainOptions, GPTConfig, OptimizerOptions)
        for field in dataclasses.fields(section)
        if field.name not in IGNORED | IN_PLAN and not field.metadata.get("derived")
    }
    return defaults | {"eval_tokens": EvalOptions.eval_tokens}


def _as_json(value: Any) -> Any:
    """As it is in a recorded run."""
    return list(value) if isinstance(value, tuple) else value


class Reference:
    """The recorded runs (among `runs`) that a run of this dataset and these options, flat by name, is compared with."""

    def __init__(self, fingerprint: str, options: Mapping[str, Any], runs: Sequence[Run]) -> None:
        defaults = _compared_options()
        compared = {name: _as_json(options[name]) for name in defaults if name in options}
        self.schedule = compared.get("schedule")
        # A recorded run that is older than an option counts as a run with that option's default.
        self.runs = [
            run
            for run in runs
            if run["dataset"] == fingerprint
            and compared.keys() >= run["options"].keys()
            and all(value == run["options"].get(name, _as_json(defaults[name])) for name, value in compared.items())
        ]

    def band(self, step: int, plan: Plan) -> tuple[float, float, int] | None:
        """(low, high, number of runs n): 95 % prediction interval of the val loss at `step`; None below MIN_RUNS runs.

        mean ± t · s · √(1 + 1/n), Student's prediction interval, assumes losses normally distributed over seeds. The
        range between the extremes of n runs, which is simpler, would miss 2 of n + 1 new runs.
        """
        runs = [run for run in self.runs if self._same_rate(step, plan, Plan(run["max_steps"], run["decay_steps"]))]
        losses = [run["val_loss"][run["steps"].index(step)] for run in runs if step in run["steps"]]
        n = len(losses)
        if n < MIN_RUNS:
            return None
        width = T_975[min(n - MIN_RUNS, len(T_975) - 1)] * statistics.stdev(losses) * math.sqrt(1 + 1 / n)
        return statistics.mean(losses) - width, statistics.mean(losses) + width, n

    def _same_rate(self, step: int, one: Plan, other: Plan) -> bool:
        """Whether two plans gave every update before `step` the same learning rate."""
        if one == other or self.schedule in ("constant", "inverse_sqrt"):
            return True
        return self.schedule == "wsd" and step <= min(one.decay_start, other.decay_start)

    def describe(self, step: int, val_loss: float, plan: Plan) -> str | None:
        """A line on where val_loss lies relative to the band; None without a band."""
        band = self.band(step, plan)
        if band is None:
            return None
        low, high, n = band
        distance = max(low - val_loss, val_loss - high)
        position = "inside" if distance <= 0 else f"{distance:.4f} {'below' if val_loss < low else 'above'}"
        return f"{position} the band of {n} runs ({low:.4f}-{high:.4f})"


def load_curves() -> list[Run]:
    """The recorded runs; [] if there is no such file. Raises UserError on anything that is not this version's file."""
    if not os.path.lexists(CURVES):
        return []
    try:
        value = read_json(CURVES)
    except DamagedFile as error:
        raise UserError(f"{error.path}: {error.problem}; {RESTORE}") from error
    if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{CURVES}: expected format {FORMAT}, version {VERSION}; {RESTORE}")
    runs = value.get("runs")
    if not isinstance(runs, list) or not all(_is_run(run) for run in runs):
        raise UserError(f"{CURVES}: an entry of its runs is damaged; {RESTORE}")
    return runs


def read_curves() -> list[Run]:
    """As load_curves, but a file that cannot be used costs one line on standard error, and the comparison."""
    try:
        return load_curves()
    except UserError as error:
        print(f"no comparison with earlier runs: {error}", file=sys.stderr, flush=True)
        return []


def _is_run(value: object) -> bool:
    """Whether a value of the file has the form of a Run."""
    if not isinstance(value, dict) or any(type(value.get(name)) is not kind for name, kind in FIELDS.items()):
        return False
    steps, losses = value["steps"], value["val_loss"]
    is_numeric = all(type(step) is int for step in steps) and all(type(loss) is float for loss in losses)
    return is_numeric and all(map(math.isfinite, losses)) and len(steps) == len(losses)


def dataset_of(run: Path) -> str | None:
    """The fingerprint of a run's dataset, from its last checkpoint; None without one."""
    state = last_state(run)
    return state["dataset"]["fingerprint"] if state is not None else None


def last_state(run: Path) -> StateFile | None:
    """The state.json of a run's last checkpoint; None without one."""
    if not list_checkpoints(run):
        return None
    return with_checkpoint(run, "latest", lambda model_folder: read_state(model_folder.parent / STATE))


def plan_of(options: Mapping[str, Any]) -> Plan:
    """The plan of a run, from its flat options. Raises UserError where they are no options of this version."""
    names = {field.name for field in dataclasses.fields(OptimizerOptions)}
    try:
        section = section_from(OptimizerOptions, {name: value for name, value in options.items() if name in names})
        length = section_from(TrainOptions, {"max_steps": options.get("max_steps")}).max_steps
    except ValueError as error:
        raise UserError(f"{CONFIG}: {error}; restore it from a copy, or use the Sprout that wrote it") from None
    return make_plan(length, section)


class Seeded(TypedDict):
    seed: int


def read_options(run: Path) -> dict[str, Any]:
    """The options in a run's config.json. Raises UserError where they are not those of this version."""
    options = read_json(run / CONFIG).get("options")
    try:
        found: dict[str, Any] = conform(dict[str, Any], options)
        conform(Seeded, found)
        for section in (TrainOptions, GPTConfig, OptimizerOptions):
            section_from(section, {name: found[name] for name in option_names(section) if name in found})
    except ValueError as error:
        raise UserError(f"{run / CONFIG}: options: {error}; restore it, or use the Sprout that wrote it") from None
    return found


def read_run(run: Path) -> Run:
    """The record of a finished run. Raises UserError if it is not finished, or started from other weights."""
    fingerprint = dataset_of(run)
    if fingerprint is None or not (run / METRICS).is_file():
        hint = run_hint(run) or "; give finished runs, such as runs/quickstart-1"
        raise UserError(f"{run}: not a run with a checkpoint{hint}")
    options = read_options(run)
    plan, evaluations = plan_of(options), read_lines(run)["eval"]
    losses = {line["step"]: line["val_loss"] for line in evaluations if line.get("val_loss") is not None}
    last = plan.max_steps
    if options.get("patience") is not None:  # which may have ended it earlier
        state = last_state(run)
        last = read_progress(Progress, state).finished_step if state is not None else None
    if last not in losses:
        raise UserError(
            f"{run}: not finished: no evaluation at its last step"
            + ("" if last is None else f" {last}")
            + f"; first run: python train.py --resume={run}"
        )
    if options.get("init_from") is not None or options.get("teacher"):
        named = options.get("init_from") or ", ".join(options["teacher"])
        raise UserError(
            f"{run}: starts or learns from {named}, which others do not have; record runs of the text alone, that start"
            " from random weights"
        )
    return {
        "dataset": fingerprint,
        "options": {name: options[name] for name in _compared_options() if name in options},
        "seed": options["seed"],
        "max_steps": plan.max_steps or last,  # without a fixed length nothing decays
        "decay_steps": plan.decay_steps,
        "steps": list(losses),
        "val_loss": [round(loss, 5) for loss in losses.values()],
    }


def merge(known: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """All runs; a new one replaces the known one that equals it in everything but the losses."""

    def key(run: Run) -> str:
        identity = {name: value for name, value in run.items() if name not in ("steps", "val_loss")}
        return json.dumps(identity, sort_keys=True)

    return list({key(run): run for run in [*known, *new]}.values())


def record(new: Sequence[Run]) -> list[Run]:
    """Adds runs to the file, which is replaced atomically. Returns all. One process at a time; others wait. Raises
    UserError."""
    try:
        with open(CURVES.with_name(CURVES.name + ".lock"), "ab") as file:  # CURVES itself is replaced
            lock_descriptor(file.fileno())  # until the file is closed
            runs = merge(load_curves(), new)
            lines = ",\n".join(json.dumps(run, sort_keys=True, allow_nan=False) for run in runs)  # for diffs
            replace_file(CURVES, f'{{"format": "{FORMAT}", "version": {VERSION}, "runs": [\n{lines}\n]}}\n'.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {CURVES} ({error.strerror}); check its permissions and the free space"
        ) from error
    return runs


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if not argv or any(arg.startswith("-") for arg in argv):
        raise UserError(
            "give finished runs; for example: python -m training.reference runs/debug-1 runs/debug-2 runs/debug-3"
        )
    runs = record([read_run(Path(arg)) for arg in argv])
    for arg in argv:
        n = len(Reference(str(dataset_of(Path(arg))), read_options(Path(arg)), runs).runs)
        print(f"{arg}: one of {n} runs with these options and data" + f"; a band needs {MIN_RUNS}" * (n < MIN_RUNS))
    print(f"wrote {CURVES}: {len(runs)} runs")
    return 0


if __name__ == "__main__":
    run_script(main)
