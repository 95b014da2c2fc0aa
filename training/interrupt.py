"""Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75  # exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """A context in which signals only set a flag. Calling it tells whether a stop was asked for."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        message = f"\n{signal.Signals(number).name}: finishing this step, then saving; a second one leaves at once\n"
        os.write(2, message.encode())  # print is not safe inside a signal handler
