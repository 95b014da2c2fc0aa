"""The samples that are generated together: which row of the cache each has, and one step for all of them.

`launch` queues a step and the copy of its ids to the host; the ids themselves stay on the device and are the input of
the next step. A GPU is thus given step t + 1 before Python has seen the ids of step t, and never waits for Python. Row
numbers change when samples leave, so every step remembers its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from generation.cuda_graphs import GraphDecoder
from generation.options import SamplingOptions
from generation.sampling import (
    LogProbability,
    Penalties,
    by_row,
    check_drawn,
    draw,
    draws_on_host,
    top_log_probs,
    uniform,
)
from generation.transfer import Readback, is_gpu, to_device
from model import GPT, KVCache, widened

CHUNK = 16  # steps whose uniform numbers are sent to the device together


class PlainDecoder:
    """GPT.decode for a batch, with the methods of GraphDecoder: nothing is recorded, and no row is idle. longest: ids
    that a row will hold at most; a cache of the whole context would take gigabytes in models of a long one."""

    def __init__(self, model: GPT, device: torch.device, dtype: torch.dtype, longest: int) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.config = replace(model.config, block_size=max(1, min(longest, model.config.block_size)))
        self.look_ahead = 1 if is_gpu(device) else 0

    def rows_for(self, samples: int) -> int:
        return samples

    def new_cache(self, samples: int) -> KVCache:
        return KVCache(self.config, samples, self.device, self.dtype)

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        return widened(self.model.decode(ids, cache))


class Step(NamedTuple):
    """A step whose ids may not have been computed yet."""

    rows: dict[int, int]  # by sample
    readback: Readback
    vocab_size: int

    def wait(self, samples: Iterable[int]) -> dict[int, tuple[int, LogProbability | tuple[()]]]:
        """By sample: the drawn id, and its log-probabilities if the options ask for them. Raises UserError."""
        drawn, *logprobs = self.readback.wait()
        rows = {sample: self.rows[sample] for sample in samples}
        check_drawn([drawn[row] for row in rows.values()], self.vocab_size)
        found = by_row(*logprobs) if logprobs else [()] * len(drawn)
        return {sample: (drawn[row], found[row]) for sample, row in rows.items()}


class Batch:
    """Rows of the cache and of what belongs to a row: newest id, penalties, uniform numbers.

    texts: sample → its ids so far, of which the last `step` are drawn. draws: entry of each sample for `uniform`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: GraphDecoder | PlainDecoder,
        texts: dict[int, list[int]],
        step: int,
        options: SamplingOptions,
        seed: int,
        draws: Sequence[int],
    ) -> None:
        self.decoder, self.options, self.device = decoder, options, decoder.device
        self.config = config = decoder.model.config
        self.eos = None if config.eos_id is None else to_device([config.eos_id], torch.int64, self.device)
        self.rows = {sample: row for row, sample in enumerate(texts)}
        self.cache = decoder.new_cache(len(texts))
        self.size = len(self.cache.host_lengths)  # rows of a step, idle ones included
        self.newest = self.ids_of_rows([ids[-1] for ids in texts.values()])  # (R,)
        self.penalties = None
        if Penalties.needed(options):
            prompts = [ids[: len(ids) - step] for ids in texts.values()] + [[0]] * (self.size - len(texts))
            self.penalties = Penalties(prompts, config.vocab_size, options, self.device)
            for back in range(step, 0, -1):
                self.penalties.add(self.ids_of_rows([ids[-back] for ids in texts.values()]))
        starts = {sample: len(ids) - step for sample, ids in texts.items()}
        self.uniform_of: Callable[[int, int], float] = lambda sample, at: uniform(
            seed, draws[sample], starts[sample] + at
        )
        self.uniforms, self.first_step = torch.empty(0), step  # (CHUNK, R) float64, of the steps from first_step on
        for row in range(len(texts), self.size):
            self.cache.make_idle(row)

    def ids_of_rows(self, ids: list[int]) -> Tensor:
        """(R,) int64: these, then 0 for the idle rows."""
        return to_device(ids + [0] * (self.size - len(ids)), torch.int64, self.device)

    @torch.inference_mode()
    def launch(self, step: int) -> Step:
        """Queues one step: decoding, the draw, and the copy of its results to the host."""
        decoder, options = self.decoder, self.options
        uniforms = self.uniforms_at(step)
        logits = decoder.decode(self.newest, self.cache)
        banned = self.eos if step < options.min_new_tokens else None
        if isinstance(decoder, GraphDecoder) and self.penalties is None and not draws_on_host(self.device):
            drawn, self.newest = decoder.draw(uniforms, options, ban_eos=banned is not None)
        else:
            changed = logits if self.penalties is None else self.penalties.apply(logits)
            if banned is not None:
                changed = changed.index_fill(1, banned, -torch.inf)
            drawn = draw(changed, uniforms, options)
            self.newest = drawn.clamp(max=self.config.vocab_size - 1)  # a draw that failed must not fail as an index
            if self.penalties is not None:
                self.penalties.add(self.newest)
        results = [drawn]
        if options.logprobs is not None:
            results += top_log_probs(logits, self.newest, options.logprobs)
        return Step(dict(self.rows), Readback(results, self.device), self.config.vocab_size)

    def uniforms_at(self, step: int) -> Tensor:
        """(R,) float64, where the draws are computed. They depend on no drawn id, so those of several steps are sent at
        once."""
        at = step - self.first_step
        if at == len(self.uniforms):
            at, self.first_step = 0, step
            samples = {row: sample for sample, row in self.rows.items()}
            steps = range(step, min(step + CHUNK, self.options.max_new_tokens))
            chunk = [
                [self.uniform_of(samples[row], t) if row in samples else 0.0 for row in range(self.size)] for t in steps
            ]
            device = torch.device("cpu") if draws_on_host(self.device) else self.device
            self.uniforms = to_device(chunk, torch.float64, device)
        return self.uniforms[at]

    @torch.inference_mode()
    def leave(self, samples: Iterable[int]) -> None:
        """Removes samples. If a step needs fewer rows now, those at the end move to the rows that are free."""
        left = [self.rows.pop(sample) for sample in samples if sample in self.rows]
        if not left or not self.rows:
            return
        size = self.decoder.rows_for(len(self.rows))
        if size < self.size:
            free = sorted(set(range(size)) - set(self.rows.values()))
            for sample, row in self.rows.items():
                if row >= size:
                    self.rows[sample] = free.pop(0)
                    self.copy_row(row, self.rows[sample])
            self.narrow(size)
            left = free
        for row in left:
            self.cache.make_idle(row)

    def copy_row(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target)
        self.newest[target].copy_(self.newest[source])
        if len(self.uniforms):
            self.uniforms[:, target].copy_(self.uniforms[:, source])
        if self.penalties is not None:
            self.penalties.copy_row(source, target)

    def narrow(self, size: int) -> None:
        self.size = size
        self.cache.narrow(size)
        self.newest = self.newest[:size]
        if len(self.uniforms):
            self.uniforms = self.uniforms[:, :size]
        if self.penalties is not None:
            self.penalties.narrow(size)
