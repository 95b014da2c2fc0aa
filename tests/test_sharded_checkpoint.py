"""sharded_checkpoint.py: several ranks write one checkpoint, and everything reads it, on any number of ranks; a rank
that fails or is killed loses nothing."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model_folder
import sharded_checkpoint
from checkpoint import (
    Checkpoint,
    SaveFailed,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
    open_latest,
    prune_checkpoints,
    resolve_model_folder,
    save_checkpoint,
    set_later_aside,
)
from errors import UserError
from files import DamagedFile, read_json, size_and_crc
from model_folder import SET_ASIDE, open_model_folder
from sharded_checkpoint import Part, save_sharded_checkpoint
from tensor_files import TensorReader
from tests.conftest import ROOT
from tests.test_checkpoint import (
    CHANGES,
    READS,
    fail_at,
    forge_manifest,
    full_disk,
    needs_fork,
    no_fsync,
    safetensors_file,
    steps,
    watch_syncs,
)

__all__ = ["no_fsync"]  # a fixture


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_and_reading_need_no_second_copy_of_the_tensors(tmp_path):
    """The peak memory of a process that writes tensors of 50 MB twice, and reads them, whole and a few rows."""
    program = """
import sys, torch
from pathlib import Path
from checkpoint import open_checkpoint
from sharded_checkpoint import Part, save_sharded_checkpoint

class Alone:
    rank, size = 0, 1
    def gather(self, value):
        return [value]

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3

def extra(action):
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = memory("VmRSS")
    result = action()
    return memory("VmHWM") - before, result

def save(step, tensors):
    parts = {name: Part(tensor, tuple(tensor.shape), 0) for name, tensor in tensors.items()}
    rest = {"config": {}, "tokenizer": {}, "state": {}}
    return save_sharded_checkpoint(Path(sys.argv[1]), step, Alone(), model=parts, optimizer=parts, **rest)

