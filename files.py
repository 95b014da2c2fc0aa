"""Data files: written atomically, validated when read, with sizes and checksums. Knows no format but JSON.

All that is written in a directory of ours is opened by `plain_file`: a link, a pipe or a device that lies there under a
known name leads nowhere else and stops nobody. Its directories are made by `make_directory`. The directory that a user
has named, and those above it, may be links.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import uuid
import zlib
from collections import Counter
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
# O_NONBLOCK: to open a pipe does not wait for its other end
SAFE = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"))
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # what is certain about a file that is not readable


class DamagedFile(UserError):
    """A file is missing, truncated, altered or malformed. advice: what to do; whoever knows the file may change it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem, self.advice = path, problem, "Restore it from a copy"

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.advice}"


class UnreadableFile(DamagedFile):
    """The system did not give what is in a file (EIO, EACCES, …): nothing is proven about its content."""


# ---- Opening ---------------------------------------------------------------------------------------------------------


def plain_file(path: str | os.PathLike[str], flags: int) -> int:
    """os.open for a plain file alone, which may serve as `opener` of open. Raises OSError for a link, a folder, a pipe
    and a device; never waits for the other end of a pipe."""
    odd = OSError(
        errno.ELOOP, "a link, a pipe or a device, where a plain file is expected; move it away", os.fspath(path)
    )
    if not hasattr(os, "O_NOFOLLOW") and os.path.islink(path):
        raise odd
    try:
        descriptor = os.open(path, flags | SAFE, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):  # EMLINK: FreeBSD's; ENXIO: a pipe, a socket
            raise odd from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise odd
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_to_append(path: Path, size: int) -> int:
    """A descriptor to read and write a plain file, which is made where there is none. A file with a second name (a
    backup by hard links) is replaced by a copy of its first `size` bytes first: what is written does not reach the
    other. Raises OSError."""
    descriptor = plain_file(path, os.O_RDWR | os.O_CREAT)
    if os.fstat(descriptor).st_nlink < 2:
        return descriptor
    temporary = path.with_name(f".{uuid.uuid4().hex[:16]}.writing")
    try:
        write_parts(temporary, _first_bytes(descriptor, size))
        os.replace(temporary, path)
    finally:
        os.close(descriptor)
        with suppress(OSError):
            temporary.unlink()
    return plain_file(path, os.O_RDWR)


def _first_bytes(descriptor: int, size: int) -> Iterator[bytes]:
    while size > 0 and (part := os.read(descriptor, min(CHUNK, size))):
        size -= len(part)
        yield part


def is_plain_directory(path: Path) -> bool:
    """Whether it is a directory and no link to one, nor a junction of Windows. Raises OSError, not where it is
    missing."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    is_junction = getattr(status, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)
    return stat.S_ISDIR(status.st_mode) and not is_junction


def make_directory(path: Path) -> None:
    """Makes a directory in a directory of ours, where it is not there. Raises OSError, also for a link to one: what is
    written there would be elsewhere."""
    try:
        path.mkdir()
    except FileExistsError:
        if not is_plain_directory(path):
            what = "a link or a file; a directory of the run is expected in its place, so move it away"
            raise NotADirectoryError(errno.ENOTDIR, what, str(path)) from None


def remove_tree(path: Path) -> None:
    """Removes a directory and all in it; of a link the link alone. Raises OSError."""
    if is_plain_directory(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def try_remove_tree(path: Path) -> None:
    """The same, as far as it is possible. shutil.rmtree raises some errors even where it is to ignore them."""
    with suppress(OSError):
        if is_plain_directory(path):
            shutil.rmtree(path, ignore_errors=True)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def write_all(descriptor: int, data: bytes | memoryview) -> int:
    """Writes all bytes at the place of the descriptor. Returns their number. Raises OSError."""
    left = memoryview(data).cast("B")
    size = len(left)
    while left:
        left = left[os.write(descriptor, left) :]
    return size


def write_file(path: Path, data: bytes) -> None:
    """Writes and syncs a new file. Raises OSError."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int]:
    """Writes and syncs a new file part by part. Returns its number of bytes and the crc32 of the parts as they are in
    memory, not as read back. Raises OSError, also where a file of that name exists."""
    size = crc = 0
    descriptor = plain_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        for part in parts:
            size += write_all(descriptor, part)
            crc = zlib.crc32(part, crc)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
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
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
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


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises DamagedFile on anything else."""
    try:
        return _read_bytes(path, limit).decode()
    except ValueError as error:
        raise DamagedFile(path, f"not UTF-8 text ({error})") from error


def _read_bytes(path: Path, limit: int) -> bytes:
    with reading(path) as size:
        _refuse_large(path, size, limit)
        with open(path, "rb", opener=plain_file) as file:
            data = file.read(size + 1)  # another program may write it, or put another file in its place
        if len(data) > size:
            raise DamagedFile(path, "it was written to while it was read")
        return data


def _refuse_large(path: Path, size: int, limit: float) -> None:
    if size > limit:
        raise DamagedFile(path, f"{size} bytes of JSON or text; the maximum is {limit}")


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
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:60]!r} stands there twice")
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
    """Yields the size of a regular file, which the body opens with `opener=plain_file`. An OSError, here or in the
    body, becomes DamagedFile where the file is missing or no plain file, else UnreadableFile."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile(path, "expected a regular file; links, folders and devices are not followed")
        yield status.st_size
    except OSError as error:
        kind = DamagedFile if error.errno in MISSING else UnreadableFile
        raise kind(path, f"cannot be read ({error.strerror})") from error


def size_and_crc(path: Path) -> dict[str, int]:
    """A file's entry in a manifest."""
    crc = 0
    with reading(path) as size, open(path, "rb", opener=plain_file) as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def check_size(path: Path, entry: object, limit: float = math.inf) -> None:
    """Raises DamagedFile where a file's size is not that of its entry in a manifest, or exceeds `limit`: before it is
    read, since a hole of a terabyte takes no space on a disk."""
    with reading(path) as size:
        _refuse_large(path, size, limit)
    if not (isinstance(entry, dict) and size == entry.get("bytes")):
        compare(path, {"bytes": size}, entry)


def compare(path: Path, found: dict[str, int], entry: object) -> None:
    """Raises DamagedFile where a file's size or crc32 is not that of its entry in a manifest."""
    if found == entry:
        return
    expected = entry if isinstance(entry, dict) else {}
    problem = f"{found['bytes']} bytes, {str(expected.get('bytes'))[:30]} expected"
    if found["bytes"] == expected.get("bytes"):
        problem = f"damaged: its crc32 is {found['crc32']:08x}, which is not the one that was recorded"
    raise DamagedFile(path, problem)
