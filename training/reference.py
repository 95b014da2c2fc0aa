"""Is this normal? The val loss of earlier runs with the same options on the same tokens, and how far a run is from them.

    python -m training.reference runs/A runs/B runs/C      adds finished runs of several seeds to reference_curves.json

A run is compared where its dataset's fingerprint and every option that moves the loss are those of at least three recorded runs, up to
the steps at which their learning rates were the same; about any other run nothing is said. Runs that were lengthened with --resume and
--max_steps belong in no band: their learning rate was not that of one plan. Which device, dtype and micro-batch a run has makes no
difference here: that changes its bits, and its loss little beside what a user would call abnormal (bench/NOTES.md has figures).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import CONFIG, STATE, list_checkpoints
from errors import UserError, run_script
from files import read_json, write_file
from model import GPTConfig
from training.metrics import METRICS
from training.optim import OptimizerOptions, Plan, planned
from training.options import EvalOptions, TrainOptions

CURVES = Path(__file__).with_name("reference_curves.json")
FORMAT, VERSION = "sprout-reference", 1
FREE = {"data", "resume", "max_steps", "budget_minutes", "micro_batch_size", "compile", "deterministic", "decay_steps"}
FEWEST = 3  # runs that make a band
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles of Student's t for 3 … 10 runs

Run = dict[
    str, Any
]  # dataset (fingerprint), options (those that move the loss), seed, max_steps, decay_steps, steps, val_loss


def _declared() -> dict[str, Any]:
    """The options that move the loss at a step, with their defaults; max_steps and decay_steps, which do so only late, are the plan's."""
    sections = (TrainOptions, GPTConfig, OptimizerOptions)
    fields = [
        field for section in sections for field in dataclasses.fields(section) if not field.metadata.get("derived")
    ]
    return {field.name: field.default for field in fields if field.name not in FREE} | {
        "eval_tokens": EvalOptions.eval_tokens
    }


class Reference:
    """The recorded runs that one run may be compared with. `options` are its own, flat; of their plan only the optimizer's part counts."""

    def __init__(self, fingerprint: str, options: Mapping[str, Any], runs: Sequence[Run]) -> None:
        declared = _declared()
        own = {name: options[name] for name in declared if name in options}
        self.schedule = own.get("schedule")
        # An option that is newer than a recorded run had its default there.
        self.runs = [
            run
            for run in runs
            if run["dataset"] == fingerprint
            and own.keys() >= run["options"].keys()
            and all(value == run["options"].get(name, declared[name]) for name, value in own.items())
        ]

    def band(self, step: int, plan: Plan) -> tuple[float, float, int] | None:
        """Low, high, number of runs: where 19 of 20 new runs lie at this step, if losses are normally distributed over seeds.

        That is mean ± t · s · √(1 + 1/n), Student's prediction interval; the extremes of n runs would miss 2 in n + 1.
        """
        runs = [run for run in self.runs if self._same_rate(step, plan, Plan(run["max_steps"], run["decay_steps"]))]
        losses = [run["val_loss"][run["steps"].index(step)] for run in runs if step in run["steps"]]
        n = len(losses)
        if n < FEWEST:
            return None
        width = STUDENT[min(n - FEWEST, len(STUDENT) - 1)] * statistics.stdev(losses) * math.sqrt(1 + 1 / n)
        return statistics.mean(losses) - width, statistics.mean(losses) + width, n

    def _same_rate(self, step: int, one: Plan, other: Plan) -> bool:
        """Whether two plans gave every update before `step` the same learning rate."""
        if one == other or self.schedule in ("constant", "inverse_sqrt"):
            return True
        return self.schedule == "wsd" and step <= min(plan.max_steps - plan.decay_steps for plan in (one, other))

    def describe(self, step: int, val_loss: float, plan: Plan) -> str | None:
        """How far the run is from its band; None where nothing is known."""
        band = self.band(step, plan)
        if band is None:
            return None
        low, high, n = band
        off = max(low - val_loss, val_loss - high)
        place = "inside" if off <= 0 else f"{off:.4f} {'below' if val_loss < low else 'above'}"
        return f"{place} the band of {n} runs ({low:.4f}-{high:.4f})"


def read_curves() -> list[Run]:
    """The recorded runs; none where there is no such file."""
    if not CURVES.exists():
        return []
    value = read_json(CURVES)
    if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{CURVES}: expected format {FORMAT}, version {VERSION}; take the file of this Sprout, or delete it"
        )
    return list(value["runs"])


def dataset_of(run: Path) -> str | None:
    """The fingerprint of what a run was trained on, from its last checkpoint; None without one."""
    checkpoints = list_checkpoints(run)
    return read_json(checkpoints[-1] / STATE)["dataset"]["fingerprint"] if checkpoints else None


def plan_of(options: Mapping[str, Any]) -> Plan:
    """The plan of a run's own options."""
    names = {field.name for field in dataclasses.fields(OptimizerOptions)}
    return planned(
        options["max_steps"], OptimizerOptions(**{name: value for name, value in options.items() if name in names})
    )


def read_run(run: Path) -> Run:
    """What is recorded of a finished run. Raises UserError."""
    fingerprint = dataset_of(run)
    if fingerprint is None or not (run / METRICS).is_file():
        raise UserError(f"{run}: no run with a checkpoint; name finished runs, such as runs/quickstart-1")
    saved = read_json(run / CONFIG)
    options, plan = saved["options"], plan_of(saved["options"])
    events = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    losses = {event["step"]: event["val_loss"] for event in events if event["event"] == "eval"}
    if plan.max_steps not in losses:
        raise UserError(
            f"{run}: not finished: no evaluation at its last step {plan.max_steps}; first: python train.py --resume={run}"
        )
    if options.get("init_from") is not None:
        raise UserError(
            f"{run}: starts from the weights of {options['init_from']}, which nobody else has; record runs that start anew"
        )
    return {
        "dataset": fingerprint,
        "options": {name: options[name] for name in _declared() if name in options},
        "seed": options["seed"],
        "max_steps": plan.max_steps,
        "decay_steps": plan.decay_steps,
        "steps": list(losses),
        "val_loss": [round(loss, 5) for loss in losses.values()],
    }


def merge(known: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """Both, but of runs that are the same in all but their losses the newer one."""

    def identity(run: Run) -> str:
        return json.dumps(
            {name: value for name, value in run.items() if name not in ("steps", "val_loss")}, sort_keys=True
        )

    return list({identity(run): run for run in [*known, *new]}.values())


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if not argv or any(arg.startswith("-") for arg in argv):
        raise UserError(
            "name finished runs; for example: python -m training.reference runs/debug-1 runs/debug-2 runs/debug-3"
        )
    runs = merge(read_curves(), [read_run(Path(arg)) for arg in argv])
    lines = ",\n".join(json.dumps(run, sort_keys=True, allow_nan=False) for run in runs)  # a line a run: fit for diffs
    try:
        write_file(CURVES, f'{{"format": "{FORMAT}", "version": {VERSION}, "runs": [\n{lines}\n]}}\n'.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {CURVES} ({error.strerror}); check its permissions and the free space"
        ) from error
    for arg in argv:
        alike = Reference(str(dataset_of(Path(arg))), read_json(Path(arg) / CONFIG)["options"], runs).runs
        print(
            f"{arg}: one of {len(alike)} runs with these options and data"
            + f"; {FEWEST} make a band" * (len(alike) < FEWEST)
        )
    print(f"wrote {CURVES}: {len(runs)} runs")
    return 0


if __name__ == "__main__":
    run_script(main)
