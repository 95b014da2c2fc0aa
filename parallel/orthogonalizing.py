"""Muon's orthogonalization, divided over the processes: each does it for some matrices, and hands the results on.

Where every process has whole matrices (ddp), the results are gathered. Where each has its rows of all matrices (fsdp),
one exchange gives each process all rows of its matrices, and another one returns the rows of the results (as Liu et al.
2025, "Muon is scalable", 2.3, with an all-to-all in place of a gather). hsdp gathers across machines what each machine
has exchanged within.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.processes import world_size

Orthogonalize = Callable[[list[Tensor]], list[Tensor]]


class Divided:
    """`orthogonalize`, matrices (R, C) → matrices of one dtype, for the updates of `parameters`, or this process's rows
    of them where the parameters are DTensors. All processes have to call it. Where there is one, or in a process that
    does not train with the others (alone), it is orthogonalize."""

    def __init__(self, parameters: Sequence[Tensor], alone: bool = False) -> None:
        self.is_divided = world_size() > 1 and not alone
        self.sizes = [(parameter.shape[0], parameter.shape[1]) for parameter in parameters]
        mesh: Any = getattr(parameters[0], "device_mesh", None)
        self.across: Any = dist.group.WORLD
        self.within: Any = None
        if mesh is not None:
            self.across = mesh.get_group(0) if mesh.ndim == 2 else None
            self.within = mesh.get_group(mesh.ndim - 1)

    def __call__(self, orthogonalize: Orthogonalize, updates: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not self.is_divided:
            return orthogonalize(updates)
        numbers = [*range(len(updates))]
        if self.across is None:
            return self._exchange(orthogonalize, updates, numbers, dtype)
        return self._gather(orthogonalize, updates, numbers, dtype)

    def _gather(
        self, orthogonalize: Orthogonalize, updates: list[Tensor], numbers: list[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """Each process of `across` does some of the matrices; all get all results."""
        rank, size = dist.get_rank(self.across), dist.get_world_size(self.across)
        owners = assign(tuple(self.sizes[number] for number in numbers), size)
        own = [number for number, owner in zip(numbers, owners, strict=True) if owner == rank]
        some = [updates[number] for number in own]
        done = orthogonalize(some) if self.within is None else self._exchange(orthogonalize, some, own, dtype)
        counts = [0] * size
        for number, owner in zip(numbers, owners, strict=True):
            counts[owner] += updates[number].numel()
        flat = updates[0].new_zeros(max(counts), dtype=dtype)
        if done:
            flat[: counts[rank]] = torch.cat([matrix.flatten() for matrix in done])
        everyone = [torch.empty_like(flat) for _ in range(size)]
        dist.all_gather(everyone, flat, group=self.across)
        results, used = [], [0] * size
        for number, owner in zip(numbers, owners, strict=True):
            count = updates[number].numel()
            part = everyone[owner][used[owner] : used[owner] + count]
            used[owner] += count
            results.append(part.view(updates[number].shape))
        return results

    def _exchange(
        self, orthogonalize: Orthogonalize, updates: list[Tensor], numbers: list[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """updates: this process's rows. Each process of `within` gets all rows of some matrices, and returns the rows
        of the results."""
        rank, size = dist.get_rank(self.within), dist.get_world_size(self.within)
        sizes = tuple(self.sizes[number] for number in numbers)
        theirs: list[list[int]] = [[] for _ in range(size)]
        for i, owner in enumerate(assign(sizes, size)):
            theirs[owner].append(i)
        rows = [split_rows(sizes[i][0], size) for i in theirs[rank]]  # of each process, in each of its own matrices
        sent = [[updates[i].to(dtype).flatten() for i in some] for some in theirs]
        shares = [[(n[other], sizes[i][1]) for n, i in zip(rows, theirs[rank], strict=True)] for other in range(size)]
        received = self._all_to_all(sent, shares, updates, dtype)
        done = orthogonalize([torch.cat(parts) for parts in zip(*received, strict=True)])
        parts = [matrix.split(n) for matrix, n in zip(done, rows, strict=True)]
        back = [[part[other].flatten() for part in parts] for other in range(size)]
        returned = self._all_to_all(back, [[tuple(updates[i].shape) for i in one] for one in theirs], updates, dtype)
        results = dict[int, Tensor]()
        for other, some in enumerate(theirs):
            results.update(zip(some, returned[other], strict=True))
        return [results[i] for i in range(len(updates))]

    def _all_to_all(
        self, sent: list[list[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], like: list[Tensor],
        dtype: torch.dtype,
    ) -> list[list[Tensor]]:  # fmt: skip
        """sent: flat tensors for each process; shapes: of those that come from each → these."""
        empty = torch.empty(0, dtype=dtype, device=like[0].device if like else "cpu")
        flat = torch.cat([empty, *(tensor for some in sent for tensor in some)])
        counts = [[rows * columns for rows, columns in some] for some in shapes]
        got = empty.new_empty(sum(map(sum, counts)))
        dist.all_to_all_single(
            got, flat, [*map(sum, counts)], [sum(map(len, some)) for some in sent], group=self.within
        )
        pieces = got.split([count for some in counts for count in some])
        found, k = [], 0
        for some in shapes:
            found.append([piece.view(shape) for piece, shape in zip(pieces[k : k + len(some)], some, strict=True)])
            k += len(some)
        return found


@cache
def assign(sizes: tuple[tuple[int, int], ...], processes: int) -> list[int]:
    """The process of each matrix (R, C): the most costly ones first, each to the process with the least work."""
    work, owners = [0] * processes, [0] * len(sizes)
    costs = [min(size) ** 2 * max(size) for size in sizes]
    for number in sorted(range(len(sizes)), key=lambda number: -costs[number]):
        owners[number] = work.index(min(work))
        work[owners[number]] += costs[number]
    return owners


def split_rows(rows: int, processes: int) -> list[int]:
    """How many rows of a matrix each process has, as torch.chunk divides them."""
    chunk = -(-rows // processes)
    return [max(0, min(chunk, rows - number * chunk)) for number in range(processes)]
