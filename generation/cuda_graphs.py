"""Decode steps and draws recorded as CUDA graphs, kept per model: a GPU then runs a whole step without Python.

A graph can replay work whose shapes and memory stay the same. So a step reads the first 64, 128, 256 … slots of the
cache, up to all of them, and computes 1, 2, 4 … rows, some of them idle, with one graph for each such pair; the mask
excludes slots beyond a row's length, and lengths are counted on the device. When rows leave, the others move together
in the same memory, and the step goes on with the graph for fewer rows.

A GraphDecoder owns a cache and its graphs. `lent` hands one out for the time of a generation, to one at a time, and
keeps it for the next one. It is dropped with its model, when the weights have moved to other addresses (a graph reads
them by address), and when the kept caches would exceed MAX_KEPT_BYTES, least recently used first.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.cuda_graphs import Recorder
from generation.options import SamplingOptions
from generation.sampling import draw
from model import GPT, GPTConfig, KVCache

MIN_SPAN = 64  # slots that the first graph reads
MAX_DRAWS = 16  # graphs of draws with different options that a decoder keeps
MAX_KEPT_BYTES = 2**30  # of caches that no generation uses
# cuDNN, which PyTorch prefers on Hopper, builds a plan for every shape; the masked steps take the efficient kernel.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def row_bytes(config: GPTConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one row."""
    return 2 * config.n_layer * config.kv_heads * config.block_size * config.head_size * dtype.itemsize


