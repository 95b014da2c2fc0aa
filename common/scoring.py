"""The nats of every token of a text: what the val loss and `sample.py --score` have in common.

A text is cut into windows of at most block_size inputs, and each target is scored in the first window that holds it.
The stride is how far the window moves, as in Press et al. 2021 (Shortformer) and in Hugging Face's guide to perplexity.
With stride = block_size windows do not overlap, and the first targets of each have little context. With a smaller one
every target after the first window is predicted from at least block_size − stride + 1 tokens, at block_size / stride
times the cost. Knows neither files nor tokenizers. Reading order: cut_windows, score_windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.memory import ONE_ROW, OutOfMemory, attempt
from errors import UserError
from model import GPT, IGNORED_TARGET
from parallel.sharding import is_sharded


class Window(NamedTuple):
    """inputs, targets: (n,) int64, n ≤ block_size; IGNORED_TARGET where a target does not count. The first `context`
    targets belong to earlier windows."""

    inputs: np.ndarray
    targets: np.ndarray
    context: int


class Scored(NamedTuple):
    """The targets of a window that are scored in it, their inputs and their nats (float64; 0 where a target does not
    count), (n − context,) each."""

    inputs: np.ndarray
    targets: np.ndarray
    nats: np.ndarray


def cut_windows(chunks: Iterable[np.ndarray], block_size: int, stride: int | None = None) -> Iterator[Window]:
    """The windows of a text whose ids come in chunks of any length: (2, n) int64, the ids as inputs and as targets.
    stride: 1 … block_size, which is the default."""
    stride = stride or block_size
    pending, context = np.empty((2, 0), dtype=np.int64), 0
    for chunk in chunks:
        pending = np.concatenate((pending, chunk), axis=1)
        while pending.shape[1] > block_size:
            yield Window(pending[0, :block_size], pending[1, 1 : block_size + 1], context)
            pending, context = pending[:, stride:], block_size - stride
    if pending.shape[1] - 1 > context:
        yield Window(pending[0, :-1], pending[1, 1:], context)


@torch.no_grad()
def score_windows(
    model: GPT,
    windows: Iterable[Window],
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    rows: int = 16,
    log: Callable[[str], None] = print,
) -> Iterator[list[Scored]]:
    """Yields the windows in order, a forward pass at a time: `rows` windows of block_size, or more short ones; fewer
    where memory runs out, which is logged. The model should be in eval mode. Raises UserError if one does not fit."""
    pending, longest = list[Window](), 0
    for window in windows:
        longest = max(longest, len(window.inputs))
        if pending and (len(pending) + 1) * longest > rows * model.config.block_size:
            scored, rows = _score(model, pending, autocast, rows, log)
            yield scored
            pending, longest = [], len(window.inputs)
        pending.append(window)
    if pending:
        yield _score(model, pending, autocast, rows, log)[0]


def _score(
    model: GPT,
    windows: list[Window],
    autocast: Callable[[], AbstractContextManager[object]],
    rows: int,
    log: Callable[[str], None],
) -> tuple[list[Scored], int]:
    """The windows, in as many forward passes as memory requires, and the number of rows that fit."""
    scored, size = list[Scored](), len(windows)
    while len(scored) < len(windows):
        batch = windows[len(scored) : len(scored) + size]
        try:
            losses = attempt(partial(_losses, model, batch, autocast)).numpy()
        except OutOfMemory:
            if size == 1:
                raise UserError(ONE_ROW) from None
            if is_sharded(model):  # of which other processes wait for this very pass
                raise UserError(
                    f"evaluation: out of memory with {size} rows; give --micro_batch_size={size // 2}, or less"
                ) from None
            log(f"evaluation: out of memory; {size} rows at a time → {size // 2}")
            size, rows = size // 2, max(1, min(size, rows) // 2)
            continue
        for (inputs, targets, context), row in zip(batch, losses, strict=True):
            scored.append(Scored(inputs[context:], targets[context:], row[context : len(inputs)]))
    return scored, rows


def _losses(model: GPT, windows: list[Window], autocast: Callable[[], AbstractContextManager[object]]) -> Tensor:
    """(B, T) float64 on the CPU, T of the longest window; 0 where nothing is scored."""
    shape = len(windows), max(len(window.inputs) for window in windows)
    x, y = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED_TARGET, dtype=np.int64)
    for row, (inputs, targets, context) in enumerate(windows):
        x[row, : len(inputs)] = inputs
        y[row, context : len(inputs)] = targets[context:]
    device = next(model.parameters()).device
    with autocast():
        losses = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), reduction="none")
    return losses.cpu().double()  # MPS has no float64
