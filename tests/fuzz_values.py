"""What the fuzz tests share: values and bytes that nobody expects, edits of JSON values, and the check of one input.

fuzz_*.py have `run(examples, seed) -> list[str]`: tries so many inputs and returns a line for each that ends otherwise
than in the project's own errors, or takes longer than LIMIT seconds. The same seed tries the same inputs.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from errors import UserError

LIMIT = 5.0  # seconds of one input, on the clock of this process: the machine may be busy
MAX_PROBLEMS = 20
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 255, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**30, 10**300, 0.5, -0.5,
    1e-320, 1e308, float("inf"), float("-inf"), float("nan"), "", " ", "x", "true", "none", "auto", "1e3", "nan", "é",
    "\x1b[31m", "a\nb", "\0", "../../etc/passwd", "/dev/zero", "~", "~nobody", "\ud800", "\u202e", "%s{0}$x", "x" * 300,
    "9" * 5000, [], [0], [None], ["x", "y"], [[[]]], {}, {"a": 1}, {"step": -1}, [{}], [1e308] * 3,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to each value inside; of a long list to its first and last two entries."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in {*range(min(2, len(value))), *range(max(0, len(value) - 2), len(value))}:
            yield from places(value[i], (*path, i))


def edit(value: Any, rng: random.Random) -> Any:
    """A copy with one or a few values replaced, removed, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = [*places(value)]
        if not paths:
            return value
        *parents, last = rng.choice(paths)
        place = value
        for key in parents:
            place = place[key]
        how, new = rng.random(), copy.deepcopy(rng.choice(VALUES))
        if how < 0.15:
            del place[last]
        elif how < 0.25 and isinstance(place, dict):
            place[rng.choice(["unknown", "\x1b[31m", "x y", "", *place])] = new
        elif how < 0.3 and isinstance(place, list):
            place.insert(last, copy.deepcopy(place[last]))
        elif how < 0.4 and isinstance(place[last], int | float):
            place[last] = place[last] + rng.choice((1, -1, 0.5, 1e9))
        else:
            place[last] = new
    return value


def edit_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, doubled or filled with other bytes."""
    how, content = rng.random(), bytearray(data)
    if how < 0.3:
        return bytes(content[: rng.randrange(len(content) + 1)])
    if how < 0.7 and content:
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content)
    if how < 0.85:
        at = rng.randrange(len(content) + 1)
        return (
            bytes(content[:at])
            + rng.choice((b"[" * 3000, b"\xff\xfe", b"\0", b"1e400", b"NaN", b"{}", b'"'))
            + bytes(content[at:])
        )
    return rng.choice((b"", b"null", b"[]", b"{", b"5", b'"x"', b"\xef\xbb\xbf{}", rng.randbytes(40)))


def as_json(value: Any) -> bytes:
    """NaN as such, infinity as a number that is read as infinity."""
    return json.dumps(value).replace("Infinity", "1e999").encode("utf-8", "replace")


def memory_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory where the system has such a place: opening a file on a disk takes longer than most
    inputs."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


class Tries:
    """The problems so far. expected: the errors in which an input may end."""

    def __init__(self, *expected: type[Exception]) -> None:
        self.expected, self.problems = (UserError, *expected), list[str]()

    def attempt(self, action: Callable[[], object], what: object) -> None:
        """Runs an action. what: the input, for the message."""
        began = time.process_time()
        try:
            action()
        except self.expected as error:
            str(error)
        except Exception as error:  # noqa: BLE001 - what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._add(
                f"{type(error).__name__}: {str(error)[:80]!r} in {place.filename.rpartition('/')[2]}:{place.lineno}",
                what,
            )
        if (seconds := time.process_time() - began) > LIMIT:
            self._add(f"took {seconds:.1f} s", what)

    def _add(self, problem: str, what: object) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{problem}: {repr(what)[:300]}")
