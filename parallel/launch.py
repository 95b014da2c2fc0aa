"""The start and the end of a process that torchrun has started.

`together` joins the processes, runs train.py's main and leaves. Rank 0 prints; the standard output of the others is
dropped. An error that all have is printed once; one that a single process has names its rank and machine.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from errors import UserError
from parallel.processes import is_first, rank, world_size

FAILED = 2  # exit code of a process that ends with an error


def has_launcher() -> bool:
    """Whether torchrun, or a program with its environment variables, has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def together(action: Callable[[], int], device: str, timeout: float) -> int:
    """The exit code of `action`, run in all processes that torchrun has started, or in this one alone. device: the
    option; timeout: seconds for which an operation waits for the others. Raises UserError."""
    if not has_launcher():
        return action()
    join(device, timeout)
    try:
        code = action()
    except UserError as error:
        fail(error)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        fail(UserError(f"lost contact with another process: {str(error).splitlines()[0][:300]}"))
    dist.destroy_process_group()
    return code


def join(device: str, timeout: float) -> None:
    """Joins the process group: gloo for tensors on the CPU, and NCCL for those on GPUs. Raises UserError."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes could not be joined: {error}; start them with torchrun") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an operation of torch.distributed failed because another process ended or does not answer."""
    words = ("gloo", "Gloo", "NCCL", "Connection", "Timed out", "timed out", "Socket", "DistNetwork", "DistBackend")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def fail(error: UserError) -> NoReturn:
    """Prints the error, once where all processes have the same, and ends this process, without waiting for others."""
    where = "" if is_first() else f"rank {rank()} of {world_size()} on {platform.node()}: "
    print(f"error: {where}{error}", file=sys.stderr, flush=True)
    os._exit(FAILED)
