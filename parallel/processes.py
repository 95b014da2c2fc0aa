"""The processes that train one model together, and how they agree.

torchrun starts one per device, tells each its rank in the environment, and launch.py joins them. Rank 0 writes all
files but its share of a sharded checkpoint, and prints. In a process that was started alone rank() is 0, world_size()
is 1, and every function below returns what it was given, so callers need not ask.

All ranks have to call the functions of this file in the same order: each one waits for the others.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(days=2)  # for what one process prepares while the others wait; whoever waits sees its launcher end


def has_group() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if has_group() else 0


def world_size() -> int:
    return dist.get_world_size() if has_group() else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if has_group() else 0


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if has_group() else 1


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def describe_rank(number: int, node: str) -> str:
    return f"rank {number} of {world_size()} on {node}"


def this_rank() -> str:
    """This process, for messages; "" where there is one."""
    return describe_rank(rank(), platform.node()) if world_size() > 1 else ""


def command() -> str:
    """How a command that trains with as many processes begins, for messages; options of a rendezvous are left out."""
    if world_size() == 1:
        return "python train.py"
    nodes, restarts = world_size() // local_world_size(), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    flags = [f"--nnodes={nodes}"] * (nodes > 1) + [f"--nproc-per-node={local_world_size()}"]
    flags += [f"--max-restarts={restarts}"] * (restarts != "0") + ["…"] * (nodes > 1)
    return " ".join(["torchrun", *flags, "-- train.py"])


def wait_at_most(seconds: float) -> None:
    """Sets for how long an operation of all processes waits for the others. All ranks have to call it."""
    if world_size() > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def wait_as_long(groups: Sequence[dist.ProcessGroup]) -> None:
    """Gives groups of some processes the time limit of that of all; PyTorch's default is half an hour."""
    world: Any = dist.group.WORLD
    options = world._get_backend(torch.device("cpu")).options
    if options is None:  # the simulated processes of tests/fake_cluster.py
        return
    limit = options._timeout
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(limit, group)


# ---- The launcher ----------------------------------------------------------------------------------------------------


@cache
def launcher() -> int | None:
    """The process id of the torchrun that has started this process, as of the first call; None where none has."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def is_orphan() -> bool:
    """Whether the launcher has ended: nobody restarts this process, or ends it where another one fails."""
    return launcher() not in (None, os.getppid())


@cache
def launches() -> tuple[str, ...]:
    """The torchrun processes of all machines, by which a restarted process knows what was begun before. They stay the
    same while torchrun starts its processes again, and no two are the same. All ranks make the first call together."""
    number, run_id = launcher(), os.environ.get("TORCHELASTIC_RUN_ID")
    own = None if number is None else f"{run_id} {platform.node()} {number} {_start_time(number)}"
    return tuple(sorted({found for found in gather(own) if found is not None}))


def _start_time(process: int) -> str:
    """In clock ticks since the machine's start; "" where the system does not tell (not Linux)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


# ---- Agreement -------------------------------------------------------------------------------------------------------


def agree(value: T) -> T:
    """The value of rank 0."""
    if world_size() == 1:
        return value
    box = [value if is_first() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group)
    return found


def holders(value: T) -> dict[T, str]:
    """Each value that a rank has, with one rank that has it, for messages: a single one where all agree."""
    return dict(gather((value, this_rank())))


class Team:
    """This process among the others, as checkpoint.py needs it: it knows no torch.distributed."""

    rank = property(lambda self: rank())
    size = property(lambda self: world_size())

    def gather(self, value: Any) -> list[Any]:
        return gather(value)


def by_first(action: Callable[[], T]) -> T:
    """The result of `action`, which rank 0 alone runs. Its UserError is raised by all."""
    result, error = None, None
    if is_first():
        try:
            result = action()
        except UserError as raised:
            error = raised
    result, error = agree((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def first_before_others(action: Callable[[Any], T], tell: Callable[[T], Any]) -> T:
    """The result of `action` in each rank: first rank 0 runs it, then the first process of each other machine, then the
    rest. For files that are made where they are missing, which may take hours. Its argument is what rank 0 tells of its
    own result, None in rank 0. What one raises is raised by all."""
    if world_size() == 1:
        return action(None)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    result: Any = None
    told: Any = None
    for turn in range(3):
        error = None
        if turn == (0 if is_first() else 1 if local_rank() == 0 else 2):
            try:
                result = action(told)
            except UserError as raised:
                error = raised
        news = gather((error, tell(result) if turn == 0 and is_first() and error is None else None), patient)
        if errors := [raised for raised, _ in news if raised is not None]:
            raise error or errors[0]
        told = news[0][1] if turn == 0 else told
    dist.destroy_process_group(patient)
    return result


def any_of(flag: Callable[[], bool]) -> bool:
    """Whether the flag is set in any rank."""
    return flag() if world_size() == 1 else add_up(float(flag()))[0] > 0


def add_up(*numbers: float) -> list[float]:
    """The sum of each number over all ranks, in float64."""
    if world_size() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def stacked(array: np.ndarray) -> np.ndarray:
    """(…) of one dtype and shape in all ranks → (world_size, …)."""
    if world_size() == 1:
        return array[None]
    own = torch.from_numpy(np.ascontiguousarray(array))
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    return torch.stack(everyone).numpy()


def summed(
    gradients: Callable[[Sequence[Any], int | Tensor], Tensor], blame: Callable[[str], None]
) -> Callable[[Sequence[Any], int | Tensor], Tensor]:
    """train.py's calculate_gradients for a step whose micro-batches are divided over the ranks: the number of targets
    and the loss are those of all of them. blame: gets the names of the ranks whose own loss is not finite."""
    if world_size() == 1:
        return gradients

    def calculate(batches: Sequence[Any], n_targets: int | Tensor) -> Tensor:
        own_loss, norm = gradients(batches, max(1, int(add_up(float(n_targets))[0]))).tolist()
        (loss,) = add_up(own_loss)
        names = gather("" if math.isfinite(own_loss) else this_rank()) if not math.isfinite(loss) else []
        blame(", ".join(filter(None, names)))
        return torch.tensor((loss, norm), dtype=torch.float64)

    return calculate
