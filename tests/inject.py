"""Faults of the disk, injected into the calls of this process: which system calls a run makes on its files
(`counting`), and one of them that fails (`failing`). `watching` is what both are made of: it can also kill.

The project writes by os.open and os.write (files.py), so the functions of os are all of it; "file" is the built-in
open, by which other packages open files, and "mmap" maps a file that is open. Calls outside `under` pass untouched.
Threads are watched, too; other processes are not.
"""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# By name: where it is looked up; the same function may have several places.
CALLS: dict[str, list[tuple[Any, str]]] = {
    "file": [(builtins, "open"), (io, "open")],
    "mmap": [(mmap, "mmap")],
    "disk_usage": [(shutil, "disk_usage")],
}
IN_OS = ("open", "close", "write", "read", "pread", "fsync", "ftruncate", "fstat", "stat", "lstat", "mkdir", "rename")
IN_OS += ("replace", "unlink", "remove", "rmdir", "link", "scandir", "listdir", "chmod")
CALLS |= {name: [(os, name)] for name in IN_OS if hasattr(os, name)}
WRITES = {"write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "remove", "rmdir", "link", "chmod"}
ERRORS = [getattr(errno, name) for name in ("ENOSPC", "EACCES", "EPERM", "EIO", "EMFILE", "EROFS", "ENOTDIR", "ENOENT")]
ERRORS += [number for name in ("EDQUOT", "ESTALE") if (number := getattr(errno, name, None)) is not None]

Hook = Callable[[str, str, tuple[Any, ...]], None]
"""Gets the name of a call, the path of its file and its arguments. What it raises, the call raises."""
_real = {name: getattr(*places[0]) for name, places in CALLS.items()}


def path_of(call: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """The absolute path that a call concerns; "" where it cannot be told."""
    first = args[0] if args else next(iter(keywords.values()), "")
    if call in ("rename", "replace", "link"):  # where to
        first = args[1]
    try:
        if isinstance(first, int):
            return os.readlink(f"/proc/self/fd/{first}").removesuffix(" (deleted)")
        folder = keywords.get("dir_fd", keywords.get("dst_dir_fd"))
        folder = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.normpath(os.path.join(folder, os.fsdecode(first)))
    except (OSError, TypeError):
        return ""


def _wrapped(call: str, under: str, before: Hook, after: Hook | None) -> Callable[..., Any]:
    real, busy = _real[call], threading.local()

    def wrapper(*args: Any, **keywords: Any) -> Any:
        if getattr(busy, "is_set", False):
            return real(*args, **keywords)
        busy.is_set = True  # the hook's own calls are not watched
        try:
            path = path_of(call, args, keywords)
            is_inside = path == under or path.startswith(under + os.sep)
            if is_inside:
                before(call, path, args)
        finally:
            busy.is_set = False
        result = real(*args, **keywords)
        if is_inside and after is not None:
            after(call, path, args)
        return result

    return wrapper


@contextmanager
def watching(before: Hook, under: Path, after: Hook | None = None) -> Iterator[None]:
    """Calls a hook before, and another after, each of CALLS on a file in the folder `under`, or on the folder."""
    folder = os.path.realpath(under)
    with ExitStack() as stack:
        for call, places in CALLS.items():
            wrapper = _wrapped(call, folder, before, after)
            for module, name in places:
                stack.enter_context(mock.patch.object(module, name, wrapper))
        yield


@contextmanager
def counting(under: Path) -> Iterator[Counter[str]]:
    """How often each of CALLS was made on a file in the folder `under`."""
    counts, lock = Counter[str](), threading.Lock()

    def count(call: str, path: str, args: tuple[Any, ...]) -> None:
        with lock:
            counts[call] += 1

    with watching(count, under):
        yield counts


@contextmanager
def failing(
    call: str, nth: int, error: int, under: Path, *, times: int | None = 1, is_torn: bool = False, name: str = ""
) -> Iterator[list[str]]:
    """The nth call (from 1) of a kind on a file in the folder `under` raises OSError(error), and the `times` - 1 after
    it; None: all after it. is_torn: a write has written the first half of its bytes before it fails. name: only calls
    on paths that contain it count. Yields the paths of the calls that have failed so far."""
    failed, count, lock = list[str](), 0, threading.Lock()

    def fail(called: str, path: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if called != call or name not in path:
            return
        with lock:
            count += 1
            fails = nth <= count and (times is None or count < nth + times)
        if fails:
            failed.append(path)
            if is_torn and call == "write":
                _real["write"](args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
            raise OSError(error, os.strerror(error), path)

    with watching(fail, under):
        yield failed
