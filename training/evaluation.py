"""The loss on the val split: fixed windows that score every target once. Restores the model's mode.

Also what the loss claims: its standard error as an estimate for the text from which the split was drawn, and whether it
has clearly risen since an earlier evaluation, both over clusters (common/clusters.py). Knows no files and no schedule;
the caller acts on the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from common.clusters import DOCUMENT_CLUSTERS, MIN_PARTS, ROUGH, Clusters, block_count
from common.scoring import Scored, Window, cut_windows, score_windows
from errors import UserError
from model import GPT, IGNORED_TARGET
from parallel.processes import rank, stacked, world_size
from parallel.sharding import release_gathered
from training.data import TokenSource
from training.metrics import log

CHUNK = 1 << 16  # tokens that are read at a time
LARGE_RISE = 0.03  # of the best loss: beyond the usual ups and downs between evaluations


class ClusterSums:
    """Adds up the nats of an evaluation by clusters of three kinds, over batches of consecutive windows."""

    def __init__(self, n_tokens: int, block_size: int, eos_id: int) -> None:
        self.n_tokens, self.block_size, self.eos_id = n_tokens, block_size, eos_id
        self.n_windows = -(-(n_tokens - 1) // block_size)
        sizes = DOCUMENT_CLUSTERS, block_count(self.n_windows), MIN_PARTS
        self.documents, self.blocks, self.parts = (np.zeros((2, size)) for size in sizes)
        self.document = 0  # first token of the document that goes on

    def add(self, first: int, x: np.ndarray, losses: np.ndarray, counted: np.ndarray) -> None:
        """first: the position of the first token. x, losses (0 where not counted), counted: (n,) or (B, T)."""
        positions = np.minimum(np.arange(first, first + x.size), self.n_tokens - 2)  # beyond the end nothing counts
        starts = np.maximum.accumulate(np.where(x.ravel() == self.eos_id, positions, self.document))
        self.document = int(starts[-1])
        for sums, places, n_places in (
            (self.documents, starts, self.n_tokens - 1),
            (self.blocks, positions // self.block_size, self.n_windows),
            (self.parts, positions, self.n_tokens - 1),
        ):
            size = sums.shape[1]
            clusters = places * size // n_places
            sums[0] += np.bincount(clusters, losses.ravel(), size)
            sums[1] += np.bincount(clusters, counted.ravel(), size)

    def clusters(self) -> tuple[list[Clusters], list[Clusters]]:
        """By documents and by blocks of windows: those for the standard error, and those that are compared with another
        evaluation. Of few windows parts are compared: their losses depend on the place in the window, but hardly the
        changes of their losses. Nothing for the standard error in a single window, whose parts share their context."""
        documents, blocks, parts = (
            Clusters(nats[counts > 0].tolist(), counts[counts > 0].astype(int).tolist())
            for nats, counts in (self.documents, self.blocks, self.parts)
        )
        whole = [documents] if documents.effective >= 2 else []  # otherwise one document is nearly all of the text
        kinds = [*whole, blocks], [*whole, blocks if self.n_windows >= MIN_PARTS else parts]
        for_error, compared = ([kind for kind in one if len(kind.counts) > 1] for one in kinds)
        return for_error if self.n_windows > 1 else [], compared


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per target; bits_per_byte: all nats, EOS included, / ln 2 / bytes of the targets; clusters, compared:
    see ClusterSums.clusters."""

    loss: float
    bits_per_byte: float
    targets: int
    clusters: list[Clusters]
    compared: list[Clusters]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def standard_error(self) -> float | None:
        """Of the loss, as an estimate for the text from which the split was drawn: the larger one of those by documents
        and by blocks, which are each too small where the other kind is alike. None for a single window."""
        return max((kind.standard_error() for kind in self.clusters), default=None)

    def clear_rise(self, before: list[Clusters]) -> float | None:
        """As in Clusters, over an earlier evaluation with its `compared`. None where it was of another text."""
        return max(map(Clusters.clear_rise, self.compared, before)) if self._is_comparable(before) else None

    def change_error(self, before: list[Clusters]) -> float | None:
        """The same for the standard error of the difference."""
        return max(map(Clusters.change_error, self.compared, before)) if self._is_comparable(before) else None

    def _is_comparable(self, before: list[Clusters]) -> bool:
        return bool(before) and [kind.counts for kind in self.compared] == [kind.counts for kind in before]

    def describe(self) -> str:
        spread = " (one window: no error estimate)"
        if self.clusters:
            widest = max(self.clusters, key=Clusters.standard_error)
            spread = f" ± {widest.standard_error():.4f}" + " (rough)" * (widest.effective < ROUGH)
        return (
            f"val loss {self.loss:.4f}{spread}, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits per byte ({self.targets:,} tokens)"
        )


