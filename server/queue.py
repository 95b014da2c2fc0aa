"""The one thread that generates, and the requests that wait for it: first come, first served. Knows no HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from generation.text import Piece
from server.completions import Refused

MAX_REQUESTS = 16  # in the queue, the one that is generated included
PAUSE = 0.02  # seconds between deliveries at least, so that the network does not slow a fast model down


def stopping() -> Refused:
    return Refused("the server is being stopped", status=503)


class Job:
    """A request in the queue, and its pieces in the batches in which they are delivered."""

    def __init__(self, work: Generator[Piece]) -> None:
        self.work = work
        self.leaving = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[list[Piece]] = asyncio.Queue()
        self.future: Future[None] = Future()

    def start(self, thread: ThreadPoolExecutor) -> None:
        self.future = thread.submit(self._run)
        self.future.add_done_callback(lambda _: self._deliver([]))

    def _run(self) -> None:
        batch, delivered = list[Piece](), 0.0
        with closing(self.work):
            for piece in self.work:
                if self.leaving.is_set():
                    return
                batch.append(piece)
                if time.monotonic() - delivered >= PAUSE:
                    self._deliver(batch)
                    batch, delivered = [], time.monotonic()
            if batch:
                self._deliver(batch)

    def _deliver(self, batch: list[Piece]) -> None:
        if not self.leaving.is_set():  # afterwards nobody waits, and the loop may be closed
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, batch)

    async def take(self) -> list[Piece]:
        """The next batch; [] after the last. Raises Refused where the job was left, UserError and whatever else the work raised."""
        batch = await self.arrived.get()
        if not batch:
            if self.leaving.is_set():
                raise stopping()
            self.future.result()
        return batch

    def leave(self) -> None:
        """Ends the work before its next token, or before it began. To be called in the loop's thread."""
        self.leaving.set()
        self.future.cancel()
        self.arrived.put_nowait([])


class Queue:
    """The one thread that generates, and the requests before it: first come, first served."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "generate")
        self.jobs = set[Job]()
        self.closed = False

    def add(self, work: Generator[Piece]) -> Job:
        if self.closed:
            raise stopping()
        if len(self.jobs) >= MAX_REQUESTS:
            message = f"{MAX_REQUESTS} requests wait for the model already; try again when some are done"
            raise Refused(message, status=503, code="queue_full")
        job = Job(work)
        job.start(self.thread)
        self.jobs.add(job)
        return job

    def remove(self, job: Job) -> None:
        job.leave()
        self.jobs.discard(job)

    def close(self) -> None:
        """Ends all work before the next token."""
        self.closed = True
        for job in list(self.jobs):
            job.leave()
