"""Generation on ids: the window rule, cached = uncached (promise 1), draws by (seed, sample, position) (promise 3), the filters."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generation.engine as engine
from errors import UserError
from generation.engine import END_OF_SEQUENCE, LENGTH, generate, next_logits, visible
from generation.options import SamplingOptions
from generation.sampling import draw, uniform, weights
from generation.text import prompt_ids, sample_texts, stream_texts
from model import GPT, GPTConfig, KVCache
from prepare_data.tokenizer import Tokenizer, bytes_tokenizer, char_tokenizer

GREEDY = SamplingOptions(max_new_tokens=10, temperature=0.0, stop_at_eos=False)
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31, eos_id=30, tie_embeddings=False)


def tiny_model(dtype=torch.float64, scale=15.0, **changes):
    """Weights large enough that greedy text does not fall into one repeated id."""
    model = GPT(replace(TINY, **changes), seed=3).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def run(model, prompts, options, seed=0, batch_size=None):
    """Per sample: the generated ids and the reason of the end."""
    ids, reasons = [[] for _ in prompts], [None] * len(prompts)
    for sample, token, reason, *_ in generate(model, prompts, options, seed, batch_size=batch_size):
        assert reasons[sample] is None, "an event after the end"
        if token is None:
            reasons[sample] = reason
        else:
            ids[sample].append(token)
    return list(zip(ids, reasons, strict=True))


# ---- which ids are visible


@given(st.integers(1, 40), st.data())
def test_visible_ids(block_size, data):
    keep_head = data.draw(st.integers(0, block_size - 1))
    half = math.ceil((block_size - keep_head) / 2)
    window, before = [], []
    for n in range(1, 4 * block_size + 2):
        before, window = window, visible(range(n), block_size, keep_head)
        assert len(window) <= block_size
        assert window[-1] == n - 1  # the newest is always there
        assert window[:keep_head] == list(range(min(n, keep_head)))  # and the head
        assert window[keep_head:] == list(range(window[keep_head], n)) if len(window) > keep_head else n <= keep_head
        if n > block_size:
            assert len(window) > block_size - half  # at least the newer half
        grown = [*before, n - 1]  # token by token, or cut where that is too long
        assert window == grown if len(grown) <= block_size else window == grown[:keep_head] + grown[keep_head + half :]


def test_a_head_that_fills_the_window_is_refused():
    with pytest.raises(UserError, match=r"keep_head=8 .*block_size=8"):
        list(generate(tiny_model(), [[1]], replace(GREEDY, keep_head=8), 0))


# ---- promise 1: the cache changes nothing

MODELS = {
    "learned": {},
    "sinusoidal": {"positions": "sinusoidal", "norm_position": "post", "scale_embeddings": True, "mlp": "relu"},
    "rotary": {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "bias": False},
    "grouped": {"n_embd": 32, "n_head": 4, "n_kv_head": 2, "positions": "rotary"},
    "sliding": {"sliding_window": 3},
    "documents": {"document_mask": True},
    "documents_rotary_sliding": {"document_mask": True, "positions": "rotary", "sliding_window": 5, "n_kv_head": 1},
    "padded_vocabulary": {"vocab_size": 1030, "eos_id": 1029},
}


@pytest.mark.parametrize("keep_head", [0, 1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_with_and_without_the_cache_are_equal(name, keep_head):
    model = tiny_model(**MODELS[name])
    B, eos = model.config.block_size, model.config.eos_id
    prompts = [[eos], [eos, 3, 1, 4], list(range(1, B)), [eos, 2, 7, eos, 1, 8, 2, 8], [eos, *range(20), eos, 5], [5, 6] * (B + 1)]
    options = replace(GREEDY, max_new_tokens=3 * B + 3, keep_head=keep_head)
    cached = run(model, prompts, options)
    for prompt, (ids, reason) in zip(prompts, cached, strict=True):
        assert (len(ids), reason) == (3 * B + 3, LENGTH)
        text = list(prompt)
        for token in ids:
            text.append(int(next_logits(model, text, keep_head).argmax()))
            assert text[-1] == token, f"at {len(text)} ids"
    assert len({token for ids, _ in cached for token in ids}) > 5, "a test on one repeated id shows nothing"


@pytest.mark.parametrize(("block_size", "keep_head"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_tiny_windows(block_size, keep_head):
    model = tiny_model(block_size=block_size)
    prompts = [[1], [2, 3, 4, 5, 6], [7, 8]]
    for prompt, (ids, _) in zip(prompts, run(model, prompts, replace(GREEDY, keep_head=keep_head)), strict=True):
        text = list(prompt)
        for token in ids:
            assert int(next_logits(model, text, keep_head).argmax()) == token
            text.append(token)


def test_the_cache_is_filled_anew_only_where_a_window_is_cut(monkeypatch):
    calls = Counter()
    for name in ("prefill", "decode"):
        method = getattr(GPT, name)
        monkeypatch.setattr(GPT, name, lambda *args, name=name, method=method: calls.update([name]) or method(*args))
    run(tiny_model(), [[1, 2]] * 3, replace(GREEDY, max_new_tokens=15))
    assert calls == {"prefill": 1 + 2, "decode": 15}  # the shared prompt once, then the cuts at 9 and 13 ids


@pytest.mark.parametrize("name", ["learned", "rotary"])
def test_in_float32_the_first_difference_is_a_near_tie(name):
    exact, single = tiny_model(**MODELS[name]), tiny_model(torch.float32, **MODELS[name])
    prompts = [[30], [30, 1, 2, 3, 4, 5], [9] * 12]
    for prompt, (ids, _) in zip(prompts, run(single, prompts, replace(GREEDY, max_new_tokens=40)), strict=True):
        text = list(prompt)
        for token in ids:
            logits = next_logits(exact, text, 1)
            if (margin := float(logits.max() - logits[token]) / float(logits.abs().max())) > 0:
                print(f"{name}: first difference after {len(text)} ids, relative margin {margin:.1e}")
                assert margin < 1e-5
                break
            text.append(token)


def test_autocast_cache_has_the_type_that_attention_sees(monkeypatch):
    dtypes = []
    init = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *args: dtypes.append(args[-1]) or init(self, *args))
    model = tiny_model(torch.float32, positions="rotary")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ids, _), _ = run(model, [[30, 1, 2], [30]], replace(GREEDY, max_new_tokens=20))
    assert (len(ids), dtypes) == (20, [torch.bfloat16])
    run(tiny_model(), [[1]], GREEDY)
    assert dtypes[1:] == [torch.float64]


# ---- promise 3: a draw depends on (seed, sample, position) alone

SAMPLED = SamplingOptions(max_new_tokens=25, temperature=1.0, top_k=20, top_p=0.95, stop_at_eos=True)


def test_a_sample_is_the_same_in_every_batch():
    model = tiny_model(scale=5.0)
    alone = run(model, [[30, 1]] * 7, SAMPLED, seed=5, batch_size=1)
    assert len({tuple(ids) for ids, _ in alone}) == 7
    assert {reason for _, reason in alone} == {END_OF_SEQUENCE, LENGTH}, "both ends should occur, so that rows leave the batch"
    for count, size in ((7, 7), (7, None), (7, 3), (4, 4), (1, 1)):
        assert run(model, [[30, 1]] * count, SAMPLED, seed=5, batch_size=size) == alone[:count]
    mixed = run(model, [[30, 1], [30] * 11, [30, 1], [4, 5, 6]], SAMPLED, seed=5)
    assert (mixed[0], mixed[2]) == (alone[0], alone[2])
    assert run(model, [[30, 1]] * 7, SAMPLED, seed=6) != alone


def test_a_text_goes_on_as_if_it_had_never_stopped():
    model = tiny_model(scale=5.0)
    ids = run(model, [[30, 1]], replace(SAMPLED, stop_at_eos=False))[0][0]
    assert run(model, [[30, 1, *ids[:15]]], replace(SAMPLED, stop_at_eos=False, max_new_tokens=10))[0][0] == ids[15:]


def test_samples_that_fill_more_than_the_memory_for_keys_and_values(monkeypatch):
    model, sizes = tiny_model(scale=5.0), []
    expected = run(model, [[30]] * 5, SAMPLED)
    init = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, config, rows, *args: sizes.append(init(self, config, rows, *args) or self))
    monkeypatch.setattr(engine, "CACHE_BYTES", 2 * (2 * 2 * 8 * 16 * 8))  # keys and values · layers · block_size · channels · bytes, twice
    assert run(model, [[30], [30], [30], [30], [30]], SAMPLED) == expected
    assert len(sizes) == 3


def test_uniform():
    values = [uniform(1337, sample, position) for sample in range(100) for position in range(100)]
    assert len(set(values)) == 10_000
    assert 0 <= min(values) < 0.001 < 0.999 < max(values) < 1
    assert abs(sum(values) / 10_000 - 0.5) < 0.01
    assert uniform(1, 23, 4) != uniform(12, 3, 4)
    assert uniform(1337, 0, 1) == 0.208437298079438, "the hash has changed: every seed now gives other samples; say so in the notes"


# ---- the distribution


def chi_square_bound(df):
    """The 99.9 % quantile (Wilson and Hilferty 1931)."""
    return df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0),
        SamplingOptions(temperature=0.7, top_k=5),
        SamplingOptions(temperature=1.5, top_p=0.8),
        SamplingOptions(temperature=1.3, top_k=9, top_p=0.9),
    ],
    ids=["temperature", "top_k", "top_p", "all"],
)
def test_draws_follow_the_filtered_softmax(options):
    torch.manual_seed(2)
    logits = 2 * torch.randn(12)
    n = 24_000
    expected = [math.exp(float(x) / options.temperature) for x in logits]
    order = sorted(range(12), key=lambda i: -expected[i])[: options.top_k]
    total, kept, mass = sum(expected[i] for i in order), [], 0.0
    for i in order:
        if mass < (options.top_p or 1.0) * total:
            kept.append(i)
        mass += expected[i]
    norm = sum(expected[i] for i in kept)
    found = Counter(draw(logits.expand(n, -1), [uniform(11, i // 100, i % 100) for i in range(n)], options))
    assert set(found) <= set(kept)
    chi_square = sum((found[i] - n * expected[i] / norm) ** 2 / (n * expected[i] / norm) for i in kept)
    assert chi_square < chi_square_bound(len(kept) - 1)


def test_the_engine_draws_the_models_distribution():
    model = tiny_model(scale=3.0)
    p = next_logits(model, [30, 4], 1).softmax(-1)
    n = 20_000
    options = SamplingOptions(max_new_tokens=1, temperature=1.0, stop_at_eos=False)
    found = Counter(ids[0] for ids, _ in run(model, [[30, 4]] * n, options, seed=8))
    assert sum((found[i] - n * float(p[i])) ** 2 / (n * float(p[i])) for i in range(31)) < chi_square_bound(30)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_top_k_keeps_exactly_k_lower_ids_first(values, k):
    kept = weights(torch.tensor([values]).float(), SamplingOptions(temperature=1.0, top_k=k))[0].nonzero()[:, 0].tolist()
    assert kept == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_suffices(values, p):
    logits = torch.tensor([values], dtype=torch.float64)
    probs = logits.softmax(-1)[0]
    kept = sorted(float(probs[i]) for i in weights(logits, SamplingOptions(temperature=1.0, top_p=p))[0].nonzero()[:, 0])
    assert kept
    assert sum(kept) >= p - 1e-9
    assert sum(kept[1:]) < p + 1e-9  # without its smallest it would not suffice
    assert kept[0] >= max((float(x) for x in probs.sort().values[: len(probs) - len(kept)]), default=0.0)


def test_temperature_zero_ignores_the_rest_and_tiny_ones_come_near():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 4.0, -math.inf, 4.9]])
    assert draw(logits, [0.99, 0.99], SamplingOptions(temperature=0.0, top_k=2, top_p=0.5)) == [1, 0]
    for temperature in (1e-6, 1e-40, 1e-300):
        assert draw(logits[1:], [0.99], SamplingOptions(temperature=temperature)) == [0]


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_draw_ids_that_are_allowed(u):
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    assert draw(logits, [u], SamplingOptions(temperature=1.0)) == [1 if u == 0 else 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_said(temperature, value):
    logits = torch.zeros(3, 5)
    logits[1, 2] = value
    for options in (SamplingOptions(temperature=temperature), SamplingOptions(temperature=temperature, top_k=2, top_p=0.5)):
        with pytest.raises(UserError, match=r"not finite.*--checkpoint=latest"):
            draw(logits, [0.5] * 3, options)


# ---- how samples end


def test_ends():
    model = tiny_model(scale=5.0)
    prompts = [[30, i] for i in range(12)]
    going_on = run(model, prompts, replace(SAMPLED, stop_at_eos=False))
    stopped = run(model, prompts, SAMPLED)
    assert any(30 in ids for ids, _ in going_on)
    for (ids, reason), (cut, why) in zip(going_on, stopped, strict=True):
        assert (len(ids), reason) == (25, LENGTH)
        assert (cut, why) == ((ids[: ids.index(30)], END_OF_SEQUENCE) if 30 in ids else (ids, LENGTH))
    assert run(model, [[1], [2, 3]], replace(SAMPLED, max_new_tokens=0)) == [([], LENGTH)] * 2


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    model = tiny_model(**MODELS["padded_vocabulary"])
    with torch.no_grad():
        model.embed.weight[1030:] = 100.0
    ids = run(model, [[1]] * 40, SamplingOptions(max_new_tokens=40, temperature=100.0, stop_at_eos=False))
    assert max(max(row) for row, _ in ids) in range(990, 1030)


# ---- text


def scripted(monkeypatch, ids):
    """generate() as if a model had written these ids."""
    events = [engine.Event(0, token, None) for token in ids] + [engine.Event(0, None, END_OF_SEQUENCE)]
    monkeypatch.setattr("generation.text.generate", lambda *args, **kwargs: iter(events))


@settings(max_examples=200)
@given(st.one_of(st.text().map(str.encode), st.binary()))
def test_streamed_text_is_the_whole_text(data):
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripted(monkeypatch, list(data))
        pieces = list(stream_texts(None, bytes_tokenizer(), [[256]], SamplingOptions(), 0))
    assert "".join(piece.text for piece in pieces) == data.decode("utf-8", errors="replace")
    assert [piece.reason for piece in pieces] == [None] * len(data) + [END_OF_SEQUENCE]


def test_characters_are_streamed_whole(monkeypatch):
    text = "héllo 世界 👩‍🚀"
    scripted(monkeypatch, list(text.encode()))
    pieces = [piece.text for piece in stream_texts(None, bytes_tokenizer(), [[256]], SamplingOptions(), 0)]
    assert [piece for piece in pieces if piece] == list(text)


def test_prompt_ids():
    tokenizer = char_tokenizer("ab")
    assert prompt_ids(tokenizer, "ba", True) == [2, 1, 0]
    assert prompt_ids(tokenizer, "ba", False) == [1, 0]
    assert prompt_ids(tokenizer, "", True) == [2]
    with pytest.raises(UserError, match="--prepend_eos=false"):
        prompt_ids(tokenizer, "", False)
    with pytest.raises(UserError, match="not 'é'"):
        prompt_ids(tokenizer, "é", True)


@pytest.mark.parametrize("training", [True, False])
def test_sample_texts_changes_nothing_and_repeats(training):
    tokenizer: Tokenizer = bytes_tokenizer()
    model = tiny_model(torch.float32, vocab_size=257, eos_id=256, dropout=0.3).train(training)
    state = torch.get_rng_state()
    once = sample_texts(model, tokenizer, "ab", num_samples=3, max_new_tokens=20, temperature=1.0, seed=4)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(text.startswith("ab") and reason in (LENGTH, END_OF_SEQUENCE) for text, reason in once)
    autocast = torch.inference_mode  # any context
    assert sample_texts(model, tokenizer, "ab", num_samples=2, max_new_tokens=20, temperature=1.0, seed=4, autocast=autocast) == once[:2]


def test_little_work_runs_on_one_thread_and_the_number_is_left_as_it_was(monkeypatch):
    threads = {"prefill": [], "decode": []}
    for name, seen in threads.items():
        method = getattr(GPT, name)
        monkeypatch.setattr(GPT, name, lambda *args, seen=seen, method=method: seen.append(torch.get_num_threads()) or method(*args))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    options = SamplingOptions(max_new_tokens=2, stop_at_eos=False)
    try:
        for event in generate(tiny_model(), [[1, 2], [1, 2]], options, 0):
            assert torch.get_num_threads() == 2, event
        monkeypatch.setattr(engine, "SMALL_PRODUCT", 2 * 16**2)
        run(tiny_model(), [[1, 2], [1, 2]], options, batch_size=1)
        run(tiny_model(), [[1, 2, 3], [1, 2, 4]], options)
    finally:
        torch.set_num_threads(before)
    assert threads == {"prefill": [1, 1, 1, 2], "decode": [1, 1, 1, 1, 1, 1, 2, 2]}
