"""Files that hold data: written whole or not at all, and read with suspicion. Knows no format but JSON; imports only errors.py."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import UserError

MAX_JSON = 100_000_000  # bytes of JSON that are read into memory


class DamagedFile(UserError):
    """A file is missing, cut, altered or malformed."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path}: {problem}. Restore it from a copy, or take another checkpoint (sample.py --checkpoint=step-N)"
        )


def write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes the names in a directory survive a power cut, where the system can."""
    if os.name == "nt":  # Windows cannot
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # nor can some network file systems
            raise
    finally:
        os.close(descriptor)


def json_bytes(value: dict[str, Any]) -> bytes:
    """Canonical: equal values give equal bytes. Raises ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1).encode() + b"\n"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces the file atomically. Raises OSError."""
    replace_file(path, json_bytes(value))


def replace_file(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    temporary = path.with_name(path.name + ".writing")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DamagedFile on anything else."""
    with reading(path) as size:
        if size > MAX_JSON:
            raise DamagedFile(path, f"{size} bytes of JSON; at most {MAX_JSON} are read")
        data = path.read_bytes()
    try:
        value = json.loads(data.decode(), parse_constant=int)  # int refuses NaN and Infinity
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, f"not valid JSON ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise DamagedFile(path, "a JSON object is expected")
    return value


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """Gives the size of an ordinary file; whatever the system has against reading it is a DamagedFile."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile(path, "an ordinary file is expected; links, folders and devices are not followed")
        yield status.st_size
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})") from error
