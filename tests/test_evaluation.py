"""The val loss: every target once, in nats and bits per byte, without touching the training."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from training.evaluation import evaluate, overfitting_warning

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30, eos_id=29, dropout=0.3)
TOKEN_BYTES = [b"x" * (1 + i % 4) for i in range(29)] + [b""]


class Tokens:
    def __init__(self, ids) -> None:
        self.ids = np.asarray(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start, count):
        assert start + count <= len(self.ids)
        return self.ids[start : start + count]

    def mask(self, start, count):
        return None


def make(length: int = 61) -> tuple[GPT, Tokens]:
    return GPT(CONFIG).train(), Tokens(np.random.default_rng(0).integers(0, 30, length))


@pytest.mark.parametrize("max_tokens", [None, 61, 30, 17, 9, 8, 3, 2, 1000])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_it_is_the_mean_over_the_first_targets(max_tokens, rows):
    model, split = make()
    n = min(max_tokens or 61, 61)
    result = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext, max_tokens=max_tokens, rows=rows)
    model.eval()
    nats = []
    for start in range(0, n - 1, 8):
        ids = torch.from_numpy(split.read(start, min(9, n - start)))
        nats += model(ids[None, :-1], ids[None, 1:], reduction="none")[0].tolist()
    assert result.targets == n - 1 == len(nats)
    assert result.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    n_bytes = sum(len(TOKEN_BYTES[i]) for i in split.ids[1:n])
    assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / n_bytes, rel=1e-5)


def test_standard_error_shrinks_with_the_text_and_vanishes_without_spread():
    model, split = make(2001)
    short = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext, max_tokens=200)
    long = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext)
    assert 0 < long.standard_error < short.standard_error
    assert evaluate(model, Tokens([5] * 49), TOKEN_BYTES, autocast=nullcontext).standard_error == pytest.approx(
        0, abs=1e-6
    )


def test_it_changes_nothing():
    model, split = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    draw = torch.rand(3)
    torch.manual_seed(5)
    evaluate(model, split, TOKEN_BYTES, autocast=nullcontext)
    assert torch.equal(torch.rand(3), draw)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_it_stops_on_request():
    model, split = make()
    stops = iter([False, True])
    assert evaluate(model, split, TOKEN_BYTES, autocast=nullcontext, rows=2, stop=lambda: next(stops)) is None
    assert model.training


def history(*losses: tuple[float, float]) -> list[dict[str, float]]:
    return [
        {"step": 10.0 * i, "val_loss": v, "train_loss": t, "standard_error": 0.01} for i, (v, t) in enumerate(losses)
    ]


def test_overfitting_is_reported_once():
    assert overfitting_warning(history((3.0, 3.0), (2.5, 2.4), (2.4, 2.2))) is None  # still learning
    assert overfitting_warning(history((2.4, 2.4), (2.41, 2.2))) is None  # within the noise
    assert overfitting_warning(history((2.4, 2.4), (2.6, 2.5))) is None  # both rise
    line = overfitting_warning(history((3.0, 3.0), (2.4, 2.4), (2.6, 2.0)))
    assert line is not None
    assert "memorizes" in line
    assert "step 10 was best" in line
    assert overfitting_warning(history((3.0, 3.0), (2.4, 2.4), (2.6, 2.0), (2.7, 1.8))) is None  # reported before
