"""Out of memory: what fails for lack of memory leaves nothing behind, so that less can be tried, or the script ends in
one clear error. Knows no model: the caller decides what less is, and drops what it holds itself (gradients).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from errors import OutOfResources, UserError

T = TypeVar("T")
# Errors that are no torch.OutOfMemoryError: of a driver, of Triton, of torch.compile, which wraps errors, of MPS; of
# CUDA's libraries, for their workspaces; of PyTorch's CPU allocator and its mapped files. A C++ compiler's own are not.
MESSAGE = re.compile(
    r"(CUDA|HIP|MPS).{0,20}out of memory|_ALLOC(ATION)?_FAILED|DefaultCPUAllocator: |mmap.*Cannot allocate memory"
)
ONE_ROW = "one row does not fit into the device's memory; use a smaller model or a smaller --block_size"


class OutOfMemory(OutOfResources):
    """Memory ran out; what the failed action held is free again."""


def attempt(action: Callable[[], T]) -> T:
    """The result of `action`. Raises OutOfMemory where memory runs out.

    It is raised outside the handler of the first error, whose traceback keeps the tensors of all failed frames alive:
    whoever catches OutOfMemory can allocate again."""
    try:
        return action()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if MESSAGE.search(line)), lines[0])
    release_memory()
    raise OutOfMemory(
        f"out of memory ({reason}); use a smaller model (--n_layer, --n_embd) or a smaller --block_size, or end other "
        "programs that use the memory; what is saved of a run stays, and --resume continues it"
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, says that memory ran out, on any device."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or MESSAGE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def release_memory() -> None:
    """Frees what only unreachable objects and caches hold: reference cycles, autocast's copies of the weights, the
    allocator's unused blocks."""
    gc.collect()
    torch.clear_autocast_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory() -> int | None:
    """Bytes of the machine's memory that programs can still get; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def require_memory(needed: float, what: str) -> None:
    """Raises UserError where so many bytes are more than the memory that is free. what: what needs them."""
    available = available_memory()
    if available is not None and available < needed:
        raise UserError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free; end other"
            " programs, or take a smaller model"
        )
