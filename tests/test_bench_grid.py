"""bench/grid.py and bench/final_loss.py: which runs are made, what is scored, what is said about wrong arguments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import final_loss, grid
from errors import UserError
from model import GPT, GPTConfig


@pytest.fixture
def text(tmp_path: Path, small_text: Path) -> Path:
    return small_text


@pytest.mark.slow
def test_a_grid_is_measured_once(tmp_path, text, capsys):
    """Two settings of a text; the second call measures nothing, and a new setting is added."""
    settings = tmp_path / "settings.txt"
    settings.write_text("# sizes\nnarrow: debug --n_embd=16\n\nwide: debug --n_embd=32\n", encoding="utf-8")
    common = [f"--text={text}", f"--settings={settings}", "--name=trial", f"--results={tmp_path}"]
    command = [*common, f"--data_dir={tmp_path}", "--", "--max_steps=4", "--threads=1", "--sample_tokens=0"]
    assert grid.main(command) == 0
    path = tmp_path / "trial.json"
    figures = json.loads(path.read_text("utf-8"))
    assert [run["setting"] for run in figures["runs"]] == ["narrow", "wide"]
    for run in figures["runs"]:
        assert run["steps"] == 4
        assert 2 < run["bits_per_byte"] < 9
        assert run["bits_per_byte"] == pytest.approx(run["last_bits_per_byte"], abs=2e-4)  # the same val split
        assert run["options"]["data"] == str(text)
        assert run["first_models"] == []
    before, table = path.read_bytes(), capsys.readouterr().out
    assert "*" in table.splitlines()[-3] + table.splitlines()[-2]
    assert grid.main(command) == 0
    assert path.read_bytes() == before


def test_a_cell_of_two_models_has_the_length_of_both(tmp_path, text):
    settings = tmp_path / "settings.txt"
    settings.write_text("two: debug --n_embd=16 --teachers=1\n", encoding="utf-8")
    common = [f"--text={text}", f"--settings={settings}", "--name=trial", f"--results={tmp_path}"]
    assert (
        grid.main([*common, f"--data_dir={tmp_path}", "--", "--max_steps=4", "--threads=1", "--sample_tokens=0"]) == 0
    )
    (run,) = json.loads((tmp_path / "trial.json").read_text("utf-8"))["runs"]
    assert len(run["options"]["teacher"]) == 1
    tokens = 4 * run["options"]["tokens_per_step"]
    assert run["first_models"] == [{"steps": 4, "tokens": tokens, "n_layer": 2, "n_embd": 16}]


@pytest.mark.parametrize("line", ["without a colon", "a: --x=1\na: --x=2"])
def test_a_wrong_settings_line_is_named(tmp_path, line):
    path = tmp_path / "settings.txt"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=r"settings\.txt:\d: expected `name: "):
        grid.read_settings(path)


def test_scores_are_those_of_each_target_with_its_context():
    """The model's own context cut into windows, and strides by the definition, a target at a time."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=20, eos_id=None), seed=0).eval()
    ids = np.random.default_rng(0).integers(20, size=75)
    found = final_loss.scores(model, ids)
    for name, stride in (("own_context", 16), ("stride_8", 8), ("stride_2", 2)):
        nats = []
        for target in range(1, len(ids)):
            # the first window start, a multiple of the stride, whose window holds the target
            start = max(0, -(-(target - 16) // stride) * stride)
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[None, start:target]))[0, -1]
            nats.append(F.cross_entropy(logits[None], torch.from_numpy(ids[target : target + 1])).item())
        assert found[name] == pytest.approx(np.mean(nats), abs=2e-5)


def test_a_model_that_other_programs_cannot_open_is_refused(text, tmp_path):
    with pytest.raises(UserError, match="max_ngram"):
        final_loss.main([f"--text={text}", f"--results={tmp_path}", "--", "speedrun_char_cpu"])
