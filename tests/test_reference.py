"""Is this normal? Which runs are compared, and that the comparison does not change a run."""

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGTERM, raise_signal

import pytest

import train as train_script
from errors import UserError
from tests.conftest import ROOT
from tests.test_report import Page
from tests.test_train import TINY, reproducible
from training import reference
from training.interrupt import STOPPED
from training.optim import Plan
from training.reference import Reference, main, merge, read_curves, record
from training.report import main as report

OPTIONS = {"n_layer": 2, "learning_rate": 0.01, "schedule": "wsd"}


def recorded(*losses, plan=(100, 20), dataset="abc", options=OPTIONS):
    """One run per list of losses, which are those of steps 0, 50 and 90."""
    shape = {"dataset": dataset, "options": options, "max_steps": plan[0], "decay_steps": plan[1], "steps": [0, 50, 90]}
    return [{**shape, "seed": seed, "val_loss": list(values)} for seed, values in enumerate(losses)]


FIVE = recorded(*((4.0 + i / 100, 2.0 + i / 100, 1.5 + i / 100) for i in (-2, -1, 0, 1, 2)))


def test_a_band_is_students_prediction_interval():
    low, high, n = Reference("abc", OPTIONS, FIVE).band(50, Plan(100, 20))
    deviation = 0.025**0.5 / 10  # sample standard deviation of -0.02 … 0.02
    width = 2.776 * deviation * 1.2**0.5
    assert (low, high, n) == (pytest.approx(2 - width, abs=1e-4), pytest.approx(2 + width, abs=1e-4), 5)


@pytest.mark.parametrize(
    ("loss", "position"),
    [(2.01, "inside the band"), (2.048, "inside"), (2.1481, "0.1000 above the band"), (1.8519, "0.1000 below")],
)
def test_the_position_relative_to_the_band(loss, position):
    text = Reference("abc", OPTIONS, FIVE).describe(50, loss, Plan(100, 20))
    assert text.startswith(position)
    assert text.endswith("of 5 runs (1.9519-2.0481)")


@pytest.mark.parametrize(
    ("fingerprint", "options", "step"),
    [
        ("other", OPTIONS, 50),
        ("abc", {**OPTIONS, "n_layer": 3}, 50),
        ("abc", {**OPTIONS, "learning_rate": 0.02}, 50),
        ("abc", OPTIONS, 51),
    ],
)
def test_no_comparison_without_three_equal_runs(fingerprint, options, step):
    assert Reference(fingerprint, options, FIVE).describe(step, 2.0, Plan(100, 20)) is None
    assert Reference("abc", OPTIONS, FIVE[:2]).describe(50, 2.0, Plan(100, 20)) is None, "two runs make no band"
    assert Reference("abc", OPTIONS, []).describe(50, 2.0, Plan(100, 20)) is None


def test_options_that_do_not_affect_the_loss_may_differ():
    ignored = {"seed": 5, "dtype": "bfloat16", "data": "elsewhere", "micro_batch_size": 3, "log_interval": 7}
    assert len(Reference("abc", {**OPTIONS, **ignored, "max_steps": 9}, FIVE).runs) == 5


def test_a_run_recorded_before_an_option_existed_counts_with_its_default():
    assert len(Reference("abc", {**OPTIONS, "beta1": 0.9}, FIVE).runs) == 5
    assert Reference("abc", {**OPTIONS, "beta1": 0.8}, FIVE).runs == []
    assert Reference("abc", OPTIONS, recorded([4, 2, 1], options={**OPTIONS, "removed_option": 1})).runs == []


@pytest.mark.parametrize(
    ("schedule", "plan", "steps"),
    [
        ("wsd", (200, 40), (0, 50)),
        ("wsd", (100, 60), (0,)),
        ("cosine", (200, 40), ()),
        ("constant", (200, 40), (0, 50, 90)),
    ],
)
def test_plans_are_compared_at_steps_with_equal_learning_rates(schedule, plan, steps):
    options = {**OPTIONS, "schedule": schedule}
    compared = Reference("abc", options, [{**run, "options": options} for run in FIVE])
    assert [step for step in (0, 50, 90) if compared.band(step, Plan(*plan))] == list(steps)


def test_recording_a_run_again_replaces_it():
    again = [{**FIVE[0], "val_loss": [4.0, 2.5, 1.6]}]
    assert merge(FIVE, again) == [*again, *FIVE[1:]]


def train(name, seed, small_text, *args):
    assert train_script.main([*TINY, f"--data={small_text}", f"--run={name}", f"--seed={seed}", *args]) == 0


