"""The val loss: every target once, in nats and bits per byte, without touching the training."""

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from common.clusters import Clusters
from model import GPT, GPTConfig
from training.evaluation import ClusterSums, Evaluation, evaluate, overfitting_warning

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


def test_one_window_has_no_error_estimate():
    model, split = make()
    result = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext, max_tokens=9)
    assert result.standard_error is None
    assert "one window: no error estimate" in result.describe()
    assert "±" not in result.describe()
    assert result.compared, "two evaluations of one window are compared by its parts"
    few = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext, max_tokens=24)
    assert few.standard_error > 0
    assert f"± {few.standard_error:.4f} (rough)" in few.describe()


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("length", [500, 800])
def test_clusters_are_whole_documents_and_blocks_of_windows(rows, length):
    """Against a loop over the targets."""
    model, split = make(length)
    documents, blocks = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext, rows=rows).clusters
    model.eval()
    n, windows = length - 1, -(-(length - 1) // 8)
    expected = {"documents": [0.0] * 64, "blocks": [0.0] * len(blocks.nats)}
    begin = 0
    for start in range(0, n, 8):
        ids = torch.from_numpy(split.read(start, min(9, length - start)))
        losses = model(ids[None, :-1], ids[None, 1:], reduction="none")[0].tolist()
        for position, (token, loss) in enumerate(zip(ids.tolist(), losses, strict=False), start):
            begin = position if token == CONFIG.eos_id else begin
            expected["documents"][begin * 64 // n] += loss
            expected["blocks"][position // 8 * len(blocks.nats) // windows] += loss
    assert documents.nats == pytest.approx([nats for nats in expected["documents"] if nats], rel=1e-5)
    assert blocks.nats == pytest.approx(expected["blocks"], rel=1e-5)
    assert sum(documents.counts) == sum(blocks.counts) == n


def drawn(losses: np.ndarray, starts: np.ndarray, block_size: int = 32) -> Evaluation:
    """The evaluation of a split with these losses per target, whose documents begin at `starts`."""
    sums = ClusterSums(len(losses) + 1, block_size, eos_id=1)
    x = np.zeros(-(-len(losses) // block_size) * block_size, dtype=np.int64)
    x[starts] = 1
    padded, counted = np.zeros(len(x)), np.arange(len(x)) < len(losses)
    padded[: len(losses)] = losses
    shape = (-1, block_size)
    sums.add(0, x.reshape(shape), padded.reshape(shape), counted.reshape(shape))
    return Evaluation(float(losses.mean()), 1.0, len(losses), *sums.clusters())


def coverage(draw, repetitions: int = 300) -> tuple[float, float]:
    """Of the mean 0 by loss ± 1.96 standard errors; and the ratio of the root mean square error to the deviation."""
    results = [draw() for _ in range(repetitions)]
    losses, errors = (np.array([getattr(one, name) for one in results]) for name in ("loss", "standard_error"))
    return float((np.abs(losses) < 1.96 * errors).mean()), float(np.sqrt(np.square(errors).mean()) / losses.std())


@pytest.mark.parametrize("n_documents", [20, 60, 500])
def test_the_error_is_that_of_documents_with_heavy_tailed_sizes(n_documents):
    generator = np.random.default_rng(1)

    def draw() -> Evaluation:
        sizes = np.minimum(5000, 50 * (1 + generator.pareto(1.5, n_documents))).astype(int)
        level = np.repeat(generator.standard_normal(n_documents), sizes)
        starts = np.cumsum([0, *sizes[:-1]])
        return drawn(level + generator.standard_normal(len(level)), starts)

    covered, ratio = coverage(draw)
    assert covered > 0.85
    assert 0.8 < ratio < 1.3


@pytest.mark.parametrize("n_windows", [64, 256, 963])
def test_the_error_is_that_of_correlated_windows_in_one_document(n_windows):
    generator = np.random.default_rng(2)

    def draw() -> Evaluation:
        noise, level = generator.standard_normal(n_windows), np.zeros(n_windows)
        level[0] = noise[0] / math.sqrt(1 - 0.52**2)
        for i in range(1, n_windows):
            level[i] = 0.52 * level[i - 1] + noise[i]
        return drawn(np.repeat(level, 4), np.array([0]), block_size=4)

    covered, ratio = coverage(draw)
    assert covered > 0.85
    assert 0.75 < ratio < 1.15


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


def test_a_large_rise_in_the_only_window_is_reported():
    line = overfitting_warning(
        [entry | {"standard_error": None, "clear_rise": 0.3} for entry in history((2, 2), (3, 1))]
    )
    assert line is not None


def evaluations(change: np.ndarray, levels: list[float], generator: np.random.Generator) -> list[dict[str, Any]]:
    """The history of a run whose loss in 40 documents is `levels` over the evaluations, changed (evaluations, 40) per
    document, while train loss falls."""
    counts, base = generator.integers(100, 2000, 40), 3 + 0.5 * generator.standard_normal(40)
    entries: list[dict[str, Any]] = []
    best: list[Clusters] = []
    for step, (level, noise) in enumerate(zip(levels, change, strict=True)):
        kinds = [Clusters(((base + level + noise) * counts).tolist(), counts.tolist())]
        result = Evaluation(sum(kinds[0].nats) / int(counts.sum()), 1.0, 1, kinds, kinds)
        entry = {"step": step, "val_loss": result.loss, "standard_error": result.standard_error}
        entries.append(entry | {"train_loss": -0.01 * step, "clear_rise": result.clear_rise(best)})
        if result.loss == min(entry["val_loss"] for entry in entries):
            best = kinds
    return entries


def warnings(entries: list[dict[str, Any]]) -> list[int]:
    return [n for n in range(1, len(entries) + 1) if overfitting_warning(entries[:n])]


def test_a_small_but_consistent_rise_is_reported_once():
    """0.02 nats a step in all documents, whose losses differ by 0.5."""
    generator = np.random.default_rng(3)
    entries = evaluations(0.01 * generator.standard_normal((6, 40)), [0.5, 0.2, 0, 0.02, 0.04, 0.06], generator)
    assert entries[-1]["standard_error"] > 0.05
    assert warnings(entries) == [5]


@pytest.mark.parametrize("slope", [0, -0.02])
def test_noise_is_not_reported(slope):
    """20 evaluations of documents whose losses change by chance, and of all together by a little."""
    generator = np.random.default_rng(4)
    alarms = 0
    for _ in range(100):
        levels = (slope * np.arange(20) + 0.005 * generator.standard_normal(20)).tolist()
        alarms += bool(warnings(evaluations(0.05 * generator.standard_normal((20, 40)), levels, generator)))
    assert alarms <= 5


def test_a_rise_from_the_loss_of_pretrained_weights_is_reported():
    """Before their first step there is no train loss."""
    pretrained = {"step": 0.0, "val_loss": 2.0, "train_loss": None, "standard_error": 0.01}
    later = [entry | {"step": entry["step"] + 10} for entry in history((2.2, 2.0), (2.45, 1.5))]
    assert overfitting_warning([pretrained, later[0]]) is None
    assert "(step 0)" in str(overfitting_warning([pretrained, *later]))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_stride_gives_each_target_more_context(stride):
    """Against single predictions, with the clusters of the same targets."""
    model, split = make()
    result = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext, stride=stride)
    plain = evaluate(model, split, TOKEN_BYTES, autocast=nullcontext)
    model.eval()
    nats = []
    for target in range(1, 61):
        start = 0 if target <= 8 else -(-(target - 8) // stride) * stride
        ids = torch.from_numpy(split.ids[start : target + 1])
        nats.append(model(ids[None, :-1], ids[None, 1:], reduction="none")[0, -1].item())
    assert result.loss == pytest.approx(sum(nats) / 60, rel=1e-5)
    assert result.targets == plain.targets == 60
    assert [kind.counts for kind in result.clusters] == [kind.counts for kind in plain.clusters]
    if stride == 8:
        assert result == plain
