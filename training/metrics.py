"""Where a run's records go: metrics.jsonl, samples.txt and the console; trackers.py: elsewhere. Knows no model and no
options; training/logger.py decides what is recorded when.

Every field of metrics.jsonl outside `timing` is reproducible: the same run writes it again byte for byte. A disk that
is full or fails is reported once and never stops the training: what it did not take is written when it works again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from errors import UserError
from files import CHUNK, open_to_append, write_all
from parallel.processes import is_first

METRICS, SAMPLES = "metrics.jsonl", "samples.txt"
MAX_UNWRITTEN = 1 << 24  # bytes of records that wait for a disk


def log(line: str) -> None:
    """Prints a line and flushes."""
    print(line, flush=True)


@cache
def process_start() -> float:
    """Start of this process on time.perf_counter's clock, to a hundredth of a second. Without /proc: the time of the
    first call."""
    status = Path("/proc/self/stat")
    if not status.exists():
        return time.perf_counter()
    fields = status.read_text().rpartition(")")[2].split()  # the process name before it may hold any character
    ticks = int(fields[19])  # starttime in proc(5)
    return time.perf_counter() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


class TrainClock:
    """Seconds of training in this process: since its start, imports and compilation included, without evaluations,
    samples and saves."""

    def __init__(self) -> None:
        self.last_pause = 0.0  # seconds
        self._paused = 0.0
        self._pause_start: float | None = None

    def seconds(self) -> float:
        """Within `pause`: as of its beginning."""
        now = time.perf_counter() if self._pause_start is None else self._pause_start
        return now - process_start() - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time does not count."""
        self._pause_start = time.perf_counter()
        try:
            yield
        finally:
            self.last_pause = time.perf_counter() - self._pause_start
            self._paused += self.last_pause
            self._pause_start = None


class Trouble:
    """Tells on standard error that a file cannot be written: once, and again when it can."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_there = path, False

    def begins(self, error: OSError, what: str = "training goes on, and it is tried again") -> None:
        if not self.is_there:
            print(f"cannot write {self.path}: {error.strerror or error}; {what}", file=sys.stderr, flush=True)
        self.is_there = True

    def ends(self, what: str = "it is written again") -> None:
        if self.is_there:
            print(f"{self.path}: {what}", file=sys.stderr, flush=True)
        self.is_there = False


class LogFile:
    """A file of records, to which they are appended. What cannot be written waits, up to MAX_UNWRITTEN bytes, for the
    next record. `size`: bytes that are written; after them may be a part of a record, which is written over.

    A file that is removed while it is open is written again, with what it held; one that is renamed keeps that, and a
    new one begins. Raises OSError where it cannot be opened at first."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.lost = path, size, 0
        self._unwritten, self._trouble = list[bytes](), Trouble(path)
        self._file = open_to_append(path, size)
        status = os.fstat(self._file)
        self._has_identity = _names(path, status)  # some network file systems number files anew
        self.found, self.size = status.st_size, min(status.st_size, size)
        if self.found > size:
            os.ftruncate(self._file, size)

    def write(self, record: bytes = b"") -> None:
        """Writes a record, and those before it that were not written."""
        if record:
            self._unwritten.append(record)
        try:
            self._follow()
            while self._unwritten:
                os.lseek(self._file, self.size, os.SEEK_SET)
                self.size += write_all(self._file, self._unwritten[0])
                del self._unwritten[0]
            self._trouble.ends("records are written again")
        except OSError as error:
            self._trouble.begins(error, "training goes on, and records are kept to be written later")
            while sum(map(len, self._unwritten)) > MAX_UNWRITTEN:
                self.lost += len(self._unwritten.pop(0)) > 0

    def sync(self) -> None:
        """Writes and syncs what can be."""
        self.write()
        try:
            if os.fstat(self._file).st_size > self.size:  # a part of a record
                os.ftruncate(self._file, self.size)
            os.fsync(self._file)
        except OSError as error:
            self._trouble.begins(error)

    def close(self) -> None:
        """Writes what is left, and tells how many records are lost."""
        self.sync()
        if lost := self.lost + len(self._unwritten):
            print(f"not saved: {lost:,} records of {self.path}", file=sys.stderr, flush=True)
        try:
            os.close(self._file)
        except OSError as error:
            self._trouble.begins(error, "its last records may be lost")

    def abandon(self) -> None:
        """Closes it as it is."""
        with suppress(OSError):
            os.close(self._file)

    def _follow(self) -> None:
        """Opens the file again where its name no longer is that of the open one."""
        status = os.fstat(self._file)
        if not self._has_identity or _names(self.path, status):
            self.size = min(self.size, status.st_size)  # somebody may have cut it
            return
        file, is_removed = open_to_append(self.path, self.size), status.st_nlink == 0
        size = os.fstat(file).st_size
        if is_removed and size == 0:
            try:
                os.lseek(self._file, 0, os.SEEK_SET)
                while size < self.size and (part := os.read(self._file, min(CHUNK, self.size - size))):
                    size += write_all(file, part)
            except OSError:
                os.close(file)
                self.path.unlink()  # the next record tries again
                raise
        old, self._file, self.size = self._file, file, size
        what = (
            "was removed, and is written again" if is_removed else "was renamed or replaced; records go on in a new one"
        )
        print(f"{self.path} {what}", file=sys.stderr, flush=True)
        os.close(old)


