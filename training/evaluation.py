"""The loss on the val split: fixed windows that score every target once. Restores the model's mode.

Knows no files and no schedule; the caller acts on the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from errors import UserError
from model import GPT, IGNORED_TARGET
from training.data import TokenSource, read_windows, val_starts


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per target; standard_error: of the loss, over windows; bits_per_byte: all nats, EOS included, / ln 2
    / bytes of the targets."""

    loss: float
    standard_error: float
    bits_per_byte: float
    targets: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def describe(self) -> str:
        return (
            f"val loss {self.loss:.4f} ± {self.standard_error:.4f}, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits per byte ({self.targets:,} tokens)"
        )


@torch.no_grad()
def evaluate(
    model: GPT,
    split: TokenSource,
    token_bytes: list[bytes],
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    max_tokens: int | None = None,
    rows: int = 16,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Scores the val split, at least two tokens, or its first max_tokens tokens, in batches of `rows` windows. Returns
    None once `stop()` is true. token_bytes: the bytes of every token id. Raises UserError where no target counts.

    The standard error is that of a ratio (sum of nats / number of targets) over independent windows.
    """
    T = model.config.block_size
    device = next(model.parameters()).device
    byte_count = torch.tensor([len(piece) for piece in token_bytes])
    starts = val_starts(len(split), T, max_tokens)
    nats, counts, n_bytes = [], [], 0
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(starts), rows):
            if stop():
                return None
            x, y = read_windows(split, starts[first : first + rows], T)
            if max_tokens is not None:
                _cut_targets(y, starts[first : first + rows], min(max_tokens, len(split)))
            with autocast():
                losses = model(x.to(device), y.to(device), reduction="none")
            counted = y != IGNORED_TARGET
            nats.append(losses.cpu().double().sum(dim=1))  # on the CPU, since MPS has no float64
            counts.append(counted.sum(dim=1))
            n_bytes += int(byte_count[y[counted]].sum())
    finally:
        model.train(was_training)
    nats_of, count_of = torch.cat(nats).numpy(), torch.cat(counts).numpy()
    total, n_targets = float(nats_of.sum()), int(count_of.sum())
    if n_targets == 0:
        raise UserError(
            "no token of the val split counts as a target: its loss mask covers all of it; correct the mask"
        )
    loss = total / n_targets
    n_windows = len(nats_of)
    spread = float(np.square(nats_of - loss * count_of).sum()) * n_windows / max(1, n_windows - 1)
    return Evaluation(loss, math.sqrt(spread) / n_targets, total / math.log(2) / max(1, n_bytes), n_targets)


def _cut_targets(y: torch.Tensor, starts: np.ndarray, max_tokens: int) -> None:
    """Masks the targets beyond the first max_tokens tokens of the split, in place."""
    columns = torch.arange(y.shape[1])
    y[columns >= (max_tokens - 1 - torch.from_numpy(starts))[:, None]] = IGNORED_TARGET


def overfitting_warning(history: list[dict[str, float]]) -> str | None:
    """One line where val loss has risen while train loss fell; None otherwise. history: an entry {step, val_loss,
    standard_error, train_loss} per evaluation.

    Returned once, at the first evaluation that lies clearly (two standard errors) above the best one.
    """
    if len(history) < 2:
        return None
    *before, last = history
    best = min(before, key=lambda entry: entry["val_loss"])

    def has_risen(entry: dict[str, float]) -> bool:
        margin = 2 * entry["standard_error"]
        return entry["val_loss"] > best["val_loss"] + margin and entry["train_loss"] < best["train_loss"]

    warned_before = any(has_risen(entry) for entry in before if entry["step"] > best["step"])
    if warned_before or not has_risen(last):
        return None
    return (
        f"val loss has risen from {best['val_loss']:.4f} (step {best['step']:.0f}) to {last['val_loss']:.4f} while "
        f"train loss falls: the model memorizes its text; "
        f"the checkpoint of step {best['step']:.0f} was best and is kept"
    )
