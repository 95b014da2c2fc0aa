"""bench/generate.py beside a stand-in for nanoGPT's model.py."""

import json

import pytest

from bench import generate as bench
from checkpoint import save_checkpoint
from common.tokenizer import bytes_tokenizer
from common.weights import export_weights
from errors import UserError
from model import GPT, GPTConfig
from prepare_data.__main__ import main as prepare

PEER = """
import time
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    n_layer: int = 1; n_head: int = 1; n_embd: int = 8; block_size: int = 4; vocab_size: int = 5
    bias: bool = True; dropout: float = 0.0

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0")

    def generate(self, ids, max_new_tokens, temperature, top_k):
        time.sleep(0.01)
        return torch.cat((ids, ids.expand(-1, max_new_tokens)), dim=1)
"""


def test_both_sides_are_measured_and_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.py").write_text(PEER)
    monkeypatch.setattr(
        bench, "SHAPES", {"tiny": ({"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4, "vocab_size": 5}, 50, 3)}
    )
    bench.main([f"--peer={tmp_path}", "--shapes=tiny", "--threads=1", f"--out={tmp_path / 'results'}"])
    (path,) = (tmp_path / "results").glob("*-generate.json")
    figures = json.loads(path.read_text(encoding="utf-8"))
    sides = {"sprout", "sprout x16", "sprout int8"}
    assert {side: len(runs) for side, runs in figures["tiny"]["runs"].items()} == dict.fromkeys([*sides, "nanogpt"], 3)
    assert figures["tiny"]["tokens"] == 50
    assert set(figures["tiny"]["ratios"]) == sides
    assert figures["tiny"]["bound"]["bytes"] == 4 * (
        8 * 8 * 12 + 8 * 9 + 2 * 8 * 3 + 5 * 8
    )  # of a block, its biases, norms, the head
    assert 0 <= figures["tiny"]["bound"]["share"] < 2  # of a tiny model next to nothing
    out = capsys.readouterr().out
    assert "times nanoGPT's speed" in out
    assert "context 32: " in out


def test_no_peer_is_needed(tmp_path, capsys):
    bench.main(["--shapes=tiny", "--threads=1", f"--out={tmp_path}"])
    (path,) = tmp_path.glob("*-generate.json")
    figures = json.loads(path.read_text(encoding="utf-8"))["tiny"]
    assert set(figures["runs"]) == set(figures["first_request"]) == {"sprout", "sprout x16", "sprout int8"}
    assert figures["ratios"] == {}
    assert "nanoGPT" not in capsys.readouterr().out


def test_unknown_shapes_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown 'huge'; expected small, 124m"):
        bench.main([f"--peer={tmp_path}", "--shapes=small,huge"])


def test_peer_and_run_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="give one of them"):
        bench.main([f"--peer={tmp_path}", f"--run={tmp_path}"])


def test_the_loss_of_a_run_with_and_without_int8(tmp_path, capsys):
    tokenizer = bytes_tokenizer()
    model = GPT(
        GPTConfig(
            n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
        )
    )
    (tmp_path / "text.txt").write_text("so many words " * 200)
    prepared = [
        "text",
        "--name=mini",
        f"--input={tmp_path}/text.txt",
        "--tokenizer=bytes",
        "--split=tail",
        f"--data_dir={tmp_path}",
    ]
    assert prepare(prepared) == 0
    contents = {"model": export_weights(model), "config": model.config.to_dict(), "tokenizer": tokenizer.to_dict()}
    dataset = {"name": "mini", "path": str(tmp_path / "mini"), "fingerprint": ""}
    state = {"dataset": dataset, "val_loss": 1.0}
    save_checkpoint(tmp_path / "run", 1, **contents, optimizer={}, state=state)
    figures = bench.losses_of_int8(tmp_path / "run")
    assert abs(figures["val_loss_int8"] - figures["val_loss"]) < 0.01
    assert "val loss 5." in capsys.readouterr().out
