"""train.py as a user runs it: a text in, a run directory out; resume, signals, kills and wrong input."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample as sample_script
import train as train_script
from checkpoint import SaveFailed, find_checkpoint, list_checkpoints, open_checkpoint
from errors import UserError
from training.interrupt import STOPPED

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "debug",
    "--dropout=0.1",
    "--max_steps=20",
    "--eval_interval=10",
    "--eval_tokens=1000",
    "--log_interval=4",
    "--tokens_per_step=256",
    "--micro_batch_size=4",
    "--sample_tokens=10",
    "--final_samples=1",
    "--threads=1",
    "--dtype=float32",
)

SHAPE = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32")


def train(*args: str) -> int:
    return train_script.main(list(args))


def read_events(run: str | Path, kind: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl without what is not reproducible."""
    events = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text("utf-8").splitlines()]
    for event in events:
        event.pop("timing", None)
    return [event for event in events if kind is None or event["event"] == kind]


def tensors_of(run: str | Path, step: int) -> dict[str, bytes]:
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    return {name: (folder / name).read_bytes() for name in ("model/model.safetensors", "optimizer.safetensors")}


def reproducible(run: str | Path) -> str:
    """metrics.jsonl as text with `timing` cut off."""
    lines = (Path(run) / "metrics.jsonl").read_text("utf-8").splitlines()
    return "\n".join(line.partition(', "timing"')[0] for line in lines)


def message_of(*args: str) -> str:
    with pytest.raises(UserError) as caught:
        train(*args)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_text) -> Path:
    """A finished run of 20 steps; tests copy it before they write."""
    folder = tmp_path_factory.mktemp("finished run")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert train(*TINY, f"--data={small_text}", "--run=runs/straight") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run, with its dataset, in this test's folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Path("runs/straight")


# ---- what a run leaves


def test_a_run_leaves_what_the_design_says(run, small_text):
    assert {path.name for path in run.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "samples.txt",
        "checkpoints",
        "lock",
    }
    assert [event["step"] for event in read_events(run, "step")] == [4, 8, 12, 16, 20]
    evaluations = read_events(run, "eval")
    assert [event["step"] for event in evaluations] == [0, 10, 20]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 1
    assert {"standard_error", "perplexity", "bits_per_byte", "targets"} <= evaluations[0].keys()
    assert read_events(run, "final")[0]["targets"] > 1000
    assert (run / "samples.txt").read_text("utf-8").count("==== step") == 3  # none of random weights
    saved = json.loads((run / "config.json").read_text())
    assert saved["options"]["n_layer"] == 2
    assert {"device", "compile"} <= saved["auto"].keys()
    state = open_checkpoint(list_checkpoints(run)[-1]).state
    assert (state["step"], state["tokens"], state["samples"]) == (20, 20 * 256, 20 * 8)


def test_the_same_command_writes_the_same_bytes(run, small_text):
    assert train(*TINY, f"--data={small_text}", "--run=again") == 0
    assert tensors_of("again", 20) == tensors_of(run, 20)
    assert reproducible("again") == reproducible(run)


def test_a_saved_config_repeats_the_run(run):
    assert train(f"{run}/config.json", "--run=repeated", "--threads=1", "--micro_batch_size=4") == 0
    assert tensors_of("repeated", 20) == tensors_of(run, 20)


