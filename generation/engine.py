"""Generation on ids: which ids the model reads, and the batched loop with a KV cache that continues prompts.

`visible` is the rule for sequences longer than block_size; `next_logits` applies it without a cache, in one forward
pass. `generate` computes the same with a cache: one decode step per token, and a new prefill where the visible window
is cut. Knows neither text nor files. Reading order: visible, generate, _prefill, _decode_loop; then batch.py.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.memory import OutOfMemory, is_out_of_memory, release_memory
from errors import UserError
from generation import cuda_graphs
from generation.batch import Batch, PlainDecoder, Step
from generation.direct_calls import with_direct_calls
from generation.options import SamplingOptions
from generation.transfer import is_gpu
from model import GPT, KVCache

# Why a sample ended; generation/text.py finds the stop strings.
END_OF_SEQUENCE, STOP, LENGTH = "end of sequence", "stop string", "length"
CACHE_BYTES = 2**30  # limit of one batch's keys and values; more samples are generated batch by batch
LARGE_MATRIX = 2**17  # numbers; the matrices of several such layers do not fit into a core's cache
SMALL_PRODUCT = 2**21  # multiplications with cached matrices; below this a second thread saves little


class Event(NamedTuple):
    """A token of a sample, the reason of its end, or both: the end-of-sequence that ends it.

    If the options ask for log-probabilities (natural, before any filter), `logprob` is the token's, and `top` has the
    likeliest ids with theirs.
    """

    sample: int
    token: int | None
    reason: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def first_kept(n: int, block_size: int, keep_head: int) -> int:
    """Of n ids the model reads the first keep_head (attention sink) and those from the returned index on, at positions
    0, 1, …

    All ids up to block_size. Whenever they exceed it, the older half of those after the head is dropped, so the window
    grows again token by token. Raises UserError if the head leaves no room.
    """
    if not 0 <= keep_head < block_size:
        raise UserError(
            f"--keep_head={keep_head} must be less than the model's block_size={block_size}, to leave room for new ids"
        )
    half = (block_size - keep_head + 1) // 2
    return keep_head + half * max(0, -((block_size - n) // half))


def visible(ids: Sequence[int], block_size: int, keep_head: int) -> list[int]:
    """The ids that the model reads to predict the one after `ids`."""
    return [*ids[:keep_head], *ids[first_kept(len(ids), block_size, keep_head) :]]


def _is_cut(n: int, block_size: int, keep_head: int) -> bool:
    """Whether the n-th id moved the start of the visible window."""
    return first_kept(n, block_size, keep_head) > first_kept(n - 1, block_size, keep_head)


@torch.inference_mode()
def next_logits(model: GPT, ids: Sequence[int], keep_head: int) -> Tensor:
    """(V,) logits of the next id, without a cache; `generate` must agree with it."""
    window = visible(ids, model.config.block_size, keep_head)
    return model(torch.tensor([window], device=model.embed.weight.device))[0, -1]


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    seed: int,
    *,
    draws: Sequence[int] | None = None,
    batch_size: int | None = None,
    stopped: Set[int] = frozenset(),
) -> Iterator[Event]:
    """Continues each prompt (at least one id) as a separate sample. Yields every token when it is drawn, then the
    end; an end-of-sequence that ends the sample is both in one event.

    A sample's draws depend only on the seed, its entry in `draws` (None: 0, 1, …) and the position. A sample that the
    caller adds to `stopped` ends without an event.
    batch_size: samples generated together (None: as many as CACHE_BYTES hold); the ids do not depend on it. The model
    must be in eval mode. Under autocast, enter it around the whole loop.
    """
    assert not model.training
    assert all(prompts), "a prompt without ids"
    config, device, dtype = model.config, model.embed.weight.device, model.embed.weight.dtype
    first_kept(0, config.block_size, options.keep_head)  # raises if the option does not fit the model
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    size = batch_size or max(1, CACHE_BYTES // cuda_graphs.row_bytes(config, dtype))
    draws = range(len(prompts)) if draws is None else draws
    waiting = [_Group(dict(enumerate(map(list, prompts))))]
    while waiting:
        group = waiting.pop()
        if len(group.texts) > size:
            waiting += reversed(group.split(size))
            continue
        fits = False
        with _suppressed_out_of_memory():
            with _decoder_for(model, group, size, dtype, options.max_new_tokens) as decoder:
                yield from _decode_loop(decoder, group, options, seed, draws, stopped)
            fits = True
        if not fits:
            size = _smaller_batch(len(group.texts), device)
            waiting.append(group)


@dataclass
class _Group:
    """Samples that are generated together: those that have not ended, with their ids; the last `step` are drawn."""

    texts: dict[int, list[int]]
    step: int = 0

    def split(self, size: int) -> list[_Group]:
        """Groups of `size` samples, in order; the last may have fewer."""
        samples = list(self.texts)
        parts = [samples[first : first + size] for first in range(0, len(samples), size)]
        return [_Group({sample: self.texts[sample] for sample in part}, self.step) for part in parts]


@contextmanager
def _suppressed_out_of_memory() -> Iterator[None]:
    """Code after this block runs without the exception, which would keep the tensors of the failed step alive."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


