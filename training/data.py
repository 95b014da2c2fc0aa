"""Which tokens the model sees in which order: a pure function of (seed, sample number), so its only state is one
integer.

The train split is cut into windows of T tokens on a grid. Each epoch shifts the grid by a phase and visits every
window exactly once, in its own order; phase and order are hashes of (seed, epoch), so no permutation is stored.
Where another text is mixed in (`MixedWindows`), it has an order and epochs of its own. `TrainBatches` reads the windows
of a step as micro-batches, prefetched by one step on a GPU. Reads a Split of prepare_data; knows neither the model nor
the optimizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from model import IGNORED_TARGET
from parallel.processes import rank, world_size
from prepare_data.shard_check import LostShard


@contextmanager
def naming_lost_text(saved: Callable[[], str]) -> Iterator[None]:
    """A context that adds to the error of a text that can no longer be read what `saved()` tells of the run."""
    try:
        yield
    except LostShard as error:
        raise UserError(f"{error}. {saved()}") from None


class TokenSource(Protocol):
    """The interface of prepare_data.shards.Split that is used here."""

    def __len__(self) -> int: ...
    def read(self, start: int, count: int) -> np.ndarray: ...
    def mask(self, start: int, count: int) -> np.ndarray | None: ...


def keyed_integer(*key: object, bits: int = 64) -> int:
    """A uniform integer of `bits` bits that depends on the key alone, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=bits // 8).digest()
    return int.from_bytes(digest, "little")


