"""Ctrl-C, SIGTERM and a closed terminal: the first signal lets the loop finish its step and save."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75  # exit code of a run that a signal stopped and that can be resumed (EX_TEMPFAIL of sysexits.h)
GRACE = 1.0  # seconds
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; not on Windows
BREAK = getattr(signal, "SIGBREAK", None)  # the console was closed, or Ctrl-Break; Windows only


class StopRequest:
    """A context in which the first signal only sets a flag. Calling the object returns the flag.

    A second Ctrl-C or SIGTERM exits at once. It counts from GRACE seconds after the first one: one Ctrl-C may arrive
    twice, and impatient fingers press it twice. A closed terminal is never a reason to lose what is being saved. Under
    nohup, SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self._requested: float | None = None  # time.monotonic of the first signal
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._requested is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM, HANGUP, BREAK):
                if number is not None and not (number == HANGUP and signal.getsignal(number) == signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested is None:
            self._requested = now
            name, again = signal.Signals(number).name, f"another Ctrl-C after {GRACE:.0f} s exits at once"
            with suppress(OSError):  # the terminal or the pipe may be gone
                os.write(2, f"\n{name}: finishing this step, then saving; {again}\n".encode())  # print is not safe here
        elif number != HANGUP and now - self._requested >= GRACE:
            os._exit(128 + number)
