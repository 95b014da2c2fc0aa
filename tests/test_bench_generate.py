"""bench/generate.py beside a stand-in for nanoGPT's model.py."""

import json

import pytest

from bench import generate as bench
from errors import UserError

PEER = """
import time
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    n_layer: int = 1; n_head: int = 1; n_embd: int = 8; block_size: int = 4; vocab_size: int = 5; bias: bool = True; dropout: float = 0.0

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
    written = []
    monkeypatch.setattr(bench, "write_results", lambda name, figures: written.append(json.dumps(figures)))
    monkeypatch.setattr(bench, "SHAPES", {"tiny": ({"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4, "vocab_size": 5}, 300, 3)})
    monkeypatch.setattr("sys.argv", ["generate.py", f"--peer={tmp_path}", "--threads=1"])
    bench.main()
    figures = json.loads(written[0])
    assert {side: len(runs) for side, runs in figures["tiny"]["runs"].items()} == {"sprout": 3, "nanogpt": 3}
    assert figures["tiny"]["tokens"] == 300
    assert figures["tiny"]["ratio"] > 0
    assert "times nanoGPT's speed" in capsys.readouterr().out


def test_unknown_shapes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate.py", f"--peer={tmp_path}", "--shapes=small,huge"])
    with pytest.raises(UserError, match="unknown 'huge'; expected small, 124m"):
        bench.main()
