"""Windows with a stride: every target once, with enough context, and the nats of the definition."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.scoring import cut_windows, score_windows
from model import GPT, IGNORED_TARGET, GPTConfig

T = 8
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=T, vocab_size=30, eos_id=29)


def chunks(ids: np.ndarray, size: int) -> list[np.ndarray]:
    return [np.stack((ids[i : i + size],) * 2) for i in range(0, len(ids), size)]


@given(n_tokens=st.integers(0, 120), T=st.integers(1, 16), size=st.integers(1, 50), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_target_is_scored_once_with_enough_context(n_tokens, T, size, data):
    stride = data.draw(st.one_of(st.none(), st.integers(1, T)))
    windows = list(cut_windows(chunks(np.arange(n_tokens), size), T, stride))
    scored = [target for window in windows for target in window.targets[window.context :].tolist()]
    assert scored == list(range(1, n_tokens))
    starts = [int(window.inputs[0]) for window in windows]
    assert starts == [i * (stride or T) for i in range(len(windows))], "the window moves by the stride"
    for window in windows:
        assert len(window.inputs) == len(window.targets) <= T
        assert (window.targets == window.inputs + 1).all()
        new = window.targets[window.context :]
        assert len(new) > 0
        context = new - window.inputs[0]  # tokens that the prediction sees
        assert (context >= (T - (stride or T) + 1 if window.inputs[0] else 1)).all()


MODELS = {
    "learned": {},
    "rotary": {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
    "documents": {"document_mask": True, "positions": "rotary"},
    "n-grams": {"max_ngram": 4, "ngram_rows": 64},
    "window": {"sliding_window": 3},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stride", [None, 8, 5, 1])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_nats_are_those_of_the_definition(name, stride, rows):
    """−log softmax of the logits at each place, one window after another, in float64."""
    model = GPT(GPTConfig(**{**CONFIG.to_dict(), **MODELS[name]})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = np.random.default_rng(0).integers(0, 30, 45)
    S = stride or T
    expected = []
    for target in range(1, len(ids)):
        start = 0 if target <= T else -(-(target - T) // S) * S  # the first window that holds the target
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, start:target]))[0, -1]
        expected.append(-float(torch.log_softmax(logits, dim=-1)[ids[target]]))
    windows = cut_windows(chunks(ids, 7), T, stride)
    batches = list(score_windows(model, windows, autocast=nullcontext, rows=rows))
    scored = [scored for batch in batches for scored in batch]
    assert np.concatenate([window.targets for window in scored]).tolist() == ids[1:].tolist()
    assert np.concatenate([window.nats for window in scored]).tolist() == pytest.approx(expected, rel=1e-9)
    assert max(map(len, batches)) <= max(rows, 1)


def test_short_windows_share_a_forward_pass_and_do_not_depend_on_it():
    model = GPT(CONFIG).eval()
    texts = [np.random.default_rng(i).integers(0, 30, 2 + i % 3) for i in range(40)]
    windows = [window for ids in texts for window in cut_windows(chunks(ids, 9), T)]
    batches = list(score_windows(model, iter(windows), autocast=nullcontext, rows=4))
    assert len(batches) < 5
    together = [scored.nats for batch in batches for scored in batch]
    for window, nats in zip(windows, together, strict=True):
        [[alone]] = score_windows(model, [window], autocast=nullcontext)
        assert alone.nats == pytest.approx(nats, rel=1e-5)


def test_targets_that_do_not_count_have_no_nats():
    model = GPT(CONFIG).eval()
    ids = np.arange(20)
    targets = np.where(ids % 3 == 0, IGNORED_TARGET, ids)
    windows = cut_windows([np.stack((ids, targets))], T, 3)
    scored = [scored for batch in score_windows(model, windows, autocast=nullcontext) for scored in batch]
    nats = np.concatenate([window.nats for window in scored])
    assert (nats[2::3] == 0).all()
    assert (np.delete(nats, np.arange(2, 19, 3)) > 0).all()
