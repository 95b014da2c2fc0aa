"""A full or failing disk never ends a training that has begun, and neither does whoever removes or renames its files:
single calls of the system that fail, one at a time, in short runs of train.py."""

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import lock_descriptor

import checkpoint
import train as train_script
from checkpoint import list_checkpoints, open_latest
from errors import UserError
from model_folder import SET_ASIDE
from prepare_data import shard_check
from prepare_data.shards import Split
from tests.inject import ERRORS, counting, failing
from tests.test_checkpoint import save, steps, value_of
from tests.test_train import TINY, read_events

SHORT = (*TINY, "--max_steps=8", "--eval_interval=4", "--log_interval=1", "--run=run")


def train(*args: str) -> int:
    return train_script.main(list(args))


@pytest.fixture(scope="module")
def counted(tmp_path_factory, small_text) -> tuple[Path, Counter[str]]:
    """A folder with the data, and how often each call is made on the files of a short run."""
    folder = tmp_path_factory.mktemp("failing disk")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with counting(folder / "run") as counts:
            assert train(*SHORT, f"--data={small_text}") == 0
        shutil.rmtree("run")
    finally:
        os.chdir(before)
    return folder, counts


@pytest.fixture(autouse=True)
def here(counted, tmp_path, monkeypatch) -> Path:
    shutil.copytree(counted[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for module in (checkpoint, shard_check):
        monkeypatch.setattr(module, "PAUSES", (0.0, 0.0, 0.0))
    return tmp_path


@pytest.fixture
def begun(monkeypatch) -> list[bool]:
    """Not empty once the first step begins."""
    found, real = list[bool](), train_script.loop
    monkeypatch.setattr(train_script, "loop", lambda *args: (found.append(True), real(*args))[1])
    return found


def at_step(monkeypatch, number: int, action: Callable[[], object]) -> None:
    """Does something before an update of the training."""
    left, real = [number], train_script.update

    def update(*args):
        left[0] -= 1
        if left[0] == 0:
            action()
        return real(*args)

    monkeypatch.setattr(train_script, "update", update)


# ---- Single calls ----------------------------------------------------------------------------------------------------

CALLS = ("open", "file", "write", "fsync", "fstat", "lstat", "stat", "close", "mkdir", "rename", "replace", "unlink")
CALLS += ("rmdir", "scandir", "ftruncate", "disk_usage")


def check_one_failure(here, counts, begun, text, call, part, error, **how) -> None:
    """One call fails: the run is complete, or refused before its first step."""
    nth = max(1, int(part * counts[call]))
    refusal = None
    try:
        with failing(call, nth, error, here / "run", **how) as failed:
            assert train(*SHORT, f"--data={text}") == 0
    except UserError as caught:
        refusal = caught
    assert failed or refusal or not counts[call]
    assert not (refusal and begun), f"{call} {nth} {os.strerror(error)}: {refusal}"
    if refusal is None:
        assert open_latest(here / "run").step == 8
        assert [event["step"] for event in read_events("run", "step")] == [*range(1, 9)]
        assert json.loads(Path("run/config.json").read_text())["options"]["max_steps"] == 8


@pytest.mark.parametrize(("call", "number"), [(call, number) for number, call in enumerate(CALLS)])
def test_one_call_that_fails_costs_nothing(here, counted, begun, small_text, call, number):
    part, error = (number * 0.31) % 0.8 + 0.2, ERRORS[number % len(ERRORS)]
    check_one_failure(here, counted[1], begun, small_text, call, part, error, is_torn=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", [i / 20 for i in range(21)])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_that_fails_costs_nothing(here, counted, begun, small_text, call, part):
    error = ERRORS[int(100 * part) % len(ERRORS)]
    check_one_failure(here, counted[1], begun, small_text, call, part, error)


@pytest.mark.parametrize(("call", "error"), [("write", errno.ENOSPC), ("open", errno.EMFILE), ("stat", errno.EIO)])
def test_a_disk_that_fails_for_good_is_told_at_the_end(here, counted, begun, small_text, call, error, capsys):
    """All steps are trained, and the end says what is not saved."""
    with (
        failing(call, counted[1][call] // 2, error, here / "run", times=None),
        pytest.raises(UserError, match="the weights of step 8 are not saved"),
    ):
        train(*SHORT, f"--data={small_text}")
    captured = capsys.readouterr()
    assert "step 8/8" in captured.out
    if call != "open":  # the logs are open
        assert captured.err.count(f"cannot write {Path('run/metrics.jsonl')}") == 1
        assert "not saved: " in captured.err
    assert train("--resume=run") == 0
    assert [event["step"] for event in read_events("run", "step")] == [*range(1, 9)]


@pytest.mark.parametrize("times", [1, 100])
def test_the_text_is_read_again_and_the_end_names_the_command(here, small_text, monkeypatch, capsys, times):
    left, real = [times], Split._open_file

    def open_file(split: Split, path: Path) -> object:
        left[0] -= 1
        if left[0] >= 0:
            split._files.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(split, path)

    at_step(monkeypatch, 6, lambda: monkeypatch.setattr(Split, "_open_file", open_file))
    if times == 1:
        assert train(*SHORT, f"--data={small_text}") == 0
        assert "trying again" in capsys.readouterr().err
        return
    with pytest.raises(UserError, match=r"can no longer be read .*step 4; .*python train\.py --resume=run"):
        train(*SHORT, f"--data={small_text}")


# ---- Checkpoints that cannot be read ---------------------------------------------------------------------------------


def test_one_read_error_is_tried_again(tmp_path, capsys):
    save(tmp_path, 1), save(tmp_path, 2)
    with failing("file", 3, errno.EIO, tmp_path, name="step-00000002"):
        assert value_of(open_latest(tmp_path)) == 2
    assert "trying again" in capsys.readouterr().err


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_checkpoint_that_a_resume_could_not_use_is_set_aside(here, small_text, capsys, is_damaged):
    """Whatever the steps are at which the resumed run saves, and it is never pruned; the records so far are kept."""
    assert train(*SHORT, f"--data={small_text}", "--save_interval=3", "--keep_interval=1") == 0
    records, last = Path("run/metrics.jsonl").read_bytes(), here / "run/checkpoints/step-00000008"
    before = {path.name: path.read_bytes() for path in last.rglob("*.*")}
    if is_damaged:
        data = (last / "optimizer.safetensors").read_bytes()
        (last / "optimizer.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    with failing("file", 1, errno.EIO, last, times=0 if is_damaged else None):
        assert train("--resume=run", "--max_steps=12", "--save_interval=5", "--eval_interval=100") == 0
    printed = capsys.readouterr()
    assert "WARNING: checkpoint skipped, an older one is tried" in printed.err
    assert "run goes on from step 7; kept aside are run/checkpoints/set-aside/step-00000008" in printed.out
    aside = last.parent / SET_ASIDE / "step-00000008"
    kept = {path.name: path.read_bytes() for path in aside.rglob("*.*")}
    assert [name for name in before if kept[name] != before[name]] == ["optimizer.safetensors"] * is_damaged
    assert Path("run/metrics.jsonl.old").read_bytes() == records
    assert [event["step"] for event in read_events("run", "step")] == [*range(1, 13)]
    assert "step-00000012" in steps(here / "run")


# ---- Removed and renamed while it trains -----------------------------------------------------------------------------


def remove_run() -> None:
    while os.path.exists("run"):  # a checkpoint is being written there
        shutil.rmtree("run", ignore_errors=True)


def move_run() -> None:
    os.rename("run", "elsewhere")


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be renamed there")
@pytest.mark.parametrize("action", [remove_run, move_run])
def test_a_run_that_is_gone_is_made_again(here, small_text, monkeypatch, capsys, action):
    at_step(monkeypatch, 6, action)
    assert train(*SHORT, f"--data={small_text}") == 0
    assert "run: the directory was removed or renamed, and is made again" in capsys.readouterr().err
    assert open_latest(Path("run")).step == 8
    found = [event["step"] for event in read_events("run", "step")]
    assert found == [*range(1 if action is remove_run else 6, 9)]
    assert {"config.json", "run.json", "lock", "samples.txt"} <= {*os.listdir("run")}
    monkeypatch.undo()
    os.chdir(here)
    assert train("--resume=run", "--max_steps=12") == 0


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be removed there")
@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "samples.txt", "config.json", "run.json"])
def test_a_file_that_is_gone_is_made_again(here, small_text, monkeypatch, capsys, name):
    at_step(monkeypatch, 6, lambda: os.remove(f"run/{name}"))
    assert train(*SHORT, f"--data={small_text}") == 0
    assert os.path.exists(f"run/{name}") or name == "run.json"
    assert [event["step"] for event in read_events("run", "step")] == [*range(1, 9)]
    assert open_latest(Path("run")).step == 8
    assert ("its lock was removed" in capsys.readouterr().err) == (name == "lock")


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be removed there")
@pytest.mark.parametrize("is_still_there", [True, False])
def test_a_second_writer_stops_the_first_one(here, small_text, monkeypatch, is_still_there):
    files = []

    def take() -> None:
        os.remove("run/lock")
        files.append(open("run/lock", "ab"))  # noqa: SIM115 - as another process
        assert lock_descriptor(files[0].fileno(), blocking=False)
        if not is_still_there:
            files[0].close()
        Path("run/metrics.jsonl").write_text("of the other\n")

    at_step(monkeypatch, 6, take)
    with pytest.raises(UserError, match=r"another one has written there since.*after its last checkpoint is lost"):
        train(*SHORT, f"--data={small_text}")
    files[0].close()
    assert Path("run/metrics.jsonl").read_text() == "of the other\n"
    assert [path.name for path in list_checkpoints(Path("run"))] == ["step-00000000", "step-00000004"]
