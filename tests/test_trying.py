"""python train.py --try=N by the real command, with the cost of a step injected; trials run in this process but where
processes and signals are what is tested."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import train as train_script
from checkpoint import list_checkpoints, open_latest
from common.run_directory import RunLock
from config import trying
from errors import UserError
from sample import main as sample
from tests.conftest import ROOT
from training.interrupt import STOPPED
from training.plan import Shape
from training.step_cost import StepCost

SMALL = ("--threads=1", "--dtype=float32", "--n_layer=1", "--n_embd=16", "--block_size=16", "--tokens_per_step=64")
QUICK = (*SMALL, "--eval_tokens=300", "--sample_tokens=5", "--final_samples=1", "--budget_minutes=0.04")
START = "training.tries.START_SECONDS"
SECONDS = 90  # of patience with a busy machine


def train(*args: str) -> int:
    return train_script.main(list(args))


def message_of(*args: str) -> str:
    with pytest.raises(UserError) as caught:
        train(*args)
    return str(caught.value)


def run_here(argv, output, stop) -> int:
    """In the place of a process."""
    with output.open("a", encoding="utf-8") as file, redirect_stdout(file):
        try:
            return train_script.main(list(argv))
        except UserError as error:
            file.write(f"error: {error}\n")
            return 2


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The arguments of the trials so far."""
    found = []
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    inject_cost(monkeypatch.setattr)
    monkeypatch.setattr(trying, "run_process", lambda argv, *rest: found.append(argv) or run_here(argv, *rest))
    return found


def inject_cost(setattr) -> None:
    """A step is said to take 5 ms, a start no time; a first trial may have 10 steps."""

    def step_seconds(self: StepCost, shape: Shape, tokens: int) -> float:
        return 0.005

    setattr("training.step_cost.StepCost.step_seconds", step_seconds)
    setattr("training.step_cost.StepCost.measure", lambda self, shapes: None)
    setattr(START, 0.0)
    setattr("training.tries.MIN_STEPS", 10)


def state_of(run: str) -> dict:
    return json.loads(Path(run, "tries", "tries.json").read_text("utf-8"))


def options_of(run: str) -> dict:
    return json.loads(Path(run, "config.json").read_text("utf-8"))["options"]


def test_the_best_of_the_trials_is_continued_and_the_table_says_so(calls, capsys, small_text):
    assert train(f"--data={small_text}", "--try=3", *QUICK, "--weight_decay=0.1", "--patience=7") == 0
    out, [run] = capsys.readouterr().out, Path("runs").iterdir()
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("settings tried"))
    assert [line.split()[0] for line in lines[first + 2 : -1]] == ["1", "2", "3"]
    assert sum(line.startswith("round ") for line in lines) == len(calls) == 5
    assert out.count("step ") < out.count("\n"), "the output of trials is not shown"

    state = state_of(run)
    assert [len(trial["results"]) for trial in state["trials"]].count(2) == 2
    steps = {trial["number"]: [one["steps"] for one in trial["results"]] for trial in state["trials"]}
    assert len({each[0] for each in steps.values()}) == 1, "equal seconds are equal steps at equal cost"
    assert len({sum(one["counts"]) for t in state["trials"] for r in t["results"] for one in r["clusters"]}) == 1
    winner = int(re.search(r"continues trial (\d)", lines[-1])[1])
    assert lines[first + 1 + winner].endswith("<- continued")

    saved, options = open_latest(run), options_of(str(run))
    assert saved.step > steps[winner][-1], "it went on from there"
    assert saved.state["progress"]["finished_step"] == saved.step
    assert (options["patience"], options["sample_tokens"], options["final_eval"]) == (7, 5, True)
    assert (options["weight_decay"], options["n_layer"], options["try"]) == (0.1, 1, None)
    few_left = saved.step - steps[winner][-1] < 10  # on a busy machine
    assert options["decay_steps"] > 1 or few_left, "its decay is not the single step of a trial"
    assert [*Path(run, "tries").rglob("checkpoints")] == []
    assert Path(run, "tries", "1.log").stat().st_size > 0
    assert sample([f"--run={run}", "--max_new_tokens=3", "--threads=1"]) == 0
    assert train(f"--resume={run}", f"--max_steps={saved.step + 2}") == 0
    assert "holds a run already" in message_of(f"--data={small_text}", "--try=3", *QUICK, f"--run={run}")


