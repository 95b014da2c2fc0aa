"""--teachers: ordinary runs, one after another, each begun by the command that the one before it printed."""

import json
import os
import shlex
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import train as train_script
from checkpoint import list_checkpoints, open_latest
from common.run_directory import newest_run
from config import chain
from prepare_data.__main__ import main as prepare
from tests.test_train import TINY, message_of, read_events, reproducible, tensors_of, train, train_until_cut
from training.interrupt import STOPPED

FLAGS = (*TINY, "--compile=false", "--tokenizer=bpe", "--vocab_size=300")
PLANNED = ("--n_layer=1", "--n_embd=16", "--block_size=16", "--tokens_per_step=64", "--max_steps=8")
PLANNED += ("--threads=1", "--dtype=float32", "--sample_tokens=0", "--eval_tokens=300", "--compile=false")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def options_of(run):
    return json.loads(Path(run, "config.json").read_text("utf-8"))["options"]


def teachers_of(run):
    return [Path(path).parent.parent.parent.name for path in options_of(run)["teacher"]]


def next_of(out):
    """The arguments that a run has printed for the next one."""
    line = next(line for line in out.splitlines() if line.startswith("now a model that learns from this one, too: "))
    return shlex.split(line.partition("python train.py ")[2])


# ---- the order of the runs


def test_the_last_model_learns_from_all_before_it(capsys, small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=my runs/x", "--teachers=2") == 0
    runs = ["x-teacher", "x-teacher-2", "x"]
    assert sorted(path.name for path in Path("my runs").iterdir()) == sorted(runs)
    assert [teachers_of(f"my runs/{run}") for run in runs] == [[], [], runs[:2]]
    assert [options_of(f"my runs/{run}")["seed"] for run in runs] == [1337, 1338, 1339]
    assert [options_of(f"my runs/{run}")["teachers"] for run in runs] == [2, 1, 0]
    assert len({options_of(f"my runs/{run}")["data"] for run in runs[1:]}) == 1
    out = capsys.readouterr().out
    assert out.count("next: python sample.py") == 1
    assert out.count("70% of the targets are its probabilities") == 1
    lines = ("now another teacher: ", "now a model that learns", 'next: python sample.py --run="my runs/x"')
    assert sorted(map(out.index, lines)) == [*map(out.index, lines)]
    assert newest_run(Path("my runs")).name == "x"
    assert len(list(Path("data").iterdir())) == 1  # the text is prepared once


def test_without_a_name_the_result_has_the_usual_one(capsys):
    """The data of the preset is that of quickstart, too, but here its name is that of a small dataset."""
    Path("text.txt").write_text("some words and " * 2000)
    assert prepare(["text", "--input=text.txt", "--name=python_stdlib", *FLAGS[-2:]]) == 0
    assert train(*FLAGS, "--teachers=1", "--max_steps=2") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["debug-1", "debug-1-teacher"]
    assert newest_run(Path("runs")).name == "debug-1"
    assert train(*FLAGS, "--max_steps=2") == 0
    assert newest_run(Path("runs")).name == "debug-2"


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "preset"])
def test_the_command_that_is_printed_makes_the_same_run(capsys, small_text, planned):
    flags = (*PLANNED, "--teachers=1") if planned else (*FLAGS, "--teachers=1")
    assert train(*flags, f"--data={small_text}", "--run=x") == 0
    argv = next_of(capsys.readouterr().out)
    assert argv[0] == ("--n_layer=1" if planned else str(Path("x-teacher", "config.json")))
    assert train(*[arg for arg in argv if arg != "--run=x"], "--run=again") == 0
    last = open_latest(Path("x")).step
    assert tensors_of("again", last) == tensors_of("x", last)
    assert reproducible("again") == reproducible("x")


@pytest.mark.parametrize("flag", ["--vocab_size=30000", "--tokenizer=bytes", "--val_fraction=0.2", "--split=tail"])
def test_flags_about_the_text_are_for_the_first_run(small_text, flag):
    """With 30,000 ids asked for, the text gives fewer."""
    assert train(*PLANNED, "--teachers=1", f"--data={small_text}", "--run=x", flag) == 0
    assert teachers_of("x") == ["x-teacher"]


