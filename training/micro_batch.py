"""How many rows go through the model at once: what is fastest on a CPU, what fits into memory on a GPU. A step's
result is the same up to rounding. Knows the model's size and the device; the rest of a step's rows is accumulated by
train.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch

from common.hardware import Choice, Hardware
from common.memory import ONE_ROW, OutOfMemory, attempt, release_memory
from errors import UserError
from model import GPT, GPTConfig
from parallel.processes import gather, world_size
from training.data import TrainBatches
from training.metrics import log
from training.state import TrainState

T = TypeVar("T")

CPU_TOKENS = 4096
MAX_TOKENS = 65_536  # larger micro-batches are not faster on any GPU
MEMORY_SHARE = 0.9  # of the free memory; the rest is for fragmentation


def choose_micro_batch(
    option: int | Literal["auto"], tokens_per_step: int, config: GPTConfig, hardware: Hardware
) -> Choice:
    """A divisor of this process's rows of a step; on a GPU the largest useful one, which fit_to_memory may lower.
    Raises UserError."""
    rows, remainder = divmod(tokens_per_step, config.block_size)
    if remainder or rows == 0:
        raise UserError(
            f"tokens_per_step={tokens_per_step} is not a multiple of block_size={config.block_size}; "
            f"use --tokens_per_step={max(1, rows) * config.block_size}"
        )
    rows = own_rows(rows, config.block_size)
    if option != "auto":
        if rows % option:
            each = f", {rows} for each of {world_size()} processes" if world_size() > 1 else ""
            raise UserError(
                f"micro_batch_size={option} does not divide the {rows * world_size()} rows of a step{each} "
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


def own_rows(rows: int, block_size: int) -> int:
    """The rows of a step for each process. Raises UserError where they are not equally many."""
    size = world_size()
    if rows % size:
        usable = ", ".join(str(n) for n in range(1, min(rows, size) + 1) if rows % n == 0)
        raise UserError(
            f"the {rows} rows of a step (tokens_per_step={rows * block_size} / block_size={block_size}) cannot be"
            f" divided among {size} processes: start {usable} of them, or a new run with"
            f" --tokens_per_step={max(1, round(rows / size)) * size * block_size}"
        )
    return rows // size


def divisor(rows: int, limit: int) -> int:
    """The largest divisor of rows up to `limit`."""
    return next(size for size in range(min(rows, limit), 0, -1) if rows % size == 0)


def fit_micro_batch(size: int, model: GPT, hardware: Hardware, is_chosen: bool = False) -> int:
    """On CUDA, the largest micro-batch up to `size` that fits into memory beside the weights and the optimizer's
    state, which exist already; `size` where the user or an earlier start has chosen it. Logs a line where it is
    smaller."""
    if is_chosen or hardware.device.type != "cuda":
        return size
    release_memory()
    free = torch.cuda.mem_get_info(hardware.device)[0]
    peak_bytes: Callable[[int], float] = partial(measure_peak, model, hardware)
    if world_size() > 1:  # where one of several runs out of memory, the others wait for it in vain
        free, peak_bytes = min(gather(free)), extrapolated(peak_bytes, size)
    fitting = fit_to_memory(size, peak_bytes, free)
    release_memory()
    if fitting < size:
        log(f"micro-batch {fitting}: the largest that fits into {free / 2**30:.1f} GiB of free device memory")
    return fitting


def extrapolated(peak_bytes: Callable[[int], float], size: int) -> Callable[[int], float]:
    """`peak_bytes` along the straight line through one and two rows, whichever process takes most."""
    one, two = (max(gather(peak_bytes(rows))) for rows in (1, min(2, size)))
    return lambda rows: one + (rows - 1) * (two - one)


def fit_to_memory(size: int, peak_bytes: Callable[[int], float], free: int) -> int:
    """The largest divisor of `size` whose peak fits into `free` bytes. Never less than one row, which is not tried:
    where that does not fit, the first step says so."""
    divisors = (rows for rows in range(size, 1, -1) if size % rows == 0)
    return next((rows for rows in divisors if peak_bytes(rows) <= MEMORY_SHARE * free), 1)


def measure_peak(model: GPT, hardware: Hardware, rows: int) -> float:
    """Peak bytes of CUDA memory in a forward and backward pass of this many rows beside the gradients of another one,
    which are then dropped. Infinite where memory runs out."""
    before = torch.cuda.memory_allocated(hardware.device)
    torch.cuda.reset_peak_memory_stats(hardware.device)

    def two_passes() -> None:
        ids = torch.zeros((rows, model.config.block_size), dtype=torch.int64, device=model.embed.weight.device)
        for _ in range(2):
            with hardware.autocast():
                loss = model(ids, ids, reduction="sum")
            loss.backward()

    try:
        attempt(two_passes)
    except OutOfMemory:
        return math.inf
    finally:
        model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(hardware.device) - before


def until_it_fits(batches: TrainBatches, state: TrainState, forced: bool, action: Callable[[], T]) -> T:
    """The result of `action`, which takes its micro-batches from `batches`. Where memory runs out, what it has left is
    dropped, and it is repeated with fewer rows. forced: the user has chosen their number. Raises UserError."""
    while True:
        try:
            return attempt(action)
        except OutOfMemory:
            if world_size() > 1:
                smaller = divisor(batches.size, max(1, batches.size // 2))
                raise UserError(f"{ONE_ROW if batches.size == 1 else out_of_step(batches.size, smaller)}") from None
            state.discard_update()
        batches.size = reduce_micro_batch(batches.size, state.step, forced)


def out_of_step(size: int, smaller: int) -> str:
    """The error of one of several processes, which cannot repeat a step alone."""
    return (
        f"out of memory in a micro-batch of {size} rows; resume the run with --micro_batch_size={smaller}, or with"
        " --parallel=fsdp or --activation_checkpointing=true, which take less memory"
    )


def reduce_micro_batch(size: int, step: int, forced: bool) -> int:
    """The micro-batch after an out-of-memory error: half the rows, or the next smaller divisor. Logs a line.

    Raises UserError where size is 1, or `forced` by the user.
    """
    if size == 1:
        raise UserError(ONE_ROW)
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