save(0, {"a": torch.ones(9)})  # loads what is loaded on first use
saving, path = extra(lambda: save(1, {f"t{i}": torch.ones(1250, 1000) for i in range(10)}))
opened = open_checkpoint(path)
rows, _ = extra(lambda: [opened.reader("optimizer").rows(f"t{i}", 7, 9) for i in range(10)])
reading, _ = extra(opened.model_tensors)
print(saving - 50, rows, reading)
"""
    child = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    saving, rows, reading = map(float, child.stdout.split())
    assert saving < 15  # MB
    assert rows < 10
    assert 40 < reading < 65


def test_equal_states_give_equal_files(tmp_path):
    first, second = save_all(tmp_path / "一 run", 3), save_all(tmp_path / "b", 3)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 7
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_team_opens_the_same_checkpoint_and_shares_the_checksums(tmp_path, monkeypatch, capsys):
    save_all(tmp_path, 10)
    damaged = save_all(tmp_path, 20) / "shards/00002.safetensors"
    checked = []
    real = model_folder.size_and_crc
    monkeypatch.setattr(model_folder, "size_and_crc", lambda path: (checked.append(path.name), real(path))[1])
    opened = on_ranks(2, lambda member: open_latest(tmp_path, member))
    assert [checkpoint.step for checkpoint in opened] == [20, 20]
    assert sorted(name for name in checked if name[0] == "0") == [f"0000{n}.safetensors" for n in range(3)]
    flip(damaged, -1)
    failed = on_ranks(4, lambda member: open_checkpoint(damaged.parents[1], member))
    assert {type(error) for error in failed} == {DamagedFile}
    assert len({str(error) for error in failed}) == 1
    assert "00002.safetensors: damaged: its crc32 is" in str(failed[3])
    assert "recorded (found by rank 3)" in str(failed[0])
    capsys.readouterr()
    opened = on_ranks(4, lambda member: open_latest(tmp_path, member))
    assert [value_of(checkpoint) for checkpoint in opened] == [10] * 4
    assert capsys.readouterr().err.count("WARNING: checkpoint skipped") == 1
    errors = on_ranks(3, lambda member: open_latest(tmp_path / "none", member))
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "none does not exist" in str(errors[0])
    assert "found by" not in str(errors[0])
    errors = on_ranks(3, lambda member: open_latest(tmp_path / ("none" if member.rank == 1 else ""), member))
    assert {type(error) for error in errors} == {UserError}
    assert all(re.search(r"none does not exist.* \(found by rank 1\)$", str(error)) for error in errors)


def test_whole_and_sharded_checkpoints_follow_each_other_in_a_run(tmp_path):
    save_all(tmp_path, 10, val_loss=1.0)
    save_checkpoint(tmp_path, 20, model=tensors_of(2), config={}, tokenizer={}, optimizer={}, state={"val_loss": 2.0})
    save_all(tmp_path, 30, size=2, val_loss=3.0)
    set_later_aside(tmp_path, 20)
    save_all(tmp_path, 20, value=5, val_loss=2.0)  # by several ranks
    assert steps(tmp_path) == [SET_ASIDE, "step-00000010", "step-00000020"]
    for name in (
        "step-00000020.writing-0123abcd/shards",
        "step-00000030.writing-0123abcd",
        "step-00000020.writing-mine",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    prune_checkpoints(tmp_path)
    assert steps(tmp_path) == [SET_ASIDE, "step-00000010", "step-00000020", "step-00000020.writing-mine"]
    assert value_of(open_latest(tmp_path)) == 5


def test_paths_into_a_sharded_checkpoint_are_resolved(tmp_path):
    path = save_all(tmp_path, 10)
    for given in (tmp_path, path, path / "model", path / "model/config.json", path / "shards/00001.safetensors"):
        assert resolve_model_folder(given) == path / "model"
    copy = shutil.copytree(path / "model", tmp_path / "a copy")
    for find in (open_model_folder, resolve_model_folder):
        with pytest.raises(UserError, match=r"a copy has no model\.safetensors.* interop export RUN --to=model$"):
            find(copy)


# ---- Damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", ["flip", "cut", "longer", "missing", "swapped", "link"])
def test_a_damaged_shard_is_named(tmp_path, change):
    path = save_all(tmp_path, 10, size=2)
    opened, first, shard = open_checkpoint(path), path / "shards/00000.safetensors", path / "shards/00001.safetensors"
    data = shard.read_bytes()
    if change == "flip":
        flip(shard, -1)
    elif change in ("cut", "longer"):
        shard.write_bytes(data[:-1] if change == "cut" else data + b"\0")
    elif change == "swapped":
        shard.write_bytes(first.read_bytes())
        first.write_bytes(data)
    else:
        shard.rename(tmp_path / "elsewhere")
        if change == "link":
            shard.symlink_to(tmp_path / "elsewhere")
    for read in (opened.model_tensors, opened.optimizer_tensors, lambda: open_checkpoint(path)):
        with pytest.raises(DamagedFile, match=r"0000[01]\.safetensors: .*use another checkpoint"):
            read()


def test_one_flipped_bit_anywhere_in_a_shard_is_found(tmp_path):
    path = save_all(tmp_path, 20)
    for shard in (path / "shards").iterdir():
        for position in range(0, shard.stat().st_size, 41):
            flip(shard, position)
            with pytest.raises(DamagedFile):
                open_checkpoint(path)
            flip(shard, position)
    assert value_of(open_checkpoint(path)) == 20


def test_a_file_that_is_cut_off_while_rows_are_read_is_damage(tmp_path):
    path = save_all(tmp_path, 20)
    reader = open_checkpoint(path).reader("model")
    os.truncate(path / "shards/00000.safetensors", 1000)
    with pytest.raises(DamagedFile, match=r"it ends before byte \d+"):
        [reader.rows(name, 0, 1) for name in ("wte.weight", "half")]


def forge(path: Path, metadata: object, shape: list[int], rank: int = 0, name: str = "model/w") -> None:
    """A shard with float32 zeros of this shape and this metadata, and its entry in the manifest."""
    size = 4 * int(torch.tensor(shape).prod()) if all(0 <= n < 100 for n in shape) else 16
    header: dict[str, Any] = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    if metadata is not None:
        header["__metadata__"] = metadata
    file = path / f"shards/{rank:05d}.safetensors"
    file.write_bytes(safetensors_file(header, bytes(size)))
    files = {key: entry for key, entry in read_json(path / "manifest.json")["files"].items() if key[:6] != "shards"}
    shards = {f"shards/{file.name}": size_and_crc(file) for file in (path / "shards").iterdir()}
    forge_manifest(path, files=files | shards)


def placed(shape: object, start: object, name: str = "model/w") -> dict[str, str]:
    return {name: json.dumps({"shape": shape, "start": start})}


HOSTILE: dict[str, tuple[list[tuple[Any, list[int]]], str]] = {
    "no metadata": ([(None, [4])], "metadata does not name the same tensors"),
    "of another tensor": ([(placed([4], 0, "model/v"), [4])], "metadata does not name the same tensors"),
    "not JSON": ([({"model/w": "{"}, [4])], "its metadata of tensor 'model/w'"),
    "a number": ([({"model/w": "7"}, [4])], "its metadata of tensor"),
    "deep": ([({"model/w": "[" * 1900}, [4])], "its metadata of tensor"),
    "long": ([({"model/w": "[" * 90_000}, [4])], "its metadata of tensor"),
    "a huge number": ([({"model/w": '{"shape": [4], "start": 1' + "0" * 1000 + "}"}, [4])], "its metadata of tensor"),
    "escape": ([({"model/w": "\x1b[31m"}, [4])], "its metadata of tensor"),
    "negative row": ([(placed([4], -1), [4])], "its metadata of tensor"),
    "negative shape": ([(placed([-4], 0), [4])], "its metadata of tensor"),
    "boolean": ([(placed([4], False), [4])], "its metadata of tensor"),
    "fraction": ([(placed([4], 0.0), [4])], "its metadata of tensor"),
    "no shape": ([(placed(None, 0), [4])], "its metadata of tensor"),
    "beyond the end": ([(placed([4], 1), [4])], "its metadata of tensor"),
    "other columns": ([(placed([4, 2], 0), [4, 3])], "its metadata of tensor"),
    "other dimensions": ([(placed([4, 1], 0), [4])], "its metadata of tensor"),
    "gap in front": ([(placed([5], 1), [4])], "rows 0 to 0 of 5 are in no part"),
    "gap between": ([(placed([9], 0), [4]), (placed([9], 5), [4])], "rows 4 to 4 of 9 are in no part"),
    "gap at the end": ([(placed([9], 0), [4]), (placed([9], 4), [4])], "rows 8 to 8 of 9 are in no part"),
    "huge": ([(placed([2**62], 0), [4])], "rows 4 to 4611686018427387903 of .* are in no part"),
    "overlap": ([(placed([7], 0), [4]), (placed([7], 3), [4])], "rows 3 to 3 of 7 are in two parts"),
    "twice": ([(placed([4], 0), [4]), (placed([4], 0), [4])], "rows 0 to 3 of 4 are in two parts"),
    "another shape": ([(placed([8], 0), [4]), (placed([9], 4), [4])], "another dtype or shape than in 00000"),
    "empty but huge": ([(placed([0, 2**62, 2**62], 0), [0, 2**62, 2**62])], "damaged"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_shards_are_refused(tmp_path, attack):
    path = save_all(tmp_path, 10, size=1)
    parts, message = HOSTILE[attack]
    for rank, (metadata, shape) in enumerate(parts):
        forge(path, metadata, shape, rank)
    for read in (
        lambda: open_checkpoint(path).model_tensors(),
        lambda: open_model_folder(path / "model", check_weights=False).model_tensors(),
        lambda: TensorReader(dict.fromkeys((path / "shards").iterdir()), "model/").tensors(),
    ):  # fmt: skip
        with pytest.raises(DamagedFile, match=message) as caught:
            read()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [
    "../x", "shards/../x.safetensors", "/etc/passwd", "shards/x.safetensors", "shards/0000٣.safetensors",
    "shards/1.safetensors", "shards/00001.safetensors\n", "model/model.safetensors", "optimizer.safetensors",
    "shards/" + "0" * 300,
])  # fmt: skip
def test_a_manifest_with_other_files_is_refused(tmp_path, name):
    path = save_all(tmp_path, 10)
    files = read_json(path / "manifest.json")["files"]
    forge_manifest(path, files={**files, name: {"bytes": 1, "crc32": 1}})
    with pytest.raises(DamagedFile, match="and nothing else") as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()


def test_a_manifest_of_very_many_shards_is_refused_at_the_first_that_is_missing(tmp_path):
    path = save_all(tmp_path, 10)
    files = read_json(path / "manifest.json")["files"]
    entry = {"bytes": 1 << 60, "crc32": 1}
    forge_manifest(path, files=files | {f"shards/{n:05d}.safetensors": entry for n in range(20_000)})
    with pytest.raises(
        DamagedFile, match=r"shards/\d{5}\.safetensors: (\d+ bytes, 1152921504606846976|cannot be read)"
    ):
        open_checkpoint(path)


# ---- Failures and kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_cannot_write_is_named_on_all(tmp_path, monkeypatch, rank):
    save_all(tmp_path, 10)
    real = sharded_checkpoint.write_parts

    def write(path: Path, parts: Any) -> dict[str, int]:
        if path.name == f"{rank:05d}.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(sharded_checkpoint, "write_parts", write)
        errors = on_ranks(3, lambda member: save(tmp_path, 20, member))
    assert {type(error) for error in errors} == {SaveFailed}
    expected = rf"step 20 could not be saved in .*checkpoints: rank {rank}: .*No space left on device. The earlier ones"
    assert all(re.search(expected, str(error)) for error in errors)
    assert steps(tmp_path) == ["step-00000010"]
    save_all(tmp_path, 20)
    assert value_of(open_latest(tmp_path)) == 20


def test_ranks_without_a_common_file_system_are_told(tmp_path, monkeypatch):
    real = sharded_checkpoint.write_parts

    def write(path: Path, parts: Any) -> dict[str, int]:
        return real(tmp_path / "rank 1's own" if path.name == "00001.safetensors" else path, parts)

    def elsewhere(member: Member) -> Path:
        return save(tmp_path / ("run" if member.rank < 2 else "other"), 1, member)

    errors = on_ranks(3, elsewhere)
    assert all(
        re.search(r": rank 2: it does not see .*writing-.* all ranks need one file system", str(e)) for e in errors
    )
    monkeypatch.setattr(sharded_checkpoint, "write_parts", write)
    errors = on_ranks(3, lambda member: save(tmp_path / "run", 1, member))
    assert all(re.search(r"rank 1 has written .* rank 0 does not see it", str(error)) for error in errors)
    assert {type(error) for error in errors} == {SaveFailed}
    assert steps(tmp_path / "run") == []


def test_too_little_disk_space_for_all_ranks_raises_before_writing(tmp_path, monkeypatch):
    save_all(tmp_path, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2_500_000))
    errors = on_ranks(3, lambda member: save(tmp_path, 20, member))  # 1 MB of each would fit
    assert {type(error) for error in errors} == {SaveFailed}
    assert "ranks 0, 1, 2: [Errno 28] 3.1 MB are needed and 2.5 MB are free" in str(errors[1])
    assert steps(tmp_path) == ["step-00000010"]


def test_errors_of_the_program_are_raised_on_all_ranks(tmp_path):
    errors = on_ranks(2, lambda member: save(tmp_path, 1, member, val_loss=float("nan")))
    assert [type(error) for error in errors] == [ValueError] * 2
    assert not (tmp_path / "checkpoints").exists()

    def overlapping(member: Member) -> Path:
        part = Part(torch.ones(2), (3,), member.rank * 2 if member.rank == 2 else 0)
        return save_sharded_checkpoint(
            tmp_path, 1, member, model={"w": part}, config={}, tokenizer={}, optimizer={}, state={}
        )

    errors = on_ranks(2, overlapping)
    assert {type(error) for error in errors} == {SaveFailed}
    assert "the parts do not fit together: tensor 'model/w': rows 0 to 1 of 3 are in two parts" in str(errors[0])
    complex_part = {"w": Part(torch.ones(2, dtype=torch.complex64), (2,), 0)}
    errors = on_ranks(2, lambda member: save_sharded_checkpoint(
        tmp_path, 1, member, model=complex_part if member.rank else {}, config={}, tokenizer={}, optimizer={}, state={}
    ))  # fmt: skip
    assert [type(error) for error in errors] == [RuntimeError, KeyError]
    assert "rank 1: KeyError" in str(errors[0])
    assert steps(tmp_path) == []


def test_a_rank_that_outlives_its_attempt_does_not_write_into_the_next_one(tmp_path, monkeypatch):
    real, go_on, stopped = sharded_checkpoint.write_parts, threading.Event(), threading.Event()

    def write(path: Path, parts: Any) -> dict[str, int]:
        if path.name == "00001.safetensors" and not stopped.is_set():
            stopped.set()
            assert go_on.wait(10)
        return real(path, parts)

    monkeypatch.setattr(sharded_checkpoint, "write_parts", write)
    first, errors = Threads(2), []

    def work(rank: int) -> None:
        try:
            save(tmp_path, 10, first.member(rank), 1)
        except (threading.BrokenBarrierError, SaveFailed) as error:
            errors.append(error)

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    assert stopped.wait(10)
    first.barrier.abort()  # rank 0 learns that the attempt has ended; rank 1 goes on writing
    ranks[0].join()
    path = save_all(tmp_path, 10, 2, 2)
    go_on.set()
    ranks[1].join()
    assert len(errors) == 2
    assert value_of(open_checkpoint(path)) == 2
    assert steps(tmp_path) == ["step-00000010"]


class PeerLost(Exception):
    pass


class Process:
    """A rank that is a process: what it gathers passes through the one that started all."""

    def __init__(self, rank: int, size: int, connection: Connection) -> None:
        self.rank, self.size, self.connection = rank, size, connection

    def gather(self, value: Any) -> list[Any]:
        self.connection.send(value)
        values = self.connection.recv()
        if values is None:
            raise PeerLost
        return values


def on_processes(size: int, action: Callable[[Process], int | None]) -> list[int]:
    """Runs an action on every rank, in forked processes → their exit codes; 7 where another one was killed."""
    ends, children = list[Connection](), list[int]()
    for rank in range(size):
        here, there = Pipe()
        child = os.fork()
        if child == 0:
            try:
                code = action(Process(rank, size, there)) or 0  # type: ignore[arg-type]
            except PeerLost:
                code = 7
            except BaseException as error:  # noqa: BLE001 - a child must not return into pytest
                print(f"rank {rank}: {error!r}", file=sys.stderr)
                code = 99
            os._exit(code)
        there.close()
        ends.append(here)  # type: ignore[arg-type]
        children.append(child)
    while any(not end.closed for end in ends):
        values = dict[int, Any]()
        for rank, end in enumerate(ends):
            with suppress(EOFError, OSError):
                values[rank] = end.recv()
        for rank, end in enumerate(ends):
            if rank in values:
                with suppress(OSError):
                    end.send([values[n] for n in range(size)] if len(values) == size else None)
            elif not end.closed:
                end.close()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def base_run(run: Path) -> None:
    """Checkpoints 10 (the best), 20 and 30, and the leftovers of an earlier kill."""
    for step, val_loss in ((10, 1.0), (20, 2.0), (30, 3.0)):
        save_all(run, step, 2, val_loss=val_loss)
    for name in ("step-00000040.writing-0123abcd", "step-00000005.removing"):
        shutil.copytree(run / "checkpoints/step-00000010", run / "checkpoints" / name)


def check_consistent(run: Path) -> float:
    """Asserts that all complete checkpoints are intact and the best exists. Returns the value of the newest one."""
    for path in list_checkpoints(run):
        value_of(open_checkpoint(path))
    assert find_checkpoint(run, "best").name == "step-00000010"
    value = value_of(open_latest(run))
    assert value in (30, 77), value
    return value


@needs_fork
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [40, 30])
def test_a_kill_of_any_rank_at_any_moment_leaves_the_old_or_the_new_state(tmp_path, no_fsync, rank, step):
    """Killed before and after all that changes the disk, rank 1 also at reads. step 40 is new; 30 is saved again."""
    base_run(tmp_path / "base")
    seen = []
    for point in range(step // 10 % 2, 1000, 2):  # every second one, the others with the other step: forking is slow
        run = shutil.copytree(tmp_path / "base", tmp_path / f"run{point}")

        def save_with_kill(member: Process, point=point, run=run) -> None:
            if member.rank == rank:
                fail_at(point, lambda: os._exit(9), sharded_checkpoint, CHANGES if rank == 0 else (*CHANGES, *READS))
            save(run, step, member, 77)

        codes = on_processes(2, save_with_kill)
        seen.append(check_consistent(run))
        if codes == [0, 0]:
            break
        assert codes[rank] == 9
        assert codes[1 - rank] in (0, 7)
        save_all(run, step, 3, 77)  # the run continues, with another number of ranks
        prune_checkpoints(run)
        assert check_consistent(run) == 77
        assert steps(run) == [f"step-000000{n}" for n in ((10, 30, 40) if step == 40 else (10, 20, 30))]
        shutil.rmtree(run)
    assert point >= (30 if rank == 0 else 10), "kill points"
    assert seen == sorted(seen), "the new state must persist once reached"
    assert seen[-1] == 77
    assert seen[0] == 30


@needs_fork
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_any_rank_at_any_moment_is_a_save_failed_of_all(tmp_path, no_fsync, rank):
    base_run(tmp_path / "base")
    failures = 0
    for point in range(0, 1000, 2 - rank):  # of rank 0 every second one: forking is slow
        run = shutil.copytree(tmp_path / "base", tmp_path / f"run{point}")

        def save_with_fault(member: Process, point=point, run=run) -> int:
            raised = []

            def fault() -> None:
                raised.append(True)
                full_disk()

            if member.rank == rank:
                fail_at(point, fault, sharded_checkpoint)
            try:
                save(run, 30, member, 77)
            except SaveFailed as error:
                return 3 if f"rank {rank}: " in str(error) else 5
            return 0 if raised or member.rank != rank else 4

        codes = on_processes(2, save_with_fault)
        assert check_consistent(run) == (30 if codes == [3, 3] else 77)
        if codes[rank] == 4:
            break
        assert codes in ([0, 0], [3, 3]), (point, codes)
        failures += codes == [3, 3]
        assert codes == [0, 0] or not any("writing" in name and "abcd" not in name for name in steps(run))
        shutil.rmtree(run)
    assert failures >= 10


@needs_fork
def test_a_file_size_limit_of_one_rank_is_a_save_failed_that_can_be_retried(tmp_path):
    import resource

    save_all(tmp_path, 10, 2)

    def limited(member: Process) -> int:
        if member.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        part = Part(torch.zeros(100_000), (200_000,), 100_000 * member.rank)
        try:
            save_sharded_checkpoint(
                tmp_path, 20, member, model={"w": part}, config={}, tokenizer={}, optimizer={}, state={}
            )
        except SaveFailed as error:
            return 3 if "rank 1: [Errno 27] File too large" in str(error) else 5
        return 0

    assert on_processes(2, limited) == [3, 3]
    assert steps(tmp_path) == ["step-00000010"]
    save_all(tmp_path, 20, 2)
    assert value_of(open_latest(tmp_path)) == 20


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    complete, synced = watch_syncs(monkeypatch)
    save_all(tmp_path, 10)
    assert complete == [True]
    assert synced == {(tmp_path / "checkpoints").stat().st_ino}
