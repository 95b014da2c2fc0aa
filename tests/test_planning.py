"""The plan by the real command: python train.py --data=TEXT without a preset. What a step costs is injected."""

import json
import shlex
from pathlib import Path

import pytest

import config
import train as train_script
from errors import UserError
from training.step_cost import StepCost, fit

QUICK = ("--threads=1", "--dtype=float32", "--sample_tokens=0", "--eval_tokens=300")
TINY = (*QUICK, "--n_layer=1", "--n_embd=16", "--block_size=16", "--tokens_per_step=64", "--max_steps=3")


def train(*args: str) -> int:
    return train_script.main(list(args))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StepCost, "measure", measure)


def measure(self: StepCost, shapes: object) -> None:
    """In the place of the measurement: 100 GFLOP/s."""
    self.pass_seconds, self.update_seconds = (1e-11, 0.0), (1e-11, 0.0)


def options_of(run: str) -> dict:
    return json.loads(Path(run, "config.json").read_text("utf-8"))["options"]


def reasons_of(run: str) -> dict:
    return json.loads(Path(run, "config.json").read_text("utf-8"))["auto"]


def test_plan_prints_six_lines_at_most_and_starts_no_run(capsys, small_text):
    for length in ("--budget_minutes=3", "--budget_minutes=none", "--max_steps=50"):
        assert train(f"--data={small_text}", "--plan", length, *QUICK) == 0
        lines = capsys.readouterr().out.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("plan: "))
        assert 3 < len(lines[first:]) <= 6
        assert "epochs" in lines[first]
    assert not Path("runs").exists()
    assert len(list(Path("data").iterdir())) == 1  # the dataset is prepared once


def test_a_planned_run_is_repeated_by_its_config_and_kept_on_resume(capsys, small_text):
    flags = (f"--data={small_text}", "--max_steps=4", *QUICK)
    assert train(*flags, "--run=runs/one") == 0
    first, reasons = options_of("runs/one"), reasons_of("runs/one")
    assert {"n_layer", "n_embd", "learning_rate", "tokens_per_step", "dropout", "vocab_size"} - reasons.keys() <= {
        "vocab_size"
    }
    assert "max_steps" not in reasons
    assert train("runs/one/config.json", "--run=runs/two") == 0
    out = capsys.readouterr().out
    assert out.count("plan: ") == 1, "a config.json is a preset: the run needs no plan"
    second = options_of("runs/two")
    assert {name: first[name] for name in first if name != "run"} == {n: second[n] for n in first if n != "run"}
    losses = [
        [
            json.loads(line)["loss"]
            for line in Path(run, "metrics.jsonl").read_text("utf-8").splitlines()
            if '"step"' in line and '"loss"' in line
        ]
        for run in ("runs/one", "runs/two")
    ]
    assert losses[0] == losses[1]
    assert train("--resume=runs/one", "--max_steps=5") == 0
    assert "plan: " not in capsys.readouterr().out
    resumed = options_of("runs/one")
    assert {name for name in first if first[name] != resumed[name]} <= {"max_steps", "resume", "run"}
    assert reasons_of("runs/one").items() >= {name: reasons[name] for name in ("n_layer", "dropout")}.items()


def test_the_quickstart_preset_and_others_have_no_plan(capsys, small_text):
    assert config.load("train.py", []).presets == ["quickstart"]
    assert config.load("train.py", ["--max_steps=3"]).presets == ["quickstart"]
    assert config.load("train.py", ["debug", f"--data={small_text}"]).presets == ["debug"]
    assert config.load("train.py", [f"--data={small_text}"]).presets == []
    with pytest.raises(UserError, match="--plan shows the plan of a run that has --data=TEXT and no preset"):
        train("debug", f"--data={small_text}", "--plan")
    with pytest.raises(UserError, match="--plan shows the plan"):
        train("--plan")
    with pytest.raises(UserError, match="a resumed run keeps its options"):
        train("--resume=runs/one", "--plan")


