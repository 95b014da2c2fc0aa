"""CUDA graphs: work that was recorded once, and is repeated without Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Recorder:
    """Records on a stream of its own. Recordings share memory that nothing else uses, in which a recording may
    overwrite what an earlier one has computed and nobody holds any more."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work is queued on the recorder's stream, between what was queued before and what will be. For warm-up: the
        first call of a library allocates memory, which must not be recorded."""
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):
                yield
            before.wait_stream(self.stream)

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """A function that repeats `work` on the same memory, and returns the tensors that `work` returned here. Nothing
        is computed yet. Raises RuntimeError where `work` waits for the device."""
        graph: Any = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.device)
        # thread_local: other threads, as one that reads training data, may use the GPU meanwhile
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                result = work()
        except RuntimeError:
            torch.cuda.set_stream(before)  # torch leaves the other one where the end of the recording fails, too
            raise

        def replay() -> T:
            graph.replay()
            return result

        return replay
