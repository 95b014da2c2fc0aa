"""The progress of a run, as read from a checkpoint's state.json: types by the annotations of Progress, and here what
those leave open: the form of its dictionaries, and how its numbers belong together. A new field of Progress needs
nothing here; one whose name ends in `step` is checked as a step.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

from common.clusters import Clusters
from state_file import StateFile, build, wrong_entry
from training.divergence import is_rollback

if TYPE_CHECKING:
    from training.state import Progress

P = TypeVar("P", bound="Progress")


class Sums(TypedDict):
    """Of Clusters, as asdict makes them."""

    nats: list[float]
    counts: list[int]


class Evaluated(TypedDict):
    """An entry of the history."""

    step: int
    val_loss: float
    train_loss: float | None
    standard_error: float | None
    clear_rise: NotRequired[float | None]


class Compared(TypedDict):
    val_loss: float
    compared: list[Sums]


class Bar(Compared):
    step: int


HINTS: dict[str, Any] = {"history": list[Evaluated], "best": list[Sums], "bar": Bar | None, "kept": list[Compared]}
HINTS |= {"grad_scaler": dict[str, float], "rollbacks": list[dict[str, Any]]}


def read_progress(cls: type[P], state: StateFile) -> P:
    """The entry `progress`. Raises WrongEntry."""
    progress, step = build(cls, state, "progress", HINTS), state["step"]
    if progress.step != step:
        raise wrong_entry(state.path, "progress.step", f"is {progress.step}, and step is {step}: expected the same")
    steps = {field.name: getattr(progress, field.name) for field in dataclasses.fields(progress)}
    steps = {name: value for name, value in steps.items() if name.endswith("step") or name == "early_decay"}
    steps |= {f"history[{i}].step": entry["step"] for i, entry in enumerate(progress.history)}
    steps |= {"bar.step": progress.bar["step"]} if progress.bar else {}
    for name, value in steps.items():
        if value is not None and value > step:
            raise wrong_entry(state.path, f"progress.{name}", f"is {value}, expected {step}, the step, at most")
    for i, entry in enumerate(progress.rollbacks):
        if not is_rollback(entry):
            raise wrong_entry(state.path, f"progress.rollbacks[{i}]", f"is {str(entry)[:200]}, which is no rollback")
    course = [entry["step"] for entry in progress.history]
    if course != sorted({*course}):
        raise wrong_entry(state.path, "progress.history", "has steps that are not in order, or twice")
    sums: dict[str, list[dict[str, Any]]] = {"best": progress.best}
    sums |= {"bar.compared": progress.bar["compared"]} if progress.bar else {}
    sums |= {f"kept[{i}].compared": entry["compared"] for i, entry in enumerate(progress.kept)}
    for name, kinds in sums.items():
        for i, kind in enumerate(kinds):
            _check_sums(state, f"progress.{name}[{i}]", Clusters(kind["nats"], kind["counts"]))
    return progress


def _check_sums(state: StateFile, entry: str, kind: Clusters) -> None:
    if not 1 < len(kind.nats) == len(kind.counts) or min(kind.counts) < 1:
        found = f"has {len(kind.nats)} sums of nats and {len(kind.counts)} counts"
        raise wrong_entry(state.path, entry, f"{found}: expected as many, two at least, all counts positive")
