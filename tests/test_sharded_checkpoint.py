"""sharded_checkpoint.py: several ranks write one checkpoint, and everything reads it, on any number of ranks; a rank
that fails or is killed loses nothing."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint import Checkpoint, open_checkpoint, open_latest, save_checkpoint
from sharded_checkpoint import Part, save_sharded_checkpoint


class Threads:
    """A team whose ranks are threads. Raises BrokenBarrierError in a rank that others leave waiting."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=10), [None] * size

    def member(self, rank: int) -> "Member":
        return Member(rank, self)


class Member:
    def __init__(self, rank: int, threads: Threads) -> None:
        self.rank, self.size, self.threads = rank, threads.size, threads

    def gather(self, value: Any) -> list[Any]:
        self.threads.values[self.rank] = value
        self.threads.barrier.wait()
        values = [*self.threads.values]
        self.threads.barrier.wait()
        return values


def on_ranks(size: int, action: Callable[[Member], Any]) -> list[Any]:
    """Runs an action on every rank → what each returned, or the exception that it raised."""
    threads, results = Threads(size), [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(threads.member(rank))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            results[rank] = error

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def split(tensors: dict[str, Tensor], rank: int, size: int) -> dict[str, Part]:
    """The rows of a rank, as FSDP has them: the last ranks have fewer, or none."""
    found = {}
    for name, whole in tensors.items():
        count = -(-len(whole) // size) if whole.dim() else 1
        start = min(rank * count, len(whole)) if whole.dim() else 0
        found[name] = Part(whole[start : start + count] if whole.dim() else whole, tuple(whole.shape), start)
    return found


def tensors_of(value: float) -> dict[str, Tensor]:
    """Seven rows over three ranks; fewer rows than ranks; none; no dimension; several dtypes."""
    value = float(value)
    return {
        "wte.weight": torch.arange(28.0).view(7, 4) + value,
        "bias": torch.tensor([value]),
        "nothing": torch.empty(0, 3),
        "flat": torch.empty(5, 0),
        "step": torch.tensor(value),
        "half": (torch.arange(24).view(4, 3, 2) + value).to(torch.bfloat16),
        "counts": torch.arange(3),
    }


def save(run: Path, step: int, member: Member, value: float | None = None, **state: object) -> Path:
    """A rank's part of a checkpoint whose contents follow from `value` (by default the step)."""
    tensors = tensors_of(step if value is None else value)
    moments = {f"{name}/exp_avg": tensor.flip(0) if tensor.dim() else tensor for name, tensor in tensors.items()}
    rest = (
        {"config": {"n_layer": 2}, "tokenizer": {"name": "bytes"}}
        if member.rank == 0
        else {"config": {}, "tokenizer": {}}
    )
    return save_sharded_checkpoint(
        run, step, member,
        model=split(tensors, member.rank, member.size),
        optimizer=split(moments, member.rank, member.size),
        state={"value": step if value is None else value, **state}, **rest,
    )  # fmt: skip


def save_all(run: Path, step: int, size: int = 3, value: float | None = None, **state: object) -> Path:
    results = on_ranks(size, lambda member: save(run, step, member, value, **state))
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert results == [run / f"checkpoints/step-{step:08d}"] * size
    return results[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal bit for bit, in the same order."""
    return [*one] == [*other] and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape and one[name].equal(other[name])
        for name in one
    )


def value_of(opened: Checkpoint) -> float:
    """The value given to save(), after a check of everything in the checkpoint."""
    value, tensors = opened.state["value"], opened.model_tensors()
    expected = tensors_of(value)
    moments = {f"{name}/exp_avg": tensor.flip(0) if tensor.dim() else tensor for name, tensor in expected.items()}
    assert same(tensors, {name: expected[name] for name in tensors})
    assert tensors.keys() == expected.keys()
    read = opened.optimizer_tensors()
    assert same(read, {name: moments[name] for name in read})
    assert read.keys() == moments.keys()
    assert (opened.config, opened.tokenizer) == ({"n_layer": 2}, {"name": "bytes"})
    return value


# ---- Round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_sharded_checkpoint_reads_as_a_whole_one(tmp_path, size):
    path = save_all(tmp_path, 3, size)
    opened = open_checkpoint(path)
    assert value_of(opened) == 3
    assert value_of(open_latest(tmp_path)) == 3
    tensors = tensors_of(3)
    whole = save_checkpoint(
        tmp_path / "whole", 3, model=tensors, config={}, tokenizer={}, optimizer=opened.optimizer_tensors(), state={}
    )
    other = open_checkpoint(whole)
    assert same(other.model_tensors(), opened.model_tensors())
    assert same(other.optimizer_tensors(), opened.optimizer_tensors())
    assert opened.model.header() == other.model.header()
    assert opened.model.weights_entry() == other.model.weights_entry()
    assert sorted(file.name for file in (path / "shards").iterdir()) == [
        f"{rank:05d}.safetensors" for rank in range(min(size, 7))
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 11])
def test_rows_are_read_on_another_number_of_ranks(tmp_path, size):
    tensors = tensors_of(5)
    whole = save_checkpoint(tmp_path / "whole", 5, model=tensors, config={}, tokenizer={}, optimizer=tensors, state={})
    for path in (save_all(tmp_path, 5), whole):
        reader = open_checkpoint(path).reader("model")
        assert reader.layout == {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in reader.layout}
        assert reader.layout.keys() == tensors.keys()
        for rank in range(size):
            for name, part in split(tensors, rank, size).items():
                if part.shape:
                    assert reader.rows(name, part.start, part.start + len(part.tensor)).equal(part.tensor)
        assert reader.rows("step", 0, 1).equal(tensors["step"])
        with pytest.raises(AssertionError):
            reader.rows("wte.weight", 3, 8)
