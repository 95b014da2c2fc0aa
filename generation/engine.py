"""Generation on ids: which ids the model sees, and the batched, cached loop that continues prompts. Knows neither text nor files.

`visible` is the rule for sequences longer than block_size, `next_logits` its plain use: one forward pass over the visible ids. `generate`
computes the same with a key/value cache: one token a step while a window grows, and a new reading of the window where it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError
from generation.bare import bare
from generation.options import SamplingOptions
from generation.sampling import Penalties, draw, log_probabilities, uniform
from generation.static import StaticDecoder
from model import GPT, KVCache

END_OF_SEQUENCE, STOP, LENGTH = (
    "end of sequence",
    "stop string",
    "length",
)  # why a sample ends; the second is text.py's to say
CACHE_BYTES = 2**30  # keys and values held at once; more samples than fit are generated one batch after the other
LARGE_MATRIX = 2**17  # numbers; several layers of such matrices do not stay in a core's cache
SMALL_PRODUCT = 2**21  # multiplications of cached matrices, below which a second thread hardly pays


class Event(NamedTuple):
    """A token of a sample, or its end: one of `token` and `reason` is None.

    Where the options ask for log-probabilities (natural, the model's own, before any filter), a token has its own in `logprob`, and `top`
    holds the likeliest ids with theirs.
    """

    sample: int
    token: int | None
    reason: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def first_kept(n: int, block_size: int, keep_head: int) -> int:
    """Of n ids the model sees the first keep_head and those from here on, at positions 0, 1, …

    All ids up to block_size. Each time they outgrow it, the older half of those behind the head is dropped, so that the window grows again
    token by token. Raises UserError where the head leaves no room.
    """
    if not 0 <= keep_head < block_size:
        raise UserError(
            f"--keep_head={keep_head} must be less than the model's block_size={block_size}, so that new ids are seen too"
        )
    half = (block_size - keep_head + 1) // 2
    return keep_head + half * max(0, -((block_size - n) // half))


def visible(ids: Sequence[int], block_size: int, keep_head: int) -> list[int]:
    """What the model reads to predict the id after `ids`."""
    return [*ids[:keep_head], *ids[first_kept(len(ids), block_size, keep_head) :]]


@torch.inference_mode()
def next_logits(model: GPT, ids: Sequence[int], keep_head: int) -> Tensor:
    """(V,) logits of the next id, without a cache: what `generate` must agree with."""
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
    leaving: Set[int] = frozenset(),
) -> Iterator[Event]:
    """Continues each prompt (one id at least) as a sample of its own; yields every token as it is drawn, then the sample's end.

    A sample's draws depend on the seed, its entry in `draws` (None: 0, 1, …) and its position alone. A drawn end-of-sequence is no token of
    the text where it stops the sample. A sample that the caller puts into `leaving` ends without an event. `batch_size` samples are
    generated side by side (None: as many as CACHE_BYTES hold); the ids depend on neither. The model is in eval mode.
    Under autocast, enter it around the whole loop.
    """
    assert not model.training
    assert all(prompts), "a prompt without ids"
    draws = range(len(prompts)) if draws is None else draws
    model, config = bare(model), model.config
    first_kept(0, config.block_size, options.keep_head)  # raises where the option does not fit the model
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    row_bytes = 2 * config.n_layer * config.kv_heads * config.block_size * config.head_size * dtype.itemsize
    size = batch_size or max(1, CACHE_BYTES // row_bytes)
    for first in range(0, len(prompts), size):
        samples = range(first, min(first + size, len(prompts)))
        texts = {sample: list(prompts[sample]) for sample in samples}
        rows = {
            ids: row for row, ids in enumerate(dict.fromkeys(map(tuple, texts.values())))
        }  # equal prompts are read once
        cache = KVCache(config, len(rows), device, dtype)
        _read(model, cache, list(range(len(rows))), list(rows), options.keep_head)
        cache.keep([rows[tuple(ids)] for ids in texts.values()])
        yield from _continue(model, cache, texts, options, seed, draws, leaving)


@torch.inference_mode()
def _read(model: GPT, cache: KVCache, rows: list[int], texts: Sequence[Sequence[int]], keep_head: int) -> None:
    """Fills rows of the cache with the visible ids of their texts, all but the newest, which decode reads."""
    device = model.embed.weight.device
    windows = [visible(ids, model.config.block_size, keep_head)[:-1] for ids in texts]
    longest = max(map(len, windows))
    where, lengths = torch.tensor(rows, device=device), torch.tensor([len(window) for window in windows], device=device)
    if longest > 0:
        padded = torch.tensor(
            [window + [0] * (longest - len(window)) for window in windows], device=device
        )  # (R, longest)
        with _threads_for(padded.numel(), model):
            model.prefill(
                padded, lengths.clamp(min=1), cache, where
            )  # it takes no empty row; the next line makes it empty again
    cache.restart(where, lengths, cache.starts[where])


def _continue(
    model: GPT,
    cache: KVCache,
    texts: dict[int, list[int]],
    options: SamplingOptions,
    seed: int,
    draws: Sequence[int],
    leaving: Set[int],
) -> Iterator[Event]:
    """Draws tokens until every text, keyed by its sample, has ended. Row r of the cache belongs to the sample live[r]."""
    block_size, keep_head, eos_id = model.config.block_size, options.keep_head, model.config.eos_id
    decode = decoder_for(model)
    live, penalties = list(texts), None
    if Penalties.needed(options):
        penalties = Penalties(list(texts.values()), model.config.vocab_size, options, model.embed.weight.device)

    def keep(rows: list[int]) -> None:
        nonlocal live
        if len(rows) < len(live):
            live = [live[row] for row in rows]
            cache.keep(rows)
            if penalties is not None:
                penalties.keep(rows)

    for step in range(options.max_new_tokens):
        keep([row for row, sample in enumerate(live) if sample not in leaving])
        if not live:
            return
        if step > 0:
            lengths = [len(texts[sample]) for sample in live]
            cut = [
                row
                for row, n in enumerate(lengths)
                if first_kept(n, block_size, keep_head) > first_kept(n - 1, block_size, keep_head)
            ]
            if cut:
                _read(model, cache, cut, [texts[live[row]] for row in cut], keep_head)
        newest = torch.tensor([texts[sample][-1] for sample in live], device=model.embed.weight.device)
        uniforms = [uniform(seed, draws[sample], len(texts[sample])) for sample in live]
        with _threads_for(len(live), model):
            own = logits = decode(newest, cache)
            if penalties is not None:
                logits = penalties.apply(logits)
            if step < options.min_new_tokens and eos_id is not None:
                logits = logits.index_fill(1, torch.tensor([eos_id], device=logits.device), -torch.inf)
            drawn = draw(logits, uniforms, options)
            reported = [()] * len(live) if options.logprobs is None else log_probabilities(own, drawn, options.logprobs)
        if penalties is not None:
            penalties.add(drawn)
        going_on = []
        for row, token in enumerate(drawn):
            if options.stop_at_eos and token == eos_id:
                yield Event(live[row], None, END_OF_SEQUENCE)
            else:
                texts[live[row]].append(token)
                going_on.append(row)
                yield Event(live[row], token, None, *reported[row])
        keep(going_on)
    for sample in live:
        if sample not in leaving:
            yield Event(sample, None, LENGTH)


def decoder_for(model: GPT) -> Callable[[Tensor, KVCache], Tensor]:
    """The step from ids (R,) to logits (R, V), as GPT.decode does it: recorded on a GPU, but not for the short samples of a training run,
    which are drawn under autocast and hardly longer than the recording takes."""
    recorded = model.embed.weight.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
    return StaticDecoder(model).decode if recorded else model.decode


@contextmanager
def _threads_for(tokens: int, model: GPT) -> Iterator[None]:
    """One thread while little goes through the model on a CPU, else as many as there are.

    Large matrices are read from memory, which two threads do almost twice as fast. What small ones gain from a second thread is little,
    and on busy cores it is waited for at every operation, which costs far more than the products.
    """
    threads = torch.get_num_threads()
    matrix = model.config.n_embd**2
    if matrix < LARGE_MATRIX and tokens * matrix < SMALL_PRODUCT and model.embed.weight.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