def test_a_pipe_is_read_once(small_text):
    read, write = os.pipe()
    Path("part.txt").write_bytes(small_text.read_bytes()[:20_000])
    threading.Thread(target=lambda: (os.write(write, Path("part.txt").read_bytes()), os.close(write))).start()
    assert train(*PLANNED, "--teachers=1", f"--data=/dev/fd/{read}", "--run=x") == 0
    assert teachers_of("x") == ["x-teacher"]


def test_weights_to_start_from_are_those_of_each_model(small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=old") == 0
    flags = ("--max_steps=3", "--keep_share=0", "--teachers=1", "--run=x", f"--data={small_text}")
    assert train("--init_from=old", *flags) == 0
    assert all(Path(options_of(run)["init_from"]).name == "old" for run in ("x-teacher", "x"))


def test_a_share_of_the_teacher_is_for_the_last_run(small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=x", "--teachers=1", "--teacher_share=0.5") == 0
    assert options_of("x")["teacher_share"] == 0.5


def test_the_config_of_a_first_run_repeats_that_run_alone(small_text, capsys):
    assert train(*FLAGS, f"--data={small_text}", "--run=x", "--teachers=1") == 0
    assert "teachers" not in capsys.readouterr().out.partition("now a model")[2].partition("--teachers=0")[0]
    assert train("x-teacher/config.json", "--run=again") == 0
    assert tensors_of("again", 20) == tensors_of("x-teacher", 20)
    assert not Path("again-teacher").exists()


def test_the_losses_of_the_teachers_stand_beside_the_student(capsys, small_text):
    flags = (*FLAGS, f"--data={small_text}")
    assert train(*flags, "--run=teacher", "--max_steps=60") == 0
    assert train(*flags, "--run=student", "--teacher=teacher", "--max_steps=4") == 0
    best, loss = (min(event["val_loss"] for event in read_events(run, "eval")) for run in ("student", "teacher"))
    worse = f"best val loss {best:.4f}, that of the teacher teacher {loss:.4f}; the teacher is better: python sample.py"
    assert f"{worse} --run=teacher\n" in capsys.readouterr().out
    assert train(*flags, "--run=longer", "--teacher=student", "--max_steps=60") == 0
    assert "the teacher is better" not in capsys.readouterr().out


def test_teachers_that_exist_are_those_of_the_last_run_alone(small_text, capsys):
    """The runs before it neither learn from them nor need them, and repeat without them."""
    assert train(*FLAGS, f"--data={small_text}", "--run=old") == 0
    assert train(*FLAGS, f"--data={small_text}", "--run=x", "--teacher=old", "--teachers=2") == 0
    assert [teachers_of(run) for run in ("x-teacher", "x-teacher-2", "x")] == [
        [],
        [],
        ["old", "x-teacher", "x-teacher-2"],
    ]
    assert train("x-teacher-2/config.json", "--run=again", "--seed=1338") == 0
    assert tensors_of("again", 20) == tensors_of("x-teacher-2", 20)


def test_a_teacher_with_a_short_context_is_refused_before_anything_is_trained(small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=short") == 0
    flags = ("--run=x", "--teacher=short", "--teachers=1", "--block_size=64", "--tokens_per_step=256")
    message = message_of(*FLAGS, f"--data={small_text}", *flags)
    assert "its context of 32 is shorter than --block_size=64" in message
    assert not Path("x-teacher").exists()


def test_the_course_of_a_first_run_is_not_the_length_of_the_next(small_text, capsys):
    """With presets, whose options the next run has from config.json of the one before: there patience has set them."""
    flags = [flag for flag in FLAGS if not flag.startswith("--max_steps")]
    flags += [f"--data={small_text}", "--schedule=wsd", "--max_steps=none", "--patience=1", "--eval_interval=4"]
    assert train(*flags, "--run=x", "--teachers=1", "--learning_rate=0.1") == 0
    assert options_of("x-teacher")["max_steps"] is not None
    assert {"--max_steps=none", "--decay_steps=none"} <= {*next_of(capsys.readouterr().out)}


# ---- the time


@pytest.mark.parametrize(("used", "left"), [(0.04, "0.11"), (0.05, "0.1"), (0.5, "0.05")])
def test_the_time_is_shared_and_what_the_first_leaves_is_for_the_last(monkeypatch, small_text, capsys, used, left):
    trained = []

    def stopped(argv):
        trained.append(list(argv))
        return train_script.train_model(argv) if len(trained) == 1 else (STOPPED, [])

    flags = [flag for flag in FLAGS if flag != "--max_steps=20"]
    flags += [f"--data={small_text}", "--teachers=1", "--schedule=wsd", "--budget_minutes=0.15"]
    monkeypatch.setattr(chain, "end_run", ending_after(60 * used, chain.end_run, monkeypatch))
    monkeypatch.setattr(train_script, "end_run", chain.end_run)
    assert chain.train_all(stopped, flags) == STOPPED
    assert "budget 0:03: " in capsys.readouterr().out  # a third
    assert f"--budget_minutes={left}" in trained[1]


def ending_after(seconds, end_run, monkeypatch):
    """end_run as if the run had begun so long ago, and as if it took no time itself."""

    def end(start, *rest):
        now = time.perf_counter()
        monkeypatch.setattr(chain, "time", SimpleNamespace(perf_counter=lambda: now))
        return end_run(replace(start, began=now - seconds), *rest)

    return end


# ---- interruptions


@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_first_run_that_is_cut_goes_on_to_its_student_from_anywhere(monkeypatch, small_text, how):
    flags = [*FLAGS, f"--data={small_text}", "--save_interval=4", "--teachers=1"]
    assert train(*flags, "--run=whole") == 0
    train_until_cut(monkeypatch, how, 13, [*flags, "--run=cut"])
    assert not list_checkpoints(Path("cut"))
    assert "goes on to it: python train.py --resume=cut-teacher" in message_of("--resume=cut")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert train("--resume=../cut-teacher") == 0
    monkeypatch.chdir("..")
    assert list(Path("elsewhere").iterdir()) == []
    for run in ("{}-teacher", "{}"):
        assert tensors_of(run.format("cut"), 20) == tensors_of(run.format("whole"), 20)
    assert teachers_of("cut") == ["cut-teacher"]


def test_a_planned_run_that_is_cut_goes_on_to_its_student_from_anywhere(monkeypatch, small_text):
    flags = [*PLANNED, "--eval_interval=4", f"--data={small_text}", "--teachers=1", "--run=cut"]
    train_until_cut(monkeypatch, "killed", 6, flags)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = f"--data={small_text}", "--data_dir=data", "--encoding=utf-8", "--max_steps=10"  # the text once more
    assert train("--resume=../cut-teacher", "--learning_rate=1e-4", *again) == 0
    monkeypatch.chdir("..")
    assert [options_of(run)["learning_rate"] for run in ("cut-teacher", "cut")] == [1e-4, 1e-4]
    assert [options_of(run)["max_steps"] for run in ("cut-teacher", "cut")] == [10, 8]


def test_a_student_that_is_cut_resumes_as_any_run(monkeypatch, small_text):
    flags = [*FLAGS, f"--data={small_text}", "--save_interval=4", "--teachers=1"]
    assert train(*flags, "--run=whole") == 0
    train_until_cut(monkeypatch, "killed", 33, [*flags, "--run=cut"])
    assert train("--resume=cut") == 0
    assert tensors_of("cut", 20) == tensors_of("whole", 20)


def test_a_student_that_had_not_begun_is_begun_by_its_teacher(monkeypatch, small_text):
    """Ctrl-C after the last step of the first run, or while the second one is planned and compiled."""
    flags = [*FLAGS, f"--data={small_text}", "--teachers=1", "--run=x"]
    with monkeypatch.context() as patch:
        patch.setattr(chain, "release_memory", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(*flags)
    assert open_latest(Path("x-teacher")).step == 20
    assert not list_checkpoints(Path("x"))
    assert train("--resume=x-teacher") == 0
    assert teachers_of("x") == ["x-teacher"]


def interrupt():
    raise KeyboardInterrupt


def test_each_of_several_runs_goes_on_to_the_next_one(monkeypatch, small_text, capsys):
    flags = [*FLAGS, f"--data={small_text}", "--save_interval=4", "--teachers=2"]
    assert train(*flags, "--run=whole") == 0
    train_until_cut(monkeypatch, "killed", 33, [*flags, "--run=cut"])  # in the second one
    capsys.readouterr()
    assert train("--resume=cut-teacher") == 0
    assert (
        "cut-teacher-2 follows this run; to go on with it: python train.py --resume=cut-teacher-2"
        in capsys.readouterr().out
    )
    assert "goes on to it: python train.py --resume=cut-teacher-2" in message_of("--resume=cut")
    assert train("--resume=cut-teacher-2") == 0
    for run in ("{}-teacher", "{}-teacher-2", "{}"):
        assert tensors_of(run.format("cut"), 20) == tensors_of(run.format("whole"), 20)
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith("cut")) == [
        "cut",
        "cut-teacher",
        "cut-teacher-2",
    ]


def test_a_student_that_exists_is_named_and_not_begun_again(capsys, small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=x", "--teachers=1") == 0
    capsys.readouterr()
    for more in ((), ("--max_steps=24",)):
        assert train("--resume=x-teacher", *more) == 0
        assert "x follows this run; to go on with it: python train.py --resume=x\n" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir() if path.name != "data") == ["x", "x-teacher"]


def test_a_resumed_run_may_have_fewer_teachers_and_not_more(monkeypatch, small_text, capsys):
    flags = [*FLAGS, f"--data={small_text}", "--save_interval=4", "--teachers=1", "--run=cut"]
    train_until_cut(monkeypatch, "killed", 13, flags)
    assert "was started with 1, and a resumed one can only have fewer" in message_of(
        "--resume=cut-teacher", "--teachers=2"
    )
    assert train("--resume=cut-teacher", "--teachers=0") == 0
    assert not list_checkpoints(Path("cut"))
    assert "next: python sample.py" in capsys.readouterr().out
    assert train(*FLAGS, f"--data={small_text}", "--run=alone") == 0
    assert "a new run learns from it with --teacher=alone" in message_of("--resume=alone", "--teachers=1")


def test_a_first_run_that_fails_has_no_student(small_text):
    flags = [*FLAGS, f"--data={small_text}", "--run=x", "--teachers=1"]
    assert "no finite gradient" in message_of(*flags, "--learning_rate=1e30", "--grad_clip=none", "--warmup_steps=0")
    assert not list_checkpoints(Path("x"))


# ---- directories


def test_a_directory_in_use_is_refused_and_one_beside_it_left_alone(small_text):
    assert train(*FLAGS, f"--data={small_text}", "--run=x-teacher") == 0
    kept = tensors_of("x-teacher", 20)
    assert train(*FLAGS, f"--data={small_text}", "--run=x", "--teachers=1") == 0
    assert teachers_of("x") == ["x-teacher-2"]
    assert tensors_of("x-teacher", 20) == kept
    message = message_of(*FLAGS, f"--data={small_text}", "--run=x", "--teachers=1")
    assert "--run=x holds a run already" in message
    assert not Path("x-teacher-3").exists()


def test_here_is_a_directory_too(monkeypatch, small_text):
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert train(*FLAGS, f"--data={small_text}", "--data_dir=../data", "--run=.", "--teachers=1") == 0
    assert teachers_of(".") == ["here-teacher"]


def test_nothing_is_made_by_a_plan(small_text):
    assert train(*PLANNED, f"--data={small_text}", "--run=x", "--teachers=1", "--plan") == 0
    assert not Path("x").exists()
