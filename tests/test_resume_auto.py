"""--resume=auto: one command that begins a run, goes on with it, and says when it is complete; and the same command
again, without it, where a run was killed before its first checkpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest

import config
import train as train_script
from checkpoint import list_checkpoints, open_latest
from common.run_directory import RunLock, asked_before
from common.run_state import read_state
from config import restart, trying
from config.resume import asked
from tests import test_trying
from tests.test_train import message_of, read_events, reproducible, tensors_of, train, train_until_cut
from training.interrupt import STOPPED
from training.saving import CheckpointWriter

TINY = ("debug", "--n_layer=1", "--tokens_per_step=256", "--sample_tokens=5", "--threads=1", "--dtype=float32")
SHORT = (*TINY, "--max_steps=8", "--eval_interval=4", "--eval_tokens=500", "--final_eval=false", "--compile=false")
PLANNED = ("--n_layer=1", "--n_embd=16", "--block_size=16", "--tokens_per_step=64", "--threads=1", "--dtype=float32")
PLANNED += ("--sample_tokens=0", "--eval_tokens=300", "--compile=false", "--eval_interval=50")
AUTO = "--resume=auto"


@pytest.fixture
def flags(tmp_path, monkeypatch, small_text) -> list[str]:
    """In a folder with a space."""
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copyfile(small_text, "text.txt")
    return [*SHORT, "--data=text.txt", "--tokenizer=bytes", "--run=my run"]


def options_of(run: str) -> dict:
    return json.loads(Path(run, "config.json").read_text("utf-8"))["options"]


# ---- one command


def test_it_begins_goes_on_and_ends(flags, monkeypatch, capsys):
    """Bitwise as without interruption; the third time nothing is done, and no model is built."""
    assert train(*flags[:-1], "--run=whole") == 0
    train_until_cut(monkeypatch, "killed", 6, [*flags, AUTO])
    assert open_latest(Path("my run")).step == 4
    assert train(*flags, AUTO) == 0
    out = capsys.readouterr().out
    assert "my run is resumed\n" in out
    assert "changed on resume" not in out
    assert tensors_of("my run", 8) == tensors_of("whole", 8)
    assert reproducible("my run") == reproducible("whole")
    monkeypatch.setattr(train_script, "train_model", None)
    Path("my run/run_state.json").unlink()  # killed before it could tell
    assert train(*flags, AUTO) == 0
    out = capsys.readouterr().out
    assert out == (
        'my run is complete at step 8; next: python sample.py --run="my run"; to train longer: --resume="my run"'
        " --max_steps=16 (its learning rate has decayed: README, --resume)\n"
    )
    assert read_state(Path("my run"))["state"] == "done"


def test_without_a_name_or_with_another_resume_it_is_refused(flags):
    assert "give it with --run=PATH" in message_of(*flags[:-1], AUTO)
    assert "without another --resume" in message_of("--resume=my run", AUTO, "--run=x")


def test_changed_flags_follow_the_rules_of_a_resume(flags, monkeypatch, capsys):
    train_until_cut(monkeypatch, "SIGTERM", 5, [*flags, AUTO])
    for _ in range(2):
        assert "n_embd=64: the run was started with n_embd=32" in message_of(*flags, AUTO, "--n_embd=64")
    capsys.readouterr()
    assert train(*flags, AUTO, "--learning_rate=1e-4", "--max_steps=12") == 0
    out = capsys.readouterr().out
    assert "changed on resume: max_steps=12 (was 8), learning_rate=0.0001 (was 0.01)\n" in out
    assert asked_before(Path("my run"))["max_steps"] == 12
    assert train(*flags, AUTO, "--learning_rate=1e-4", "--max_steps=12") == 0
    assert "is complete at step 12" in capsys.readouterr().out
    assert train(*flags, AUTO, "--max_steps=14") == 0, "and back: the rate of the command has changed again"
    assert "max_steps=14 (was 12), learning_rate=0.01 (was 0.0001)\n" in capsys.readouterr().out
    assert "n_embd=64: the run was started with" in message_of(*flags, AUTO, "--n_embd=64"), "although it is complete"
    assert train(*flags, AUTO, "--max_steps=14", "--threads=2") == 0


def test_what_was_changed_by_hand_is_kept_by_the_repeated_command(flags, monkeypatch):
    train_until_cut(monkeypatch, "SIGTERM", 3, [*flags, AUTO])
    train_until_cut(monkeypatch, "SIGTERM", 2, ["--resume=my run", "--learning_rate=1e-4", "--max_steps=10"])
    assert train(*flags, AUTO) == 0
    options = options_of("my run")
    assert (options["learning_rate"], options["max_steps"], open_latest(Path("my run")).step) == (1e-4, 10, 10)


def test_a_preset_that_was_edited_is_compared_too(flags, monkeypatch):
    Path("mine.py").write_text("n_layer = 1\nlearning_rate = 1e-3\nsample_prompt = 'a\\n\\\\b'\n")
    train_until_cut(monkeypatch, "SIGTERM", 3, [flags[0], "mine.py", *flags[2:], AUTO])
    Path("mine.py").write_text("n_layer = 1\nlearning_rate = 2e-3\nsample_prompt = 'b\\n\\\\n\\t'\n")
    assert train(flags[0], "mine.py", *flags[2:], AUTO) == 0
    options = options_of("my run")
    assert (options["learning_rate"], options["sample_prompt"]) == (2e-3, "b\n\\n\t")
    Path("mine.py").write_text("n_layer = 2\n")
    assert "was started with n_layer=1" in message_of(flags[0], "mine.py", *flags[2:], AUTO)


def test_a_run_of_an_earlier_version_is_compared_with_its_options(flags, monkeypatch):
    train_until_cut(monkeypatch, "SIGTERM", 3, flags)
    Path("my run/run.json").write_text('{"ordinal": 1}\n')
    assert train(*flags, AUTO) == 0
    assert open_latest(Path("my run")).step == 8


def test_a_time_budget_is_spent_once(flags, monkeypatch, capsys):
    """Its steps are planned at first, with the plan of the text; the repeated command trains what is left of them."""
    command = [*PLANNED, "--data=text.txt", "--run=my run", "--budget_minutes=0.05", AUTO]
    train_until_cut(monkeypatch, "SIGTERM", 60, command)
    planned = options_of("my run")
    capsys.readouterr()
    assert train(*command) == 0
    assert "budget 0:" not in capsys.readouterr().out
    after = options_of("my run")
    assert (after["max_steps"], after["learning_rate"]) == (planned["max_steps"], planned["learning_rate"])
    assert train(*command) == 0
    assert "is complete" in capsys.readouterr().out
    again = [arg.replace("=0.05", "=0.1") for arg in command]
    message = message_of(*again)
    assert "--budget_minutes=0.1: my run was begun with budget_minutes=0.05" in message
    assert '--resume="my run" --budget_minutes=MORE' in message
    done = open_latest(Path("my run")).step
    assert train("--resume=my run", "--budget_minutes=0.02") == 0, "by hand: as much more"
    assert open_latest(Path("my run")).step > done


def test_weights_to_start_from(flags, monkeypatch):
    assert train(*flags[:-1], "--run=old") == 0
    command = [
        "--init_from=old",
        "--data=text.txt",
        "--max_steps=8",
        "--eval_interval=4",
        "--keep_share=0",
        "--run=new",
    ]
    train_until_cut(monkeypatch, "killed", 6, [*command, AUTO])
    assert train(*command, AUTO) == 0
    assert open_latest(Path("new")).step == 8
    message = message_of("--init_from=other", *command[1:], AUTO)
    assert "new was begun with init_from=old, and goes on with that" in message


@pytest.mark.parametrize("moment", [2, 6, 9, 14, 19])
def test_a_chain_of_runs(flags, monkeypatch, capsys, moment):
    """Two runs of 8 steps, the second one learning from the first; killed before and after checkpoints of each."""
    command = [*flags, "--teachers=1", AUTO]
    train_until_cut(monkeypatch, "killed", moment, command) if moment < 17 else None
    assert train(*command) == 0
    assert sorted(path.name for path in Path().iterdir() if path.is_dir()) == ["data", "my run", "my run-teacher"]
    assert [open_latest(Path(run)).step for run in ("my run", "my run-teacher")] == [8, 8]
    assert options_of("my run")["teacher"]
    capsys.readouterr()
    assert train(*command) == 0
    assert "my run is complete at step 8" in capsys.readouterr().out


def test_a_run_in_use_is_refused(flags, monkeypatch):
    train_until_cut(monkeypatch, "SIGTERM", 5, [*flags, AUTO])
    with RunLock(Path("my run")):
        assert "another process is writing there" in message_of(*flags, AUTO)


def test_all_that_a_command_can_give_becomes_flags_again():
    """A changed option is passed on as a flag; text with escapes, lists and none included."""
    options = config.load(
        "train.py", ["debug", "--exclude=a", "--exclude=b c", r"--separator=\n\\n", "--patience=none"]
    )
    given = asked(options)
    flags = [flag for name in given for flag in options.loader.options[name].as_flags(options.values[name])]
    assert {name: config.load("train.py", flags).values[name] for name in given} == {
        name: options.values[name] for name in given
    }


# ---- the trials of --try


@pytest.fixture
def trials(tmp_path, monkeypatch, small_text) -> list[str]:
    monkeypatch.chdir(tmp_path)
    test_trying.inject_cost(monkeypatch.setattr)
    monkeypatch.setattr(trying, "run_process", test_trying.run_here)
    return [f"--data={small_text}", "--try=2", *test_trying.QUICK, "--run=run"]


def test_trials_go_on_and_their_run_is_found_complete(trials, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(trying, "run_process", lambda *args: STOPPED)
        assert train(*trials, AUTO) == STOPPED
    assert read_state(Path("run"))["state"] == "stopped"
    assert train(*trials, AUTO) == 0
    assert "going on with the trials of run" in capsys.readouterr().out
    assert read_state(Path("run"))["state"] == "done"
    assert train(*trials, AUTO) == 0
    assert "run is complete at step" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["claim_run", "write_json"])
def test_trials_that_were_killed_at_once_begin_anew(trials, monkeypatch, moment):
    make = getattr(trying, moment)

    def interrupted(*args, **named):
        make(*args, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trying, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(*trials)
    assert train(*trials) == 0
    assert list_checkpoints(Path("run"))


# ---- the same command, without --resume=auto


def test_a_run_without_a_checkpoint_begins_anew(flags, monkeypatch, capsys):
    """As a supervisor does it; the records of the killed one are kept."""

    def fail(writer):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "__call__", fail)
        patch.setattr(CheckpointWriter, "try_again", fail)
        train_until_cut(monkeypatch, "killed", 6, flags)
    assert not list_checkpoints(Path("my run"))
    former = Path("my run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(*flags) == 0
    records = "its former records are now metrics.jsonl.old and samples.txt.old\n"
    assert f"my run ended before its first checkpoint, and begins anew; {records}" in capsys.readouterr().out
    assert Path("my run/metrics.jsonl.old").read_bytes() == former
    assert [event["step"] for event in read_events("my run", "eval")] == [0, 4, 8]
    assert "holds a run already" in message_of(*flags)


# ---- config.json repeats the run that it lies in


def test_it_repeats_a_changed_run_from_any_directory(flags, monkeypatch):
    assert train(*flags[:-1], "--run=old") == 0
    command = [
        "--init_from=old",
        "--data=text.txt",
        "--max_steps=4",
        "--eval_interval=4",
        "--keep_share=0",
        "--threads=1",
    ]
    assert train(*command, "--run=new") == 0
    assert train("--resume=new", "--max_steps=6", "--grad_clip=2") == 0
    config_file, expected = Path("new/config.json").absolute(), options_of("new")
    assert expected["data"] == os.path.abspath("text.txt")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert train(str(config_file), "--run=again") == 0
    found = options_of("again")
    assert {name for name in found if found[name] != expected[name]} == {"run", "resume"}
    assert (found["max_steps"], found["grad_clip"]) == (6, 2)


def test_it_is_written_again_where_it_was_deleted_edited_or_not_written(flags, monkeypatch):
    train_until_cut(monkeypatch, "SIGTERM", 5, flags)
    whole = options_of("my run")
    for content in (None, "{}"):
        Path("my run/config.json").unlink() if content is None else Path("my run/config.json").write_text(content)
        assert train("--resume=my run", "--eval_only") == 0
        assert not Path("my run/config.json").exists() or Path("my run/config.json").read_text() == "{}"
        assert train("--resume=my run") == 0
        assert options_of("my run").keys() == whole.keys()
    save = CheckpointWriter.__call__

    def delete_and_save(writer):
        Path("x/config.json").unlink(missing_ok=True)
        save(writer)

    monkeypatch.setattr(CheckpointWriter, "__call__", delete_and_save)
    assert train(*flags[:-1], "--run=x") == 0
    assert options_of("x")["max_steps"] == 8


def test_the_name_of_a_dataset_stays_one(flags):
    assert train(*flags) == 0
    name = Path(open_latest(Path("my run")).state["dataset"]["path"]).name
    assert train(*[flag for flag in flags[:-1] if "data=" not in flag], f"--data={name}", "--run=x") == 0
    assert (options_of("x")["data"], options_of("x")["data_dir"]) == (name, os.path.abspath("data"))


# ---- what a resume says


@pytest.mark.parametrize("spelling", ["my run", "my run/", "./my run", "{}/my run", "link"])
def test_the_same_directory_may_be_named_again(flags, monkeypatch, spelling):
    train_until_cut(monkeypatch, "SIGTERM", 5, flags)
    Path("link").symlink_to("my run")
    assert train("--resume=my run", f"--run={spelling.format(Path.cwd())}") == 0
    assert open_latest(Path("my run")).step == 8
    assert "a resumed run stays in its directory my run" in message_of("--resume=my run", "--run=other")


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--micro_batch_size=2", "micro_batch_size 8 → 2"), ("--threads=2", "threads 1 → 2"),
        ("--dtype=bfloat16", "dtype float32 → bfloat16"), ("--dtype=float32", None), ("--micro_batch_size=auto", None),
        ("--activation_checkpointing", "activation_checkpointing False → True"), ("--attention=auto", None),
    ],
)  # fmt: skip
def test_what_may_change_the_bits_is_said(flags, monkeypatch, capsys, flag, line):
    """Not where an automatic choice is the same as before."""
    train_until_cut(monkeypatch, "SIGTERM", 5, flags)
    capsys.readouterr()
    assert train("--resume=my run", flag) == 0
    out = capsys.readouterr().out
    assert out.count("the resume may not be bitwise exact") == (line is not None)
    assert line is None or f"the resume may not be bitwise exact: {line}\n" in out


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--muon_steps=3", "no effect with optimizer=adamw"), ("--momentum=0.5", "no effect with optimizer=adamw"),
        ("--decay_steps=2", "no effect with schedule=constant"), ("--cuda_graphs=false", "no effect on a CPU"),
        ("--warmup_steps=1", "the run is at step 5, after this warm-up and its own of 2 steps"),
        ("--deterministic", "a CPU always is"), ("--wandb_project=x", "no effect with wandb=none"),
        ("--max_steps=4", "already at step 5"),
    ],
)  # fmt: skip
def test_flags_that_change_nothing_are_refused(flags, monkeypatch, flag, reason):
    train_until_cut(monkeypatch, "SIGTERM", 5, [*flags, "--schedule=constant", "--warmup_steps=2"])
    assert reason in message_of("--resume=my run", flag)
    equal = ("--warmup_steps=2", "--max_steps=8", "--decay_steps=none", "--cuda_graphs=true", "--muon_steps=5")
    assert train("--resume=my run", *equal, "--warmup_steps=2") == 0


def test_a_complete_run_says_what_would_train_it_further(flags, capsys):
    assert train(*flags, "--schedule=constant") == 0
    message = message_of("--resume=my run", "--learning_rate=1e-4", "--final_samples=9")
    assert (
        "--learning_rate=0.0001 and --final_samples=9: the run is complete at step 8, and trains no further" in message
    )
    assert message.endswith('to train longer: --resume="my run" --max_steps=16')
    capsys.readouterr()
    assert train("--resume=my run", "--max_steps=8", "--schedule=constant") == 0
    out = capsys.readouterr().out
    assert "the run is complete at step 8" in out
    assert "next: python sample.py" in out
    assert train("--resume=my run", "--learning_rate=1e-4", "--max_steps=10") == 0


@pytest.mark.parametrize(
    "edit",
    [
        {"options": []}, {"progress": None}, {"step": "8"}, {"progress": {"stale": "x", "finished_step": 8}},
        {"options": {"max_steps": {}, "patience": []}},
    ],
    ids=str,
)  # fmt: skip
def test_a_crafted_state_is_left_to_the_checks_of_the_resume(flags, edit):
    assert train(*flags) == 0
    path = list_checkpoints(Path("my run"))[-1] / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | edit))
    assert restart._last_state(Path("my run")) == {}
    assert train(*flags, AUTO) == 0, "it is damaged: the checkpoint before it goes on"


@pytest.mark.parametrize("content", ["", "[]", '{"asked": 3}', '{"asked": {"n_layer": [], "no_such": {}}}'])
def test_a_crafted_run_json_ends_in_no_traceback(flags, monkeypatch, content):
    train_until_cut(monkeypatch, "SIGTERM", 5, flags)
    Path("my run/run.json").write_text(content)
    assert train(*flags, AUTO) == 0, "what looks new is what the run has"