def test_flags_beat_the_plan(capsys, small_text):
    assert train(f"--data={small_text}", *TINY, "--learning_rate=0.02", "--tokenizer=bytes", "--run=runs/hand") == 0
    options = options_of("runs/hand")
    assert (options["n_layer"], options["n_embd"], options["learning_rate"]) == (1, 16, 0.02)
    assert (options["tokenizer"], options["tokens_per_step"], options["max_steps"]) == ("bytes", 64, 3)
    assert options["optimizer"] == "muon"
    out = capsys.readouterr().out
    assert "  flags: " in out
    assert "--n_layer=1 (else" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n_embd=100", "--n_head=3"), "n_embd=100 is not divisible by n_head=3"),
        (("--vocab_size=100",), "bpe needs at least 257"),
        (("--tokenizer=bytes", "--vocab_size=300"), "--vocab_size=300 has no effect with tokenizer=bytes"),
        (("--block_size=100", "--tokens_per_step=128"), "tokens_per_step=128 is not a multiple of block_size=100"),
        (("--max_steps=5", "--budget_minutes=3"), "both set the length"),
        (("--learning_rat=1",), "did you mean --learning_rate"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_before_the_text_is_read(capsys, small_text, flags, message):
    with pytest.raises(UserError, match=message):
        train(f"--data={small_text}", *flags)
    assert not Path("data").exists()


def test_the_weights_of_a_run_keep_their_shape_and_tokenizer(capsys, small_text):
    assert train(f"--data={small_text}", *TINY, "--run=runs/first") == 0
    Path("more.txt").write_text(small_text.read_text("utf-8")[:9000], encoding="utf-8")
    flags = ("--init_from=runs/first", "--data=more.txt", "--max_steps=2", *QUICK)
    assert train(*flags, "--run=runs/second") == 0
    first, second = options_of("runs/first"), options_of("runs/second")
    names = ("n_layer", "n_embd", "n_head", "block_size", "positions", "tokenizer", "vocab_size")
    assert [first[name] for name in names] == [second[name] for name in names]
    assert second["learning_rate"] < first["learning_rate"]
    assert second["tokens_per_step"] % second["block_size"] == 0


def test_a_text_shorter_than_the_context_of_the_weights_is_refused_without_a_wrong_command(small_text):
    assert train(f"--data={small_text}", *TINY, "--run=runs/first") == 0
    Path("short.txt").write_text("A cat.", encoding="utf-8")
    with pytest.raises(UserError, match="the weights have a context of 16") as caught:
        train("--init_from=runs/first", "--data=short.txt", "--max_steps=2", *QUICK)
    assert "--block_size" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 300, 3000])
def test_a_text_that_is_too_short_is_refused_with_what_is_possible(size):
    Path("short.txt").write_text("a letter " * (size // 9) + "!" * (size % 9), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        train("--data=short.txt", "--budget_minutes=3")
    assert "4,000" in str(caught.value)
    assert not Path("data").exists()
    assert not Path("runs").exists()
    if size > 100:
        command = str(caught.value).rpartition("python train.py ")[2]
        assert train(*shlex.split(command), "--max_steps=2", *QUICK) == 0


def test_a_dataset_keeps_the_tokenizer_that_it_was_prepared_with(capsys, small_text):
    from prepare_data.__main__ import main as prepare

    assert prepare(["text", f"--input={small_text}", "--name=sentences", "--tokenizer=char"]) == 0
    assert train("--data=sentences", "--max_steps=2", *QUICK, "--run=runs/char") == 0
    assert options_of("runs/char")["tokenizer"] == "char"
    assert "char of" in capsys.readouterr().out
    assert train("runs/char/config.json", "--run=runs/again") == 0


def test_two_points_give_two_constants_and_one_point_their_ratio():
    assert fit([(1.0, 2.0, 8.0), (3.0, 1.0, 9.0)], 5.0) == pytest.approx((2.0, 3.0))
    assert fit([(0.0, 2.0, 8.0), (0.0, 1.0, 5.0)], 5.0) == (0.0, 5.0)
    assert fit([(1.0, 2.0, 3.0), (10.0, 3.0, 60.0)], 5.0) == (6.0, 0.0)  # steeper than in proportion to the first
    assert fit([(2.0, 4.0, 11.0)], 5.0) == (0.5, 2.5)


def test_a_real_measurement_predicts_a_positive_cost(monkeypatch, capsys, small_text):
    monkeypatch.undo()
    monkeypatch.chdir(small_text.parent)
    assert train(f"--data={small_text}", "--plan", "--budget_minutes=1", "--block_size=16", *QUICK) == 0
    assert "epochs" in capsys.readouterr().out
