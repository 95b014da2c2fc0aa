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
from json_types import Argument, Mismatch, conform

T = TypeVar("T")


class WrongEntry(UserError):
    """An entry of a state.json is missing, or has another type or range than this version writes."""


def wrong_entry(path: Path, entry: str, problem: str) -> WrongEntry:
    """problem: what was found, and what was expected."""
    return WrongEntry(
        f"{path}: {entry} {problem}. The file is as it was written, so by another version or program: open it with the"
        " Sprout that wrote it, or use another checkpoint (sample.py --checkpoint=step-N, train.py"
        " --init_from=RUN/checkpoints/step-N)"
    )


class DatasetEntry(TypedDict):
    """A dataset as a state.json names it."""

    name: Argument
    path: Argument
    fingerprint: str
    example_prompt: NotRequired[str | None]


class Weights(TypedDict):
    """Weights as a manifest has them; of adapters with those of their base."""

    bytes: int
    crc32: int
    base: NotRequired[dict[str, int]]


class StoredOptions(TypedDict, total=False):
    """The options that are read on their own. Whoever takes over all of them checks them by the option loader."""

    max_steps: int | None
    eval_tokens: int | None
    teachers: int
    init_from: Argument | None
    separator: str | None


class State(TypedDict, total=False):
    """The entries. Those that are not required are missing in files of earlier versions; others are ignored."""

    step: Required[int]
    val_loss: float | None
    val_bits_per_byte: float | None
    samples: int
    tokens: int
    progress: dict[str, Any]  # Progress in training/state.py
    dataset: DatasetEntry
    environment: dict[str, str | float | None]
    options: StoredOptions
    auto: dict[str, str]
    logs: dict[str, int]
    kept: list[DatasetEntry]
    teachers: list[Weights]
    chain: dict[str, Any]  # Chain in config/start.py
    signature: str  # common/signature.py


class StateFile(dict[str, Any]):
    """The entries of a state.json, those of State checked. One that is missing is a WrongEntry at its first use."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, name: str) -> NoReturn:
        raise wrong_entry(self.path, name, "is missing")


def read_state(path: Path) -> StateFile:
    """Reads and checks a state.json. Raises DamagedFile where it is no JSON, WrongEntry on what it holds."""
    values = read_json(path)
    try:
        conform(State, values)
    except Mismatch as error:
        raise wrong_entry(path, error.entry or "its content", error.problem) from None
    return StateFile(path, values)


def build(cls: type[T], state: StateFile, entry: str, hints: Mapping[str, Any] | None = None) -> T:
    """The dataclass `cls` from an entry of a state, checked by the annotations of its fields. Fields that are missing
    get their defaults. hints: more exact types of some fields. Raises WrongEntry."""
    try:
        found: T = conform(cls, state[entry], hints)
        return found
    except Mismatch as error:
        raise wrong_entry(state.path, ".".join(filter(None, (entry, error.entry))), error.problem) from None