def _names(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except FileNotFoundError:
        return False


class RunLog:
    """The log files of a run directory, which rank 0 alone writes. `lengths`, their bytes at a checkpoint, truncates
    what a killed run wrote after it; none: all of it. Raises UserError where they cannot be written at first, and later
    where another process has taken the directory (RunLock.keep_place)."""

    def __init__(self, run: Path, lengths: Mapping[str, int]) -> None:
        self._run, self._trouble = run, Trouble(run)
        self._files: dict[str, LogFile] = {}
        for name in (METRICS, SAMPLES) if is_first() else ():
            path, expected = run / name, lengths.get(name, 0)
            try:
                file = self._files[name] = LogFile(path, expected)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be written ({error.strerror}); check its permissions and the disk"
                ) from error
            if file.found < expected:
                print(
                    f"{path}: {file.found} bytes, {expected} at the checkpoint: the end of this log is lost",
                    file=sys.stderr,
                    flush=True,
                )

    def metrics(self, event: str, step: int, *, timing: Mapping[str, Any] | None = None, **fields: Any) -> None:
        """Writes one line: event, step, the reproducible fields, and the others in `timing`. NaN and infinity become
        null."""
        record = {"event": event, "step": step, **fields}
        if timing is not None:
            record["timing"] = dict(timing)
        self._write(METRICS, json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")

    def sample(self, step: int, text: str, facts: str) -> None:
        self._write(SAMPLES, f"==== step {step} ({facts}) ====\n{text}\n\n")

    def lengths(self) -> dict[str, int]:
        """Bytes written so far, for the checkpoint's state; they are synced to disk when this returns."""
        self._keep_place()
        for file in self._files.values():
            file.sync()
        return {name: file.size for name, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, name: str, text: str) -> None:
        if name in self._files:
            self._keep_place()
            self._files[name].write(text.encode("utf-8", errors="replace"))

    def _keep_place(self) -> None:
        """Makes the directory and its lock again where they were removed or renamed. Where another process has taken
        it, nothing more is written there."""
        try:
            keep_and_tell(self._run)
            self._trouble.ends("the directory can be used again")
        except OSError as error:
            self._trouble.begins(error)
        except UserError:
            while self._files:
                self._files.popitem()[1].abandon()
            raise


def keep_and_tell(run: Path) -> None:
    """keep_place, with a line on what was made again. Raises UserError, OSError."""
    from common.run_directory import keep_place  # it needs safetensors, and the benches of GPUs import `log` without

    for what in keep_place(run):
        line = f"{run}: {what} was removed or renamed, and is made again; what was there before is not"
        print(line, file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console_line(
    step: int,
    max_steps: int | None,
    loss: float,
    lr: float,
    grad_norm: float,
    tok_s: float,
    left: float | None,
    memory: int,
    mfu: str = "",
) -> str:
    """A logged step in fixed columns: `left` in seconds, `memory` in bytes, `mfu` the model FLOP utilization or "".
    max_steps, left: None in a run whose length is not known yet."""
    place = f"{step:>6}" if max_steps is None else f"{step:>{len(str(max_steps))}}/{max_steps}"
    shown_left = "unknown" if left is None else format_duration(left)
    return (
        f"step {place}  loss {loss:7.4f}  lr {lr:.2e}  grad {grad_norm:7.3f}  "
        f"{tok_s:>9,.0f} tok/s  left {shown_left:>7}  mem {memory / 2**30:5.2f} GiB"
        + (f"  mfu {mfu:>7}" if mfu else "")
    )


def format_duration(seconds: float) -> str:
    """4:05 for 245 seconds, 2:00:00 for two hours."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
