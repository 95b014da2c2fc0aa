"""--patience: a val loss that no longer falls begins the decay of wsd or ends the run; --max_steps=none."""

import io
import json
import os
import random
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoint import find_checkpoint, list_checkpoints, open_checkpoint
from common.clusters import Clusters
from tests.test_train import TINY, message_of, read_events, reproducible, tensors_of, train, train_until_cut
from training import budget as budget_module
from training.budget import Budget
from training.evaluation import Evaluation
from training.optim import Plan, learning_rate, make_plan
from training.options import OptimizerOptions
from training.patience import count_evaluation
from training.reference import read_run
from training.report import main as report
from training.state import Progress

COUNTS = [100] * 20
BASE = np.random.default_rng(0).standard_normal(20)  # the documents' losses differ far more than those of a step


def evaluation(loss: float, spread: float = 0.0, seed: int = 0) -> Evaluation:
    """Of 20 documents, each changed by chance of this standard deviation."""
    changes = spread * np.random.default_rng(seed).standard_normal(20)
    kinds = [Clusters(((loss + BASE + changes - changes.mean()) * 100).tolist(), COUNTS)]
    return Evaluation(loss + float(BASE.mean()), 1.0, 2000, kinds, kinds)


def stale_counts(losses: list[float], plan: Plan | None = None, interval: int = 10, **options: Any) -> list[int]:
    """Progress.stale after each evaluation, whose documents change by 0.05 from one to the next."""
    progress, found = Progress(), []
    for i, loss in enumerate(losses):
        progress.step = i * interval
        progress.history.append({"step": progress.step, "val_loss": loss, "train_loss": 1.0})
        settings = OptimizerOptions(**{"warmup_steps": 0, **options})
        count_evaluation(progress, evaluation(loss, 0.05, i), plan or Plan(None, 1), settings)
        found.append(progress.stale)
    return found


# ---- the rule


def test_improvements_within_the_noise_add_up():
    """Each is a third of the standard error of the difference, 0.05 · √2 / √20 = 0.016."""
    counts = stale_counts([2 - 0.005 * i for i in range(40)])
    assert max(counts) <= 8
    assert counts.count(0) >= 5


def test_a_level_loss_is_never_better_and_a_single_clear_fall_is():
    assert stale_counts([2.0] * 12) == list(range(12))
    assert stale_counts([2.0, 2.0, 2.0, 1.9, 1.9, 1.9]) == [0, 1, 2, 0, 1, 2]
    assert stale_counts([2.0, 2.1, 2.05, 2.0, 1.999]) == [0, 1, 2, 3, 4], "counts against the best, not the last one"


def test_warm_up_does_not_count():
    assert stale_counts([2.0, 2.2, 2.3, 2.3, 2.3], warmup_steps=25) == [0, 0, 0, 1, 2]


def test_the_decay_of_wsd_has_a_bar_of_its_own():
    """The loss at its beginning, after a rise, is not held against it."""
    losses = [2.0, 2.2, 2.3, 2.4, 2.3, 2.2, 2.3, 2.3]
    assert stale_counts(losses, Plan(70, 40), schedule="wsd") == [0, 1, 2, 0, 0, 0, 1, 2]
    assert stale_counts(losses, Plan(70, 40), schedule="cosine") == [0, 1, 2, 3, 4, 5, 6, 7]


def test_evaluations_of_other_tokens_and_of_a_single_target():
    progress, options = Progress(), OptimizerOptions(warmup_steps=0)
    other = Evaluation(9.0, 1.0, 10, [], [Clusters([5.0, 85.0], [5, 5])])
    single = [Evaluation(loss, 1.0, 1, [], []) for loss in (3.0, 3.0, 2.9)]
    found = []
    for i, result in enumerate([evaluation(1.0), other, *single]):
        progress.step = i
        progress.history.append({"step": i})
        count_evaluation(progress, result, Plan(None, 1), options)
        found.append(progress.stale)
    assert found == [0, 0, 0, 1, 0]


