"""metrics.jsonl, as others read it: its lines by event, each with the types that training/metrics.py writes.

A line may be incomplete (a killed run, a run in progress), edited, or of another program: it is left out, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Required, TypedDict

from files import DamagedFile, plain_file, reading
from json_types import conform
from training.metrics import METRICS

if TYPE_CHECKING:
    from annotated_types import Interval, Le

MAX_LINE, MAX_FILE = 1 << 20, 1 << 32  # bytes


class Record(TypedDict, total=False):
    """A line. Numbers are bounded, so that they can be added up, drawn and printed."""

    step: Required[Annotated[int, Le(10**12)]]
    timing: dict[str, Annotated[float, Interval(ge=-1e30, le=1e30)] | None]


class Scores(Record, total=False):
    """Of the events eval, final and kept."""

    val_loss: Annotated[float, Interval(ge=-1e30, le=1e30)] | None
    standard_error: Annotated[float, Interval(ge=0, le=1e30)] | None
    perplexity: float | None
    bits_per_byte: Annotated[float, Interval(ge=-1e30, le=1e30)] | None
    targets: int
    train_loss: float | None
    name: str
    before: Annotated[float, Interval(ge=-1e30, le=1e30)] | None


class Logged(Record, total=False):
    loss: Annotated[float, Interval(ge=-1e30, le=1e30)] | None
    learning_rate: Annotated[float, Interval(ge=0, le=1e30)] | None
    grad_norm: Annotated[float, Interval(ge=0, le=1e30)] | None
    tokens: int


class Planned(Record, total=False):
    max_steps: int | None
    decay_steps: int


EVENTS: dict[str, type] = {"eval": Scores, "step": Logged, "plan": Planned, "patience": Planned, "kept": Scores}
EVENTS |= {"skip": Record, "final": Scores}


class Lines(dict[str, list[dict[str, Any]]]):
    """The lines by event, each event's in the order of the steps. unusable: how many others there are."""

    def __init__(self) -> None:
        super().__init__({event: [] for event in EVENTS})
        self.unusable = 0


def read_lines(run: Path) -> Lines:
    """The lines of a run's metrics.jsonl. Events of other versions are left out and not counted, like a last line that
    is still being written. Raises DamagedFile."""
    with reading(run / METRICS) as size, open(run / METRICS, "rb", opener=plain_file) as file:
        if size > MAX_FILE:
            raise DamagedFile(run / METRICS, f"{size} bytes of records; the maximum is {MAX_FILE}")
        pieces = iter(partial(file.readline, MAX_LINE), b"")  # of a line that is longer, none is usable
        return sort_lines(text for text in pieces if text.endswith(b"\n") or len(text) == MAX_LINE)


def sort_lines(texts: Iterable[bytes]) -> Lines:
    found = Lines()
    for text in texts:
        try:
            line = json.loads(text, parse_constant=lambda _: None)  # NaN and infinity
            event = conform(str, line.get("event")) if isinstance(line, dict) else ""
            if event in EVENTS:
                found[event].append(conform(EVENTS[event], line))
            found.unusable += not event
        except (ValueError, RecursionError):  # Mismatch is a ValueError, like all that json raises
            found.unusable += 1
    for lines in found.values():
        lines.sort(key=lambda line: line["step"])
    return found
