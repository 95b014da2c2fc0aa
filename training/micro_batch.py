"""How many rows go through the model at once: what is fastest on a CPU, what fits into memory on a GPU. A step's
result is the same up to rounding. Knows the model's size and the device; the rest of a step's rows is accumulated by
train.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from common.hardware import Choice, Hardware
from common.weights import count_parameters
from errors import UserError
from model import GPT, GPTConfig
from training.metrics import log
from training.optim import Optimizer

CPU_TOKENS = 4096
MAX_TOKENS = 65_536  # larger micro-batches are not faster on any GPU
MEMORY_SHARE = 0.9  # of the free memory; the rest is for fragmentation


def choose_micro_batch(
    option: int | Literal["auto"], tokens_per_step: int, config: GPTConfig, hardware: Hardware
) -> Choice:
    """A divisor of the rows of a step; on a GPU the largest useful one, which fit_to_memory may lower. Raises
    UserError."""
    rows, remainder = divmod(tokens_per_step, config.block_size)
    if remainder or rows == 0:
        raise UserError(
            f"tokens_per_step={tokens_per_step} is not a multiple of block_size={config.block_size}; "
            f"use --tokens_per_step={max(1, rows) * config.block_size}"
        )
    if option != "auto":
        if rows % option:
            raise UserError(
                f"micro_batch_size={option} does not divide the {rows} rows of a step "
                f"(tokens_per_step={tokens_per_step} / block_size={config.block_size}); "
                f"use --micro_batch_size={divisor(rows, option)}"
            )
        return Choice(option, {})
    if hardware.device.type == "cuda":
        size = divisor(rows, max(1, MAX_TOKENS // config.block_size))
        return Choice(
            size, {"micro_batch_size": f"at most {MAX_TOKENS:,} tokens, and no more than fit into memory in a trial"}
        )
    size = divisor(rows, max(1, CPU_TOKENS // config.block_size))
    return Choice(
        size, {"micro_batch_size": f"about {CPU_TOKENS:,} tokens, whose activations stay near a CPU's caches"}
    )


def divisor(rows: int, limit: int) -> int:
    """The largest divisor of rows up to `limit`."""
    return next(size for size in range(min(rows, limit), 0, -1) if rows % size == 0)


def fit_micro_batch(size: int, model: GPT, hardware: Hardware) -> int:
    """On CUDA, the largest micro-batch up to `size` that fits into memory beside AdamW's two moments, which the first
    step allocates. Logs a line where it is smaller."""
    if hardware.device.type != "cuda":
        return size
    free = torch.cuda.mem_get_info(hardware.device)[0] - 8 * count_parameters(model)
    fitting = fit_to_memory(size, lambda rows: measure_peak(model, hardware, rows), free)
    torch.cuda.empty_cache()
    if fitting < size:
        log(f"micro-batch {fitting}: the largest that fits into {free / 2**30:.1f} GiB of free device memory")
    return fitting


def fit_to_memory(size: int, peak_bytes: Callable[[int], int], free: int) -> int:
    """The largest divisor of `size` whose peak fits into `free` bytes, extrapolated from the peaks of one row and of
    two.

    Never less than one row: where that does not fit, the first step raises.
    """
    if size == 1:
        return 1
    one = peak_bytes(1)
    if one > MEMORY_SHARE * free / 2:  # two rows might not fit, so they are not tried
        return 1
    per_row = max(1, peak_bytes(2) - one)
    return divisor(size, max(1, 1 + int((MEMORY_SHARE * free - one) / per_row)))


def measure_peak(model: GPT, hardware: Hardware, rows: int) -> int:
    """Peak bytes of CUDA memory in a forward and backward pass of this many rows, gradients included, which are then
    dropped."""
    before = torch.cuda.memory_allocated(hardware.device)
    torch.cuda.reset_peak_memory_stats(hardware.device)
    ids = torch.zeros((rows, model.config.block_size), dtype=torch.int64, device=hardware.device)
    with hardware.autocast():
        loss = model(ids, ids, reduction="sum")
    loss.backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(hardware.device) - before


def reduce_micro_batch(size: int, step: int, optimizer: Optimizer, forced: bool) -> int:
    """The micro-batch after an out-of-memory error: half the rows, or the next smaller divisor. Frees the gradients
    and logs a line.

    Raises UserError where size is 1, or `forced` by the user.
    """
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if size == 1:
        raise UserError("one row does not fit into the device's memory; use a smaller model or a smaller --block_size")
    smaller = divisor(size, size // 2)
    if forced:
        raise UserError(
            f"--micro_batch_size={size} does not fit into the device's memory; "
            f"use --micro_batch_size={smaller}, or auto"
        )
    log(
        f"step {step}: out of memory; micro-batch {size} → {smaller}. "
        "The result may not be bitwise equal to a run that started with this micro-batch"
    )
    return smaller
