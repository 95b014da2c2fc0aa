"""Generation on ids: which ids the model sees, and the batched, cached loop that continues prompts. Knows neither text nor files.

`visible` is the rule for sequences longer than block_size, `next_logits` its plain use: one forward pass over the visible ids. `generate`
computes the same with a key/value cache: one token a step while a window grows, and a new reading of the window where it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError
from generation.options import SamplingOptions
from generation.sampling import draw, uniform
from model import GPT, KVCache

END_OF_SEQUENCE, LENGTH = "end of sequence", "length"  # why a sample ends
CACHE_BYTES = 2**30  # keys and values held at once; more samples than fit are generated one batch after the other
SMALL_PRODUCT = 2**21  # multiplications; on two cores a second thread begins to pay at about 3 rows of 768 channels


class Event(NamedTuple):
    """A token of a sample, or its end: one of `token` and `reason` is None."""

    sample: int
    token: int | None
    reason: str | None


def first_kept(n: int, block_size: int, keep_head: int) -> int:
    """Of n ids the model sees the first keep_head and those from here on, at positions 0, 1, …

    All ids up to block_size. Each time they outgrow it, the older half of those behind the head is dropped, so that the window grows again
    token by token. Raises UserError where the head leaves no room.
    """
    if not 0 <= keep_head < block_size:
        raise UserError(f"--keep_head={keep_head} must be less than the model's block_size={block_size}, so that new ids are seen too")
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
    model: GPT, prompts: Sequence[Sequence[int]], options: SamplingOptions, seed: int, batch_size: int | None = None
) -> Iterator[Event]:
    """Continues each prompt (one id at least) as a sample of its own; yields every token as it is drawn, then the sample's end.

    A drawn end-of-sequence is no token of the text where it stops the sample. `batch_size` samples are generated side by side (None: as
    many as CACHE_BYTES hold); the ids depend on neither. The model is in eval mode. Under autocast, enter it around the whole loop.
    """
    assert not model.training
    assert all(prompts), "a prompt without ids"
    config = model.config
    first_kept(0, config.block_size, options.keep_head)  # raises where the option does not fit the model
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    row_bytes = 2 * config.n_layer * config.kv_heads * config.block_size * config.head_size * dtype.itemsize
    size = batch_size or max(1, CACHE_BYTES // row_bytes)
    for first in range(0, len(prompts), size):
        batch = [list(prompt) for prompt in prompts[first : first + size]]
        different = {tuple(prompt): row for row, prompt in enumerate(dict.fromkeys(map(tuple, batch)))}  # equal prompts are read once
        cache = KVCache(config, len(different), device, dtype)
        _read(model, cache, list(range(len(different))), list(different), options.keep_head)
        cache.keep([different[tuple(prompt)] for prompt in batch])
        yield from _continue(model, cache, batch, first, options, seed)


@torch.inference_mode()
def _read(model: GPT, cache: KVCache, rows: list[int], texts: Sequence[Sequence[int]], keep_head: int) -> None:
    """Fills rows of the cache with the visible ids of their texts, all but the newest, which decode reads."""
    device = cache.lengths.device
    windows = [visible(ids, model.config.block_size, keep_head)[:-1] for ids in texts]
    longest = max(map(len, windows))
    where, lengths = torch.tensor(rows, device=device), torch.tensor([len(window) for window in windows], device=device)
    if longest > 0:
        padded = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)  # (R, longest)
        with _threads_for(padded.numel(), model):
            model.prefill(padded, lengths.clamp(min=1), cache, where)  # it takes no empty row; the next line makes it empty again
    cache.restart(where, lengths, cache.starts[where])


def _continue(model: GPT, cache: KVCache, texts: list[list[int]], first: int, options: SamplingOptions, seed: int) -> Iterator[Event]:
    """Draws tokens until every text has ended. Row r of the cache belongs to texts[live[r]], which is sample first + live[r]."""
    block_size, keep_head = model.config.block_size, options.keep_head
    live = list(range(len(texts)))
    for step in range(options.max_new_tokens):
        if step > 0:
            lengths = [len(texts[sample]) for sample in live]
            cut = [row for row, n in enumerate(lengths) if first_kept(n, block_size, keep_head) > first_kept(n - 1, block_size, keep_head)]
            if cut:
                _read(model, cache, cut, [texts[live[row]] for row in cut], keep_head)
        newest = torch.tensor([texts[sample][-1] for sample in live], device=cache.lengths.device)
        uniforms = [uniform(seed, first + sample, len(texts[sample])) for sample in live]
        with _threads_for(len(live), model):
            drawn = draw(model.decode(newest, cache), uniforms, options)
        going_on = []
        for row, token in enumerate(drawn):
            if options.stop_at_eos and token == model.config.eos_id:
                yield Event(first + live[row], None, END_OF_SEQUENCE)
            else:
                texts[live[row]].append(token)
                going_on.append(row)
                yield Event(first + live[row], token, None)
        if not going_on:
            return
        if len(going_on) < len(live):
            cache.keep(going_on)
            live = [live[row] for row in going_on]
    for sample in live:
        yield Event(first + sample, None, LENGTH)


@contextmanager
def _threads_for(tokens: int, model: GPT) -> Iterator[None]:
    """One thread while few tokens go through the model on a CPU, else as many as there are.

    The product of a matrix with one vector waits for memory and runs on one thread in any case, small products gain nothing from a second
    one; but every small operation between them would wait for it, which on busy cores costs far more than the products.
    """
    threads = torch.get_num_threads()
    few = tokens == 1 or tokens * model.config.n_embd**2 < SMALL_PRODUCT
    if few and model.embed.weight.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