def test_plan_shows_the_settings_and_their_time_and_trains_nothing(calls, capsys, small_text):
    assert train(f"--data={small_text}", "--try=4", "--plan", *QUICK) == 0
    out = capsys.readouterr().out
    assert "tries: 3 settings (no more differ here) in rounds of 3 and 2 trials, about 0.6 s a round; the best" in out
    assert "   1  the plan\n   2  learning_rate=0.006\n   3  learning_rate=0.0015\n" in out
    assert calls == []
    assert not Path("runs").exists()


def test_a_trial_that_fails_is_out_with_its_reason(calls, monkeypatch, capsys, small_text):
    here = trying.run_process

    def fails(argv, output, stop):
        if output.name == "2.log":
            output.write_text("error: 3 updates in a row had no finite gradient\n", encoding="utf-8")
            return 2
        return -9 if output.name == "3.log" else here(argv, output, stop)

    monkeypatch.setattr(trying, "run_process", fails)
    assert train(f"--data={small_text}", "--try=3", *QUICK, "--run=run") == 0
    out = capsys.readouterr().out
    assert "out: 3 updates in a row had no finite gradient" in out
    assert "out: ended by SIGKILL, perhaps for lack of memory" in out
    assert "run continues trial 1" in out
    monkeypatch.setattr(trying, "run_process", lambda argv, output, stop: output.write_text("error: bad\n") and 2)
    Path("run/tries/tries.json").write_text('{"format": "sprout-tries", "version": 2}', encoding="utf-8")
    assert "not in this version's format" in message_of(f"--data={small_text}", "--try=3", *QUICK, "--run=run")
    failing = (f"--data={small_text}", "--try=2", *QUICK, "--run=failed")
    assert "all trials failed (trial 1: bad)" in message_of(*failing)
    assert "name a new one" in message_of(*failing)


def test_the_same_command_goes_on_and_another_one_does_not(calls, monkeypatch, capsys, small_text):
    here, flags = trying.run_process, (f"--data={small_text}", "--try=3", *QUICK)

    def stops(argv, output, stop):
        return STOPPED if output.name == "2.log" else here(argv, output, stop)

    monkeypatch.setattr(trying, "run_process", stops)
    assert train(*flags) == STOPPED
    out = capsys.readouterr().out
    assert "stopped in the trials" in out
    assert not Path("runs/sätze_1-1/checkpoints").exists()
    before = state_of("runs/sätze_1-1")
    assert [len(trial["results"]) for trial in before["trials"]] == [1, 0, 0]
    again = shlex.split(out.rpartition("continue with: python train.py ")[2])

    assert "begun by another command" in message_of(*flags, "--learning_rate=0.1", "--run=runs/sätze_1-1")
    assert "holds other files (tries)" in message_of(*flags[::2], "--run=runs/sätze_1-1")
    with RunLock(Path("runs/sätze_1-1/tries")):
        assert "another process is writing there" in message_of(*flags, "--run=runs/sätze_1-1")
        assert train(*flags) == STOPPED  # a run of its own
    assert len(list(Path("runs").iterdir())) == 2

    monkeypatch.setattr(trying, "run_process", here)
    Path("runs/sätze_1-1/tries/2").mkdir()
    with RunLock(Path("runs/sätze_1-1/tries/2")):  # as where the process of a trial outlived its parent
        assert "another process is writing there" in message_of(*again)
    assert "repeat the command with --try" in message_of("--resume=runs/sätze_1-1")
    done = len(calls)
    assert train(*again) == 0
    assert "going on with the trials of runs/sätze_1-1" in capsys.readouterr().out
    after = state_of("runs/sätze_1-1")
    assert after["trials"][0]["results"][0] == before["trials"][0]["results"][0]
    assert len(calls) - done == 4
    assert list_checkpoints(Path("runs/sätze_1-1"))
    assert len(list(Path("runs").iterdir())) == 2


