"""Data files: written atomically, validated when read, with sizes and checksums. Knows no format but JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import UserError

MAX_JSON = 2**24  # bytes of a JSON file, where its reader names no other limit
MAX_CONFIG = 2**18  # of a config.json of ours, which has about 2,000
MAX_TOKENIZER = 100_000_000  # of a file with a tokenizer: those of large vocabularies have some ten million
SPARE, TOKENIZER_SPARE = 2**25, 2**27  # bytes that parsed JSON may take beside twice its size
MAX_DIGITS = 300  # of a whole number in JSON: more would be no float
SLOW = 2**20  # bytes of JSON from which on only Python's own limit of 4,300 digits counts
CHUNK = 1 << 20


class DamagedFile(UserError):
    """A file is missing, truncated, altered or malformed. advice: what to do; whoever knows the file may change it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem, self.advice = path, problem, "Restore it from a copy"

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.advice}"


def write_file(path: Path, data: bytes) -> None:
    """Writes and syncs a file. Raises OSError."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int]:
    """Writes and syncs a file part by part. Returns its number of bytes and the crc32 of the parts as they are in
    memory, not as read back. Raises OSError."""
    size = crc = 0
    with open(path, "wb") as file:
        for part in parts:
            size += file.write(part)
            crc = zlib.crc32(part, crc)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}


def require_space(home: Path, needed: int) -> None:
    """Raises OSError where the disk of a folder has not so many bytes free."""
    free = shutil.disk_usage(home).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; free space on that disk",
        )


def sync_directory(path: Path) -> None:
    """fsync of a directory, so that new names survive a power cut, where the system supports it."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def json_bytes(value: dict[str, Any]) -> bytes:
    """Canonical JSON: equal values give equal bytes. Raises ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1).encode() + b"\n"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object atomically. Raises OSError."""
    replace_file(path, json_bytes(value))


def replace_file(path: Path, data: bytes) -> None:
    """Replaces the file atomically; of several writers at once, the last one counts. Raises OSError."""
    temporary = path.with_name(f".{uuid.uuid4().hex[:16]}.writing")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()  # if it was not renamed
    sync_directory(path.parent)


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises DamagedFile on anything else."""
    try:
        return _read_bytes(path, limit).decode()
    except ValueError as error:
        raise DamagedFile(path, f"not UTF-8 text ({error})") from error


def _read_bytes(path: Path, limit: int) -> bytes:
    with reading(path) as size:
        if size > limit:
            raise DamagedFile(path, f"{size} bytes of JSON or text; the maximum is {limit}")
        with open(path, "rb", opener=_open_at_once) as file:
            data = file.read(size + 1)  # another program may write it, or put another file in its place
        if len(data) > size:
            raise DamagedFile(path, "it was written to while it was read")
        return data


def _open_at_once(path: str, flags: int) -> int:
    """os.open that neither waits for the other end of a pipe nor follows a link."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def parse_json(data: bytes, spare: int = SPARE) -> Any:
    """The value of JSON text. Numbers are finite, keys unique, and the values take no more memory than twice the text
    and `spare` bytes. Raises ValueError."""
    values, objects = data.count(b",") + data.count(b":"), data.count(b"{") + data.count(b"[")
    if 64 * values + 88 * objects > 2 * len(data) + spare:  # what Python takes for each at least
        raise ValueError(f"{objects:,} objects and lists with {values:,} values are too many in {len(data):,} bytes")
    hooks: dict[str, Any] = {"parse_constant": _number, "parse_float": _number}
    if len(data) < SLOW:  # the ids of a vocabulary would take three times as long
        hooks["parse_int"] = _whole_number
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:30]} is not a number that JSON has")
    return number


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:60]!r} stands there twice")
    return found


def read_json(path: Path, limit: int = MAX_JSON, spare: int = SPARE) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; spare: see parse_json. Raises DamagedFile on anything
    else."""
    data = _read_bytes(path, limit)
    try:
        value = parse_json(data, spare)
    except ValueError as error:
        raise DamagedFile(path, f"not valid JSON ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise DamagedFile(path, "expected a JSON object")
    return value


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """Yields the size of a regular file. Any OSError, here or in the body, becomes DamagedFile."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile(path, "expected a regular file; links, folders and devices are not followed")
        yield status.st_size
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})") from error


def size_and_crc(path: Path) -> dict[str, int]:
    """A file's entry in a manifest."""
    crc = 0
    with reading(path) as size, open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def compare(path: Path, found: dict[str, int], entry: object) -> None:
    """Raises DamagedFile where a file's size or crc32 is not that of its entry in a manifest."""
    if found == entry:
        return
    expected = entry if isinstance(entry, dict) else {}
    problem = f"{found['bytes']} bytes, {str(expected.get('bytes'))[:30]} expected"
    if found["bytes"] == expected.get("bytes"):
        problem = f"damaged: its crc32 is {found['crc32']:08x}, which is not the one that was recorded"
    raise DamagedFile(path, problem)
