"""common/run_directory.py: one writer per run, no run overwritten, and the newest run found without a clock."""

import errno
import json
import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from common.run_directory import RunLock, claim_run, newest_run, refuse_used_run
from errors import UserError, quote
from tests.conftest import ROOT

HOLDER = """
import pathlib, sys, time
from common.run_directory import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another process is writing there") as caught, RunLock(tmp_path):
            pass
        assert str(tmp_path) in str(caught.value)
        holder.kill()  # kill -9
    assert (tmp_path / "lock").exists()
    with RunLock(tmp_path), pytest.raises(UserError, match="another process"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_and_no_other_lock_is_taken(tmp_path, monkeypatch, code):
    def fail(descriptor: int, blocking: bool) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock, "lock_descriptor", fail)
    with pytest.raises(UserError, match="file system cannot lock files"), RunLock(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["lock"]
    assert (tmp_path / "lock").read_bytes() == b""


def test_the_lock_file_is_neither_emptied_nor_deleted(tmp_path):
    (tmp_path / "lock").write_text("kept")
    with RunLock(tmp_path):
        assert (tmp_path / "lock").read_text() == "kept"
    assert (tmp_path / "lock").read_text() == "kept"


def refusals(run: Path) -> Iterator[str]:
    """What is said at once, before data and model, and when the directory is claimed."""
    for refuse in (refuse_used_run, lambda run: claim_run(run, "debug")):
        with pytest.raises(UserError) as caught:
            refuse(str(run))
        yield str(caught.value)


def test_a_run_with_a_checkpoint_is_refused_and_the_error_names_resume(tmp_path):
    run = finish(claim_run(str(tmp_path / "a run"), "debug"))
    for message in refusals(run):
        assert "holds a run already" in message
        assert f"--resume={quote(str(run))}" in message
    refuse_used_run(None)


def test_a_run_without_a_checkpoint_may_start_again(tmp_path, capsys):
    """Killed before its first one, with its first files there; its records are kept, those of the last attempt."""
    run = claim_run(str(tmp_path / "run"), "debug")
    with RunLock(run):
        (run / "checkpoints" / "step-00000000.writing").mkdir(parents=True)
        (run / "config.json").write_text("{}")
        (run / "config.json.writing").write_text("")
        (run / "metrics.jsonl").write_text('{"event": "eval", "step": 0}\n')
        assert all("another process is writing there" in message for message in refusals(run))
    assert claim_run(str(run), "debug") == run
    capsys.readouterr()
    (run / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    (run / "samples.txt").write_text("")
    (run / "tries").mkdir()  # killed before it wrote tries.json
    assert claim_run(str(run), "debug") == run
    line = "run ended before its first checkpoint, and begins anew; its former records are now metrics.jsonl.old\n"
    assert capsys.readouterr().out.endswith(line)
    assert (run / "metrics.jsonl.old").read_text() == '{"event": "step", "step": 1}\n'
    assert not (run / "metrics.jsonl").exists()
    (run / "tries" / "tries.json").write_text("{}")
    assert all("holds other files (tries)" in message for message in refusals(run))


@pytest.mark.parametrize("name", ["README.md", "samples.txt", "config.json", "notes"])
def test_a_directory_with_other_files_is_refused(tmp_path, name):
    """Also files that have the names of a run's: only run.json tells that they are one's."""
    (tmp_path / name).write_text("mine")
    for message in refusals(tmp_path):
        assert f"holds other files ({name}); name a new one, for example --run={tmp_path}/run-1" in message
    assert os.listdir(tmp_path) == [name]
    assert claim_run(str(tmp_path / "run-1"), "debug")


def test_an_empty_directory_and_the_output_of_the_command_are_no_obstacle(tmp_path):
    for name in (".gitignore", "train.log", "slurm-1.out"):
        (tmp_path / name).touch()
    assert claim_run(str(tmp_path), "debug") == tmp_path


def test_the_next_number_is_taken_and_gaps_are_not_filled(tmp_path):
    runs = tmp_path / "runs"
    for taken in ("debug-3", "debug-12", "debugger-40", "debug-x"):
        (runs / taken).mkdir(parents=True)
    names = [claim_run(None, preset, runs).name for preset in ("debug", "debug", "quick[start]")]
    assert names == ["debug-13", "debug-14", "quick[start]-1"]


def claim_many(runs: Path) -> list[str]:
    return [claim_run(None, "debug", runs).name for _ in range(25)]


def test_processes_that_claim_at_once_get_different_numbers(tmp_path):
    method = "fork" if hasattr(os, "fork") else "spawn"  # forked: no time goes into importing torch again
    with multiprocessing.get_context(method).Pool(3) as pool:
        names = [name for part in pool.map(claim_many, [tmp_path] * 3) for name in part]
    assert sorted(names) == sorted(f"debug-{n}" for n in range(1, 76))


def finish(run: Path) -> Path:
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    return run


def test_the_newest_run_was_started_last_whatever_the_file_times_are(tmp_path):
    with pytest.raises(UserError, match=r"no run with a checkpoint in .*none.*python train\.py"):
        newest_run(tmp_path / "none")
    foreign = finish(tmp_path / "zzz")  # not made by claim_run
    assert newest_run(tmp_path) == foreign
    runs = [
        finish(claim_run(None, "quickstart", tmp_path)),
        finish(claim_run(str(tmp_path / "notes"), "debug")),
        finish(claim_run(None, "debug", tmp_path)),
    ]
    claim_run(None, "quickstart", tmp_path)  # no checkpoint yet
    (tmp_path / "a file").write_text("")
    for i, run in enumerate(runs):
        os.utime(run, (4e9 - i, 4e9 - i))
    assert newest_run(tmp_path) == runs[2]
    for damaged in ("", "[]", '{"ordinal": "9"}', '{"ordinal": true}'):
        (runs[2] / "run.json").write_text(damaged)
        assert newest_run(tmp_path) == runs[1]
    assert json.loads((runs[1] / "run.json").read_text()) == {"ordinal": 2}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions apply to ordinary POSIX users only")
def test_a_read_only_directory_is_named(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    for attempt in (lambda: claim_run(None, "debug", tmp_path), lambda: RunLock(tmp_path).__enter__()):
        with pytest.raises(UserError, match=r"cannot write in the run directory|is not writable"):
            attempt()


def test_a_file_where_a_directory_belongs_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run", "file/a/b"):
        assert all(f"{tmp_path / 'file'} is not a directory" in message for message in refusals(tmp_path / name))
    assert all("name another directory" in message for message in refusals(tmp_path / ("long" * 100)))
    with pytest.raises(UserError, match="cannot write in the run directory"):
        RunLock(tmp_path / "no").__enter__()
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    with pytest.raises(UserError, match="runs is not a directory"):
        refuse_used_run(None)
