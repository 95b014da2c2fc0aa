"""bench/cpu_speed.py from its command line, with a stand-in for nanoGPT's model.py."""

import json

import pytest

from bench import cpu_speed
from errors import UserError

PEER = """
import torch
from types import SimpleNamespace
GPTConfig = SimpleNamespace
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, x, y):
        logits = self.table(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters())
"""


@pytest.mark.slow
def test_both_sides_are_measured_and_the_ratio_is_written(tmp_path, capsys):
    (tmp_path / "a peer").mkdir()
    (tmp_path / "a peer" / "model.py").write_text(PEER)
    arguments = [
        f"--peer={tmp_path / 'a peer'}",
        "--settings=small",
        "--rounds=2",
        f"--results={tmp_path}",
        "--dtype=float32",
        "--sides=nanogpt,sprout",
    ]
    assert cpu_speed.main(arguments) == 0
    figures = json.loads(next(tmp_path.glob("*-cpu_speed.json")).read_text())
    rates = figures["small"]["tokens_per_second"]
    assert [len(rates[side]) for side in ("nanogpt", "sprout")] == [2, 2]
    assert min(rates["nanogpt"]) > 0
    assert figures["small"]["ratios"].keys() == {"sprout / nanogpt"}
    assert min(figures["peak_gflops"].values()) > 0
    printed = capsys.readouterr().out
    assert "small  sprout / nanogpt: " in printed
    assert "GFLOP/s; first step " in printed


def test_wrong_settings_and_a_missing_peer_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="unknown 'large'; expected small, baby, 124m"):
        cpu_speed.main([f"--peer={tmp_path}", "--settings=large"])
    with pytest.raises(UserError, match="unknown 'minimind'; expected nanogpt, nanogpt compiled, sprout, sprout"):
        cpu_speed.main([f"--peer={tmp_path}", "--sides=minimind"])
    with pytest.raises(UserError, match=r"no model\.py there"):
        cpu_speed.main([f"--peer={tmp_path}"])