# ---- with a time budget


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_a_time_budget_is_planned_anew_once(monkeypatch, schedule):
    """The val loss stops falling at step 400 of about 3,000; the sentence says how much time is left."""
    options = OptimizerOptions(schedule=schedule, warmup_steps=50)
    budget = Budget(Plan(1, 1), options, 100, patience=3)
    budget.limit(600.0, 0.0, 0.2, 0.0, 1.0, 1.0)
    state: Any = SimpleNamespace(progress=Progress(), step=0)
    verdicts = []
    while not budget.is_over(state, 0.2 * state.step):
        now = 0.2 * state.step
        monkeypatch.setattr(budget_module.time, "perf_counter", lambda now=now: now)
        if state.step % 100 == 0:
            loss = 2.0 if state.step >= 400 else 3.0 - state.step / 400
            entry = {"step": state.step, "val_loss": loss, "train_loss": loss - 0.5}
            state.progress.history.append(entry)
            if verdict := budget.judge(state, evaluation(loss, 0.01, state.step)):
                verdicts.append((state.step, verdict))
                continue
        state.step = state.progress.step = state.step + 1
        if state.step % 10 == 0:
            budget.observe(state.step, 10, 2.0, now)
    assert [step for step, _ in verdicts] == [700]
    assert "--dropout" in verdicts[0][1]
    if schedule == "wsd":
        assert (budget.plan, state.step) == (Plan(840, 140), 840)
        assert "about 7:12 of the 10:00 are left" in verdicts[0][1]
        assert budget.as_options() == {"max_steps": 840, "decay_steps": 140, "budget_minutes": None}
        assert learning_rate(700, budget.plan, options) == options.learning_rate
    else:
        assert state.step == 700
        assert "about 7:40 of the 10:00 are left" in verdicts[0][1]


def test_a_plan_without_a_length_stays_at_the_peak():
    for schedule in ("wsd", "constant"):
        options = OptimizerOptions(schedule=schedule, warmup_steps=10)
        assert learning_rate(10**9, make_plan(None, options), options) == options.learning_rate


# ---- whole runs


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_noise()


def write_noise() -> None:
    letters = random.Random(0).choices("abcdefgh", k=3000)  # nothing to learn but their frequencies
    Path("noise.txt").write_text("".join(letters))


