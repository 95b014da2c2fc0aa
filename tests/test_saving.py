"""Checkpoints that are written while the training goes on."""

import itertools
import threading
import time
from pathlib import Path

import pytest

import train as train_script
from checkpoint import SaveFailed, list_checkpoints, open_checkpoint, saved_steps
from tests.test_train import TINY, message_of, reproducible, train
from training import saving


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def contents(run: str) -> dict[str, bytes]:
    """Tensors of the checkpoints of a run, by name, and what state.json holds of the training."""
    found = {}
    for path in list_checkpoints(Path(run)):
        state = open_checkpoint(path).state
        found[path.name] = repr([state[name] for name in ("progress", "val_loss", "samples")]).encode()
        found |= {f"{path.name}/{file.name}": file.read_bytes() for file in path.rglob("*.safetensors")}
    return found


@pytest.mark.parametrize("more", [[], ["--ema_half_life=0.2"], ["--optimizer=muon", "--max_ngram=3"]])
def test_the_checkpoints_are_those_of_a_run_that_waits(small_text, more, monkeypatch):
    """Bit for bit, though each is written while later steps change the weights."""
    command = [*TINY, f"--data={small_text}", "--save_interval=2", "--keep_interval=2", *more]
    assert train(*command, "--run=waits", "--async_save=false") == 0
    save = saving.save_checkpoint

    def slow(*args, **named):
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.1)
        return save(*args, **named)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    assert train(*command, "--run=goes on") == 0
    assert saved_steps(Path("goes on")) == [*range(0, 21, 2)]
    assert contents("goes on") == contents("waits")
    assert reproducible("goes on") == reproducible("waits")


def test_training_goes_on_meanwhile_and_one_is_in_flight(small_text, monkeypatch):
    save, update, lock, events = saving.save_checkpoint, train_script.update, threading.Lock(), []

    def slow(run, step, **named):
        assert lock.acquire(blocking=False)  # no other is being written
        events.append(f"begin {step}")
        time.sleep(0.2)
        save(run, step, **named)
        events.append(f"end {step}")
        lock.release()

    def noted(*args):
        result = update(*args)
        events.append("step")
        return result

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    monkeypatch.setattr(train_script, "update", noted)
    assert train(*TINY, f"--data={small_text}", "--run=run", "--save_interval=5", "--sample_tokens=0") == 0
    saves = [event for event in events if event != "step"]
    assert saves == [f"{what} {step}" for step in (0, 5, 10, 15, 20, 20) for what in ("begin", "end")]
    assert "step" in events[events.index("begin 10") : events.index("end 10")]


def test_a_failure_is_logged_before_the_next_step_and_training_goes_on(small_text, monkeypatch, capsys):
    save, calls = saving.save_checkpoint, itertools.count()

    def failing(*args, **named):
        if next(calls) == 1:
            raise SaveFailed("no room")
        return save(*args, **named)

    monkeypatch.setattr(saving, "save_checkpoint", failing)
    assert train(*TINY, f"--data={small_text}", "--run=run", "--save_interval=5", "--log_interval=1") == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("step 5: not saved: no room")
    assert lines[place - 1].startswith(("step  5/20", "step  6/20", "step  7/20", "step  8/20"))
    assert 5 not in saved_steps(Path("run"))


def test_an_error_of_the_program_is_raised(small_text, monkeypatch):
    def broken(*args, **named):
        raise ZeroDivisionError

    monkeypatch.setattr(saving, "save_checkpoint", broken)
    with pytest.raises(ZeroDivisionError):
        train(*TINY, f"--data={small_text}", "--run=run")


def test_a_run_that_ends_in_an_error_finishes_the_checkpoint_in_flight(small_text, monkeypatch):
    save, update, calls = saving.save_checkpoint, train_script.update, itertools.count()

    def slow(*args, **named):
        time.sleep(0.5)
        return save(*args, **named)

    def interrupted(*args):
        if next(calls) == 11:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    monkeypatch.setattr(train_script, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(*TINY, f"--data={small_text}", "--run=run")
    assert saved_steps(Path("run")) == [0, 10]
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-00000000", "step-00000010"]


def test_where_memory_has_no_room_for_a_copy_training_waits(small_text, monkeypatch):
    save, threads = saving.save_checkpoint, set()

    def noted(*args, **named):
        threads.add(threading.current_thread())
        return save(*args, **named)

    monkeypatch.setattr(saving, "save_checkpoint", noted)
    monkeypatch.setattr(saving, "available_memory", lambda: 100_000)
    assert train(*TINY, f"--data={small_text}", "--run=run") == 0
    assert threads == {threading.main_thread()}


def test_a_checkpoint_is_written_after_so_many_minutes(small_text, monkeypatch):
    """Whatever the steps are; the records and the weights do not change."""
    command = [*TINY, f"--data={small_text}", "--eval_interval=20"]
    assert train(*command, "--run=by steps") == 0
    update, calls, now = train_script.update, itertools.count(1), [0.0]

    def passing(*args):
        if next(calls) in (7, 12):
            now[0] += 61
        return update(*args)

    real = time.perf_counter
    monkeypatch.setattr(saving.time, "perf_counter", lambda: real() + now[0])
    monkeypatch.setattr(train_script, "update", passing)
    assert train(*command, "--run=by time", "--save_minutes=1") == 0
    assert saved_steps(Path("by time")) == [0, 12, 20]  # 7 and 12 beside the first and the last; 7 was removed
    assert reproducible("by time") == reproducible("by steps")


def test_times_and_milestones_are_checked():
    assert "save_minutes" in message_of(*TINY, "--save_minutes=0")
    assert "keep_interval" in message_of(*TINY, "--keep_interval=0")
