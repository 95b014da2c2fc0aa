"""RUN/run_state.json and exit codes: what a scheduler reads of a run, whatever way it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train as train_script
from common.memory import OutOfMemory
from common.run_state import FORMAT, RunState, read_state
from errors import FAILED, IN_USE, LOST, NO_RESOURCES, STOPPED, UserError, run_script
from parallel.launch import LostContact
from tests.conftest import ROOT
from tests.test_train import message_of, train, train_until_cut
from training.saving import CheckpointWriter

TINY = ("debug", "--n_layer=1", "--tokens_per_step=256", "--sample_tokens=5", "--threads=1", "--dtype=float32")
SHORT = (*TINY, "--max_steps=6", "--eval_interval=3", "--eval_tokens=500", "--final_eval=false", "--compile=false")


@pytest.fixture
def flags(tmp_path, monkeypatch, small_text) -> list[str]:
    """In a folder with a space."""
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return [*SHORT, f"--data={small_text}", "--tokenizer=bytes"]


def state_of(run: str) -> dict:
    state = read_state(Path(run))
    assert state.keys() == {
        *FORMAT, "state", "resumable", "step", "saved_step", "exit_code", "message", "command", "launches"
    }  # fmt: skip
    return state


def told(run: str) -> tuple:
    state = state_of(run)
    return state["state"], state["resumable"], state["exit_code"], state["saved_step"]


def test_a_run_that_cannot_follow_another_one_has_failed(flags, monkeypatch):
    read_start, starts = train_script.read_start, []

    def read_first(*args):
        starts.append(args)
        if len(starts) > 1:
            raise UserError("the text is gone")
        return read_start(*args)

    monkeypatch.setattr(train_script, "read_start", read_first)
    assert "the text is gone" in message_of(*flags, "--run=x", "--teachers=1")
    assert told("x-teacher") == ("done", False, 0, 6)
    assert told("x") == ("failed", False, FAILED, 6)
    assert (state_of("x")["message"], state_of("x")["command"]) == ("the text is gone", None)


def test_a_run_is_running_then_done(flags, monkeypatch):
    """Told after each save."""
    save, seen = CheckpointWriter.__call__, []

    def save_and_look(writer):
        seen.append(told("my run"))
        save(writer)

    monkeypatch.setattr(CheckpointWriter, "__call__", save_and_look)
    assert train(*flags, "--run=my run", "--async_save=false") == 0
    assert seen == [("running", True, None, saved) for saved in (None, 0, 3, 6)]
    assert told("my run") == ("done", False, 0, 6)
    assert state_of("my run")["command"] == 'python sample.py --run="my run"'


def test_a_signal_stops_it(flags, monkeypatch):
    train_until_cut(monkeypatch, "SIGTERM", 5, [*flags, "--run=run"])
    assert told("run") == ("stopped", True, STOPPED, 5)
    assert state_of("run")["command"] == "python train.py --resume=run"


def test_a_killed_process_leaves_it_running_and_the_next_one_tells(flags, small_text):
    program = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
    program += "from training import data; read = data.TrainBatches.__call__\n"
    program += (
        "data.TrainBatches.__call__ = lambda self, step: os.kill(os.getpid(), 9) if step == 4 else read(self, step)\n"
    )
    program += f"train.main({[*flags, '--run=run', '--async_save=false']!r})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -signal.SIGKILL
    assert told("run") == ("running", True, None, 3)
    assert train("--resume=run") == 0
    assert told("run") == ("done", False, 0, 6)


def test_a_divergence_is_not_to_be_repeated(flags):
    message = message_of(*flags, "--run=run", "--learning_rate=1e30", "--grad_clip=none", "--warmup_steps=0")
    assert told("run")[:3] == ("failed", False, 2)
    assert state_of("run")["message"] == message[:2000]
    assert state_of("run")["command"] is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LostContact("lost"), LOST), (OutOfMemory("memory"), NO_RESOURCES), (MemoryError(), NO_RESOURCES),
        (RuntimeError("CUDA error: an illegal memory access"), 1), (KeyboardInterrupt(), 130), (UserError("bad"), 2),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_faults_of_machines_may_be_tried_again_and_mistakes_may_not(tmp_path, monkeypatch, error, code):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("last").mkdir()
    with pytest.raises(type(error)), RunState([Path("run"), Path("last")], ["debug", "--run=a b"]):
        raise error
    state = "stopped" if code == 130 else "failed"
    assert told("run") == told("last") == (state, code != 2, code, None)
    assert state_of("run")["command"] == ('python train.py debug "--run=a b"' if code != 2 else None)


def test_a_full_disk_at_the_end_may_be_tried_again(flags, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "__call__", lambda writer: None)
    with pytest.raises(UserError) as caught:
        train(*flags, "--run=run")
    assert caught.value.exit_code == NO_RESOURCES
    assert told("run") == ("failed", True, NO_RESOURCES, None)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"state": "done"}', '{"format": "sprout-run-state", "version": 2}', None]
)
def test_a_damaged_file_tells_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "run_state.json").write_text(content)
    assert read_state(tmp_path) == {}


def test_a_failure_to_write_it_ends_nothing(flags, monkeypatch):
    def fail(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("common.run_state.write_json", fail)
    assert train(*flags, "--run=run") == 0
    assert not Path("run/run_state.json").exists()


def test_the_last_run_of_a_chain_tells_of_those_before_it(flags, monkeypatch):
    train_until_cut(monkeypatch, "SIGTERM", 5, [*flags, "--run=x", "--teachers=1"])
    assert told("x") == told("x-teacher") == ("stopped", True, STOPPED, 5)
    assert state_of("x")["command"] == "python train.py --resume=x-teacher"
    assert train("--resume=x-teacher") == 0
    assert told("x") == told("x-teacher") == ("done", False, 0, 6)


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (LostContact, LOST), (OutOfMemory, NO_RESOURCES)])
def test_a_script_ends_with_the_exit_code_of_its_error(error, code):
    def fail() -> None:
        raise error("why")

    with pytest.raises(SystemExit) as ended:
        run_script(fail)
    assert ended.value.code == code


def test_a_run_in_use_has_an_exit_code_of_its_own(flags):
    from common.run_directory import RunLock

    assert train(*flags, "--run=run") == 0
    with RunLock(Path("run")), pytest.raises(UserError) as caught:
        train_script.main(["--resume=run", "--max_steps=8"])
    assert caught.value.exit_code == IN_USE
    assert told("run") == ("done", False, 0, 6), "the state is that of the process that holds the lock"
    assert json.loads(Path("run/run_state.json").read_text())["launches"] == []
