"""Where a run's records go: metrics.jsonl, samples.txt and the console; trackers.py: elsewhere. Knows no model and no
options; training/logger.py decides what is recorded when.

Every field of metrics.jsonl outside `timing` is reproducible: the same run writes it again byte for byte. A full disk
is reported once and never stops the training.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from errors import UserError
from parallel.processes import is_first

METRICS, SAMPLES = "metrics.jsonl", "samples.txt"


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


class RunLog:
    """The log files of a run directory, which rank 0 alone writes. `lengths`, their bytes at a checkpoint, truncates
    what a killed run wrote after it; none: all of it. Raises UserError where they cannot be written."""

    def __init__(self, run: Path, lengths: Mapping[str, int]) -> None:
        self._paths = {name: run / name for name in (METRICS, SAMPLES)}
        self._warned = False
        self._files: dict[str, io.BufferedWriter] = {}
        for name, path in self._paths.items() if is_first() else ():
            try:
                self._files[name] = path.open("ab")
                size, expected = path.stat().st_size, lengths.get(name, 0)
                if size > expected:
                    self._files[name].truncate(expected)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error}); check its permissions and the disk") from error
            if size < expected:
                print(
                    f"{path}: {size} bytes, {expected} at the checkpoint: the end of this log is lost",
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
        for name, file in self._files.items():
            try:
                os.fsync(file.fileno())
            except OSError as error:
                self._warn(name, error)
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def close(self) -> None:
        for name, file in self._files.items():
            try:
                file.close()
            except OSError as error:  # what a full disk did not take is still in its buffer
                self._warn(name, error)

    def _write(self, name: str, text: str) -> None:
        if name not in self._files:
            return
        try:
            self._files[name].write(text.encode("utf-8", errors="replace"))
            self._files[name].flush()
        except OSError as error:
            self._warn(name, error)

    def _warn(self, name: str, error: OSError) -> None:
        if not self._warned:
            print(
                f"cannot write {self._paths[name]}: {error}; training continues without it", file=sys.stderr, flush=True
            )
        self._warned = True


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
