"""Generation on ids: visible window, cached = uncached, draws by (seed, sample, position), ends of samples."""

import math
import re
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generation.batch as batch
import generation.engine as engine
from errors import UserError
from generation.direct_calls import with_direct_calls
from generation.engine import END_OF_SEQUENCE, LENGTH, generate, next_logits, visible
from generation.options import SamplingOptions
from generation.sampling import filtered_probs
from model import GPT, GPTConfig, KVCache
from tests.test_sampling import chi_square_bound

GREEDY = SamplingOptions(max_new_tokens=10, temperature=0.0, stop_at_eos=False)
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31, eos_id=30, tie_embeddings=False)


def tiny_model(dtype=torch.float64, scale=15.0, **changes):
    """Weights large enough that greedy text does not fall into one repeated id."""
    model = GPT(replace(TINY, **changes), seed=3).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
        if model.ngrams is not None:  # zeros at first
            model.ngrams.weight.normal_(std=0.02 * scale, generator=torch.Generator().manual_seed(4))
    return model


def run(model, prompts, options, seed=0, batch_size=None):
    """Per sample: the drawn ids, an end-of-sequence that ends it included, and the reason of the end."""
    ids, reasons = [[] for _ in prompts], [None] * len(prompts)
    for sample, token, reason, *_ in generate(model, prompts, options, seed, batch_size=batch_size):
        assert reasons[sample] is None, "an event after the end"
        reasons[sample] = reason
        ids[sample] += [] if token is None else [token]
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


def test_keep_head_must_be_less_than_block_size():
    with pytest.raises(UserError, match=r"keep_head=8 .*block_size=8"):
        list(generate(tiny_model(), [[1]], replace(GREEDY, keep_head=8), 0))


# ---- with the cache = without

MODELS = {
    "learned": {},
    "sinusoidal": {"positions": "sinusoidal", "norm_position": "post", "scale_embeddings": True, "mlp": "relu"},
    "rotary": {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "bias": False},
    "grouped": {"n_embd": 32, "n_head": 4, "n_kv_head": 2, "positions": "rotary"},
    "neox": {"positions": "rotary", "rotary_dim": 2, "parallel_residual": True, "mlp": "gelu_exact"},
    "wide_heads": {"positions": "rotary", "head_dim": 10, "n_kv_head": 1, "bias": False, "qkv_bias": True,
                   "rope_factor": 4.0, "rope_original_context": 8},
    "sliding": {"sliding_window": 3},
    "documents": {"document_mask": True},
    "documents_rotary_sliding": {"document_mask": True, "positions": "rotary", "sliding_window": 5, "n_kv_head": 1},
    "ngrams": {"max_ngram": 3, "ngram_rows": 64},
    "padded_vocabulary": {"vocab_size": 1030, "eos_id": 1029},
}  # fmt: skip


