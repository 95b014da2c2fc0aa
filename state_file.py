"""state.json of a checkpoint: read and checked, so that what uses it meets the types and ranges that it expects.

`State` has the types of the entries. What the larger ones hold is known to their owners, which check them by
dataclasses of their own: `build(Progress, …)`. Checksums say nothing here: whoever edits a state can write those, too.
Every mistake is a WrongEntry, which names the file, the entry, what was found and expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, NotRequired, Required, TypedDict, TypeVar

from errors import UserError
from files import read_json
from json_types import Filename, Line, Mismatch, conform

T = TypeVar("T")


class WrongEntry(UserError):
    """An entry of a state.json is missing, or has another type or range than this version writes."""

    def __init__(self, path: Path, entry: str, problem: str) -> None:
        self.path, self.entry = path, entry
        super().__init__(
            f"{path}: {entry} {problem}. The file is as it was written, so by another version or program: open it with"
            " the Sprout that wrote it, or use another checkpoint (sample.py --checkpoint=step-N, train.py"
            " --init_from=RUN/checkpoints/step-N)"
        )


class DatasetEntry(TypedDict):
    """A dataset as a state.json names it."""

    name: Filename
    path: Filename
    fingerprint: Line
    example_prompt: NotRequired[str | None]


class Weights(TypedDict):
    """Weights as a manifest has them; of adapters with those of their base."""

    bytes: int
    crc32: int
    base: NotRequired[dict[str, int]]


class State(TypedDict, total=False):
    """The entries. Those that are not required are missing in files of earlier versions; others are ignored."""

    step: Required[int]
    val_loss: float | None
    val_bits_per_byte: float | None
    samples: int
    tokens: int
    progress: dict[str, Any]  # Progress in training/state.py
    dataset: DatasetEntry
    environment: dict[str, Line | float | None]
    options: dict[str, Any]  # checked by the option loader
    auto: dict[str, Line]
    logs: dict[str, int]
    kept: list[DatasetEntry]
    teachers: list[Weights]
    chain: dict[str, Any]  # Chain in config/start.py


class StateFile(dict[str, Any]):
    """The entries of a state.json, those of State checked. One that is missing is a WrongEntry at its first use."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, name: str) -> NoReturn:
        raise WrongEntry(self.path, name, "is missing")


def read_state(path: Path) -> StateFile:
    """Reads and checks a state.json. Raises DamagedFile where it is no JSON, WrongEntry on what it holds."""
    values = read_json(path)
    try:
        conform(State, values)
    except Mismatch as error:
        raise WrongEntry(path, error.entry or "its content", error.problem) from None
    return StateFile(path, values)


def build(cls: type[T], state: StateFile, entry: str, hints: Mapping[str, Any] | None = None) -> T:
    """The dataclass `cls` from an entry of a state, checked by the annotations of its fields. Fields that are missing
    get their defaults. hints: more exact types of some fields. Raises WrongEntry."""
    try:
        found: T = conform(cls, state[entry], hints)
        return found
    except Mismatch as error:
        raise WrongEntry(state.path, ".".join(filter(None, (entry, error.entry))), error.problem) from None