def test_a_stop_of_the_winner_goes_on_too(calls, monkeypatch, capsys, small_text):
    trained = []

    def stopped(argv):
        """Before it has begun, then after two steps."""
        trained.append(argv)
        if len(trained) == 2:
            shorter = [arg for arg in argv if not arg.startswith("--budget_minutes")]
            assert train_script.train_model([*shorter, f"--max_steps={open_latest(Path('run')).step + 2}"])[0] == 0
        return STOPPED if len(trained) < 3 else train_script.train_model(argv)[0]

    flags = [f"--data={small_text}", "--try=2", *QUICK, "--run=run"]
    for code in (STOPPED, STOPPED, 0):
        assert trying.try_candidates(stopped, flags) == code
        assert "settings tried" in capsys.readouterr().out
    assert len(calls) == 2
    assert trained[0] == trained[1]
    assert any(arg.startswith("--budget_minutes=0.0") for arg in trained[0])
    assert trained[2] == ["--resume=run"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--try=4",), ("debug", "--try=4"), ("--data=TEXT", "--try=4"), ("--data=TEXT", "--try=4", "--max_steps=50"),
        ("--data=TEXT", "--try=4", "--budget_minutes=none"), ("--resume=run", "--try=4", "--budget_minutes=2"),
        ("--data=TEXT", "--try=4", "--budget_minutes=2", "--schedule=cosine"),
        ("--data=TEXT", "--try=4", "--budget_minutes=2", "--init_from=run"),
        ("--data=TEXT", "--try=4", "--budget_minutes=2", "--teachers=1"),
        ("--data=TEXT", "--try=4", "--budget_minutes=2", "quickstart"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_has_no_plan_or_no_time_is_refused_with_a_command_that_works(calls, small_text, flags):
    message = message_of(*(flag.replace("TEXT", str(small_text)) for flag in flags))
    assert message.startswith("--try=4 tries settings of a plan")
    command = shlex.split(message.rpartition("python train.py ")[2])
    command = [f"--data={small_text}" if arg == "--data=python_stdlib" else arg for arg in command]
    assert train(*command, *SMALL, "--plan") == 0


@pytest.mark.parametrize("number", ["1", "33", "2.5", "many"])
def test_a_wrong_number_is_one_clear_error(calls, number):
    assert "expected a whole number with 2 <= x <= 32 or none" in message_of("--data=x", f"--try={number}")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_a_trial_saves_it_and_the_same_command_goes_on(tmp_path, small_text):
    """Real processes: the trials', and the one that starts them, where the cost of a step is injected."""
    program = (
        "import importlib, sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from errors import run_script; from tests.test_trying import inject_cost; import train\n"
        "def change(name, value):\n"
        "    path, attribute = name.rsplit('.', 1)\n"
        "    owner = importlib.import_module(path) if path.islower() else train.config.planning.StepCost\n"
        "    setattr(owner, attribute, value)\n"
        "inject_cost(change); run_script(train.main)"
    )
    flags = [f"--data={small_text}", "--try=2", *SMALL, "--sample_tokens=0", "--run=run", "--budget_minutes=0.1"]
    command = [sys.executable, "-c", program, str(ROOT), *flags, "--log_interval=1"]
    with Path(tmp_path, "out").open("w+") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        metrics, deadline = tmp_path / "run/tries/1/metrics.jsonl", time.monotonic() + SECONDS
        while not metrics.exists() or metrics.read_text("utf-8").count('"step"') < 20:
            assert process.poll() is None, Path(tmp_path, "out").read_text("utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == STOPPED
    out = Path(tmp_path, "out").read_text("utf-8")
    assert "Traceback" not in out
    assert "stopped in the trials" in out.splitlines()[-1]
    step = open_latest(tmp_path / "run/tries/1").step
    assert step > 0
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {step}\n" in Path(tmp_path, "run/tries/1.log").read_text("utf-8")
    assert "run continues trial" in done.stdout
    assert open_latest(tmp_path / "run").step > step