OPEN = (
    *TINY,
    "--compile=false",
    "--data=noise.txt",
    "--eval_interval=5",
    "--patience=3",
    "--max_steps=none",
    "--warmup_steps=3",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a run of wsd without a fixed length, and its output."""
    folder, before, output = tmp_path_factory.mktemp("early"), Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        write_noise()
        with redirect_stdout(output):
            assert train(*OPEN, "--schedule=wsd", "--run=early") == 0
    finally:
        os.chdir(before)
    return folder, output.getvalue()


@pytest.fixture
def early(finished, tmp_path) -> tuple[Path, str, int]:
    """A copy of that run in this test's folder, its output, and the step at which its decay began."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (event,) = read_events("early", "patience")
    return Path("early"), finished[1], event["step"]


def test_a_run_without_a_length_decays_once_the_loss_stops_falling(early):
    run, output, begin = early
    decay = max(1, begin // 5)
    assert re.search(
        rf"step {begin}: val loss has stopped falling \(none of the last 3 evaluations was better than step \d+'s .*"
        rf"\): the learning rate decays from here on, and the run ends at step {begin + decay}\n  train loss",
        output,
    )
    assert re.search(r"step      4  loss .* left unknown  mem", output)
    assert f"step {begin + decay}/{begin + decay}  loss" in output
    rates = {event["step"]: event["learning_rate"] for event in read_events(run, "step")}
    assert all((rates[step] == 1e-2) == (step <= begin + 1) for step in rates if step > 3)
    options = json.loads((run / "config.json").read_text())["options"]
    assert (options["max_steps"], options["decay_steps"], options["patience"]) == (begin + decay, decay, 3)
    last = open_checkpoint(list_checkpoints(run)[-1])
    assert last.step == begin + decay
    assert last.state["options"]["max_steps"] == begin + decay
    best = find_checkpoint(run, "best")
    losses = {event["step"]: event["val_loss"] for event in read_events(run, "eval") if event["step"]}
    assert int(best.name[5:]) == min(losses, key=losses.__getitem__)
    assert f"sample.py takes {best.name}, the best of the run by val loss" in output
    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert f"val loss had stopped falling at step {begin} (patience 3)" in page


def test_its_config_repeats_it_and_resuming_it_changes_nothing(early, capsys):
    run, _, begin = early
    end = begin + max(1, begin // 5)
    log = (run / "metrics.jsonl").read_bytes()
    assert train(f"--resume={run}") == 0
    assert f"the run is complete at step {end}" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == log
    assert train(f"{run}/config.json", "--run=repeated", "--threads=1", "--micro_batch_size=4") == 0
    assert tensors_of("repeated", end) == tensors_of(run, end)
    assert train(f"--resume={run}", f"--max_steps={end + 30}") == 0  # patience counts anew
    assert read_events(run, "step")[-1]["step"] > end


@pytest.mark.parametrize("where", ["before", "at", "after", "in the decay"])
@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_run_that_is_cut_ends_in_the_same_bits(early, monkeypatch, how, where):
    run, _, begin = early
    end = begin + max(1, begin // 5)
    moment = {"before": begin - 2, "at": begin, "after": begin + 1, "in the decay": begin + 3}[where]
    train_until_cut(monkeypatch, how, moment, [*OPEN, "--schedule=wsd", "--run=cut", "--save_interval=7"])
    assert train("--resume=cut") == 0
    assert tensors_of("cut", end) == tensors_of(run, end)
    assert reproducible("cut") == reproducible(run)


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt", "cosine"])
def test_other_schedules_end_at_once(capsys, schedule):
    length = "--max_steps=120" if schedule == "cosine" else "--max_steps=none"
    assert train(*OPEN, f"--schedule={schedule}", length, "--run=ended") == 0
    output = capsys.readouterr().out
    (event,) = read_events("ended", "patience")
    step = event["step"]
    assert f"the run ends here, at step {step}" + " of 120" * (schedule == "cosine") in output
    best = int(re.search(r"sample.py takes the checkpoint of step (\d+)", output)[1])
    assert find_checkpoint(Path("ended"), "best").name == f"step-{best:08d}"
    assert list_checkpoints(Path("ended"))[-1].name == f"step-{step:08d}"
    assert read_run(Path("ended"))["max_steps"] == (120 if schedule == "cosine" else step)
    command = next(line.strip() for line in output.splitlines() if "--resume=ended" in line)
    shutil.copytree("ended", "copy")
    assert train("--resume=ended") == 0
    assert f"the run is complete at step {step}: its val loss had stopped falling" in capsys.readouterr().out
    assert reproducible("ended") == reproducible("copy")
    assert train(*command.partition("   ")[0].split()[2:]) == 0
    assert read_events("ended", "step")[-1]["step"] > step


def test_more_patience_on_resume_goes_on_counting(capsys):
    assert train(*OPEN, "--schedule=constant", "--run=run") == 0
    step = read_events("run", "patience")[0]["step"]
    assert train("--resume=run", "--patience=5") == 0
    assert train(*OPEN, "--schedule=constant", "--patience=5", "--run=straight") == 0
    steps = [event["step"] for event in read_events("run", "patience")]
    assert [step, *[event["step"] for event in read_events("straight", "patience")]] == steps
    assert tensors_of("run", steps[-1]) == tensors_of("straight", steps[-1])


# ---- wrong options


def command_in(message: str) -> list[str]:
    return message[message.index("python train.py ") :].split()[2:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_steps=none"], ["--max_steps=none", "--patience=N"]),
        (["--max_steps=none", "--schedule=cosine"], ["--patience=N", "--schedule=cosine"]),
        (["--max_steps=none", "--schedule=linear", "--patience=2"], ["--schedule=linear", "--schedule=wsd"]),
        (["--max_steps=40", "--patience=4", "--eval_interval=10"], ["--patience=4", "40", "--eval_interval"]),
        (["--max_steps=40", "--patience=2", "--eval_interval=50"], ["--patience=2", "100 steps"]),
    ],
)
def test_a_length_that_cannot_be_meant_is_refused_with_a_command_that_works(flags, words):
    base = [flag for flag in TINY if "max_steps" not in flag and "eval_interval" not in flag]
    extra = [] if any("eval_interval" in flag for flag in flags) else ["--eval_interval=5"]
    message = message_of(*base, "--data=noise.txt", *extra, *flags)
    assert all(word in message for word in words), message
    assert not Path("runs").exists()
    assert train(*command_in(message)) == 0


def test_without_room_for_patience_the_flag_is_refused_and_a_preset_noted(capsys):
    assert message_of(*TINY, "--data=noise.txt", "--max_steps=3", "--patience=3").endswith("leave it out")
    Path("mine.py").write_text("patience = 3\n")
    assert train(*TINY, "mine.py", "--data=noise.txt", "--max_steps=3", "--run=short") == 0
    assert "note: patience=3 has no effect" in capsys.readouterr().out


def test_max_steps_none_leaves_the_length_to_the_budget():
    assert train(*OPEN, "--budget_minutes=0.02", "--run=timed") == 0
    assert isinstance(json.loads(Path("timed/config.json").read_text())["options"]["max_steps"], int)


def test_few_tokens_to_judge_by_are_noted(capsys):
    assert train(*OPEN, "--schedule=wsd", "--eval_tokens=100") == 0
    assert "patience judges by 100 tokens of the val split" in capsys.readouterr().out


def test_a_run_without_patience_keeps_its_length_on_resume():
    assert train(*TINY, "--data=noise.txt", "--run=plain") == 0
    assert "--patience=N" in message_of("--resume=plain", "--max_steps=none")
    assert train("--resume=plain", "--max_steps=none", "--patience=2", "--schedule=constant", "--eval_interval=5") == 0
    assert read_events("plain", "patience")
