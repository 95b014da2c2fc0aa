"""Which tokens the model sees in which order: a pure function of (seed, sample number), so a run's only state is one integer.

The train split is cut into windows of T tokens on a grid. Every epoch shifts the grid by a phase and visits its windows in an
order of its own, each exactly once; phase and order come from hashes of (seed, epoch), so nothing is stored or shuffled.
Reads (B, T) rows from prepare_data's Split; knows neither devices nor models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from model import IGNORED_TARGET


class TokenSource(Protocol):
    """What this module asks of a split: prepare_data.shards.Split has it."""

    def __len__(self) -> int: ...
    def read(self, start: int, count: int) -> np.ndarray: ...
    def mask(self, start: int, count: int) -> np.ndarray | None: ...


def keyed_integer(*key: object, bits: int = 64) -> int:
    """A uniform integer of `bits` bits that depends on the key alone, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=bits // 8).digest()
    return int.from_bytes(digest, "little")


def keyed_permutation(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """The places that a keyed bijection of range(size) sends `index` to.

    A four-round Feistel network over the next even number of bits; results outside the range go through it again until they
    fall inside (cycle walking, Black and Rogaway 2002), four passes at most on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    round_keys = [np.uint64(keyed_integer(key, number)) for number in range(4)]
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        out[outside] = (left << half) | right
        outside = out >= size
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class TrainWindows:
    """The order of the train split. Sample number n is window order(n mod W) of epoch n // W, W windows an epoch."""

    n_tokens: int
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_tokens < self.block_size + 1:
            raise UserError(
                f"the train split holds {self.n_tokens} tokens, fewer than one window of block_size + 1 = {self.block_size + 1}; "
                f"lower --block_size to at most {max(1, self.n_tokens - 1)} or train on more text"
            )

    @property
    def per_epoch(self) -> int:
        return max(1, (self.n_tokens - self.block_size) // self.block_size)

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where the windows of samples first … first + count − 1 start, (count,) int64."""
        numbers = np.arange(first, first + count)
        epochs = numbers // self.per_epoch
        starts = np.empty(count, dtype=np.int64)
        phases = (
            self.n_tokens - self.per_epoch * self.block_size
        )  # at the last one the last window ends with the last token
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            phase = keyed_integer(self.seed, "phase", int(epoch)) % phases
            key = keyed_integer(self.seed, "order", int(epoch))
            starts[chosen] = phase + self.block_size * keyed_permutation(
                numbers[chosen] % self.per_epoch, self.per_epoch, key
            )
        return starts


def read_windows(split: TokenSource, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """x, y of shape (len(starts), T) int64: y is x one token later, IGNORED_TARGET where a loss mask or the split's end says so."""
    B, T = len(starts), block_size
    x, y = np.zeros((B, T), dtype=np.int64), np.full((B, T), IGNORED_TARGET, dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        count = min(T, len(split) - 1 - start)
        ids = split.read(start, count + 1)
        x[row, :count], y[row, :count] = ids[:-1], ids[1:]
        counted = split.mask(start + 1, count)
        if counted is not None:
            y[row, :count][~counted] = IGNORED_TARGET
    return torch.from_numpy(x), torch.from_numpy(y)


def val_starts(n_tokens: int, block_size: int, max_tokens: int | None = None) -> np.ndarray:
    """The fixed val grid: windows at 0, T, 2T …, which score every target once, the short last window included."""
    return np.arange(0, min(n_tokens, max_tokens or n_tokens) - 1, block_size)
