"""Options of runs that start from another one: --resume, --init_from, --eval_only, a run's config.json as a preset."""

import json
import os
import shutil
from pathlib import Path

import pytest

import config
import train as train_script
from checkpoint import list_checkpoints
from errors import UserError

QUICK = ("--max_steps=2", "--tokens_per_step=64", "--warmup_steps=1", "--sample_tokens=2", "--final_samples=1")
SMALL = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--threads=1", "--dtype=float32")
LETTERS = "abc abd acd bcd "


def train(*args: str) -> int:
    return train_script.main(list(args))


def options_of_run(run: str) -> dict:
    return json.loads(Path(run, "config.json").read_text("utf-8"))["options"]


def message_of(*args: str) -> str:
    with pytest.raises(UserError) as caught:
        train(*args)
    return str(caught.value)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(LETTERS * 300)
    Path("other.txt").write_text(LETTERS[::-1] * 200)


@pytest.fixture
def run(project, capsys):
    assert train("--data=text.txt", "--tokenizer=bytes", *QUICK, *SMALL, "--run=run") == 0
    capsys.readouterr()
    return "run"


TOKENIZERS = [("char",), ("bytes",), ("bpe", "--vocab_size=260")]
if os.environ.get("TIKTOKEN_CACHE_DIR"):
    TOKENIZERS.append(("gpt2",))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda given: given[0])
def test_runs_of_every_tokenizer_are_continued_evaluated_repeated_and_used_as_initial_weights(
    project, tokenizer, capsys
):
    """A run without --init_from has the quickstart preset's tokenizer options, which weights with another tokenizer
    must not be checked against."""
    name, *flags = tokenizer
    assert train("--data=text.txt", f"--tokenizer={name}", *flags, *QUICK, *SMALL, "--run=one") == 0
    assert train("--init_from=one", "--data=other.txt", "--eval_only=true", "--threads=1") == 0
    assert "val loss" in capsys.readouterr().out
    assert train("--resume=one", "--eval_only=true") == 0
    assert train("--resume=one", "--max_steps=3") == 0
    assert train("one/config.json", "--run=again", "--max_steps=2") == 0
    assert train("--init_from=one", "--data=other.txt", *QUICK, "--threads=1", "--run=two") == 0
    assert options_of_run("two")["tokenizer"] == name
    assert train("two/config.json", "--run=three") == 0


def test_flags_of_a_tokenizer_that_is_not_used_are_refused(project):
    assert "--vocab_size=300 has no effect with tokenizer=char" in message_of("--tokenizer=char", "--vocab_size=300")
    assert "--vocab_size=65 has no effect with tokenizer=bytes" in message_of("debug", "--vocab_size=65")
    assert "bpe needs at least 257" in message_of("--vocab_size=65")
    Path("small.py").write_text("tokenizer = 'char'\nvocab_size = 65\n")  # no rule of bpe's for a preset of another
    assert config.load("train.py", ["small.py"]).flat()["vocab_size"] == 65


def test_init_from_takes_flags_that_agree_with_the_weights(run):
    common = (f"--init_from={run}", "--data=other.txt", "--eval_only=true", "--threads=1")
    assert train(*common, "--tokenizer=bytes", "--n_layer=1") == 0
    assert "have their own tokenizer" in message_of(*common, "--tokenizer=char")
    assert "have their own tokenizer" in message_of(*common, "--vocab_size=300")
    assert "have n_layer=1" in message_of(*common, "--n_layer=2")


def test_an_evaluation_names_the_flags_that_concern_training_alone(run, capsys):
    for source in ("--resume=run", "--init_from=run"):
        flags = ("--max_steps=9", "--learning_rate=1", "--dtype=float32")
        assert train(source, "--data=text.txt", "--eval_only", "--threads=1", *flags) == 0
        output = capsys.readouterr().out
        assert "note: --max_steps, --learning_rate: no effect with --eval_only\n" in output
        assert "changed on resume" not in output


@pytest.mark.parametrize("value", ["scratch", "resume", "gpt2", "gpt2-xl"])
def test_values_of_init_from_in_nanogpt_are_explained(project, value):
    expected = {"scratch": "leave the flag out", "resume": "write --resume=RUN"}.get(
        value, f"python -m interop import {value} --download"
    )
    assert expected in message_of(f"--init_from={value}")


