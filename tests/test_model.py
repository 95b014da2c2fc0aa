"""The Transformer: causal, masked where asked, initialized as listed, the same with the cache as without."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import model as model_module
from common.weights import build_for_weights, count_parameters, export_weights, import_weights
from model import (
    GPT,
    IGNORED_TARGET,
    AttentionContext,
    Dropout,
    GPTConfig,
    KVCache,
    attention,
    dense_mask,
    rotary_table,
    rotate,
    sinusoidal_table,
)
from tests.oracle import attention_weights

EOS = 39
TINY = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=EOS + 1, eos_id=EOS)
MODERN = dataclasses.replace(TINY, positions="rotary", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False)
VARIANTS = {
    "gpt2": TINY,
    "modern": MODERN,
    "grouped": dataclasses.replace(MODERN, n_kv_head=2),
    "vaswani": dataclasses.replace(
        TINY, positions="sinusoidal", norm_position="post", mlp="relu", scale_embeddings=True
    ),
    "untied relu2": dataclasses.replace(TINY, tie_embeddings=False, mlp="relu2", n_hidden=48),
    "window": dataclasses.replace(MODERN, sliding_window=5),
    "documents": dataclasses.replace(TINY, document_mask=True),
    "recent": dataclasses.replace(MODERN, first_attention="recent", n_kv_head=2),
    "n-grams": dataclasses.replace(MODERN, max_ngram=3, ngram_rows=50, document_mask=True, tie_embeddings=False),
    "window and documents": dataclasses.replace(MODERN, n_kv_head=1, sliding_window=5, document_mask=True),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def ids_with_documents(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids with an EOS at the start and a few more of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, EOS, (rows, length), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.15] = EOS
    ids[:, 0] = EOS
    return ids


def full_of_numbers(config: GPTConfig) -> GPT:
    """A model in float64 whose table of n-grams holds something, as it does after training."""
    model = GPT(config).double().eval()
    if model.ngrams is not None:
        torch.nn.init.normal_(model.ngrams.weight, std=0.02)
    return model


def sensitivity(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """(T, T) bool: whether the logits at t depend on the token at s, by the gradient through the embeddings."""
    embedded = []
    handle = model.embed.register_forward_hook(lambda module, args, out: embedded.append(out))
    logits = model(ids)
    handle.remove()
    gradients = [
        torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)[0] for t in range(ids.shape[1])
    ]
    return torch.stack([gradient[0].abs().sum(dim=-1) > 0 for gradient in gradients])


@every_variant
def test_a_token_depends_on_exactly_the_visible_tokens(variant):
    """Over several layers a window reaches further, so here the model has one."""
    model = GPT(dataclasses.replace(variant, n_layer=1)).double()
    ids = ids_with_documents(1, 16)
    t = torch.arange(16)
    expected = t <= t[:, None]
    if variant.document_mask:
        expected &= t >= model.document_starts(ids)[0][:, None]
    if variant.sliding_window:
        expected &= t > t[:, None] - variant.sliding_window
    assert torch.equal(sensitivity(model, ids), expected)


@every_variant
def test_no_token_depends_on_the_future_in_a_deep_model(variant):
    depends = sensitivity(GPT(variant).double(), ids_with_documents(1, 16))
    assert not depends.triu(1).any()


@every_variant
def test_initial_loss_is_that_of_a_uniform_guess(variant):
    ids = torch.randint(0, EOS + 1, (8, 17), generator=torch.Generator().manual_seed(0))
    loss = GPT(variant)(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(EOS + 1), abs=0.1)


@pytest.mark.parametrize(("preset", "parameters"), [("gpt2_124m", 124_439_808), ("modern_124m", 123_552_768)])
def test_parameter_counts_of_the_124m_presets(preset, parameters):
    """gpt2_124m: as OpenAI's model. modern: 50257·768 + 12·(4·768² + 3·768·2048 + 2·64 + 2·768) + 768."""
    options = config.load("train.py", [preset]).section(GPTConfig)
    with torch.device("meta"):
        assert count_parameters(GPT(options, seed=None)) == parameters


