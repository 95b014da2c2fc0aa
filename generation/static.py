"""Decoding with fixed shapes, so that a GPU can record the whole step once, as a CUDA graph, and then run it without Python.

Between two recordings nothing may change but numbers in the same memory. So the step looks at the first 64, 128, 256 … places of the cache,
a recording for each, masks those beyond a row's length, and keeps the lengths on the device. When rows leave, the cache moves to other
memory and is recorded anew; a recording takes as long as a few plain steps.

On other devices the same step runs as it is, which is how it is tested: no GPU was at hand when this was written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT, KVCache

SHORTEST = 64  # places of the first recording


class StaticCache(KVCache):
    """The first `places` of another cache's memory; lengths (R,) are a tensor that a step itself counts up."""

    def __init__(self, cache: KVCache, places: int, lengths: Tensor) -> None:
        self.memory, self.ids, self.starts = cache.memory, cache.ids, cache.starts
        self.places, self.device_lengths = places, lengths

    @property
    def lengths(self) -> Tensor:
        return self.device_lengths

    @property
    def longest(self) -> int:
        return self.places - 1  # as far as shapes are concerned

    @property
    def even(self) -> bool:
        return False

    def advance(self, ids: Tensor) -> None:
        if self.ids is not None:
            self.ids.scatter_(1, self.lengths[:, None], ids[:, None])
        self.device_lengths += 1


class StaticDecoder:
    """GPT.decode for the rows of one cache. The logits are overwritten by the next step."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.memory: Tensor | None = None  # the cache's, for which the steps are made
        self.steps: dict[int, Callable[[], Tensor]] = {}

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """As GPT.decode: ids (R,) int64 → logits (R, V). Raises ValueError where a row is full."""
        cache.check_room()
        if cache.memory is not self.memory:
            self.steps.clear()
            self.memory, self.ids, self.lengths, self.on_device = (
                cache.memory,
                ids.clone(),
                cache.lengths,
                cache.host_lengths.copy(),
            )
        self.ids.copy_(ids)
        if self.on_device != cache.host_lengths:  # a window was cut
            self.lengths.copy_(cache.lengths)
        places = min(cache.capacity, max(SHORTEST, 1 << cache.longest.bit_length()))
        if places not in self.steps:
            self.steps[places] = self._prepare(StaticCache(cache, places, self.lengths))
        logits = self.steps[places]()
        cache.host_lengths = [length + 1 for length in cache.host_lengths]
        self.on_device = cache.host_lengths.copy()
        return logits

    def _prepare(self, static: StaticCache) -> Callable[[], Tensor]:
        """A function that runs the step on self.ids and static. What warming up writes, the first real step writes again."""
        if self.ids.device.type != "cuda":
            return lambda: self.model.decode(self.ids, static)
        with torch.cuda.device(self.ids.device):
            return self._record(static)

    def _record(self, static: StaticCache) -> Callable[[], Tensor]:
        lengths = self.lengths.clone()
        side = torch.cuda.Stream(self.ids.device)
        side.wait_stream(torch.cuda.current_stream(self.ids.device))
        with torch.cuda.stream(
            side
        ):  # libraries allocate what they need at their first call, which must not be recorded
            for _ in range(2):
                self.lengths.copy_(lengths)
                self.model.decode(self.ids, static)
        torch.cuda.current_stream(self.ids.device).wait_stream(side)
        self.lengths.copy_(lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model.decode(self.ids, static)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