@pytest.mark.parametrize("name", ["tokenizer", "vocab_size", "split_pattern", "split", "val_fraction", "encoding"])
def test_a_resumed_run_refuses_flags_of_preparation(run, name):
    """They can have no effect on a text that is prepared already; config.json must repeat the run."""
    before = Path(run, "config.json").read_bytes()
    values = {"tokenizer": "char", "vocab_size": "300", "split_pattern": "gpt2", "split": "documents"}
    value = values.get(name) or {"val_fraction": "0.3", "encoding": "latin-1"}[name]
    message = message_of(f"--resume={run}", "--max_steps=3", f"--{name}={value}")
    assert message.startswith(f"--{name}={value}: the run's text was prepared with {name}=")
    assert Path(run, "config.json").read_bytes() == before
    stored = options_of_run(run)[name]
    assert train(f"--resume={run}", "--max_steps=3", f"--{name}={stored}") == 0


def test_repeated_flags_are_compared_with_the_stored_list(project):
    Path("folder").mkdir()
    Path("folder/a.txt").write_text(LETTERS * 300)
    flags = ("--data=folder", "--exclude=*.log", "--exclude=b.txt")
    assert train(*flags, "--tokenizer=bytes", *QUICK, *SMALL, "--run=run") == 0
    assert train("--resume=run", "--max_steps=3", *flags[1:]) == 0
    assert "prepared with exclude=*.log and b.txt" in message_of("--resume=run", "--exclude=a.txt")


def test_a_text_that_is_named_again_may_have_another_folder_and_encoding(run):
    Path("moved").mkdir()
    Path("moved/text.txt").write_text(LETTERS * 300, encoding="utf-16")
    flags = ("--data=moved/text.txt", "--encoding=utf-16", "--data_dir=other")
    assert "add --data" in message_of(f"--resume={run}", "--data_dir=other")
    assert train(f"--resume={run}", "--max_steps=3", *flags) == 0
    assert Path("other").is_dir()
    options = options_of_run(run)
    assert (options["data"], options["encoding"], options["data_dir"]) == (
        os.path.abspath("moved/text.txt"),
        "utf-16",
        os.path.abspath("other"),
    )
    assert train(f"{run}/config.json", "--run=again", "--max_steps=2") == 0
    assert "the run's text was prepared with" in message_of(f"--resume={run}", *flags, "--tokenizer=char")


def test_the_rules_of_a_resumed_run_are_checked_with_its_own_values(project):
    flags = ("--data=text.txt", "--tokenizer=bytes", "--learning_rate=0.02", *QUICK, *SMALL, "--run=run")
    assert train(*flags) == 0  # 0.02 is above the default
    assert "min_learning_rate=0.05 is above learning_rate=0.02" in message_of(
        "--resume=run", "--min_learning_rate=0.05"
    )
    assert train("--resume=run", "--max_steps=3", "--min_learning_rate=0.01") == 0
    assert options_of_run("run")["min_learning_rate"] == 0.01


def test_a_resumed_run_takes_more_minutes_and_they_repeat_as_steps(run, capsys):
    """The measured steps leave no trace: a resume with the steps that the time gave has the same weights."""
    shutil.copytree(run, "copy")
    flags = ("--schedule=wsd", "--decay_steps=none", "--eval_interval=100")
    assert train("--resume=run", "--budget_minutes=0.02", *flags) == 0
    output, options = capsys.readouterr().out, options_of_run("run")
    assert "budget 0:01: " in output
    assert options["max_steps"] > 3
    assert options["budget_minutes"] is None
    length = (f"--max_steps={options['max_steps']}", f"--decay_steps={options['decay_steps']}")
    assert train("--resume=copy", *flags[:1], *flags[2:], *length) == 0
    one, other = (list_checkpoints(Path(name))[-1] / "model" / "model.safetensors" for name in ("run", "copy"))
    assert one.read_bytes() == other.read_bytes()
    assert train("--resume=run") == 0
    assert "the run is complete" in capsys.readouterr().out
    assert "both set the length" in message_of("--resume=run", "--budget_minutes=1", "--max_steps=9999")


def test_the_last_evaluation_of_the_whole_val_split_can_be_left_out(project, capsys):
    flags = ("--data=text.txt", "--tokenizer=bytes", "--eval_tokens=50", *QUICK, *SMALL)
    assert train(*flags, "--run=one") == 0
    assert "whole val split" in capsys.readouterr().out
    assert train(*flags, "--final_eval=false", "--run=two") == 0
    assert "whole val split" not in capsys.readouterr().out
