"""A part of bench/gpu_session.py as a process: its output, its end, with its children, and what came of it.

Knows no part. Works on Windows too, where a process that is asked to end is ended.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
GRACE = 6.0  # seconds from SIGTERM to SIGKILL, within a part's limit
POLL_EVERY = 3.0  # seconds
LINES, WIDTH = 60, 180  # of a part's output on the screen
LEFT_OUT = "left out: "  # how a bench says that something is missing here
# A line of pytest -vv: "tests/test_x.py::test_y PASSED", or with -n "[gw0] [ 50%] PASSED tests/test_x.py::test_y".
OUTCOMES = "(?:PASSED|FAILED|ERROR|SKIPPED)"
TEST = re.compile(rf"(\[gw\d+\] \[ *\d+%\] (?P<before>{OUTCOMES}) )?(?P<test>\S+::.*?)( (?P<after>{OUTCOMES})\b.*)?$")


class Output(threading.Thread):
    """Reads what a part prints: all goes into the log, some of it to the screen, the outcomes of tests to `tests`."""

    def __init__(self, pipe: IO[bytes], log: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.pipe, self.log = pipe, log
        self.tests: dict[str, list[str]] = {}
        self.left_out, self.shown = "", 0

    def run(self) -> None:
        for data in self.pipe:
            self.log.write(data)
            line = data.decode(errors="replace").rstrip()
            if line.startswith(LEFT_OUT):
                self.left_out = line.removeprefix(LEFT_OUT)
            elif found := TEST.match(line):  # without an outcome: the test begins
                if outcome := found["before"] or found["after"]:
                    self.tests.setdefault(outcome.lower(), []).append(found["test"])
                if outcome not in ("FAILED", "ERROR"):
                    continue
            self.shown += 1
            if self.shown <= LINES and line:
                print(line[:WIDTH], flush=True)
            elif self.shown == LINES + 1:
                print("… more in the log", flush=True)


def start(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """The part as a process group of its own, which can be ended as a whole."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    group: dict[str, Any] = {"process_group": 0}  # in this session: what ends a session's processes ends these, too
    if os.name == "nt":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams, **group)


def wait(process: subprocess.Popen[bytes], end: float, collect: Callable[[], None]) -> bool:
    """Waits for the end of the process, which is forced at `end`. Returns whether it was."""
    asked = False
    while process.poll() is None:
        now = time.monotonic()
        if now > end:
            end_group(process, at_once=True)
            process.wait()
            break
        if now > end - GRACE and not asked:
            end_group(process, at_once=False)
            asked = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(POLL_EVERY, max(0.1, (end if asked else end - GRACE) - now)))
        collect()
    end_group(process, at_once=True)  # children that it has left
    return asked


def end_group(process: subprocess.Popen[bytes], *, at_once: bool) -> None:
    """Ends the process and its children."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL if at_once else signal.SIGTERM)


def outcome(code: int, is_late: bool, output: Output, log: Path, start_of_log: int) -> dict[str, Any]:
    """status and, unless it is "done", why."""
    if is_late:
        return {"status": "out of time"}
    if output.left_out:
        return {"status": "left out", "why": output.left_out}
    if code == 0:
        return {"status": "done"}
    if code < 0:
        return {"status": "crashed", "why": f"{signal.Signals(-code).name}; see the log"}
    said = log.read_bytes()[start_of_log:].decode(errors="replace").split("\n")
    last = next((line for line in reversed(said) if line.strip()), "")
    return {"status": "failed", "why": f"exit code {code}: {last[:WIDTH]}"}


def results_in(folder: Path) -> dict[str, Any]:
    """The newest result that a bench has written there, {} before there is one."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(paths[-1].read_text(encoding="utf-8")) if paths else {}
