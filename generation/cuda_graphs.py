"""Decode steps recorded as CUDA graphs: a GPU then runs a whole step without Python.

A graph can replay a step whose shapes and memory stay the same. So a step reads the first 64, 128, 256 … slots of the
cache, up to all of them, with one graph for each such span; the mask excludes slots beyond a row's length, and the
lengths are counted on the device. When rows leave the batch, KVCache.keep moves the cache to new memory, and the graphs
are recorded again. Recording takes as long as a few plain steps.

On other devices the same step runs without a graph, as in the tests. It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT, KVCache

MIN_SPAN = 64  # slots that the first graph reads


class GraphDecoder:
    """GPT.decode by CUDA graphs, one per span of the cache. Each step overwrites the logits of the step before."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.memory: Tensor | None = None  # of the cache that the graphs were recorded for
        self.graphs: dict[int, Callable[[], Tensor]] = {}  # by span

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Like GPT.decode: ids (R,) int64 → logits (R, V). Raises ValueError if a row is full."""
        cache.extend()
        if cache.memory is not self.memory:
            self.graphs.clear()
            self.memory, self.ids = cache.memory, ids.clone()
        self.ids.copy_(ids)
        span = min(cache.capacity, max(MIN_SPAN, 1 << (cache.longest - 1).bit_length()))
        if span not in self.graphs:
            self.graphs[span] = self.record(cache, span)
        return self.graphs[span]()

    def record(self, cache: KVCache, span: int) -> Callable[[], Tensor]:
        """A function that runs the step on self.ids and returns its logits; a plain call where there is no CUDA."""
        if self.ids.device.type != "cuda":
            return lambda: self.model.decode_step(self.ids, cache, span)
        device, lengths = self.ids.device, cache.lengths.clone()
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            # warm-up: a library's first call allocates memory, which must not be recorded
            with torch.cuda.stream(side):
                for _ in range(2):
                    cache.lengths.copy_(lengths)
                    self.model.decode_step(self.ids, cache, span)
            torch.cuda.current_stream(device).wait_stream(side)
            cache.lengths.copy_(lengths)  # the first replay writes again what the warm-up wrote
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.model.decode_step(self.ids, cache, span)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
