"""When a run has diverged, and where it goes on from.

A loss is *far above* where it exceeds by one nat, and by ten times the median absolute deviation, the lowest running
median of the losses so far (at first: ln(vocabulary), the loss of a model that knows nothing). A run is *in trouble*
while updates are skipped because loss or gradient norm is not finite, and from the third step in a row on whose loss is
far above. It is not saved then. It has *diverged* after three skipped updates in a row, after a hundred such losses in
a row, where a val loss is not finite, and where it would end in trouble.

A diverged run goes back to the newest checkpoint from before the trouble, and from there on reads other data: what it
has read since that checkpoint is passed over (as Chowdhery et al. 2022, PaLM, section 5.1, did by hand). If it diverges
again before it has a new checkpoint, it goes back to the one before; after MAX_ROLLBACKS within a thousand steps it
ends. RUN/rollbacks.json holds all of them, so that a run that is killed and resumed does the same.

Everything here is a pure function of the losses, but for the file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from files import DamagedFile, read_json, write_json

RECENT, MIN_RECENT = 64, 16  # losses of the running median
NATS, DEVIATIONS = 1.0, 10.0  # by which a loss that is far above exceeds it
MAX_SKIPPED = 3  # consecutive updates without a finite gradient
MIN_HIGH, MAX_HIGH = 3, 100  # consecutive losses far above: trouble; divergence
MAX_ROLLBACKS, ROW_STEPS = 3, 1000  # within so many steps
FILE = "rollbacks.json"


class Diverged(UserError):
    """The run has diverged at the current step. since: the last step without trouble."""

    def __init__(self, reason: str, since: int) -> None:
        super().__init__(reason)
        self.reason, self.since = reason, since


def limit(recent: Sequence[float]) -> float:
    """The loss above which one is far above the recent ones (nats); infinite where those are too few."""
    if len(recent) < MIN_RECENT:
        return math.inf
    median = statistics.median(recent)
    return median + max(NATS, DEVIATIONS * statistics.median(abs(loss - median) for loss in recent))


def first_limit(vocab_size: int) -> float:
    """The same before the first loss."""
    return math.log(vocab_size) + NATS


# ---- Rollbacks -------------------------------------------------------------------------------------------------------


def make_rollback(
    error: Diverged, step: int, rate: float, checkpoints: Sequence[int], before: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The next rollback: the step of the divergence, the step `to` which the run goes back, the number of steps whose
    data it passes over, the reason and the peak learning rate. None where there have been too many, or nothing is left
    to go back to.

    checkpoints: their steps, ascending. before: the rollbacks so far."""
    in_a_row = recent_rollbacks(before, step, rate)
    usable = [number for number in checkpoints if number <= error.since]
    if len(in_a_row) >= MAX_ROLLBACKS or not usable:
        return None
    if in_a_row and usable[-1] <= in_a_row[-1]["to"]:
        usable = [number for number in usable if number < in_a_row[-1]["to"]] or usable[:1]
    rollback = {"step": step, "to": usable[-1], "passed_over": step - usable[-1], "reason": error.reason}
    return rollback | {"learning_rate": rate}


def recent_rollbacks(rollbacks: Sequence[dict[str, Any]], step: int, rate: float) -> list[dict[str, Any]]:
    """Those that count at this step: not those of long ago, nor those with another learning rate."""
    return [entry for entry in rollbacks if step - entry["step"] < ROW_STEPS and entry["learning_rate"] == rate]


def write_rollbacks(run: Path, rollbacks: Sequence[dict[str, Any]]) -> None:
    """Raises OSError."""
    write_json(run / FILE, {"format": "sprout rollbacks", "version": 1, "rollbacks": [*rollbacks]})


def read_rollbacks(run: Path) -> list[dict[str, Any]]:
    """All rollbacks of a run. Raises DamagedFile."""
    path = run / FILE
    if not path.exists():
        return []
    found = read_json(path, 1_000_000).get("rollbacks")
    if not isinstance(found, list) or not all(map(is_rollback, found)):
        raise DamagedFile(path, f"its rollbacks are {str(found)[:200]!r}")
    return found


def is_rollback(entry: object) -> bool:
    """Whether a JSON value has the form of a rollback."""
    if not isinstance(entry, dict) or entry.keys() != {"step", "to", "passed_over", "reason", "learning_rate"}:
        return False
    step, to, passed_over = (entry[name] for name in ("step", "to", "passed_over"))
    return (
        all(type(number) is int and 0 <= number <= 10**9 for number in (step, to, passed_over))
        and to <= step
        and isinstance(entry["reason"], str)
        and isinstance(entry["learning_rate"], int | float)
    )


def following(rollbacks: Sequence[dict[str, Any]], known: int, step: int) -> list[dict[str, Any]]:
    """Those after the first `known`, the last of which leads to a checkpoint of this step, which does not know them
    yet; none where it leads elsewhere."""
    return [*rollbacks[known:]] if len(rollbacks) > known and rollbacks[-1]["to"] == step else []