def test_worked_example_of_self_attention():
    """The example of the tutorials: d_k = 64, scores 112 and 96 → 14 and 12 → 0.88 and 0.12."""
    q = torch.zeros(1, 64, dtype=torch.float64)
    q[0, 0] = 1.0
    k = torch.zeros(2, 64, dtype=torch.float64)
    k[0, 0], k[1, 0] = 112.0, 96.0
    assert torch.equal(q @ k.mT / math.sqrt(64), torch.tensor([[14.0, 12.0]], dtype=torch.float64))
    assert attention_weights(q, k)[0].tolist() == pytest.approx([0.88, 0.12], abs=0.005)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_its_definition(kv_heads, masked):
    B, T, H, D = 2, 13, 4, 8
    q, k, v = torch.randn(B, T, H + 2 * kv_heads, D, dtype=torch.float64).split((H, kv_heads, kv_heads), dim=2)
    first = torch.maximum(torch.zeros(T), torch.arange(T) - 4).to(torch.int32).expand(B, T) if masked else None
    out = attention(q, k, v, AttentionContext("sdpa", mask=dense_mask(first)), layer=0)
    for b in range(B):
        for h in range(H):
            kv = h // (H // kv_heads)
            for t in range(T):
                seen = slice(int(first[b, t]) if masked else 0, t + 1)
                weights = attention_weights(q[b, t, h][None], k[b, seen, kv])
                torch.testing.assert_close(out[b, t, h], (weights @ v[b, seen, kv])[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 100), (torch.float32, 129), (torch.bfloat16, 100)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_ways_to_attend_agree_with_float64(dtype, length, kv_heads, monkeypatch):
    """Outputs and gradients differ from float64 by at most 1.5 × what PyTorch's attention in the same dtype does."""
    q, k, v, grad = (torch.randn(2, length, heads, 16, dtype=dtype) for heads in (4, kv_heads, kv_heads, 4))
    calls = []
    unfused = model_module.causal_attention
    monkeypatch.setattr(model_module, "causal_attention", lambda *args: calls.append(1) or unfused(*args))

    def outputs(convert, attend):
        inputs = [convert(x).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        out.backward(convert(grad))
        return [out.detach(), *(x.grad for x in inputs)]

    def sdpa(q, k, v):
        return model_module._sdpa(q, k.transpose(1, 2), v.transpose(1, 2), None, causal=True)

    def chosen(q, k, v):
        return attention(q, k, v, AttentionContext("sdpa"), layer=0)

    exact = outputs(lambda x: x.detach().double(), chosen)
    assert not calls
    plain = outputs(lambda x: x.detach().clone(), sdpa)
    ours = outputs(lambda x: x.detach().clone(), chosen)
    assert bool(calls) == (length <= 128)
    for mine, its, true in zip(ours, plain, exact, strict=True):
        error, allowed = (mine.double() - true).abs().max(), (its.double() - true).abs().max()
        assert error <= 1.5 * allowed + 4 * torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("max_ngram", [1, 4])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_document_mask_makes_a_document_independent_of_its_predecessors(positions, max_ngram):
    model = full_of_numbers(dataclasses.replace(MODERN, positions=positions, document_mask=True, max_ngram=max_ngram))
    document = torch.tensor([EOS, 5, 6, 7, 8, 9, EOS])
    losses = []
    for before in ([], [EOS], [EOS, 1, 2, 3], [4, 4, EOS, 17, 2, 3, 30]):
        ids = torch.cat((torch.tensor(before, dtype=torch.int64), document))[None]
        losses.append(model(ids[:, :-1], ids[:, 1:], reduction="none")[0, -6:])
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], atol=1e-12, rtol=0)


