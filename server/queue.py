"""A queue of completion requests and the one thread that generates them, first in, first out. Knows no HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from generation.text import Piece
from server.completions import RequestError

MAX_REQUESTS = 16  # waiting or running
MIN_INTERVAL = 0.02  # seconds between two batches of pieces, to limit the overhead of sending with a fast model


def shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503)


class Job:
    """A request in the queue. Its pieces are passed in batches from the generating thread to the event loop."""

    def __init__(self, work: Generator[Piece]) -> None:
        self.work = work
        self.cancelled = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.batches: asyncio.Queue[list[Piece]] = asyncio.Queue()
        self.future: Future[None] = Future()

    def start(self, thread: ThreadPoolExecutor) -> None:
        self.future = thread.submit(self._run)
        self.future.add_done_callback(lambda _: self._deliver([]))  # [] marks the end

    def _run(self) -> None:
        batch, last_delivery = list[Piece](), 0.0
        with closing(self.work):
            for piece in self.work:
                if self.cancelled.is_set():
                    return
                batch.append(piece)
                if time.monotonic() - last_delivery >= MIN_INTERVAL:
                    self._deliver(batch)
                    batch, last_delivery = [], time.monotonic()
            if batch:
                self._deliver(batch)

    def _deliver(self, batch: list[Piece]) -> None:
        if not self.cancelled.is_set():  # after that the event loop may be closed
            self.loop.call_soon_threadsafe(self.batches.put_nowait, batch)

    async def next_batch(self) -> list[Piece]:
        """Returns [] after the last batch. Raises RequestError if the job was cancelled, and what the work raised."""
        batch = await self.batches.get()
        if not batch:
            if self.cancelled.is_set():
                raise shutting_down()
            self.future.result()
        return batch

    def cancel(self) -> None:
        """Stops the work before its next token, or before it starts. Call it in the event loop's thread."""
        self.cancelled.set()
        self.future.cancel()
        self.batches.put_nowait([])


class Queue:
    """The generating thread and its jobs. Only the thread runs the model."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "generate")
        self.jobs = set[Job]()
        self.closed = False

    def add(self, work: Generator[Piece]) -> Job:
        """Raises RequestError if the queue is full or closed."""
        if self.closed:
            raise shutting_down()
        if len(self.jobs) >= MAX_REQUESTS:
            message = f"{MAX_REQUESTS} requests are waiting already; try again later"
            raise RequestError(message, status=503, code="queue_full")
        job = Job(work)
        job.start(self.thread)
        self.jobs.add(job)
        return job

    def remove(self, job: Job) -> None:
        job.cancel()
        self.jobs.discard(job)

    def close(self) -> None:
        """Cancels all jobs and accepts no more."""
        self.closed = True
        for job in list(self.jobs):
            job.cancel()
