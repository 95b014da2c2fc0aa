"""How many rows go through the model at once: as many as pay on a CPU, as many as fit on a GPU. A step computes the same in any case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from common.hardware import Choice, Hardware
from errors import UserError
from model import GPT, GPTConfig

CPU_TOKENS = 4096
MOST_TOKENS = 65_536  # more at once make no GPU faster
MEMORY_SHARE = 0.9  # of what is free; fragments take the rest


def choose_micro_batch(
    option: int | Literal["auto"], tokens_per_step: int, config: GPTConfig, hardware: Hardware
) -> Choice:
    """A divisor of the rows of a step, on a GPU the most that pays, which fit_to_memory lowers. Raises UserError where there is none."""
    rows, rest = divmod(tokens_per_step, config.block_size)
    if rest or rows == 0:
        raise UserError(
            f"tokens_per_step={tokens_per_step} is not a multiple of block_size={config.block_size}; take --tokens_per_step="
            f"{max(1, rows) * config.block_size}"
        )
    if option != "auto":
        if rows % option:
            raise UserError(
                f"micro_batch_size={option} does not divide the {rows} rows of a step (tokens_per_step={tokens_per_step} / "
                f"block_size={config.block_size}); take --micro_batch_size={divisor(rows, option)}"
            )
        return Choice(option, {})
    if hardware.device.type == "cuda":
        size = divisor(rows, max(1, MOST_TOKENS // config.block_size))
        return Choice(
            size, {"micro_batch_size": f"at most {MOST_TOKENS:,} tokens, and what a trial shows to fit into memory"}
        )
    size = divisor(rows, max(1, CPU_TOKENS // config.block_size))
    return Choice(
        size, {"micro_batch_size": f"about {CPU_TOKENS:,} tokens, whose activations stay near a CPU's caches"}
    )


def divisor(rows: int, most: int) -> int:
    """The largest divisor of rows up to `most`."""
    return next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)


def fit_to_memory(size: int, peak_bytes: Callable[[int], int], free: int) -> int:
    """The largest divisor of `size` whose peak fits into `free` bytes, judging by the peaks of one row and of two: memory grows by the row.

    One row always remains: where it does not fit, the first step says so.
    """
    if size == 1:
        return 1
    one = peak_bytes(1)
    if one > MEMORY_SHARE * free / 2:  # two might not fit, and need not be tried
        return 1
    a_row = max(1, peak_bytes(2) - one)
    return divisor(size, max(1, 1 + int((MEMORY_SHARE * free - one) / a_row)))


def measure_peak(model: GPT, hardware: Hardware, rows: int) -> int:
    """Bytes of CUDA memory that a forward and backward pass of so many rows takes at its peak, gradients included; they are dropped."""
    before = torch.cuda.memory_allocated(hardware.device)
    torch.cuda.reset_peak_memory_stats(hardware.device)
    ids = torch.zeros((rows, model.config.block_size), dtype=torch.int64, device=hardware.device)
    with hardware.autocast():
        loss = model(ids, ids, reduction="sum")
    loss.backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(hardware.device) - before