@every_variant
def test_cached_logits_equal_those_of_the_full_forward(variant):
    """Rows of unequal lengths, one of them empty; a dropped row; a row that is prefilled again in the middle."""
    model = full_of_numbers(variant)
    ids = ids_with_documents(3, 16)
    full, rows = model(ids), torch.arange(3)
    cache = KVCache(variant, 3, dtype=torch.float64)
    model.prefill(ids[:, :8], [5, 0, 8], cache, [0, 1, 2])
    for step in range(8):
        if step == 4:
            model.prefill(ids[[1], :3], [3], cache, [1])
        at = cache.lengths.clone()
        assert at.tolist() == cache.host_lengths
        logits = model.decode(ids[rows, at], cache)
        torch.testing.assert_close(logits, full[rows, at], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="full"):
        model.decode(ids[rows, 0], cache)
    cache.copy_row(1, 0)
    cache.narrow(1)
    at = cache.lengths.clone()
    torch.testing.assert_close(model.decode(ids[1, at], cache), full[1, at], atol=1e-12, rtol=0)


def test_a_token_is_embedded_with_the_ngrams_that_end_with_it():
    """Equal n-grams share a row at every position, others hardly ever do; the first tokens have shorter ones only."""
    model = GPT(dataclasses.replace(TINY, max_ngram=3, ngram_rows=10_000))
    ids = torch.tensor([[1, 2, 3, 9, 2, 3, 1, 2, 3, 2, 1]])
    rows = model._ngram_rows(ids, slice(0, ids.shape[1]), None)[0]  # (T, 2)
    assert torch.equal(rows[2], rows[8])  # 3 after 1 2
    assert (rows[2] == rows[5]).tolist() == [True, False]  # 3 after 9 2
    assert (
        len(set(rows.flatten().tolist())) == len({(1, 2), (2, 3), (3, 9), (9, 2), (3, 1), (3, 2), (2, 1), (0, 1)}) + 10
    )
    positions = slice(0, ids.shape[1] - 1)
    cut = model._ngram_rows(ids[:, 1:], positions, None)
    assert torch.equal(
        cut, model._ngram_rows(ids[:, 1:], positions, ids[:, :2])
    )  # positions start at 0: what lies before counts for nothing
    assert torch.equal(model._ngram_rows(ids[:, 8:9], torch.tensor([[8]]), ids[:, 6:8])[0, 0], rows[8])


def test_padded_rows_never_matter():
    padded = dataclasses.replace(TINY, vocab_size=1500, eos_id=1499, tie_embeddings=False)
    assert padded.padded_vocab_size == 1536
    assert not GPT(dataclasses.replace(padded, positions="rotary", first_attention="recent")).embed.weight[1500:].any()
    model = GPT(padded)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    ids = torch.randint(0, 1500, (2, 17))
    logits = model(ids[:, :-1])
    assert logits.shape == (2, 16, 1500)
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    for matrix in (model.embed.weight, model.head.weight):
        assert not matrix[1500:].any()
    assert {t.shape[0] for name, t in export_weights(model).items() if name in ("embed.weight", "head.weight")} == {
        1500
    }
    other = GPT(padded, seed=7)
    import_weights(other, export_weights(model))
    assert torch.equal(other(ids[:, :-1]), model(ids[:, :-1]))


