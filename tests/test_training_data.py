"""The order of the training data, a pure function of seed and sample number, and the grid of validation windows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from training.data import (
    IGNORED_TARGET,
    TrainBatches,
    TrainWindows,
    keyed_permutation,
    read_windows,
)


class CountingSplit:
    """A split whose token at index i is i; those at `masked` indices do not count as targets."""

    def __init__(self, length: int, masked: frozenset[int] = frozenset()) -> None:
        self.length, self.masked = length, masked

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0
        assert start + count <= self.length
        return np.arange(start, start + count)

    def mask(self, start: int, count: int) -> np.ndarray | None:
        return np.array([i not in self.masked for i in range(start, start + count)]) if self.masked else None


@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_keyed_permutation_is_a_bijection(size, key):
    assert sorted(keyed_permutation(np.arange(size), size, key).tolist()) == list(range(size))


def test_keyed_permutation_is_uncorrelated():
    order = keyed_permutation(np.arange(100_000), 100_000, 7)
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert (order != keyed_permutation(np.arange(100_000), 100_000, 8)).mean() > 0.99


@given(n_tokens=st.integers(9, 2000), T=st.integers(1, 8), seed=st.integers(0, 10**9), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_disjoint_windows_once_each(n_tokens, T, seed, epoch):
    windows = TrainWindows(n_tokens, T, seed)
    starts = np.sort(windows.starts(epoch * windows.per_epoch, windows.per_epoch))
    assert starts[0] >= 0
    assert starts[-1] + T + 1 <= n_tokens
    assert (np.diff(starts) == T).all()


def test_the_order_depends_on_seed_and_sample_number_only():
    windows = TrainWindows(1000, 8, seed=3)
    whole = windows.starts(0, 500)
    pieces = np.concatenate([windows.starts(first, 20) for first in range(0, 500, 20)])
    assert np.array_equal(whole, pieces)
    assert not np.array_equal(whole, TrainWindows(1000, 8, seed=4).starts(0, 500))
    phases = {int(windows.starts(epoch * windows.per_epoch, 1)[0]) % 8 for epoch in range(40)}
    assert len(phases) > 4, "epochs must shift the grid of windows"


@pytest.mark.parametrize(("n_tokens", "T"), [(95, 32), (64, 32), (33, 32), (351, 32)])
def test_every_target_is_trained_on(n_tokens, T):
    """Over many epochs, every token but the first is a target, also at the end of the text."""
    windows = TrainWindows(n_tokens, T, seed=1)
    starts = set(windows.starts(0, 400 * windows.per_epoch).tolist())
    assert {start + i for start in starts for i in range(1, T + 1)} == set(range(1, n_tokens))


def test_targets_are_the_inputs_one_token_later():
    x, y = read_windows(CountingSplit(100), TrainWindows(100, 8, seed=0).starts(0, 6), 8)
    assert x.shape == y.shape == (6, 8)
    assert (y == x + 1).all()


def test_masked_targets_do_not_count():
    x, y = read_windows(CountingSplit(40, frozenset({3, 9})), np.array([0, 8]), 8)
    assert (y[0, 2], y[1, 0]) == (IGNORED_TARGET, IGNORED_TARGET)
    assert ((y == x + 1) | (y == IGNORED_TARGET)).all()
    assert int((y == IGNORED_TARGET).sum()) == 2


def test_a_corpus_shorter_than_a_window_is_an_error():
    message = r"8 tokens, fewer than a window of block_size \+ 1 = 9; lower --block_size to at most 7"
    with pytest.raises(UserError, match=message):
        TrainWindows(8, 8, seed=0)
    assert TrainWindows(9, 8, seed=0).starts(0, 3).tolist() == [0, 0, 0]


def step_of(batches, step):
    """x, y of all micro-batches of a step."""
    micro_batches = batches(step)
    assert all(len(batch.x) == len(batch.y) == batches.size for batch in micro_batches)
    return torch.cat([batch.x for batch in micro_batches]), torch.cat([batch.y for batch in micro_batches])


def test_a_step_has_the_same_rows_in_any_micro_batch_size():
    expected = read_windows(CountingSplit(200), TrainWindows(200, 8, seed=3).starts(12, 6), 8)
    for size in (1, 2, 3, 6):
        batches = TrainBatches(CountingSplit(200), 8, 6, size, 3, torch.device("cpu"), dropout=False)
        assert all(map(torch.equal, step_of(batches, 2), expected))
        assert {batch.dropout_seed for batch in batches(2)} == {None}


def test_read_ahead_does_not_change_the_batches():
    """The meta device stands for a GPU: a thread reads ahead. Steps are repeated and skipped, and the size changes."""
    ahead, direct = (
        TrainBatches(CountingSplit(200), 8, 6, 6, 3, torch.device(name), dropout=True) for name in ("meta", "cpu")
    )
    assert (ahead.reader is None, direct.reader is None) == (False, True)
    for step, size in ((0, 6), (1, 6), (1, 3), (2, 3), (7, 3), (8, 2)):
        ahead.size = direct.size = size
        assert all(map(torch.equal, step_of(ahead, step), step_of(direct, step)))
        assert [batch.dropout_seed for batch in ahead(step)] == [batch.dropout_seed for batch in direct(step)]
