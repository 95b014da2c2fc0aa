"""What a process does about others that end or fall silent, while its main thread may wait for them.

Watch is a thread. It counts up a number in the store of the processes, and sees whether its launcher has ended, and
whether another process has lost contact with this one. `find_lost` reads these numbers: who is killed or stopped, or on
a machine that cannot be reached, does not count. All of it is for messages and a prompt end: the operations of
torch.distributed have timeouts of their own. Keys: host/R, alive/R, error/R, lost/R of rank R; ended, the first error;
lost.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from errors import LOST
from parallel.processes import describe_rank, is_orphan, rank, this_rank, world_size

T = TypeVar("T")

INTERVAL = 1.0  # seconds between signs of life
PATIENCE = 5.0  # seconds for what helps a message only, and for a process to notice by itself that others have ended


class Watch(threading.Thread):
    """store: of all processes; None where there are no others."""

    def __init__(self, store: dist.Store | None) -> None:
        super().__init__(daemon=True, name="watch")
        self.store, self.is_leaving = store, False
        self._ended = threading.Event()
        if store is not None:
            store.set(f"host/{rank()}", platform.node())
            store.add(f"alive/{rank()}", 1)

    def run(self) -> None:
        while not is_orphan():
            if self._ended.wait(INTERVAL):
                return
            try:
                if self.store is not None:
                    self.store.add(f"alive/{rank()}", 1)
                    if self.store.check(["lost"]):
                        self._follow()
            except RuntimeError:  # whoever keeps the store has ended
                self.store = None
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # nothing is trained yet; later a StopRequest asks
            self._leave("torchrun has ended")

    def end(self) -> bool:
        """Whether the thread has ended, as it must before the interpreter does: an operation of the store would abort
        the process then."""
        self.is_leaving = True
        self._ended.set()
        self.join(PATIENCE)
        return not self.is_alive()

    def _follow(self) -> None:
        """Ends this process, after another one has reported that it lost contact with some process."""
        time.sleep(2 * PATIENCE)
        if not self.is_leaving:
            faulthandler.dump_traceback(2)
            self._leave("another process has waited for this one, which is at the place above")

    def _leave(self, why: str) -> None:
        if not self.is_leaving:
            print(f"error: {this_rank() or 'this process'}: {why}", file=sys.stderr, flush=True)
            os._exit(LOST)


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """The result of `action`; None where it takes longer, or where the store is gone. On a machine without a network
    an operation of the store may not return at all."""
    found = list[T]()

    def run() -> None:
        with suppress(RuntimeError):
            found.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def get(store: dist.Store, key: str, seconds: float) -> str | None:
    """A text of another process, once it is there; None where it does not come."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # Store.wait would print warnings
        if store.check([key]):
            return store.get(key).decode()
        time.sleep(0.1)
    return None


def find_lost(store: dist.Store) -> tuple[str, bool]:
    """Which processes do not answer, or what is known of the first one that ended; "" where nothing is. And whether
    another process tells the same."""
    store.set("lost", "")
    store.set(f"lost/{rank()}", "")
    others = [number for number in range(world_size()) if number != rank()]
    before = store.multi_get([f"alive/{number}" for number in others])
    time.sleep(3 * INTERVAL)
    after = store.multi_get([f"alive/{number}" for number in others])
    is_told = any(store.check([f"lost/{number}"]) for number in others if number < rank())
    if store.check(["ended"]):
        return store.get("ended").decode(), is_told
    silent = [number for number, one, two in zip(others, before, after, strict=True) if one == two]
    late = [number for number in others if not store.check([f"lost/{number}"])]
    names = [describe_rank(number, store.get(f"host/{number}").decode()) for number in (silent or late)[:8]]
    more = f" and {len(silent or late) - 8} more" if len(silent or late) > 8 else ""
    what = "gives no sign of life: killed, stopped, or not to be reached" if silent else "lives, but does not take part"
    return (f"{', '.join(names)}{more} {what}" if names else ""), is_told