def test_runs_are_recorded_and_the_next_one_is_compared(tmp_path, small_text, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "CURVES", tmp_path / "curves.json")
    for seed in (1, 2, 3):
        train(f"run {seed}", seed, small_text)
    train("before", 4, small_text)
    assert "the band" not in capsys.readouterr().out
    assert main(["run 1", "run 2"]) == 0
    assert "one of 2 runs with these options and data; a band needs 3" in capsys.readouterr().out
    assert main(["run 2", "run 3"]) == 0
    first = (tmp_path / "curves.json").read_bytes()
    assert main(["run 1", "run 2", "run 3"]) == 0
    assert (tmp_path / "curves.json").read_bytes() == first
    assert [run["steps"] for run in read_curves()] == [[0, 10, 20]] * 3
    assert str(tmp_path) not in first.decode()

    train("after", 4, small_text)
    assert capsys.readouterr().out.count("the band of 3 runs (") == 3
    assert reproducible("after") == reproducible("before"), "the comparison must not change metrics.jsonl"
    assert report(["after"]) == 0
    assert "of 3 runs (" in Page(Path("after/report.html")).text
    train("different", 4, small_text, "--learning_rate=0.02")
    assert report(["different"]) == 0
    assert "the band" not in capsys.readouterr().out + Page(Path("different/report.html")).text


def test_a_resumed_run_logs_the_same_comparisons(tmp_path, small_text, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "CURVES", tmp_path / "curves.json")
    for seed in (1, 2, 3):
        train(f"run {seed}", seed, small_text)
    main(["run 1", "run 2", "run 3"])
    capsys.readouterr()
    train("straight", 4, small_text)
    straight = capsys.readouterr().out.splitlines()
    calls, update = itertools.count(1), train_script.update

    def update_then_stop(*args):
        result = update(*args)
        if next(calls) == 12:
            raise_signal(SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "update", update_then_stop)
        assert train_script.main([*TINY, f"--data={small_text}", "--run=cut", "--seed=4"]) == STOPPED
    assert train_script.main(["--resume=cut", "--threads=1"]) == 0
    resumed = capsys.readouterr().out.splitlines()
    expected = [line for line in straight if "the band" in line]
    assert [line for line in resumed if "the band" in line] == expected
    assert len(expected) == 3


DAMAGE = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "a list": lambda text: "[]",
    "no runs": lambda text: text.replace('"runs"', '"walks"'),
    "runs of another form": lambda text: text.replace('"val_loss": [', '"val_loss": ["3", '),
    "a field missing": lambda text: text.replace('"steps"', '"paces"'),
    "unequal lengths": lambda text: text.replace('"steps": [', '"steps": [7, '),
    "infinity": lambda text: text.replace("1.5", "1e999"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_curves_cost_one_line_and_are_not_overwritten(kind, tmp_path, monkeypatch, capsys):
    curves = tmp_path / "curves.json"
    monkeypatch.setattr(reference, "CURVES", curves)
    whole = json.dumps({"format": "sprout-reference", "version": 1, "runs": FIVE})
    curves.write_text(DAMAGE[kind](whole))
    before = curves.read_bytes()
    assert before != whole.encode()
    assert read_curves() == []
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"no comparison with earlier runs: {curves}")
    assert "delete it" in line
    assert "checkpoint" not in line
    with pytest.raises(UserError, match="delete it"):
        record(FIVE)
    assert curves.read_bytes() == before


def test_training_and_report_go_on_without_readable_curves(tmp_path, small_text, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "CURVES", tmp_path / "curves.json")
    (tmp_path / "curves.json").write_text('{"format": "sprout-ref')
    train("run", 1, small_text)
    assert report(["run"]) == 0
    assert capsys.readouterr().err.count("no comparison with earlier runs") == 2


def test_a_write_that_is_cut_short_leaves_the_old_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "CURVES", tmp_path / "curves.json")
    record(FIVE[:1])
    before, sync = (tmp_path / "curves.json").read_bytes(), os.fsync

    def full(descriptor):
        sync(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .* \(No space left on device\)"):
        record(FIVE[1:])
    assert (tmp_path / "curves.json").read_bytes() == before
    assert not list(tmp_path.glob("*.writing"))


def test_processes_that_record_at_once_lose_no_run(tmp_path):
    """Each process records one run, slowly between its read and its write."""
    code = """
import sys, time
from pathlib import Path
from training import reference
reference.CURVES, run = Path(sys.argv[1]), eval(sys.argv[2])
merge = reference.merge
reference.merge = lambda known, new: time.sleep(0.5) or merge(known, new)
reference.record([run])
"""
    curves = tmp_path / "curves.json"
    commands = [[sys.executable, "-c", code, str(curves), repr(run)] for run in FIVE[:3]]
    children = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [child.wait(timeout=120) for child in children] == [0, 0, 0]
    assert sorted(run["seed"] for run in json.loads(curves.read_text())["runs"]) == [0, 1, 2]


def test_errors_of_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "CURVES", tmp_path / "curves.json")
    for args, message in (([], "give finished runs"), ([str(tmp_path / "nowhere")], "not a run with a checkpoint")):
        with pytest.raises(UserError, match=message):
            main(args)
