"""The first minutes of a run: what is printed, refused, named and sampled before and while it trains."""

import json
import re
import shlex
from pathlib import Path

import pytest

import sample as sample_script
import train as train_script
from errors import UserError, quote
from training.prompt import MAX_CHARACTERS

SHORT = ("--max_steps=2", "--eval_interval=1", "--log_interval=1", "--threads=1", "--dtype=float32")
SMALL = ("debug", *SHORT, "--tokens_per_step=64", "--micro_batch_size=2", "--block_size=32", "--sample_tokens=8")


def train(*args: str) -> int:
    return train_script.main(list(args))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def documents(tmp_path) -> Path:
    """A folder of 40 short documents."""
    folder = tmp_path / "my letters"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Dear {'ABCDEFGH'[i % 8]}, this is letter number {i}.\nYours, {i}\n" * 3)
    return folder


# ---- what is printed


def test_a_missing_file_is_named_before_anything_else(capsys):
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        train(*SMALL, "--data=nowhere.txt")
    assert capsys.readouterr().out == ""


def test_the_choices_are_one_line_and_verbose_gives_the_reasons(small_text, capsys):
    assert train(*SMALL, f"--data={small_text}", "--run=quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    [choices] = [line for line in lines if "attention:" in line]
    assert "--verbose=true" in choices
    assert not any(line.startswith("  ") and "no fused kernel" in line for line in lines)
    order = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in ("data:", "model:", "run:")]
    assert order == sorted(order)
    assert "no fused kernel" in json.loads(Path("quiet/config.json").read_text())["auto"]["attention"]
    assert train(*SMALL, f"--data={small_text}", "--run=wordy", "--verbose=true") == 0
    assert "\n  attention: no fused kernel" in capsys.readouterr().out


def test_the_evaluation_of_the_whole_val_split_says_so(small_text, capsys):
    assert train(*SMALL, f"--data={small_text}", "--run=run", "--eval_tokens=100") == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^step \d+: val loss", out, re.M)) == 3
    assert len(re.findall(r"^step 2: whole val split: val loss", out, re.M)) == 1
    assert train("--resume=run", "--eval_only=true") == 0
    assert "whole val split: val loss" in capsys.readouterr().out