def keyed_permutation(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps `index` by a keyed bijection of range(size).

    A four-round Feistel network over the next even number of bits; results outside the range are mapped again until
    they fall inside (cycle walking, Black and Rogaway 2002), at most four passes on average.
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
    """splitmix64's finalizer: every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class TrainWindows:
    """The order of the train split. Sample n is window order(n mod W) of epoch n // W, with W windows per epoch."""

    n_tokens: int
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_tokens < self.block_size + 1:
            raise UserError(
                f"the train split holds {self.n_tokens} tokens, fewer than a window of block_size + 1 = "
                f"{self.block_size + 1}; lower --block_size to "
                f"at most {max(1, self.n_tokens - 1)} or train on more text"
            )

    @property
    def per_epoch(self) -> int:
        return max(1, (self.n_tokens - self.block_size) // self.block_size)

    def starts(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: the first token of the windows of samples first … first + count − 1."""
        numbers = np.arange(first, first + count)
        epochs = numbers // self.per_epoch
        starts = np.empty(count, dtype=np.int64)
        phases = self.n_tokens - self.per_epoch * self.block_size  # with the last, the last window ends the split
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            phase = keyed_integer(self.seed, "phase", int(epoch)) % phases
            key = keyed_integer(self.seed, "order", int(epoch))
            places = keyed_permutation(numbers[chosen] % self.per_epoch, self.per_epoch, key)
            starts[chosen] = phase + self.block_size * places
        return starts


class JoinedSplits:
    """Several splits, read as one: a TokenSource."""

    def __init__(self, splits: Sequence[TokenSource]) -> None:
        self.splits, self.ends = splits, np.cumsum([len(split) for split in splits]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        return np.concatenate([split.read(*part) for split, *part in self._parts(start, count)])

    def mask(self, start: int, count: int) -> np.ndarray | None:
        parts = [(split.mask(*part), part[1]) for split, *part in self._parts(start, count)]
        if all(mask is None for mask, _ in parts):
            return None
        return np.concatenate([np.ones(n, dtype=bool) if mask is None else mask for mask, n in parts])

    def _parts(self, start: int, count: int) -> Iterator[tuple[TokenSource, int, int]]:
        """The parts of [start, start + count): a split, the first token in it, their number."""
        for split, end in zip(self.splits, self.ends, strict=True):
            first = max(0, start - (end - len(split)))
            n = min(start + count, end) - max(start, end - len(split))
            if n > 0:
                yield split, first, n


class MixedWindows:
    """The samples of a run that reads two texts, `share` of them from the second one, evenly spread.

    Sample n is of the second text where floor(share · n) grows with the next sample; the numbers of either text count
    its own samples, so that each is visited in the order of TrainWindows, epoch by epoch. A share of 0 is that of one
    text.
    """

    def __init__(self, split: TokenSource, other: TokenSource | None, share: float, block_size: int, seed: int) -> None:
        self.share, self.block_size, self.seed = share if other is not None else 0.0, block_size, seed
        splits = [split] if other is None else [split, other]
        self.texts = [(split, TrainWindows(len(split), block_size, seed)) for split in splits]

    def before(self, number: int) -> list[int]:
        """How many of the samples before sample `number` are of each text."""
        second = int(self.share * number)
        return [number - second, second][: len(self.texts)]

    def epochs(self, number: int) -> list[float]:
        """How often the samples before sample `number` have read each text."""
        return [n / windows.per_epoch for n, (_, windows) in zip(self.before(number), self.texts, strict=True)]

    def read(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """x, y (count, T) of samples first … first + count − 1, as in read_windows."""
        numbers = np.arange(first, first + count)
        is_second = np.floor(self.share * (numbers + 1)) > np.floor(self.share * numbers)
        x, y = torch.empty((2, count, self.block_size), dtype=torch.int64)
        chosen_rows = (~is_second, is_second)
        for (split, windows), begin, chosen in zip(self.texts, self.before(first), chosen_rows, strict=False):
            rows = torch.from_numpy(chosen)
            x[rows], y[rows] = read_windows(split, windows.starts(begin, int(chosen.sum())), self.block_size)
        return x, y


def read_windows(split: TokenSource, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """x, y of shape (len(starts), T) int64: y is x one token later, IGNORED_TARGET where a loss mask excludes the
    target or the split has ended."""
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


class MicroBatch(NamedTuple):
    """Rows that go through the model at once: x and y (B, T) int64 on the CPU. dropout_seed: for torch's generator,
    None without dropout."""

    x: Tensor
    y: Tensor
    dropout_seed: int | None

    @property
    def n_targets(self) -> int:
        """Number of targets that count in the loss."""
        return int((self.y != IGNORED_TARGET).sum())


class TrainBatches:
    """The micro-batches of each step: `batches(step)`. Each has `size` rows of the step's `rows`; size may be changed
    to another divisor. other, share: a second text, as in MixedWindows. Of several processes each has the next
    `own_rows` of a step.

    On a GPU the batches are in pinned memory, and those of the next step are read on a thread while the device
    computes.
    """

    def __init__(
        self,
        split: TokenSource,
        block_size: int,
        rows: int,
        size: int,
        seed: int,
        device: torch.device,
        dropout: bool,
        other: TokenSource | None = None,
        share: float = 0.0,
    ) -> None:
        self.windows = MixedWindows(split, other, share, block_size, seed)
        self.rows, self.own_rows, self.size, self.dropout = rows, rows // world_size(), size, dropout
        self.pinned = device.type == "cuda"
        self.reader = None if device.type == "cpu" else ThreadPoolExecutor(1, thread_name_prefix="batches")
        # (step, size) and its batches: those returned last, and the following ones
        self.current: tuple[tuple[int, int], list[MicroBatch]] | None = None
        self.prefetched: tuple[tuple[int, int], Future[list[MicroBatch]]] | None = None

    def __call__(self, step: int) -> list[MicroBatch]:
        """The micro-batches of update number `step` (from 0)."""
        wanted, prefetched = (step, self.size), self.prefetched
        if self.current is not None and self.current[0] == wanted:
            return self.current[1]
        self.current = None
        batches = prefetched[1].result() if prefetched is not None and prefetched[0] == wanted else self._read(*wanted)
        if self.reader is not None:
            following = (step + 1, self.size)
            self.prefetched = following, self.reader.submit(self._read, *following)
        self.current = wanted, batches
        return batches

    def _read(self, step: int, size: int) -> list[MicroBatch]:
        batches = []
        begin = step * self.rows + rank() * self.own_rows
        for first in range(begin, begin + self.own_rows, size):
            x, y = self.windows.read(first, size)
            if self.pinned:
                x, y = x.pin_memory(), y.pin_memory()
            seed = keyed_integer(self.windows.seed, "dropout", first, bits=32) if self.dropout else None
            batches.append(MicroBatch(x, y, seed))
        return batches