def test_accumulation_gives_the_gradient_of_the_whole_batch(small_text):
    """Without dropout the micro-batch changes nothing but rounding."""
    for size in (8, 2):
        args = (
            "--dropout=0",
            f"--micro_batch_size={size}",
            f"--data={small_text}",
            f"--run=by{size}",
            "--optimizer=sgd",
            "--eval_interval=20",
        )
        assert train(*TINY, *args) == 0
    for one, other in zip(read_events("by8", "step"), read_events("by2", "step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_without_a_name_runs_are_numbered(small_text):
    for _ in range(2):
        assert train(*TINY, f"--data={small_text}", "--max_steps=1") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["sätze_1-1", "sätze_1-2"]


def test_training_time_leaves_evaluations_out(small_text, monkeypatch):
    evaluate = train_script.evaluate
    slow = lambda *args, **kwargs: time.sleep(0.3) or evaluate(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(train_script, "evaluate", slow)
    assert train(*TINY, f"--data={small_text}", "--run=slow") == 0
    events = [json.loads(line) for line in Path("slow/metrics.jsonl").read_text("utf-8").splitlines()]
    steps, evals = ([event for event in events if event["event"] == kind] for kind in ("step", "eval"))
    elapsed, trained = (steps[-1]["timing"][name] - steps[0]["timing"][name] for name in ("seconds", "train_seconds"))
    assert elapsed - trained >= 0.3  # the evaluation of step 10 lies between
    seconds = [event["timing"]["train_seconds"] for event in sorted(steps + evals, key=lambda event: event["step"])]
    assert seconds == sorted(seconds)


# ---- resume


def test_a_resumed_run_ends_in_the_same_bits(run):
    """20 steps = 10 + resume + 10, with dropout and accumulation."""
    shutil.copytree(run, "cut")
    shutil.rmtree("cut/checkpoints/step-00000020")
    with open("cut/metrics.jsonl", "a") as file:
        # what a killed process wrote after its checkpoint
        file.write('{"event": "step", "step": 12, "loss": 1.0}\n{"event": "st')
    assert train("--resume=cut") == 0
    assert tensors_of("cut", 20) == tensors_of(run, 20)
    assert reproducible("cut") == reproducible(run)
    assert Path("cut/samples.txt").read_bytes() == (run / "samples.txt").read_bytes()


def train_until_cut(monkeypatch, how: str, moment: int, command: list[str]) -> None:
    """Trains until update number `moment` (from 1) begins: killed there, records left as they are, or by SIGTERM."""
    update, calls = train_script.update, itertools.count(1)

    def interrupted(*args):
        if next(calls) == moment:
            if how == "killed":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "update", interrupted)
        if how == "killed":
            with pytest.raises(KeyboardInterrupt):
                train(*command)
        else:
            assert train(*command) == STOPPED


@pytest.mark.parametrize("moment", [3, 10, 13, 20])
def test_a_run_stopped_by_a_signal_ends_in_the_same_bits(run, small_text, monkeypatch, moment, capsys):
    """SIGTERM in the middle of an update: the step is finished, everything is saved, the exit code says resumable."""
    train_until_cut(monkeypatch, "SIGTERM", moment, [*TINY, f"--data={small_text}", "--run=stopped"])
    assert "--resume=stopped" in capsys.readouterr().out
    assert open_checkpoint(list_checkpoints(Path("stopped"))[-1]).step == moment
    assert train("--resume=stopped") == 0
    assert tensors_of("stopped", 20) == tensors_of(run, 20)
    assert reproducible("stopped") == reproducible(run)


def start(*args: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_nothing_is_lost_to_kill_9(small_text):
    """Killed at four moments, resumed each time: the log and the weights are those of a run that was left alone."""
    args = (*TINY, f"--data={small_text}", "--max_steps=80", "--save_interval=5", "--eval_interval=40")
    assert train(*args, "--run=alone") == 0
    command, kills = (*args, "--run=killed"), 0
    while True:
        process = start(*command)
        if kills < 4:
            deadline = time.monotonic() + 60
            steps_before = newest_step("killed")
            while process.poll() is None and newest_step("killed") <= steps_before and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.013 * kills)  # at another place in the step each time
            process.kill()
            kills += 1
        output, _ = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
        command = ("--resume=killed",)
    assert kills == 4
    assert tensors_of("killed", 80) == tensors_of("alone", 80)
    assert reproducible("killed") == reproducible("alone")


def newest_step(run: str) -> int:
    names = [path.name for path in Path(run, "checkpoints").glob("step-????????")]
    return max((int(name[5:]) for name in names), default=-1)


def test_a_finished_run_goes_on_with_more_steps_and_keeps_its_records(run, capsys):
    log, samples = (run / "metrics.jsonl").read_bytes(), (run / "samples.txt").read_bytes()
    assert train(f"--resume={run}") == 0  # nothing is left to do, and nothing is recorded twice
    output = capsys.readouterr().out
    assert "the run is complete at step 20" in output
    assert "learning rate:" not in output
    assert ((run / "metrics.jsonl").read_bytes(), (run / "samples.txt").read_bytes()) == (log, samples)
    assert train(f"--resume={run}", "--max_steps=24") == 0
    output = capsys.readouterr().out
    assert "changed on resume: max_steps=24 (was 20)" in output
    assert re.search(r"learning rate: 1.\d\de-04 so far, 1.\d\de-03 from here, .* at step 24 \(cosine\)", output)
    assert "it had decayed" in output
    assert (run / "metrics.jsonl").read_bytes().startswith(log)
    assert (run / "samples.txt").read_bytes().startswith(samples)
    assert [event["step"] for event in read_events(run, "final")] == [20, 24]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_lengthened_run_that_is_killed_ends_in_the_same_bits(run, monkeypatch, schedule):
    """Killed in its second part, before and after a checkpoint: the records of the first part are kept."""
    if schedule == "constant":
        assert train(f"{run}/config.json", "--schedule=constant", "--run=constant", "--threads=1") == 0
        run = Path("constant")
    copies = [Path(shutil.copytree(run, name)) for name in ("alone", "early", "late")]
    update = train_script.update

    def killed_at(moment):
        calls = itertools.count(1)

        def killed(*args):
            if next(calls) == moment:
                raise KeyboardInterrupt  # leaves the records as they are
            return update(*args)

        return killed

    for copy, moment in zip(copies[1:], (5, 13), strict=True):
        monkeypatch.setattr(train_script, "update", killed_at(moment))
        with pytest.raises(KeyboardInterrupt):
            train(f"--resume={copy}", "--max_steps=40")
        monkeypatch.setattr(train_script, "update", update)
        assert train(f"--resume={copy}", "--max_steps=40") == 0
    assert train("--resume=alone", "--max_steps=40") == 0
    for copy in copies[1:]:
        assert reproducible(copy) == reproducible("alone")
        assert (copy / "samples.txt").read_bytes() == Path("alone/samples.txt").read_bytes()
        assert tensors_of(copy, 40) == tensors_of("alone", 40)


def test_a_kill_between_the_final_records_and_their_save_repeats_them(run, small_text, monkeypatch):
    save, calls = train_script.CheckpointWriter.__call__, itertools.count(1)

    def killed(self):
        if next(calls) == 4:  # after those of steps 0, 10 and 20
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(train_script.CheckpointWriter, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*TINY, f"--data={small_text}", "--run=cut")
    monkeypatch.setattr(train_script.CheckpointWriter, "__call__", save)
    assert train("--resume=cut") == 0
    assert reproducible("cut") == reproducible(run)
    assert Path("cut/samples.txt").read_bytes() == (run / "samples.txt").read_bytes()


@pytest.mark.parametrize(
    ("schedule", "max_steps", "expected"),
    [
        ("cosine", 6, "python train.py again/config.json --max_steps=12"),
        ("wsd", 6, "python train.py --resume=again --max_steps=12"),
        ("constant", 6, "python train.py --resume=again --max_steps=12"),
        ("inverse_sqrt", 6, "python train.py --resume=again --max_steps=12"),
        ("cosine", 0, None),
    ],
)
def test_the_closing_lines_name_commands_that_work(run, small_text, capsys, schedule, max_steps, expected):
    """Each is executed; only a learning rate that has not decayed is continued."""
    assert (
        train(*TINY, f"--data={small_text}", "--run=again", f"--schedule={schedule}", f"--max_steps={max_steps}") == 0
    )
    commands = [line.strip() for line in capsys.readouterr().out.partition("\nnext: ")[2].splitlines()]
    longer = [command.partition("   ")[0] for command in commands if "train.py" in command]
    assert longer == ([expected] if expected else [])
    for command in longer:
        assert train(*command.split()[2:]) == 0
        events = read_events("again" if "--resume" in command else "runs/again-1", "step")
        assert events[-1]["step"] == 12


def test_a_damaged_latest_checkpoint_is_passed_over_loudly(run, capsys):
    weights = run / "checkpoints/step-00000020/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert train(f"--resume={run}") == 0
    assert "step-00000020" in capsys.readouterr().err
    assert open_checkpoint(list_checkpoints(run)[-1]).step == 20


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--n_layer=3", ["--n_layer=3", "n_layer=2", "--init_from="]),
        ("--seed=5", ["seed=1337"]),
        ("--tokens_per_step=512", ["tokens_per_step=256"]),
        ("--data=other.txt", ["--data=other.txt"]),
        ("--run=elsewhere", ["stays in its directory"]),
    ],
)
def test_what_would_make_another_experiment_is_refused_on_resume(run, flag, words):
    before = tensors_of(run, 20)
    message = message_of(f"--resume={run}", flag)
    assert all(word in message for word in words), message
    assert tensors_of(run, 20) == before


