"""Ctrl-C and SIGTERM: the first lets the loop finish its step and save, the second exits at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75  # exit code of a run that a signal stopped and that can be resumed (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """A context in which the first signal only sets a flag. Calling the object returns the flag."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._requested

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            os._exit(128 + number)
        self._requested = True
        message = f"\n{signal.Signals(number).name}: finishing this step, then saving; a second one exits at once\n"
        os.write(2, message.encode())  # print is not safe inside a signal handler