class GraphDecoder:
    """GPT.decode and `draw` by CUDA graphs. Each step overwrites the tensors that the step before has returned."""

    look_ahead = 1  # steps that may be queued before the ids of an earlier one are read

    def __init__(self, model: GPT, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.rows = model, device, rows
        self.bytes = rows * row_bytes(model.config, dtype)
        self.whole = KVCache(model.config, rows, device, dtype)
        V, wide = model.config.vocab_size, torch.promote_types(model.embed.weight.dtype, torch.float32)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, V, dtype=wide, device=device)
        self.uniforms = torch.zeros(rows, dtype=torch.float64, device=device)
        self.eos = torch.tensor([model.config.eos_id or 0], device=device)
        self.steps: dict[tuple[int, int], Callable[[], Tensor]] = {}  # by rows and span
        self.draws: dict[tuple[Any, ...], Callable[[], Tensor]] = {}  # by rows and options
        self.kind: tuple[Any, ...] = ()  # what `lent` compares
        self.last_use = 0
        self.recorder = Recorder(device)

    def rows_for(self, samples: int) -> int:
        """Rows of the cache that a step of so many samples computes."""
        return min(self.rows, 1 << (samples - 1).bit_length())

    @torch.inference_mode()
    def new_cache(self, samples: int) -> KVCache:
        """An empty cache in the memory of the recordings. Zeros, since NaN of an earlier text would pass the mask."""
        cache = copy.copy(self.whole)
        for x in (cache.memory, cache.ids, cache.lengths, cache.starts):
            if x is not None:
                x.zero_()
        cache.growing.fill_(1)
        cache.narrow(self.rows_for(samples))
        return cache

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Like GPT.decode: ids (R,) int64 → logits (R, V), in float32 at least. Raises ValueError if a row is full."""
        cache.extend()
        rows = len(cache.host_lengths)
        static = self.ids[:rows]
        if ids.data_ptr() != static.data_ptr():
            static.copy_(ids)
        span = min(cache.capacity, max(MIN_SPAN, 1 << (cache.longest - 1).bit_length()))
        if (rows, span) not in self.steps:
            self.steps[rows, span] = self.record_step(cache, span)
        return self.steps[rows, span]()

    def record_step(self, cache: KVCache, span: int) -> Callable[[], Tensor]:
        rows, lengths = len(cache.host_lengths), cache.lengths.clone()
        static, logits = self.ids[:rows], self.logits[:rows]
        return self.record(
            lambda: logits.copy_(self.model.decode_step(static, cache, span)),
            before=lambda: cache.lengths.copy_(lengths),  # so that the first replay writes the same slots again
        )

    @torch.inference_mode()
    def draw(self, uniforms: Tensor, options: SamplingOptions, ban_eos: bool) -> tuple[Tensor, Tensor]:
        """Draws from the logits of the last step: uniforms (R,) → ids as from sampling.draw, and as the next input."""
        rows = len(uniforms)
        self.uniforms[:rows].copy_(uniforms)
        key = rows, options.temperature, options.top_k, options.top_p, options.min_p, ban_eos
        if key not in self.draws:
            if len(self.draws) >= MAX_DRAWS:
                del self.draws[next(iter(self.draws))]
            self.draws[key] = self.record(lambda: self.draw_next(rows, options, ban_eos))
        drawn = self.draws[key]()
        return drawn, self.ids[:rows]

    def draw_next(self, rows: int, options: SamplingOptions, ban_eos: bool) -> Tensor:
        logits = self.logits[:rows]
        if ban_eos:
            logits = logits.index_fill(1, self.eos, -torch.inf)
        drawn = draw(logits, self.uniforms[:rows], options)
        self.ids[:rows].copy_(drawn.clamp(max=logits.shape[1] - 1))
        return drawn

    def record(self, work: Callable[[], Tensor], before: Callable[[], Any] = lambda: None) -> Callable[[], Tensor]:
        """A function that repeats `work` on the same memory and returns its result. `before` undoes what it changes."""
        device = self.device
        amp: AbstractContextManager[object] = nullcontext()
        if torch.is_autocast_enabled(device.type):  # a graph must not read the weights that autocast casts and frees
            amp = torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
        with amp, sdpa_kernel(BACKENDS):
            with self.recorder.on_stream():
                for _ in range(2):
                    before()
                    work()
                before()
            return self.recorder.record(work)


_kept: WeakKeyDictionary[GPT, list[GraphDecoder]] = WeakKeyDictionary()  # those that no generation uses
_lock, _uses = threading.RLock(), count()  # RLock: the garbage collector may close a generator that returns a decoder


@contextmanager
def lent(
    model: GPT, direct: GPT, rows: int, max_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[GraphDecoder]:
    """A decoder for at least `rows` rows, kept from before or new, that nobody else uses meanwhile. direct: the copy of
    the model to call; dtype: of the cache. After an error the decoder is dropped, since its state is unknown."""
    weights = [(x.data_ptr(), x.dtype) for x in chain(model.parameters(), model.buffers())]
    kind = dtype, torch.is_autocast_enabled(device.type), weights
    wanted = min(1 << (rows - 1).bit_length(), max(rows, max_rows))
    with _lock:
        kept = [each for each in _kept.pop(model, []) if each.kind[-1] == weights]
        fitting = [each for each in kept if each.kind == kind and each.rows >= wanted]
        decoder = min(fitting, key=lambda each: each.rows, default=None)
        if kept:
            _kept[model] = [each for each in kept if each is not decoder]
    if decoder is None:
        drop_kept(MAX_KEPT_BYTES - wanted * row_bytes(model.config, dtype))
        decoder = GraphDecoder(direct, wanted, device, dtype)
        decoder.kind = kind
    returned = False
    try:
        yield decoder
        returned = True
    except GeneratorExit:
        returned = True
        raise
    finally:
        if returned:
            with _lock:
                decoder.last_use = next(_uses)
                _kept.setdefault(model, []).append(decoder)
                drop_kept(MAX_KEPT_BYTES)


def drop_kept(max_bytes: int = 0) -> None:
    """Drops decoders that no generation uses, least recently used first, until at most max_bytes of caches are kept."""
    with _lock:
        kept = sorted((each for decoders in _kept.values() for each in decoders), key=lambda each: each.last_use)
        total = sum(each.bytes for each in kept)
        for each in kept:
            if total > max_bytes:
                total -= each.bytes
                for decoders in _kept.values():
                    if each in decoders:
                        decoders.remove(each)