@pytest.mark.parametrize("keep_head", [0, 1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_with_and_without_the_cache_are_equal(name, keep_head):
    model = tiny_model(**MODELS[name])
    B, eos = model.config.block_size, model.config.eos_id
    prompts = [
        [eos],
        [eos, 3, 1, 4],
        list(range(1, B)),
        [eos, 2, 7, eos, 1, 8, 2, 8],
        [eos, *range(20), eos, 5],
        [5, 6] * (B + 1),
    ]
    options = replace(GREEDY, max_new_tokens=3 * B + 3, keep_head=keep_head)
    cached = run(model, prompts, options)
    for prompt, (ids, reason) in zip(prompts, cached, strict=True):
        assert (len(ids), reason) == (3 * B + 3, LENGTH)
        text = list(prompt)
        for token in ids:
            text.append(int(next_logits(model, text, keep_head).argmax()))
            assert text[-1] == token, f"at {len(text)} ids"
    assert len({token for ids, _ in cached for token in ids}) > 5, "one repeated id would prove nothing"


@pytest.mark.parametrize("name", ["learned", "documents"])
@pytest.mark.parametrize(("block_size", "keep_head"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_tiny_windows(block_size, keep_head, name):
    model = tiny_model(block_size=block_size, **MODELS[name])
    prompts = [[1], [2, 30, 4, 5, 30], [30, 8], [7, 30]]
    for prompt, (ids, _) in zip(prompts, run(model, prompts, replace(GREEDY, keep_head=keep_head)), strict=True):
        text = list(prompt)
        for token in ids:
            assert int(next_logits(model, text, keep_head).argmax()) == token
            text.append(token)


def test_prefill_runs_again_only_when_the_window_is_cut(monkeypatch):
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


# ---- a draw depends on (seed, sample, position) alone

SAMPLED = SamplingOptions(max_new_tokens=25, temperature=1.0, top_k=20, top_p=0.95, stop_at_eos=True)


def test_a_sample_is_the_same_in_every_batch():
    model = tiny_model(scale=5.0)
    alone = run(model, [[30, 1]] * 7, SAMPLED, seed=5, batch_size=1)
    assert len({tuple(ids) for ids, _ in alone}) == 7
    assert {reason for _, reason in alone} == {END_OF_SEQUENCE, LENGTH}, (
        "both ends should occur, so that rows leave the batch"
    )
    for count, size in ((7, 7), (7, None), (7, 3), (4, 4), (1, 1)):
        assert run(model, [[30, 1]] * count, SAMPLED, seed=5, batch_size=size) == alone[:count]
    mixed = run(model, [[30, 1], [30] * 11, [30, 1], [4, 5, 6]], SAMPLED, seed=5)
    assert (mixed[0], mixed[2]) == (alone[0], alone[2])
    assert run(model, [[30, 1]] * 7, SAMPLED, seed=6) != alone


def test_a_continued_text_equals_an_uninterrupted_one():
    model = tiny_model(scale=5.0)
    ids = run(model, [[30, 1]], replace(SAMPLED, stop_at_eos=False))[0][0]
    assert run(model, [[30, 1, *ids[:15]]], replace(SAMPLED, stop_at_eos=False, max_new_tokens=10))[0][0] == ids[15:]


def test_samples_that_fill_more_than_the_memory_for_keys_and_values(monkeypatch):
    model, sizes = tiny_model(scale=5.0), []
    expected = run(model, [[30]] * 5, SAMPLED)
    init = KVCache.__init__
    monkeypatch.setattr(
        KVCache, "__init__", lambda self, config, rows, *args: sizes.append(init(self, config, rows, *args) or self)
    )
    monkeypatch.setattr(
        engine, "CACHE_BYTES", 2 * (2 * 2 * 8 * 16 * 8)
    )  # keys and values · layers · block_size · channels · bytes, twice
    assert run(model, [[30], [30], [30], [30], [30]], SAMPLED) == expected
    assert len(sizes) == 3


# ---- the distribution


def test_the_engine_draws_the_models_distribution():
    model = tiny_model(scale=3.0)
    p = next_logits(model, [30, 4], 1).softmax(-1)
    n = 20_000
    options = SamplingOptions(max_new_tokens=1, temperature=1.0, stop_at_eos=False)
    found = Counter(ids[0] for ids, _ in run(model, [[30, 4]] * n, options, seed=8))
    assert sum((found[i] - n * float(p[i])) ** 2 / (n * float(p[i])) for i in range(31)) < chi_square_bound(30)


def test_the_first_tokens_of_the_samples_of_one_prompt_are_independent():
    """Over 5,000 samples: tokens follow the model's distribution, those of samples 2i and 2i + 1 are independent."""
    model = tiny_model(scale=2.0)
    options = SamplingOptions(max_new_tokens=1, temperature=1.0, top_k=4, stop_at_eos=False)
    firsts = [ids[0] for ids, _ in run(model, [[30, 4]] * 5_000, options, seed=9)]
    p = filtered_probs(next_logits(model, [30, 4], 1)[None], options)[0]
    p = {i: float(p[i] / p.sum()) for i in p.nonzero()[:, 0].tolist()}
    found, pairs = Counter(firsts), Counter(zip(firsts[::2], firsts[1::2], strict=True))
    assert found.keys() == p.keys()
    assert sum((found[i] - 5_000 * p[i]) ** 2 / (5_000 * p[i]) for i in p) < chi_square_bound(3)
    expected = {(i, j): 2_500 * p[i] * p[j] for i in p for j in p}
    assert min(expected.values()) > 5, "too few for the test to be sound"
    assert sum((pairs[pair] - n) ** 2 / n for pair, n in expected.items()) < chi_square_bound(15)


@pytest.mark.parametrize("name", ["learned", "rotary", "grouped", "documents", "ngrams"])
def test_a_batch_of_unequal_prompts_is_each_alone(name):
    """Greedy and drawn, past block_size, with penalties, which belong to a row."""
    model = tiny_model(scale=6.0, **MODELS[name])
    prompts = [[30, 1, 2], [30], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [30, 1, 2], [3]]
    for options in (
        GREEDY,
        replace(SAMPLED, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1, min_new_tokens=3),
    ):
        together = run(model, prompts, options)
        for sample, prompt in enumerate(prompts):
            ids = [(token, reason) for _, token, reason, *_ in generate(model, [prompt], options, 0, draws=[sample])]
            assert [token for token, _ in ids if token is not None] == together[sample][0]
            assert ids[-1][1] == together[sample][1]


def test_no_float64_is_sent_to_mps(monkeypatch):
    """It has none, not even for a copy. With a cache on the CPU as a stub."""
    sent, to_device = [], batch.to_device

    def send(values, dtype, device):
        sent.append((device.type, dtype))
        return to_device(values, dtype, torch.device("cpu"))

    monkeypatch.setattr(batch, "to_device", send)
    model = tiny_model(dtype=torch.float32)
    decoder = batch.PlainDecoder(model, torch.device("mps"), torch.float32, 8)
    monkeypatch.setattr(decoder, "new_cache", lambda samples: KVCache(model.config, samples))
    new = batch.Batch(decoder, {0: [1, 2], 1: [3]}, 0, SAMPLED, seed=0, draws=[0, 1])
    assert new.uniforms_at(0).tolist() == [new.uniform_of(0, 0), new.uniform_of(1, 0)]
    assert ("mps", torch.int64) in sent
    assert ("mps", torch.float64) not in sent


def test_draws_selects_the_random_numbers_of_samples():
    model = tiny_model(scale=5.0)
    usual = run(model, [[30, 1]] * 4, SAMPLED, seed=5)
    events = list(generate(model, [[30, 1]] * 2, SAMPLED, 5, draws=[3, 1]))
    assert [[e.token for e in events if e.sample == sample and e.token is not None] for sample in (0, 1)] == [
        usual[3][0],
        usual[1][0],
    ]


# ---- log-probabilities


def test_log_probabilities_are_those_before_all_filters():
    model = tiny_model(scale=5.0)
    options = replace(SAMPLED, top_k=2, temperature=0.3, repetition_penalty=2.0, min_new_tokens=25, logprobs=3)
    text = [30, 1]
    for event in generate(model, [text], options, 0):
        if event.token is not None:
            expected = next_logits(model, text, 1).log_softmax(-1)
            assert event.logprob == pytest.approx(float(expected[event.token]), abs=1e-9)
            assert [i for i, _ in event.top] == expected.argsort(descending=True)[:3].tolist()
            assert [p for _, p in event.top] == pytest.approx(
                expected.sort(descending=True).values[:3].tolist(), abs=1e-9
            )
            text.append(event.token)
    assert len(text) == 27
    ending = replace(options, min_new_tokens=0, top_k=None, temperature=1.0)
    (*_, token), reason = run(model, [[30, 1]], ending, 1)[0]
    last = list(generate(model, [[30, 1]], ending, 1))[-1]
    assert (token, reason, last.reason) == (30, END_OF_SEQUENCE, END_OF_SEQUENCE)
    text = [30, 1, *(e.token for e in generate(model, [[30, 1]], ending, 1))][:-1]
    expected = next_logits(model, text, 1).log_softmax(-1)
    assert last.logprob == pytest.approx(float(expected[30]), abs=1e-9)  # of the end-of-sequence
    assert next((e.logprob, e.top) for e in generate(model, [[30]], replace(options, logprobs=None), 0)) == (None, ())


# ---- how samples end


def test_ends():
    model = tiny_model(scale=5.0)
    prompts = [[30, i] for i in range(12)]
    going_on = run(model, prompts, replace(SAMPLED, stop_at_eos=False))
    stopped = run(model, prompts, SAMPLED)
    assert any(30 in ids for ids, _ in going_on)
    for (ids, reason), (cut, why) in zip(going_on, stopped, strict=True):
        assert (len(ids), reason) == (25, LENGTH)
        assert (cut, why) == ((ids[: ids.index(30) + 1], END_OF_SEQUENCE) if 30 in ids else (ids, LENGTH))
    assert run(model, [[1], [2, 3]], replace(SAMPLED, max_new_tokens=0)) == [([], LENGTH)] * 2


def test_no_end_of_sequence_before_min_new_tokens():
    model = tiny_model(scale=5.0)
    prompts = [[30, i] for i in range(12)]
    free = run(model, prompts, SAMPLED)
    assert any(30 in ids[:6] for ids, _ in free)
    longer = run(model, prompts, replace(SAMPLED, min_new_tokens=6))
    assert all(len(ids) > 6 and 30 not in ids[:6] for ids, _ in longer)
    assert any(30 in ids for ids, _ in longer)
    for options in (replace(GREEDY, stop_at_eos=True), SAMPLED):
        assert all(
            30 not in ids[:6] for ids, _ in run(model, prompts, replace(options, min_new_tokens=6, stop_at_eos=False))
        )


def test_stopped_samples_end_without_an_event():
    model, stopped = tiny_model(scale=5.0), set()
    options = replace(SAMPLED, stop_at_eos=False)
    whole, seen = run(model, [[30]] * 3, options), [[], [], []]
    for event in generate(model, [[30]] * 3, options, 0, stopped=stopped):
        assert event.sample not in stopped
        if event.token is not None:
            seen[event.sample].append(event.token)
        if len(seen[1]) == 4:
            stopped.add(1)
    assert seen == [whole[0][0], whole[1][0][:4], whole[2][0]]
    stopped |= {0, 1, 2}
    assert list(generate(model, [[30]] * 3, options, 0, stopped=stopped)) == []


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    model = tiny_model(**MODELS["padded_vocabulary"])
    with torch.no_grad():
        model.embed.weight[1030:] = 100.0
    ids = run(model, [[1]] * 40, SamplingOptions(max_new_tokens=40, temperature=100.0, stop_at_eos=False))
    assert max(max(row) for row, _ in ids) in range(990, 1030)


# ---- threads


def test_little_work_runs_on_one_thread_and_the_setting_is_restored(monkeypatch):
    threads = {"prefill": [], "decode": []}
    for name, seen in threads.items():
        method = getattr(GPT, name)
        monkeypatch.setattr(
            GPT, name, lambda *args, seen=seen, method=method: seen.append(torch.get_num_threads()) or method(*args)
        )
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


# ---- calls without nn.Module.__call__


def test_direct_calls_compute_the_same_and_share_large_matrices(monkeypatch):
    monkeypatch.setattr("generation.direct_calls.MAX_COPIED", 600)
    model = tiny_model(**MODELS["rotary"])
    direct, ids = with_direct_calls(model), torch.tensor([[1, 2, 3, 4, 5]])
    with torch.inference_mode():
        assert torch.allclose(direct(ids), model(ids), rtol=1e-12, atol=1e-12)
    assert direct.blocks[0].mlp.up.weight is model.blocks[0].mlp.up.weight  # 2 · 64 × 16 numbers
    assert direct.blocks[0].attn.proj.weight is not model.blocks[0].attn.proj.weight  # 16 × 16
    assert torch.equal(direct.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)
    assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()  # the model is unchanged


@pytest.mark.parametrize(
    "register",
    [
        lambda model, hook: model.blocks[1].mlp.register_forward_hook(hook),
        lambda model, hook: model.blocks[1].mlp.register_forward_pre_hook(hook),
        lambda model, hook: torch.nn.modules.module.register_module_forward_hook(hook),
    ],
    ids=["forward", "pre", "global"],
)
def test_hooks_fire_during_generation(register):
    """Activations of a prefill and of every decode step reach the hook, and the ids stay the same."""
    model, calls = tiny_model(), Counter()
    expected = run(model, [[30, 1, 2]], replace(GREEDY, max_new_tokens=4))
    handle = register(model, lambda module, args, out=None: calls.update([type(module).__name__]))
    try:
        assert run(model, [[30, 1, 2]], replace(GREEDY, max_new_tokens=4)) == expected
    finally:
        handle.remove()
    assert calls["MLP"] in (5, 10)  # of one block or both
    assert with_direct_calls(model) is not model


# ---- out of memory


@pytest.mark.parametrize("kind_of_error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(
    "options",
    [SAMPLED, replace(SAMPLED, repetition_penalty=1.3, frequency_penalty=0.4, min_new_tokens=12, logprobs=1)],
    ids=["plain", "penalties"],
)
@pytest.mark.parametrize("where", ["cache", "prefill", "decode"])
def test_out_of_memory_halves_the_batch_and_changes_no_sample(monkeypatch, capsys, where, options, kind_of_error):
    """The failed attempt allocates before it raises; all of that is free when the next attempt begins."""
    model = tiny_model(scale=5.0)
    prompts = [[30, 1], [30] * 11, [30, 1], [4, 5, 6], [7]]
    expected = run(model, prompts, options)
    steps, allocated, alive = Counter(), [], []
    init, prefill, decode = KVCache.__init__, GPT.prefill, GPT.decode

    def fail(kind, rows):
        steps[kind] += 1
        if kind == where and rows > 2 and (kind != "decode" or steps[kind] % 7 == 0):
            large = torch.zeros(1000)
            allocated.append(weakref.ref(large))
            raise kind_of_error("DefaultCPUAllocator: can't allocate memory")

    def new_cache(self, config, rows, *args):
        alive.extend(ref() is not None for ref in allocated)
        init(self, config, rows, *args)
        allocated.append(weakref.ref(self.memory))
        fail("cache", rows)

    def prefill_or_fail(self, ids, *args):
        fail("prefill", len(ids))
        prefill(self, ids, *args)

    def decode_or_fail(self, ids, cache):
        fail("decode", len(ids))
        return decode(self, ids, cache)

    monkeypatch.setattr(KVCache, "__init__", new_cache)
    monkeypatch.setattr(GPT, "prefill", prefill_or_fail)
    monkeypatch.setattr(GPT, "decode", decode_or_fail)
    assert run(model, prompts, options) == expected
    assert re.search(r"out of memory with \d samples at once: going on with \d\n", capsys.readouterr().err)
    assert alive != []
    assert not any(alive)


@pytest.mark.parametrize(("owner", "name"), [(GPT, "prefill"), (engine, "with_direct_calls")])
def test_one_sample_that_does_not_fit_is_one_clear_error(monkeypatch, owner, name):
    def fail(*args):
        raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(UserError, match="one sample needs more memory than is free; end other programs"):
        run(tiny_model(), [[1], [2], [3]], GREEDY)
    monkeypatch.setattr(owner, name, lambda *args: (_ for _ in ()).throw(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        run(tiny_model(), [[1], [2], [3]], GREEDY)