def test_no_note_blames_a_flag_that_was_not_given(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A short text about a cat and a moon. " * 60)
    flags = ("--max_steps=1", "--tokens_per_step=64", "--block_size=32", "--n_layer=1", "--n_embd=16", "--n_head=2")
    assert train("quickstart", "--data=short.txt", *flags, "--threads=1", "--sample_tokens=0") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert any("vocab_size" in note for note in notes)
    assert any("warmup_steps" in note for note in notes)
    assert not any("--" in note for note in notes)


# ---- what is refused


@pytest.mark.parametrize("characters", [150, 1000])
def test_a_small_text_gets_a_command_that_works(characters, tmp_path):
    (tmp_path / "two words.txt").write_text("It was a day in May. " * 99)
    text = (tmp_path / "two words.txt").read_text()[:characters]
    (tmp_path / "two words.txt").write_text(text)
    with pytest.raises(UserError, match="too small") as caught:
        train("debug", *SHORT, "--data=two words.txt", "--block_size=2048", "--tokens_per_step=2048")
    command = shlex.split(str(caught.value).rpartition("context: ")[2])
    assert command[:2] == ["python", "train.py"]
    assert train(*command[2:]) == 0


@pytest.mark.parametrize("characters", [1, 2, 10])
def test_a_text_too_small_for_any_context_gets_no_command_for_it(characters, tmp_path):
    (tmp_path / "tiny.txt").write_text("It was a day in May, and it was late. Yes."[:characters])
    with pytest.raises(UserError, match=r"too small|one character long") as caught:
        train(*SMALL, "--data=tiny.txt")
    assert "block_size" not in str(caught.value)
    assert not Path("runs").exists()


# ---- the run's name


def test_a_run_is_named_after_its_text(small_text, documents, capsys):
    assert train(*SMALL, f"--data={small_text}") == 0
    assert train(*SMALL, f"--data={small_text}") == 0
    assert train("debug", *SMALL[1:], f"--data={documents}", "--init_from=runs/sätze_1-1") == 0
    assert {path.name for path in Path("runs").iterdir()} == {"sätze_1-1", "sätze_1-2", "my_letters-1"}
    assert "run: runs/my_letters-1" in capsys.readouterr().out


def test_a_run_of_a_preset_with_its_own_data_is_named_after_the_preset(small_text, tmp_path):
    (tmp_path / "mine.py").write_text(f"data = {str(small_text)!r}\n")
    assert train(*SMALL, "mine.py", "--sample_tokens=0") == 0
    assert Path("runs/mine-1").is_dir()
    assert train("runs/mine-1/config.json", "--max_steps=1") == 0
    assert Path("runs/mine-2").is_dir()


# ---- samples


def headings(run: str) -> list[str]:
    return re.findall(r"^==== (.*) ====$", (Path(run) / "samples.txt").read_text("utf-8"), re.M)


def test_samples_are_titled_and_untrained_weights_write_none(small_text, capsys):
    assert train(*SMALL, f"--data={small_text}", "--run=run", "--final_samples=2", "--learning_rate=0.01") == 0
    cut = "cut at its maximum length"
    expected = [
        f"step 1 (sample, the best so far, {cut})",
        f"step 2 (sample, the best so far, {cut})",
        f"step 2 (sample 1 of 2, the best so far, {cut})",
        f"step 2 (sample 2 of 2, the best so far, {cut})",
    ]
    assert headings("run") == expected
    assert all(f"---- {heading} ----" in capsys.readouterr().out for heading in expected[:1])
    assert train(*SMALL, f"--data={small_text}", "--run=next", "--init_from=run", "--learning_rate=9") == 0
    assert headings("next")[0] == f"step 0 (sample, before training, {cut})"
    assert headings("next")[-1].startswith("step 2 (sample 3 of 3, the best is step 0, ")


def test_samples_of_one_long_document_start_with_its_words(small_text, capsys):
    assert train(*SMALL, f"--data={small_text}", "--run=run") == 0
    prompt = re.search(r"^samples start with '(.*?)'", capsys.readouterr().out, re.M)[1]
    assert 3 <= len(prompt) <= MAX_CHARACTERS
    assert prompt in small_text.read_text("utf-8")
    assert f"====\n{prompt}" in Path("run/samples.txt").read_text("utf-8")
    assert sample_script.main(["--run=run", "--max_new_tokens=3"]) == 0
    assert f"--prompt={quote(prompt)}" in capsys.readouterr().err
    assert sample_script.main(["--run=run", "--max_new_tokens=3", "--prompt=A"]) == 0
    assert "few document" not in capsys.readouterr().err


def test_samples_of_many_documents_and_of_a_given_prompt_do_not(small_text, documents, capsys):
    assert train(*SMALL, f"--data={documents}", "--run=letters") == 0
    assert sample_script.main(["--run=letters", "--max_new_tokens=3"]) == 0
    assert train(*SMALL, f"--data={small_text}", "--run=new", "--sample_prompt=") == 0
    assert train(*SMALL, f"--data={small_text}", "--run=given", "--sample_prompt=Anna") == 0
    seen = capsys.readouterr()
    assert train("--resume=new", "--eval_only=true") == 0
    assert "samples start with" not in seen.out + capsys.readouterr().out
    assert "few document" not in seen.err
    assert "====\nAnna" in Path("given/samples.txt").read_text("utf-8")


def test_a_prompt_that_cannot_be_encoded_is_refused_before_the_run_begins(small_text):
    with pytest.raises(UserError, match="sample_prompt"):
        train(*SMALL, f"--data={small_text}", "--tokenizer=char", "--sample_prompt=猫", "--run=run")
    assert not Path("run").exists()
