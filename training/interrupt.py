"""Ctrl-C, SIGTERM and a closed terminal: the first signal lets the loop finish its step and save. So does the end of
the torchrun that has started this process. Of several processes one is enough to stop all of them at the same step."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from errors import STOPPED
from parallel.processes import any_of, gather, is_orphan, launcher, this_rank, world_size
from training.metrics import log

__all__ = ["GRACE", "STOPPED", "StopRequest"]

GRACE = 1.0  # seconds
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; not on Windows
BREAK = getattr(signal, "SIGBREAK", None)  # the console was closed, or Ctrl-Break; Windows only


class StopRequest:
    """A context in which the first signal only sets a flag. Calling the object returns the flag, of all processes: all
    have to call it, and learn of it together.

    A second Ctrl-C or SIGTERM exits at once. It counts from GRACE seconds after the first one: one Ctrl-C may arrive
    twice, and impatient fingers press it twice. A closed terminal is never a reason to lose what is being saved. Under
    nohup, SIGHUP stays ignored.

    begun: whether a signal lets a loop end. Otherwise, until `begin` is called, it raises KeyboardInterrupt in a single
    process, where compiling takes long and leaves nothing to save; several processes have to stop together.
    """

    def __init__(self, *, begun: bool = True) -> None:
        self._begun = begun or world_size() > 1
        self._requested: float | None = None  # time.monotonic of the first signal
        self._reason = ""
        self._agreed = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        if self._requested is None and is_orphan():
            self._request("torchrun has ended")
            if world_size() == 1:
                log("torchrun has ended: saving")
        if not self._agreed and any_of(lambda: self._requested is not None):
            self._agreed = True
            self._tell()
        return self._agreed

    def begin(self) -> None:
        """From here on a signal only sets the flag."""
        self._begun = True

    def _tell(self) -> None:
        """Says, once for all processes, why they stop. Those that had no signal are from here on as if they had."""
        if world_size() == 1:
            return
        reasons = gather((self._reason, this_rank()))
        self._request("")
        asked = [f"{reason} ({name})" for reason, name in reasons if reason]
        shown = reasons[0][0] or "; ".join(asked[:4])
        log(f"\n{shown}: all {world_size()} processes save; another signal after {GRACE:.0f} s ends them at once")

    def _request(self, reason: str) -> None:
        if self._requested is None:
            self._requested, self._reason = time.monotonic(), reason

    def __enter__(self) -> StopRequest:
        launcher()
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM, HANGUP, BREAK):
                if number is not None and not (number == HANGUP and signal.getsignal(number) == signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and world_size() > 1:  # it is still to be reported, and torchrun sends SIGTERM meanwhile
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested is None:
            name, again = signal.Signals(number).name, f"another Ctrl-C after {GRACE:.0f} s exits at once"
            self._request(name)
            if not self._begun:  # where that is caught by whoever should not, the flag counts
                raise KeyboardInterrupt
            if world_size() > 1:  # torchrun sends a signal to all, which one of them reports: _tell
                return
            with suppress(OSError):  # the terminal or the pipe may be gone
                os.write(2, f"\n{name}: finishing this step, then saving; {again}\n".encode())  # print is not safe here
        elif number != HANGUP and now - self._requested >= GRACE:
            os._exit(128 + number)