def test_resume_refuses_presets_missing_runs_and_other_data(run, small_text):
    assert "presets" in message_of("debug", f"--resume={run}")
    assert "does not exist" in message_of("--resume=runs/nowhere")
    Path("runs/empty").mkdir()
    assert "no checkpoint" in message_of("--resume=runs/empty")
    assert "contains these runs: runs/straight" in message_of("--resume=runs")
    run.rename("runs/run")  # a name like that of the folder
    for flags in (["--resume=runs"], [*TINY, "--init_from=runs"]):
        assert "contains these runs: runs/run" in message_of(*flags)
    Path("runs/run").rename(run)
    assert "--resume= is empty" in message_of("--resume=")
    Path("other.txt").write_text(small_text.read_text("utf-8")[:30_000], encoding="utf-8")
    assert "holds other tokens" in message_of(f"--resume={run}", "--max_steps=30", "--data=other.txt")
    assert "already at step 20" in message_of(f"--resume={run}", "--max_steps=3")


@pytest.mark.parametrize(
    "inside",
    ["", "/", "/config.json", "/checkpoints", "/checkpoints/step-00000020/", "/checkpoints/step-00000020/model"],
)
def test_any_path_into_a_run_resumes_it(run, inside):
    assert train(f"--resume={run}{inside}", "--max_steps=22") == 0
    assert read_events(run, "step")[-1]["step"] == 22
    assert json.loads((run / "config.json").read_text())["options"]["run"] == str(run)
    assert list(Path().rglob("lock")) == [run / "lock"]