def _smaller_batch(samples: int, device: torch.device) -> int:
    """Half of the samples that did not fit into memory, with a line that says so. Raises OutOfMemory for one sample."""
    cuda_graphs.drop_kept()
    release_memory()
    if samples == 1:
        raise OutOfMemory(f"one sample needs more memory than is free; {end_programs(device)}")
    print(f"out of memory with {samples} samples at once: going on with {samples // 2}", file=sys.stderr)
    return samples // 2


def end_programs(device: torch.device) -> str:
    """What helps a program that only generates."""
    other = "" if device.type == "cpu" else ", or add --device=cpu"
    return f"end other programs that use the memory of the device ({device}){other}"


@contextmanager
def _decoder_for(
    model: GPT, group: _Group, max_samples: int, dtype: torch.dtype, max_new_tokens: int
) -> Iterator[cuda_graphs.GraphDecoder | PlainDecoder]:
    """Steps recorded as CUDA graphs on a GPU, unless the model has hooks, which a recording would not call."""
    device, direct, samples = model.embed.weight.device, with_direct_calls(model), len(group.texts)
    if is_gpu(device) and direct is not model:
        with cuda_graphs.lent(model, direct, samples, max_samples, device, dtype) as decoder:
            yield decoder
    else:
        longest = max(map(len, group.texts.values()), default=1) - group.step + max_new_tokens
        yield PlainDecoder(direct, device, dtype, longest)


def _prefill(model: GPT, cache: KVCache, rows: Sequence[int], texts: Sequence[Sequence[int]], keep_head: int) -> None:
    """Fills rows of the cache with the visible ids of their texts, but the newest: the next decode step reads it."""
    windows = [visible(ids, model.config.block_size, keep_head)[:-1] for ids in texts]
    longest = max(map(len, windows))
    padded = [window + [0] * (longest - len(window)) for window in windows]
    ids = torch.tensor(padded, dtype=torch.int64, device=model.embed.weight.device)  # (len(rows), longest)
    with _threads_for(ids.numel(), model):
        model.prefill(ids, [len(window) for window in windows], cache, rows)


@torch.inference_mode()
def _prefill_all(batch: Batch, model: GPT, texts: dict[int, list[int]], keep_head: int) -> None:
    """Reads all texts, equal ones once."""
    row_of: dict[tuple[int, ...], int] = {}
    for sample, ids in texts.items():
        row_of.setdefault(tuple(ids), batch.rows[sample])
    _prefill(model, batch.cache, list(row_of.values()), list(row_of), keep_head)
    for sample, ids in texts.items():
        source, target = row_of[tuple(ids)], batch.rows[sample]
        if source != target:
            batch.cache.copy_row(source, target)


def _decode_loop(
    decoder: cuda_graphs.GraphDecoder | PlainDecoder,
    group: _Group,
    options: SamplingOptions,
    seed: int,
    draws: Sequence[int],
    stopped: Set[int],
) -> Iterator[Event]:
    """Draws tokens until every sample of the group has ended."""
    if not (live := group.texts):
        return
    model, keep_head = decoder.model, options.keep_head
    batch = Batch(decoder, live, group.step, options, seed, draws)
    _prefill_all(batch, model, live, keep_head)
    queued = deque[Step]()  # steps whose ids Python has not read

    def leave(samples: Set[int]) -> None:
        for sample in samples:
            del live[sample]
        batch.leave(samples)

    def read() -> Iterator[Event]:
        leave(live.keys() & stopped)
        step, ended = queued.popleft(), set[int]()
        drawn = step.wait(live) if live else {}
        for sample, (token, logprobs) in drawn.items():
            if options.stop_at_eos and token == model.config.eos_id:
                ended.add(sample)
                yield Event(sample, token, END_OF_SEQUENCE, *logprobs)
            else:
                live[sample].append(token)
                yield Event(sample, token, None, *logprobs)
        group.step += 1
        leave(ended)

    def is_cut(sample: int) -> bool:
        return _is_cut(len(live[sample]) + len(queued), model.config.block_size, keep_head)

    first = group.step
    for step in range(first, options.max_new_tokens):
        leave(live.keys() & stopped)
        if step > first and any(map(is_cut, live)):
            while queued:
                yield from read()
            leave(live.keys() & stopped)
            if cut := list(filter(is_cut, live)):
                _prefill(model, batch.cache, [batch.rows[i] for i in cut], [live[i] for i in cut], keep_head)
        if not live:
            return
        with _threads_for(batch.size, model):
            queued.append(batch.launch(step))
        if len(queued) > decoder.look_ahead:
            yield from read()
    while queued:
        yield from read()
    for sample in live:
        if sample not in stopped:
            yield Event(sample, None, LENGTH)


@contextmanager
def _threads_for(tokens: int, model: GPT) -> Iterator[None]:
    """One thread for small products on a CPU, else torch's number of threads.

    Large matrices are read from memory, which two threads do almost twice as fast. Small ones gain little from a second
    thread; on busy cores every operation waits for it, which costs far more than the products.
    """
    threads = torch.get_num_threads()
    matrix = model.config.n_embd**2
    if matrix < LARGE_MATRIX and tokens * matrix < SMALL_PRODUCT and model.embed.weight.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
