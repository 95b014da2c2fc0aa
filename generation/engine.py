"""Generation on ids: which ids the model reads, and the batched loop with a KV cache that continues prompts.

`visible` is the rule for sequences longer than block_size; `next_logits` applies it without a cache, in one forward
pass. `generate` computes the same with a cache: one decode step per token, and a new prefill where the visible window
is cut. Knows neither text nor files. Reading order: visible, generate, _prefill, _decode_loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError
from generation.cuda_graphs import GraphDecoder
from generation.direct_calls import with_direct_calls
from generation.options import SamplingOptions
from generation.sampling import Penalties, draw, log_probabilities, uniform
from model import GPT, KVCache

# Why a sample ended; generation/text.py finds the stop strings.
END_OF_SEQUENCE, STOP, LENGTH = "end of sequence", "stop string", "length"
CACHE_BYTES = 2**30  # limit of one batch's keys and values; more samples are generated batch by batch
LARGE_MATRIX = 2**17  # numbers; the matrices of several such layers do not fit into a core's cache
SMALL_PRODUCT = 2**21  # multiplications with cached matrices; below this a second thread saves little


class Event(NamedTuple):
    """A token of a sample, or its end: either `token` or `reason` is None.

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
    end.

    A sample's draws depend only on the seed, its entry in `draws` (None: 0, 1, …) and the position. An end-of-sequence
    that ends the sample is not yielded as a token. A sample that the caller adds to `stopped` ends without an event.
    batch_size: samples generated together (None: as many as CACHE_BYTES hold); the ids do not depend on it. The model
    must be in eval mode. Under autocast, enter it around the whole loop.
    """
    assert not model.training
    assert all(prompts), "a prompt without ids"
    draws = range(len(prompts)) if draws is None else draws
    model, config = with_direct_calls(model), model.config
    first_kept(0, config.block_size, options.keep_head)  # raises if the option does not fit the model
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    row_bytes = 2 * config.n_layer * config.kv_heads * config.block_size * config.head_size * dtype.itemsize
    size = batch_size or max(1, CACHE_BYTES // row_bytes)
    for first in range(0, len(prompts), size):
        texts = {sample: list(prompts[sample]) for sample in range(first, min(first + size, len(prompts)))}
        distinct = list(dict.fromkeys(map(tuple, texts.values())))  # equal prompts are read once
        cache = KVCache(config, len(distinct), device, dtype)
        _prefill(model, cache, range(len(distinct)), distinct, options.keep_head)
        row_of = {ids: row for row, ids in enumerate(distinct)}
        cache.keep([row_of[tuple(ids)] for ids in texts.values()])
        yield from _decode_loop(model, cache, texts, options, seed, draws, stopped)


def _prefill(model: GPT, cache: KVCache, rows: Sequence[int], texts: Sequence[Sequence[int]], keep_head: int) -> None:
    """Fills rows of the cache with the visible ids of their texts, but the newest: the next decode step reads it."""
    windows = [visible(ids, model.config.block_size, keep_head)[:-1] for ids in texts]
    longest = max(map(len, windows))
    padded = [window + [0] * (longest - len(window)) for window in windows]
    ids = torch.tensor(padded, dtype=torch.int64, device=model.embed.weight.device)  # (len(rows), longest)
    with _threads_for(ids.numel(), model):
        model.prefill(ids, [len(window) for window in windows], cache, rows)


def _decode_loop(
    model: GPT,
    cache: KVCache,
    texts: dict[int, list[int]],
    options: SamplingOptions,
    seed: int,
    draws: Sequence[int],
    stopped: Set[int],
) -> Iterator[Event]:
    """Draws tokens until every text, keyed by sample, has ended. Row r of the cache belongs to the sample live[r]."""
    config, keep_head, device = model.config, options.keep_head, model.embed.weight.device
    decode = decoder_for(model)
    live, penalties = list(texts), None
    if Penalties.needed(options):
        penalties = Penalties(list(texts.values()), config.vocab_size, options, device)

    def keep(rows: list[int]) -> None:
        nonlocal live
        if len(rows) < len(live):
            live = [live[row] for row in rows]
            cache.keep(rows)
            if penalties is not None:
                penalties.keep(rows)

    for step in range(options.max_new_tokens):
        keep([row for row, sample in enumerate(live) if sample not in stopped])
        if not live:
            return
        if step > 0:
            cut = [row for row, sample in enumerate(live) if _is_cut(len(texts[sample]), config.block_size, keep_head)]
            if cut:
                _prefill(model, cache, cut, [texts[live[row]] for row in cut], keep_head)
        newest = torch.tensor([texts[sample][-1] for sample in live], device=device)
        uniforms = [uniform(seed, draws[sample], len(texts[sample])) for sample in live]
        with _threads_for(len(live), model):
            logits = raw_logits = decode(newest, cache)
            if penalties is not None:
                logits = penalties.apply(logits)
            if step < options.min_new_tokens and config.eos_id is not None:
                logits = logits.index_fill(1, torch.tensor([config.eos_id], device=device), -torch.inf)
            drawn = draw(logits, uniforms, options)
            logprobs = (
                [()] * len(live) if options.logprobs is None else log_probabilities(raw_logits, drawn, options.logprobs)
            )
        if penalties is not None:
            penalties.add(drawn)
        unfinished = []
        for row, token in enumerate(drawn):
            if options.stop_at_eos and token == config.eos_id:
                yield Event(live[row], None, END_OF_SEQUENCE)
            else:
                texts[live[row]].append(token)
                unfinished.append(row)
                yield Event(live[row], token, None, *logprobs[row])
        keep(unfinished)
    for sample in live:
        if sample not in stopped:
            yield Event(sample, None, LENGTH)


def decoder_for(model: GPT) -> Callable[[Tensor, KVCache], Tensor]:
    """GPT.decode, by CUDA graphs on a GPU. Not under autocast: recording takes about as long as the short samples of a
    training run."""
    recorded = model.embed.weight.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
    return GraphDecoder(model).decode if recorded else model.decode


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