def test_what_cannot_be_resumed_is_named_with_what_can(run):
    """The advice is executed; nothing is written meanwhile."""
    before = sorted(Path().rglob("*"))
    old = f"{run}/checkpoints/step-00000010"
    for name in ("straight", "runs/strait", "STRAIGHT"):
        assert f"did you mean {run}?" in message_of(f"--resume={name}")
        assert f"did you mean {run}?" in message_of(*TINY, f"--init_from={name}")
    assert f"its run is {run}" in message_of(f"--resume={run}/checkpoints/step-00000015")
    assert sorted(Path().rglob("*")) == before
    assert train(*TINY, f"--init_from={old}", "--run=new", "--max_steps=1", f"--data={dataset_of(run)}") == 0


def dataset_of(run: Path) -> Path:
    return Path(open_checkpoint(list_checkpoints(run)[-1]).state["dataset"]["path"])


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(run, small_text, monkeypatch):
    """By the same command, and by the one that --resume names."""
    evaluate, command = train_script.evaluate, (*TINY, f"--data={small_text}", "--run=early")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_script, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*command)
    monkeypatch.setattr(train_script, "evaluate", evaluate)
    message = message_of("--resume=early")
    assert message.endswith("start it again: python train.py early/config.json")
    assert train("early/config.json") == 0
    assert tensors_of("runs/early-1", 20) == tensors_of(run, 20)
    assert train(*command) == 0
    assert reproducible("early") == reproducible(run)


