"""--students: ordinary runs, one after another, each begun by the command that the one before it printed."""

import json
import shlex
import time
from pathlib import Path

import pytest

import train as train_script
from checkpoint import list_checkpoints, open_checkpoint
from config import students
from prepare_data.__main__ import main as prepare
from tests.test_train import TINY, message_of, read_events, reproducible, tensors_of, train, train_until_cut
from training.interrupt import STOPPED

FLAGS = (*TINY, "--compile=false", "--tokenizer=bpe", "--vocab_size=300")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def options_of(run):
    return json.loads(Path(run, "config.json").read_text("utf-8"))["options"]


def teachers_of(run):
    return [Path(path).parent.parent.parent.name for path in options_of(run)["teacher"]]


def next_of(out):
    """The arguments that a run has printed for the next one."""
    line = next(line for line in out.splitlines() if line.startswith("next: a model that learns from this one, too: "))
    return shlex.split(line.partition("python train.py ")[2])


# ---- the order of the runs


def test_each_model_learns_from_all_before_it(capsys, small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=my runs/x", "--students=2") == 0
    runs = ["x-teacher", "x-teacher-2", "x"]
    assert sorted(path.name for path in Path("my runs").iterdir()) == sorted(runs)
    assert [teachers_of(f"my runs/{run}") for run in runs] == [[], runs[:1], runs[:2]]
    assert [options_of(f"my runs/{run}")["seed"] for run in runs] == [1337, 1338, 1339]
    assert [options_of(f"my runs/{run}")["students"] for run in runs] == [2, 1, 0]
    out = capsys.readouterr().out
    assert out.count("next: python sample.py") == 1
    assert out.index("next: a model") < out.index('next: python sample.py --run="my runs/x"')


def test_the_command_that_is_printed_makes_the_same_run(capsys, small_text):
    assert train(*FLAGS, f"--data={small_text}", "--students=1") == 0
    runs = sorted(path.name for path in Path("runs").iterdir())
    assert len(runs) == 2
    assert train(*next_of(capsys.readouterr().out), "--run=again") == 0
    assert tensors_of("again", 20) == tensors_of(f"runs/{runs[1]}", 20)
    assert reproducible("again") == reproducible(f"runs/{runs[1]}")


def test_a_preset_keeps_its_name(capsys, small_text):
    """The data of the preset has a name, too: that of a dataset."""
    assert prepare(["text", f"--input={small_text}", "--name=python_stdlib", *FLAGS[-2:]]) == 0
    assert train(*FLAGS, "--students=1", "--max_steps=2") == 0
    assert next_of(capsys.readouterr().out)[0] == "debug"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["debug-1", "debug-2"]


def test_the_losses_of_the_teachers_stand_beside_the_student(capsys, small_text):
    flags = (*FLAGS, f"--data={small_text}")
    assert train(*flags, "--run=teacher", "--max_steps=60") == 0
    assert train(*flags, "--run=student", "--teacher=teacher", "--max_steps=4") == 0
    best, loss = (min(event["val_loss"] for event in read_events(run, "eval")) for run in ("student", "teacher"))
    worse = f"best val loss {best:.4f}, that of the teacher teacher {loss:.4f}; the teacher is better: python sample.py"
    assert f"{worse} --run=teacher\n" in capsys.readouterr().out
    assert train(*flags, "--run=longer", "--teacher=student", "--max_steps=60") == 0
    assert "the teacher is better" not in capsys.readouterr().out


# ---- the time


def test_the_time_is_shared_and_what_is_left_goes_to_the_student(monkeypatch, small_text, capsys):
    trained = []

    def stopped(argv):
        trained.append(list(argv))
        return train_script.train_model(argv) if len(trained) == 1 else (STOPPED, [])

    flags = [*FLAGS, f"--data={small_text}", "--students=1", "--schedule=wsd", "--budget_minutes=0.15"]
    flags.remove("--max_steps=20")
    started = time.perf_counter()
    assert students.train_all(stopped, flags) == STOPPED
    took = (time.perf_counter() - started) / 60
    (run,) = Path("runs").iterdir()
    out = capsys.readouterr().out
    assert "budget 0:03: " in out  # a third
    budget = next(arg for arg in trained[1] if arg.startswith("--budget_minutes="))
    assert float(budget.partition("=")[2]) == pytest.approx(max(0.15 - took, 0.015), abs=0.02)
    assert f"--teacher={run}" in trained[1]
    assert "--students=0" in trained[1]


# ---- interruptions


@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_first_run_that_is_cut_goes_on_to_its_student(monkeypatch, small_text, how):
    flags = [*FLAGS, f"--data={small_text}", "--save_interval=4", "--students=1"]
    assert train(*flags, "--run=whole") == 0
    train_until_cut(monkeypatch, how, 13, [*flags, "--run=cut"])
    assert not list_checkpoints(Path("cut"))
    assert train("--resume=cut-teacher") == 0
    for run in ("{}-teacher", "{}"):
        assert tensors_of(run.format("cut"), 20) == tensors_of(run.format("whole"), 20)
    assert teachers_of("cut") == ["cut-teacher"]


def test_a_student_that_is_cut_resumes_as_any_run(monkeypatch, small_text):
    flags = [*FLAGS, f"--data={small_text}", "--save_interval=4", "--students=1"]
    assert train(*flags, "--run=whole") == 0
    train_until_cut(monkeypatch, "killed", 33, [*flags, "--run=cut"])
    assert train("--resume=cut") == 0
    assert tensors_of("cut", 20) == tensors_of("whole", 20)


def test_a_complete_run_names_its_student_and_does_not_begin_it_again(capsys, small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=x", "--students=1") == 0
    first = next_of(capsys.readouterr().out)
    assert train("--resume=x-teacher") == 0
    second = next_of(capsys.readouterr().out)
    assert [arg for arg in second if arg[:7] != "--data="] == [arg for arg in first if arg[:7] != "--data="]
    assert sorted(path.name for path in Path().iterdir() if path.name != "data") == ["x", "x-teacher"]


def test_a_resumed_run_may_do_without_its_student(monkeypatch, small_text, capsys):
    flags = [*FLAGS, f"--data={small_text}", "--save_interval=4", "--students=1", "--run=cut"]
    train_until_cut(monkeypatch, "killed", 13, flags)
    assert train("--resume=cut-teacher", "--students=0") == 0
    assert not Path("cut").exists()
    assert "next: python sample.py" in capsys.readouterr().out


def test_a_first_run_that_fails_has_no_student(monkeypatch, small_text):
    flags = [*FLAGS, f"--data={small_text}", "--run=x", "--students=1"]
    assert "no finite gradient" in message_of(*flags, "--learning_rate=1e30", "--grad_clip=none", "--warmup_steps=0")
    assert not Path("x").exists()


# ---- directories


@pytest.mark.parametrize("used", ["x", "x-teacher"])
def test_a_directory_in_use_is_refused_before_the_training(small_text, used):
    assert train(*FLAGS, f"--data={small_text}", f"--run={used}") == 0
    message = message_of(*FLAGS, f"--data={small_text}", "--run=x", "--students=1")
    assert f"--run={used} holds a run already" in message
    assert len(list_checkpoints(Path(used))) > 0


def test_the_state_holds_the_command_that_began_the_run(small_text):
    flags = [*FLAGS, f"--data={small_text}", "--run=x"]
    assert train(*flags) == 0
    assert train("--resume=x", "--max_steps=24") == 0
    assert open_checkpoint(list_checkpoints(Path("x"))[-1]).state["command"] == flags