def evaluate(
    model: GPT,
    split: TokenSource,
    token_bytes: list[bytes],
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    max_tokens: int | None = None,
    rows: int = 16,
    stride: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Scores the val split, at least two tokens, or its first max_tokens tokens, in batches of `rows` windows, or of
    fewer where memory runs out. Returns None once `stop()` is true. token_bytes: the bytes of every token id. stride:
    of the windows, as in common/scoring.py; block_size by default. Raises UserError where no target counts, or one row
    does not fit."""
    T, n_tokens = model.config.block_size, min(max_tokens or len(split), len(split))
    lengths = np.array([len(piece) for piece in token_bytes])
    windows = cut_windows(_chunks(split, n_tokens), T, stride)
    batches = score_together(model, windows, autocast, rows)
    sums, total, n_targets, n_bytes, first = ClusterSums(n_tokens, T, model.eos_id), 0.0, 0, 0, 0
    was_training = model.training
    model.eval()
    try:
        while not (stopped := stop()) and (batch := next(batches, None)) is not None:
            x, y, nats = (np.concatenate(part) for part in zip(*batch, strict=True))
            counted = y != IGNORED_TARGET
            sums.add(first, x, nats, counted)
            total, n_targets, first = total + float(nats.sum()), n_targets + int(counted.sum()), first + len(x)
            n_bytes += int(lengths[y[counted]].sum())
    finally:
        model.train(was_training)
        release_gathered(model)
    if stopped:
        return None
    if n_targets == 0:
        raise UserError(
            "no token of the val split counts as a target: its loss mask covers all of it; correct the mask"
        )
    bits_per_byte = total / math.log(2) / max(1, n_bytes)
    return Evaluation(total / n_targets, bits_per_byte, n_targets, *sums.clusters())


def score_together(
    model: GPT, windows: Iterator[Window], autocast: Callable[[], AbstractContextManager[object]], rows: int
) -> Iterator[list[Scored]]:
    """score_windows, whose windows are divided over the processes: each scores `rows` of them in turn, and all get the
    nats of all. So every process makes as many forward passes, as a sharded model needs, and adds up the same numbers
    in the same order as one process would."""
    if world_size() == 1:
        yield from score_windows(model, windows, autocast=autocast, rows=rows, log=log)
        return
    while group := [*islice(windows, rows * world_size())]:
        own = group[rank() * rows : (rank() + 1) * rows] or group[:1]  # a process that has none does one for nothing
        nats = np.zeros((rows, model.config.block_size))
        found = chain.from_iterable(score_windows(model, own, autocast=autocast, rows=rows, log=log))
        for row, scored in zip(nats, found, strict=False):
            row[: len(scored.nats)] = scored.nats
        everyone = stacked(nats).reshape(-1, model.config.block_size)
        yield [
            Scored(inputs[context:], targets[context:], row[: len(inputs) - context])
            for (inputs, targets, context), row in zip(group, everyone, strict=False)
        ]


def _chunks(split: TokenSource, n_tokens: int) -> Iterator[np.ndarray]:
    """The first n_tokens tokens, as cut_windows takes them."""
    for start in range(0, n_tokens, CHUNK):
        count = min(CHUNK, n_tokens - start)
        ids, counted = split.read(start, count).astype(np.int64), split.mask(start, count)
        yield np.stack((ids, ids if counted is None else np.where(counted, ids, IGNORED_TARGET)))


def overfitting_warning(history: Sequence[Mapping[str, Any]]) -> str | None:
    """One line where val loss has clearly risen while train loss fell; None otherwise. history: an entry {step,
    val_loss, train_loss, standard_error, clear_rise} per evaluation; clear_rise as in Clusters, over the best one
    before it. train_loss is None before the first step of pretrained weights; the one after it stands for it.

    Returned once. A rise must show at two evaluations in a row, or be large, since the loss of a model also goes
    up and down while it learns.
    """
    if len(history) < 2:
        return None
    best, last = min(history[:-1], key=lambda entry: entry["val_loss"]), history[-1]
    first = history.index(best) + 1
    best_train_loss = history[first]["train_loss"] if best["train_loss"] is None else best["train_loss"]
    rises, alarms = [0.0], []  # of the evaluations after the best one; 0 where not clear
    for end, entry in enumerate(history[first:], first + 1):
        rise, clear = entry["val_loss"] - best["val_loss"], entry.get("clear_rise")
        if clear is None:  # the best evaluation was another version's, or of another text
            clear = math.inf if entry["standard_error"] is None else 2 * entry["standard_error"]
        clear = math.hypot(clear, 3 * fluctuation([entry["val_loss"] for entry in history[:end]]))
        rises.append(rise if rise > clear and entry["train_loss"] < best_train_loss else 0.0)
        is_large = rises[-1] > max(LARGE_RISE * best["val_loss"], 2 * clear)
        alarms.append(is_large or min(rises[-2:]) > 0)
    *before, now = alarms
    if any(before) or not now:
        return None
    return (
        f"val loss has risen from {best['val_loss']:.4f} (step {best['step']:.0f}) to {last['val_loss']:.4f} while "
        f"train loss falls: the model memorizes its text; "
        f"the checkpoint of step {best['step']:.0f} was best and is kept"
    )


def fluctuation(losses: Sequence[float]) -> float:
    """Standard deviation of independent ups and downs around a convex curve, which a val loss follows: of their second
    differences, of standard deviation sqrt(6), the mean negative part is 0.977."""
    second = np.diff(losses, 2)
    return float(np.maximum(0, -second).mean()) / 0.977 if len(second) else 0.0