def test_a_run_does_not_mix_with_other_files(run, small_text):
    Path("documents").mkdir()
    Path("documents/letter.txt").write_text("Dear Anna")
    for name, words in (
        (".", "other files"),
        ("documents", "other files (letter.txt)"),
        (small_text, "not a directory"),
    ):
        before = sorted(Path().rglob("*"))
        assert words in message_of(*TINY, "--data=missing.txt", f"--run={name}")  # before the data are looked for
        assert sorted(Path().rglob("*")) == before


def test_a_run_resumes_from_another_folder(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(f"--resume={tmp_path / run}", "--max_steps=22") == 0
    assert read_events(tmp_path / run, "step")[-1]["step"] == 22


# ---- a new run from old weights


def test_init_from_takes_weights_and_tokenizer(run, tmp_path, capsys):
    letters = tmp_path / "letters.txt"
    letters.write_text("Dear Anna,\nthe cat likes the moon.\n" * 200)
    assert train(*TINY, f"--init_from={run}", f"--data={letters}", "--run=second", "--dropout=0.0") == 0
    first = read_events("second", "eval")[0]
    assert first["val_loss"] < 4.5  # a fresh model starts at ln 257 = 5.5
    assert "--n_layer=3" in message_of(*TINY, f"--init_from={run}", f"--data={letters}", "--n_layer=3")


def test_a_run_from_old_weights_resumes_to_the_same_bits(run, small_text, monkeypatch):
    args = (*TINY, f"--init_from={run}", f"--data={small_text}", "--learning_rate=1e-3")
    assert train(*args, "--run=straight") == 0
    shutil.copytree("straight", "cut")
    shutil.rmtree("cut/checkpoints/step-00000020")
    assert train("--resume=cut") == 0
    assert tensors_of("cut", 20) == tensors_of("straight", 20)
    assert "give one of them" in message_of("--resume=cut", f"--init_from={run}")


def test_init_from_refuses_a_dataset_of_another_tokenizer(run, small_text):
    other = ("--tokenizer=char", "--max_steps=1")
    assert train(*TINY, f"--data={small_text}", *other) == 0
    dataset = next(
        path
        for path in Path("data").iterdir()
        if json.loads((path / "dataset.json").read_text())["tokenizer"]["name"] == "char"
    )
    message = message_of(*TINY, f"--init_from={run}", f"--data={dataset}")
    assert "bytes" in message
    assert "char" in message


def test_eval_only_prints_and_writes_nothing(run, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    assert train(f"--resume={run}", "--eval_only=true") == 0
    assert "bits per byte" in capsys.readouterr().out
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    assert "--init_from" in message_of(*TINY, "--eval_only=true")


# ---- wrong input


def test_a_used_or_locked_directory_is_refused(run, small_text):
    assert "--resume=runs/straight" in message_of(*TINY, f"--data={small_text}", "--run=runs/straight")
    from common.run_directory import RunLock

    with RunLock(run):
        before = sorted(run.rglob("*"))
        assert "another process" in message_of(f"--resume={run}", "--max_steps=30")
        assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n_layr=3"], ["--n_layr=3", "--n_layer"]),
        (["quikstart"], ["quikstart", "quickstart"]),
        (["--n_layer=three"], ["--n_layer=three", "whole number"]),
        (["--dropout=1.5"], ["--dropout=1.5", "0 <= x < 1"]),
        (["--learning_rate=nan"], ["--learning_rate=nan"]),
        (["--n_head=3"], ["n_embd=32", "n_head=3"]),
        (["--n_layr=3", "--dropout=2"], ["--n_layr=3", "--dropout=2"]),
        (["--data=missing.txt"], ["missing.txt", "no dataset, file or folder"]),
        (["--tokens_per_step=100"], ["tokens_per_step=100", "block_size=32"]),
        (["--micro_batch_size=3"], ["micro_batch_size=3"]),
        (["--device=cuda:99"], ["--device=cuda:99"]),
        (["--device=abacus"], ["--device=abacus"]),
        (["--dtype=float16", "--device=cpu"], ["--dtype=float16"]),
        (
            ["--block_size=65536", "--tokens_per_step=65536", "--micro_batch_size=auto"],
            ["too small", "context of 65536", "--block_size="],
        ),
        (["--tokenizer=char", "--sample_prompt=猫"], ["猫"]),
    ],
)
def test_wrong_options_are_one_clear_message(flags, words, small_text):
    message = message_of(*TINY, f"--data={small_text}", *flags)
    assert all(word in message for word in words), message
    assert not Path("runs").exists()