def test_initial_weights_follow_the_table():
    model = GPT(dataclasses.replace(TINY, n_layer=8, n_embd=128, n_head=4, tie_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith(("attn.proj.weight", "mlp.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(parameter.mean().item()) < expected / 5, name
    again, other = export_weights(GPT(TINY, seed=3)), export_weights(GPT(TINY, seed=3))
    assert all(torch.equal(again[name], other[name]) for name in again)
    assert not torch.equal(again["embed.weight"], export_weights(GPT(TINY, seed=4))["embed.weight"])


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_untrained_heads_of_first_attention_recent_look_at_the_last_tokens(qk_norm, n_kv_head):
    """One, two, three, one back, in every layer, whatever the tokens are."""
    recent = {"first_attention": "recent", "qk_norm": qk_norm, "n_kv_head": n_kv_head}
    shape = dataclasses.replace(MODERN, n_embd=128, block_size=32, rope_theta=100.0, **recent)
    model = GPT(shape)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)  # as without
    ids = torch.randint(0, EOS, (8, 32), generator=torch.Generator().manual_seed(0))
    x = model.embed(ids)
    with torch.no_grad():
        for block in model.blocks:
            q, k, _ = block.attn.queries_keys_values(block.attn_norm(x), model.table)
            k = k.repeat_interleave(shape.n_head // shape.kv_heads, dim=2)
            scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(shape.head_size)  # (B, H, T, T)
            weights = scores.masked_fill(torch.ones(32, 32).triu(1).bool(), -math.inf).softmax(dim=-1)
            for head in range(shape.n_head):
                by_distance = [weights[:, head].diagonal(-back, 1, 2)[:, 16:].mean().item() for back in range(16)]
                assert by_distance.index(max(by_distance)) == 1 + head % 3
                assert max(by_distance) > 0.3
            x = block(x, AttentionContext("sdpa", model.table))


def test_first_attention_recent_needs_rotations():
    with pytest.raises(ValueError, match="first_attention=recent needs positions=rotary"):
        dataclasses.replace(TINY, first_attention="recent")


def test_import_raises_on_missing_extra_or_misshapen_tensors():
    state = export_weights(GPT(TINY))
    with pytest.raises(ValueError, match=r"lack 'embed\.weight'"):
        import_weights(GPT(TINY), {name: tensor for name, tensor in state.items() if name != "embed.weight"})
    with pytest.raises(ValueError, match="'surplus'"):
        import_weights(GPT(TINY), {**state, "surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'embed\.weight' has the shape \(39, 32\)"):
        import_weights(GPT(TINY), {**state, "embed.weight": state["embed.weight"][:-1]})


def test_ignored_targets_count_neither_in_the_loss_nor_in_its_divisor():
    model, ids = GPT(TINY), ids_with_documents(2, 16)
    targets = ids.roll(-1, dims=1)
    losses = model(ids, targets, reduction="none")
    targets[0, :7] = IGNORED_TARGET
    kept = torch.cat((losses[0, 7:], losses[1]))
    assert model(ids, targets).item() == pytest.approx(kept.mean().item(), rel=1e-6)
    assert model(ids, targets, reduction="sum").item() == pytest.approx(kept.sum().item(), rel=1e-6)


def test_label_smoothing_mixes_in_the_uniform_distribution():
    model, ids = GPT(TINY), ids_with_documents(2, 16)
    log_probabilities = torch.log_softmax(model(ids), dim=-1)
    plain = -log_probabilities.gather(-1, ids[..., None]).mean()
    uniform = -log_probabilities.mean()
    assert model(ids, ids, label_smoothing=0.1).item() == pytest.approx((0.9 * plain + 0.1 * uniform).item(), rel=1e-5)


@pytest.mark.parametrize("p", [1e-5, 1e-3, 1 / 512, 0.01, 0.1, 0.2, 0.5, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_as_often_as_it_says_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = (torch.rand(4_000_000) + 1).to(dtype)
    out = Dropout(p)(x).double()
    deviation = math.sqrt(p * (1 - p) / out.numel())
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=5 * deviation + 2**-17)
    assert (out.mean() / x.double().mean()).item() == pytest.approx(1, abs=6 * deviation / (1 - p) + 2e-3)


@given(p=st.floats(0.002, 0.998), size=st.integers(1, 999))
@settings(max_examples=25, deadline=None)
def test_dropout_scales_what_it_keeps(p, size):
    """By the rate that is applied, p to 16 bits."""
    dropout = Dropout(p)
    torch.manual_seed(0)
    out = dropout(torch.ones(size, 7))
    torch.manual_seed(0)
    assert torch.equal(out, dropout(torch.ones(size, 7)))
    assert ((out == 0) | (out == torch.tensor(1 / (1 - round(65_536 * p) / 65_536)))).all()
    assert (out != 0).float().mean().item() == pytest.approx(1 - p, abs=5 * math.sqrt(0.25 / out.numel()))
    assert torch.equal(dropout.eval()(torch.ones(3)), torch.ones(3))


def test_a_loss_has_the_precision_of_the_model():
    """And is one of float32 in a model of bfloat16."""
    ids = ids_with_documents(2, 16)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model = GPT(TINY).to(dtype)
        assert {model(ids, ids, reduction=kind).dtype for kind in ("mean", "sum", "none")} == {expected}
    exact, near = GPT(TINY).double()(ids, ids), GPT(TINY)(ids, ids)
    assert 0 < abs(exact - near) < 1e-5


# In a trained quickstart the scores of a row have a standard deviation of up to 2.6 (1 to 2 here at scales 1 and 2).
@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize(("T", "D", "H", "K"), [(64, 32, 4, 4), (200, 48, 4, 2), (256, 64, 2, 2), (1024, 32, 1, 1)])
def test_unfused_attention_is_as_exact_as_pytorch(T, D, H, K, scale, monkeypatch):
    """In bfloat16, against float64, as a model calls it: errors of the output and all gradients are at most 1.45 times
    PyTorch's, whose largest weight is exactly 1 until the last division. With bfloat16 scores they were up to 8."""
    draw = torch.Generator().manual_seed(T)
    q, k, v, grad = (torch.randn(2, T, heads, D, generator=draw).bfloat16() for heads in (H, K, K, H))
    q *= scale

    def run(dtype: torch.dtype, longest: int) -> list[torch.Tensor]:
        monkeypatch.setattr(model_module, "MAX_UNFUSED_LENGTH", {torch.bfloat16: longest})
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model_module.attention(*leaves, model_module.AttentionContext("sdpa"), layer=0)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact, ours, its = run(torch.float64, 0), run(torch.bfloat16, T), run(torch.bfloat16, 0)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), exact, ours, its, strict=True):
        assert y.dtype == torch.bfloat16
        assert (y.double() - x).norm() <= 1.45 * (z.double() - x).norm(), name
    assert not torch.equal(ours[0], its[0])  # two paths ran


def test_rotation_depends_on_relative_positions_only():
    table = rotary_table(32, 8, 10_000.0).double()
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()

    def score(i: int, j: int) -> float:
        return (rotate(q, table[i : i + 1]) * rotate(k, table[j : j + 1])).sum().item()

    assert score(3, 1) == pytest.approx(score(30, 28), abs=1e-6)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)
    assert torch.equal(rotate(q, table[:1]), q)


def test_sinusoidal_positions_are_those_of_the_paper():
    table = sinusoidal_table(50, 16)
    assert table[7, 4].item() == pytest.approx(math.sin(7 / 10_000 ** (4 / 16)), abs=1e-6)
    assert table[7, 5].item() == pytest.approx(math.cos(7 / 10_000 ** (4 / 16)), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 33}, "n_embd=33 is not divisible by n_head=4"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"positions": "rotary", "n_embd": 36}, r"even head size \(n_embd=36 / n_head=4 is 9\)"),
        ({"positions": "rotary", "rotary_dim": 5}, r"rotary_dim=5 is odd, or above the head size \(n_embd=32"),
        ({"positions": "sinusoidal", "n_embd": 27, "n_head": 3}, "even n_embd, not 27"),
        ({"document_mask": True, "eos_id": None}, "end-of-sequence"),
        ({"n_layer": 0}, "at least 1"),
        ({"eos_id": 40}, "outside the vocabulary"),
    ],
)
def test_options_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(TINY, **change)
    assert ";" not in str(error.value)  # which separates several rules


def test_weights_of_narrow_activations_keep_their_dtype():
    """Under autocast queries and keys must come out of norm and rotation in the dtype of the values."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = GPT(MODERN)(ids_with_documents(2, 16), ids_with_documents(2, 16))
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_embd", 2**20, "has the shape"),
        ("n_embd", 10**18, "impossible"),
        ("n_layer", 10**9, "the weights have 2 layers"),
        ("block_size", 10**9, "table of positions"),
        ("n_hidden", 10**10, "has the shape"),
        ("ngram_rows", 10**12, "'ngrams.weight'"),
    ],
)
def test_a_config_that_does_not_belong_to_the_weights_takes_no_memory(field, value, message):
    config = dataclasses.replace(TINY, positions="rotary", max_ngram=2 if field == "ngram_rows" else 1)
    tensors = export_weights(GPT(config))
    build_for_weights(config, tensors)
    with pytest.raises(ValueError, match=message):
        build_for_weights(dataclasses.replace(config, **{field: value}), tensors)
