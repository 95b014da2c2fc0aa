"""Filters and penalties on logits: what they keep, the distribution of the draws, log-probabilities."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from generation.options import SamplingOptions
from generation.sampling import Penalties, check_drawn, draw, filtered_probs, log_probabilities, uniform


def drawn(logits, uniforms, options):
    """The ids that a sample gets. Raises UserError."""
    ids = draw(logits, torch.tensor(uniforms, dtype=torch.float64), options).tolist()
    check_drawn(ids, logits.shape[1])
    return ids


def test_uniform():
    values = [uniform(1337, sample, position) for sample in range(100) for position in range(100)]
    assert len(set(values)) == 10_000
    assert 0 <= min(values) < 0.001 < 0.999 < max(values) < 1
    assert abs(sum(values) / 10_000 - 0.5) < 0.01
    assert uniform(1, 23, 4) != uniform(12, 3, 4)
    assert uniform(1337, 0, 1) == 0.208437298079438, (
        "the hash has changed: every seed now gives other samples. If that is intended, update the number and the notes"
    )


def chi_square_bound(df):
    """The 99.9 % quantile (Wilson and Hilferty 1931)."""
    return df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


def filtered(logits, options):
    """Reference for all filters, in plain Python: list of logits without ties → {id: probability}."""
    scaled = [math.exp(x / options.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -scaled[i])[: options.top_k]
    total, kept, mass = sum(scaled[i] for i in order), [], 0.0
    for i in order:
        if mass < (options.top_p or 1.0) * total and scaled[i] >= (options.min_p or 0.0) * scaled[order[0]]:
            kept.append(i)
        mass += scaled[i]
    norm = sum(scaled[i] for i in kept)
    return {i: scaled[i] / norm for i in kept}


def penalized(logits, prompt, generated, options):
    """Reference for the penalties, id by id."""
    result = []
    for i, x in enumerate(float(x) for x in logits):
        if i in prompt or i in generated:
            x = x * options.repetition_penalty if x < 0 else x / options.repetition_penalty
        result.append(x - options.presence_penalty * (i in generated) - options.frequency_penalty * generated.count(i))
    return result


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0),
        SamplingOptions(temperature=0.7, top_k=5),
        SamplingOptions(temperature=1.5, top_p=0.8),
        SamplingOptions(temperature=1.2, min_p=0.1),
        SamplingOptions(temperature=1.6, top_k=9, top_p=0.9, min_p=0.06),
        SamplingOptions(temperature=1.3, top_k=9, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all filters", "penalties"],
)
def test_20_000_draws_follow_the_filtered_softmax(options):
    torch.manual_seed(2)
    logits = 2 * torch.randn(12)
    prompt, generated = [0, 1, 2], [1, 3, 3, 3, 4]
    if Penalties.needed(options):
        penalties = Penalties([prompt], 12, options, logits.device)
        for token in generated:
            penalties.add(torch.tensor([token]))
        expected = penalized(logits, prompt, generated, options)
        logits = penalties.apply(logits[None])[0]
        assert logits.tolist() == pytest.approx(expected, rel=1e-5)
    expected = filtered(logits.tolist(), options)
    n = 20_000
    found = Counter(drawn(logits.expand(n, -1), [uniform(11, i // 100, i % 100) for i in range(n)], options))
    assert set(found) <= set(expected)
    assert sum((found[i] - n * p) ** 2 / (n * p) for i, p in expected.items()) < chi_square_bound(len(expected) - 1)


def test_penalties_are_per_row_and_follow_it():
    options = SamplingOptions(frequency_penalty=1.0, repetition_penalty=2.0)
    penalties = Penalties([[0], [1], [2]], 4, options, torch.device("cpu"))
    penalties.add(torch.tensor([3, 3, 0]))
    penalties.copy_row(2, 1)
    penalties.narrow(2)
    penalties.add(torch.tensor([1, 0]))
    assert penalties.apply(torch.full((2, 4), 8.0)).tolist() == [[4.0, 3.0, 8.0, 3.0], [2.0, 8.0, 4.0, 8.0]]
    assert penalties.apply(torch.full((2, 4), -1.0)).tolist() == [[-2.0, -3.0, -1.0, -3.0], [-4.0, -1.0, -2.0, -1.0]]


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=30), st.floats(0.0, 1.0))
def test_min_p_keeps_ids_above_the_threshold(values, p):
    logits = torch.tensor([values], dtype=torch.float64)
    probs = logits.softmax(-1)[0]
    kept = filtered_probs(logits, SamplingOptions(temperature=1.0, min_p=p))[0] > 0
    assert kept[probs >= (p + 1e-9) * probs.max()].all()
    assert not kept[probs < (p - 1e-9) * probs.max()].any()
    assert kept[probs.argmax()]


def test_log_probabilities_are_those_of_log_softmax():
    torch.manual_seed(3)
    logits = torch.randn(2, 9)
    (first, top), (second, _) = log_probabilities(logits, [4, 0], 3)
    expected = logits.double().log_softmax(-1)
    assert [first, second] == pytest.approx([float(expected[0, 4]), float(expected[1, 0])], abs=1e-6)
    assert [i for i, _ in top] == expected[0].argsort(descending=True)[:3].tolist()
    assert [p for _, p in top] == pytest.approx(expected[0].sort(descending=True).values[:3].tolist(), abs=1e-6)
    assert log_probabilities(logits, [4, 0], 0)[0][1] == ()
    assert len(log_probabilities(logits, [4, 0], 100)[0][1]) == 9


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_top_k_keeps_exactly_k_and_ties_go_to_the_lower_id(values, k):
    kept = (
        filtered_probs(torch.tensor([values]).float(), SamplingOptions(temperature=1.0, top_k=k))[0]
        .nonzero()[:, 0]
        .tolist()
    )
    assert kept == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(values, p):
    logits = torch.tensor([values], dtype=torch.float64)
    probs = logits.softmax(-1)[0]
    kept = sorted(
        float(probs[i]) for i in filtered_probs(logits, SamplingOptions(temperature=1.0, top_p=p))[0].nonzero()[:, 0]
    )
    assert kept
    assert sum(kept) >= p - 1e-9
    assert sum(kept[1:]) < p + 1e-9  # without its smallest member it would not reach p
    assert kept[0] >= max((float(x) for x in probs.sort().values[: len(probs) - len(kept)]), default=0.0)


def test_temperature_zero_is_argmax_and_tiny_temperatures_agree():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 4.0, -math.inf, 4.9]])
    assert drawn(logits, [0.99, 0.99], SamplingOptions(temperature=0.0, top_k=2, top_p=0.5)) == [1, 0]
    for temperature in (1e-6, 1e-40, 1e-300):
        assert drawn(logits[1:], [0.99], SamplingOptions(temperature=temperature)) == [0]


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_uniform_numbers_at_the_ends_of_the_interval_draw_allowed_ids(u):
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    assert drawn(logits, [u], SamplingOptions(temperature=1.0)) == [1 if u == 0 else 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise(temperature, value):
    logits = torch.zeros(3, 5)
    logits[1, 2] = value
    for options in (
        SamplingOptions(temperature=temperature),
        SamplingOptions(temperature=temperature, top_k=2, top_p=0.5),
    ):
        with pytest.raises(UserError, match=r"not finite.*--checkpoint=latest"):
            drawn(logits, [0.5] * 3, options)