def test_empty_and_binary_texts_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ab\0cd" * 100)
    assert "empty.txt" in message_of(*TINY, "--data=empty.txt")
    assert "binary.txt" in message_of(*TINY, "--data=binary.txt")
    assert not Path("runs").exists()


def test_the_script_exits_with_2_and_no_traceback():
    process = start("debug", "--n_layr=3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.startswith("error: ")
    assert "Traceback" not in output


def test_an_update_without_a_finite_gradient_is_skipped_and_never_saved(small_text, monkeypatch):
    update = train_script.update

    def broken_at(steps):
        calls = itertools.count()
        nan = float("nan")
        return lambda *args: (nan, nan) if next(calls) in steps else update(*args)

    monkeypatch.setattr(train_script, "update", broken_at({5, 6}))
    assert train(*TINY, f"--data={small_text}", "--run=spiky") == 0
    assert [event["step"] for event in read_events("spiky", "skip")] == [6, 7]  # the step that the update would end
    monkeypatch.setattr(train_script, "update", broken_at(range(12, 1000)))
    message = message_of(*TINY, f"--data={small_text}", "--run=broken")
    assert "--resume=broken --from=step-0 --learning_rate=" in message
    assert open_checkpoint(list_checkpoints(Path("broken"))[-1]).step == 0


def test_a_full_disk_stops_no_training(small_text, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise SaveFailed("no room")

    with monkeypatch.context() as patch:
        patch.setattr("training.saving.save_checkpoint", full)
        message = message_of(*TINY, f"--data={small_text}", "--run=full")
    assert (
        "full has no checkpoint; free disk space or memory, then start again: python train.py full/config.json"
        in message
    )
    assert (
        capsys.readouterr().out.count("not saved: no room") == 5
    )  # at every evaluation, once more at the last step, and at the end
    assert read_events("full", "step")[-1]["step"] == 20
    assert "full has no checkpoint" in message_of("--resume=full")
    assert train("full/config.json") == 0  # what both messages say
    assert read_events("runs/full-1", "step")[-1]["step"] == 20
    assert train(*TINY, f"--data={small_text}", "--run=full") == 0
    assert "full ended before its first checkpoint, and begins anew" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_budget_becomes_a_number_of_steps_that_can_be_repeated(optimizer, small_text, monkeypatch):
    """The discarded steps that measure the speed leave no trace: the repeated run measures nothing and has the same
    bits."""
    monkeypatch.setattr("training.budget.Budget.is_spent", lambda self, now: False)  # however slow this machine gets
    Path("timed.py").write_text(
        f"optimizer = '{optimizer}'\nschedule = 'wsd'\nbudget_minutes = 3\nwarmup_steps = 5\neval_interval = 1000"
    )
    flags = [flag for flag in TINY if not flag.startswith(("--max_steps", "--eval_interval"))]
    assert train("debug", "timed.py", *flags[1:], f"--data={small_text}", "--budget_minutes=0.01", "--run=timed") == 0
    saved = json.loads(Path("timed/config.json").read_text())["options"]
    assert saved["budget_minutes"] is None
    assert saved["max_steps"] == read_events("timed", "step")[-1]["step"]
    plans = [
        json.loads(line)["timing"] for line in Path("timed/metrics.jsonl").read_text().splitlines() if '"plan"' in line
    ]
    assert plans[-1] == {"max_steps": saved["max_steps"], "decay_steps": saved["decay_steps"]}
    assert train("timed/config.json", "--threads=1", "--run=timed again") == 0
    assert tensors_of("timed again", saved["max_steps"]) == tensors_of("timed", saved["max_steps"])


def test_a_flag_for_the_length_wins_over_the_other_in_a_preset(small_text):
    Path("timed.py").write_text("budget_minutes = 3")
    assert train("timed.py", *TINY[1:], f"--data={small_text}", *SHAPE, "--run=short") == 0
    assert read_events("short", "step")[-1]["step"] == 20
    assert "give one of them" in message_of(*TINY, f"--data={small_text}", "--budget_minutes=1")


def test_a_loss_scale_that_is_too_large_is_halved_and_no_update_counts_as_skipped(small_text, monkeypatch):
    """float16's scaler, here on the CPU: the first updates overflow, the scale comes down, and the model learns."""
    monkeypatch.setattr("training.setup.make_scaler", lambda _: torch.amp.GradScaler("cpu", init_scale=2.0**127))
    assert train(*TINY, f"--data={small_text}", "--run=scaled", "--log_interval=1") == 0
    steps = read_events("scaled", "step")
    assert steps[0]["grad_norm"] is None  # infinite
    assert read_events("scaled", "skip") == []
    assert steps[-1]["loss"] < 5  # a uniform guess has ln 257 = 5.5
    scale = open_checkpoint(list_checkpoints(Path("scaled"))[-1]).state["progress"]["grad_scaler"]["scale"]
    assert 1 <= scale < 2.0**127


def test_attention_triton_trains_and_samples_as_sdpa_does(small_text, capsys):
    """Under Triton's interpreter, which tests set: the whole program with the fused kernel in it."""
    pytest.importorskip("triton", reason="the kernel is Triton's")
    for path in ("sdpa", "triton"):
        short = ("--max_steps=2", "--eval_interval=2", "--eval_tokens=64", "--sample_tokens=2", "--final_samples=0")
        short += ("--tokens_per_step=256", "--final_eval=false")
        assert train(*TINY, *SHAPE, f"--data={small_text}", f"--run=runs/{path}", f"--attention={path}", *short) == 0
        assert f"attention: {path}," in capsys.readouterr().out
    ours, its = (
        [event.get("loss", event.get("val_loss")) for event in read_events(f"runs/{path}")]
        for path in ("triton", "sdpa")
    )
    assert ours == pytest.approx(its, rel=1e-5)
    assert (
        sample_script.main(
            ["--run=runs/triton", "--attention=triton", "--max_new_tokens=3", "--device=cpu", "--dtype=float32"]
        )
        == 0
    )


def test_attention_that_cannot_run_is_refused_with_the_reason(small_text, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = message_of(*TINY, f"--data={small_text}", "--attention=triton", "--device=cpu")
    assert message == "--attention=triton: Triton needs a GPU, the device is cpu; use --attention=auto"
    assert not Path("runs").exists()


def test_random_weights_are_never_the_best_ones(small_text, monkeypatch):
    """A learning rate that is far too high makes the model worse than random numbers."""
    monkeypatch.setattr("training.state.MIN_HIGH", 1000)  # or else it would not be saved
    assert train(*TINY, f"--data={small_text}", "--run=run", "--learning_rate=30", "--grad_clip=none") == 0
    losses = {event["step"]: event["val_loss"] for event in read_events("run", "eval")}
    assert losses[0] < min(losses[10], losses[20])
    best = find_checkpoint(Path("run"), "best")
    assert best.name != "step-00000000"
    last = f"{min(losses.keys() - {0}, key=losses.__getitem__):08d}"
    assert best.name == f"step-{last}"


def test_weights_that_a_run_starts_from_can_be_its_best_ones(run, small_text, monkeypatch):
    monkeypatch.setattr("training.state.MIN_HIGH", 1000)
    flags = [*(flag for flag in TINY if "n_" not in flag), f"--data={small_text}", f"--init_from={run}"]
    assert train(*flags, "--run=worse", "--learning_rate=30", "--grad_clip=none") == 0
    assert find_checkpoint(Path("worse"), "best").name == "step-00000000"
    assert "the best is step 0" in Path("worse", "samples.txt").read_text("utf-8")
