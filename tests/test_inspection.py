"""sample.py --inspect: the page's data agree with the model, and no text can inject markup."""

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import config
import sample
from checkpoint import save_checkpoint
from common.tokenizer import Tokenizer, bytes_tokenizer, char_tokenizer
from common.weights import export_weights
from errors import UserError
from generation.engine import next_logits, visible
from generation.options import SamplingOptions
from generation.sampling import Penalties, filtered_probs
from inspection.page import attention_inputs, head_kinds, inspect_prompt, printable, render_page, shown_positions
from model import GPT, GPTConfig, dense_mask
from tests.oracle import attention_weights

EOS = 256
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=128, vocab_size=257, eos_id=EOS)
KINDS = {
    "learned": {},
    "wide heads, partly rotated": {"positions": "rotary", "head_dim": 12, "rotary_dim": 4, "parallel_residual": True},
    "sinusoidal, after the norm": {
        "positions": "sinusoidal",
        "norm_position": "post",
        "scale_embeddings": True,
        "mlp": "relu",
    },
    "rotary, QK-norm, grouped": {
        "positions": "rotary",
        "qk_norm": True,
        "n_kv_head": 2,
        "norm": "rmsnorm",
        "bias": False,
    },
    "one key head, untied": {"n_kv_head": 1, "tie_embeddings": False, "mlp": "swiglu"},
    "window": {"sliding_window": 5, "positions": "rotary"},
    "documents": {"document_mask": True},
    "documents, window, n-grams": {
        "document_mask": True,
        "sliding_window": 7,
        "max_ngram": 3,
        "positions": "rotary",
        "n_kv_head": 2,
    },
}
TEXT = [EOS, *b"the cat and the hat", EOS, *b"and the rat sat"]
PLAIN = SamplingOptions()


def make(kind, **changes):
    """A model whose attention is far from uniform."""
    model = GPT(replace(SMALL, **KINDS[kind] | changes)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 15
        if model.ngrams is not None:
            model.ngrams.weight.normal_(std=0.02)
    return model


def unpack(packed, heads, tokens, size):
    """Decodes q, k or v as the page does."""
    integers, scales = (
        np.frombuffer(base64.b64decode(packed[name]), dtype) for name, dtype in (("integers", "<i2"), ("scales", "<f4"))
    )
    return torch.from_numpy(
        (integers.reshape(-1, size) * scales[:, None].astype(np.float64)).reshape(-1, heads, tokens, size)
    )


def unpacked(data):
    shape, tokens = data["model"], len(data["tokens"])
    heads = (shape["n_head"], shape["kv_heads"], shape["kv_heads"])
    return [unpack(data[name], count, tokens, shape["head_size"]) for name, count in zip("qkv", heads, strict=True)]


def page_weights(data):
    """(L, H, N, N) attention weights of the tokens shown, and (L, H, N) of all others, computed as the page does."""
    q, k, _ = unpacked(data)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    positions, first = torch.tensor(data["positions"]), torch.tensor(data["first_visible"])
    sees = (positions <= positions[:, None]) & (positions >= first[:, None])
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~sees, -torch.inf)
    if data["hidden_lse"] is None:
        return torch.softmax(scores, dim=-1), torch.zeros(scores.shape[:-1])
    lse = np.frombuffer(base64.b64decode(data["hidden_lse"]), "<f4").reshape(scores.shape[:-1]).astype(np.float64)
    weights = torch.softmax(torch.cat((scores, torch.from_numpy(lse)[..., None]), dim=-1), dim=-1)
    return weights[..., :-1], weights[..., -1]


@torch.no_grad()
def queries_and_keys(model, ids):
    """q (T, H, D) and k (T, K, D) of each layer in float64."""
    _, found = attention_inputs(model.double(), torch.tensor([ids]))
    model.float()
    return [(q[0], k[0]) for q, k, _ in found]


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_weights_are_the_models(kind):
    model = make(kind)
    data = inspect_prompt(model, bytes_tokenizer(), TEXT, PLAIN)
    shares, _ = page_weights(data)
    assert shares.sum(dim=-1).allclose(torch.ones(shares.shape[:-1], dtype=torch.float64))
    assert (shares.amax(dim=-1)[:, :, 5:] > 0.3).any(), "uniform attention would prove nothing"
    for layer, (q, k) in enumerate(queries_and_keys(model, TEXT)):
        first = model.first_visible(torch.tensor([TEXT]))
        mask = dense_mask(torch.zeros(1, len(TEXT)) if first is None else first)[0, 0]
        assert torch.equal(shares[layer] > 0, mask.expand_as(shares[layer])), "only masked tokens have weight 0"
        for head in range(SMALL.n_head):
            key = k[:, head // (SMALL.n_head // model.config.kv_heads)]
            for t in (0, 7, len(TEXT) - 1):
                visible_keys = mask[t].nonzero()[:, 0]
                expected = attention_weights(q[t : t + 1, head], key[visible_keys])[0]
                assert (shares[layer, head, t, visible_keys] - expected).abs().max() < 5e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_sums_are_the_inputs_of_the_output_projections(kind):
    """Hooks on a plain forward pass: independent of how the page got its numbers."""
    model, outputs = make(kind), []
    hooks = [
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0][0].detach()))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(torch.tensor([TEXT]))
    for hook in hooks:
        hook.remove()
    data = inspect_prompt(model, bytes_tokenizer(), TEXT, PLAIN)
    (shares, _), v = page_weights(data), unpacked(data)[2]
    sums = shares @ v.repeat_interleave(SMALL.n_head // model.config.kv_heads, dim=1)  # (L, H, N, D)
    expected = torch.stack(outputs).double()
    assert (sums.transpose(1, 2).flatten(2) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_long_prompt_shows_its_first_and_newest_tokens_and_weighs_all():
    model, ids = make("learned"), [EOS, *(b"a long text. " * 24)]
    data = inspect_prompt(model, bytes_tokenizer(), ids, PLAIN)
    window = visible(ids, SMALL.block_size, 1)
    positions = data["positions"]
    assert 96 == len(positions) < data["num_read"] == len(window) < len(ids)
    assert positions == [0, *range(len(window) - 95, len(window))]
    assert data["omitted"] == (
        f"the model sees {len(window)} of the prompt's {len(ids)} tokens, since its context is 128; "
        f"of the {len(window)} tokens that the model reads, the page shows the first and the last 95"
    )
    shares, hidden = page_weights(data)
    for layer, (q, k) in enumerate(queries_and_keys(model, window)):
        for head in range(SMALL.n_head):
            expected = attention_weights(q[-1:, head], k[:, head])[0]
            assert (shares[layer, head, -1] - expected[positions]).abs().max() < 5e-4
            assert abs(hidden[layer, head, -1] - (1 - expected[positions].sum())) < 1e-3
    assert (hidden[:, :, 0] == 0).all(), "the first token sees only itself"
    assert [entry["actual"][0][0] for entry in data["predictions"][:-1]] == [
        window[position + 1] for position in positions[:-1]
    ]


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        SamplingOptions(temperature=1.7, top_k=5),
        SamplingOptions(temperature=0.5, top_p=0.6, min_p=0.1),
        SamplingOptions(repetition_penalty=1.5, min_new_tokens=3, presence_penalty=2.0),
        SamplingOptions(temperature=0),
    ],
)
def test_the_next_token_distribution_is_that_of_generation(options):
    model = make("documents")
    model.embed.weight.data *= 10
    data = inspect_prompt(model, bytes_tokenizer(), TEXT, options)
    for position in (0, 6, len(TEXT) - 1):
        logits, entry = next_logits(model, TEXT[: position + 1], 1)[None], data["predictions"][position]
        probs = logits[0].double().softmax(dim=0)
        logits = Penalties([TEXT[: position + 1]], 257, options, logits.device).apply(logits)
        if options.min_new_tokens:
            logits[0, EOS] = -torch.inf
        filtered = filtered_probs(logits, options)[0].double()
        sampled = filtered / filtered.sum()
        assert [token for token, *_ in entry["top"]] == probs.argsort(descending=True)[:20].tolist()
        for token, p, q, rank in [*entry["top"], *entry["actual"]]:
            assert p == pytest.approx(float(probs[token]), rel=1e-4)
            assert q == pytest.approx(float(sampled[token]), rel=1e-3, abs=1e-9)
            assert rank == 1 + int((probs > probs[token]).sum())
        assert entry["allowed"] == int((sampled > 0).sum())
        assert entry["bits"] == pytest.approx(
            [float(-(x * x.clamp(min=1e-300).log2()).sum()) for x in (probs, sampled)], rel=1e-3, abs=1e-6
        )
    assert [entry["actual"][0][0] for entry in data["predictions"][:-1]] == TEXT[1:]
    assert data["predictions"][-1]["actual"] == []


def test_flags_are_those_that_change_the_first_draw():
    options = SamplingOptions(temperature=1.0, top_k=40, presence_penalty=1.0, min_p=0.05)
    flags = inspect_prompt(make("learned"), bytes_tokenizer(), TEXT, options)["flags"]
    assert flags == "--temperature=1.0 --top_k=40 --min_p=0.05"
    config.load("sample.py", flags.split())


def test_a_single_token_and_a_small_vocabulary():
    tokenizer = char_tokenizer("ab")
    model = make("learned", vocab_size=3, eos_id=2, block_size=4)
    data = inspect_prompt(model, tokenizer, [2], replace(PLAIN, keep_head=0))
    assert data["texts"] == {0: "a", 1: "b", 2: "⟨end⟩"}
    assert (len(data["predictions"]), len(data["predictions"][0]["top"]), data["omitted"]) == (1, 3, None)
    assert page_weights(data)[0].flatten().tolist() == [1.0] * 8
    assert data["kinds"] == [[("", 0.0)] * 4] * 2


def test_weights_that_are_not_finite_raise():
    model = make("learned")
    model.blocks[0].mlp.up.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        inspect_prompt(model, bytes_tokenizer(), TEXT, PLAIN)


def test_the_size_of_a_page_is_bounded():
    for shape in (GPTConfig(), GPTConfig(n_layer=48, n_head=25, n_embd=1600), GPTConfig(n_layer=1, n_head=1, n_embd=8)):
        tokens = len(shown_positions(shape, 1024))
        numbers = tokens * shape.n_layer * (shape.n_head + 2 * shape.kv_heads) * shape.head_size
        assert tokens >= 64 if shape.n_embd <= 768 else tokens == 8
        assert numbers * 2 * 4 / 3 < 5.5e6
    assert shown_positions(GPTConfig(), 3) == [0, 1, 2]


# ---- head kinds


def test_heads_are_named_after_their_attention_pattern():
    ids = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4])
    T = len(ids)
    mask, steps, starts = torch.ones(T, T).tril().bool(), torch.arange(T), torch.zeros(T, dtype=torch.int64)

    def to(keys, share=0.9):
        weight = (1 - share) * mask / mask.sum(dim=1, keepdim=True)
        return weight.scatter_add(1, keys.clamp(min=0)[:, None], torch.full((T, 1), share))

    heads = [
        to(steps),
        to(steps - 1),
        to(steps - 2),
        to(0 * steps),
        to(steps - 3),
        to(steps - 4),
        mask / mask.sum(dim=1, keepdim=True),
    ]
    kinds = head_kinds(torch.stack(heads), mask, ids, starts)
    assert [name for name, _ in kinds] == [
        "itself",
        "one back",
        "two back",
        "first token",
        "after same",
        "same token",
        "spread",
    ]
    assert all(0.9 <= share < 1 for _, share in kinds[:-1])
    assert kinds[-1][1] == pytest.approx(8.0, abs=0.01), "the mean of 4 … 12 visible tokens"
    [(name, _)] = head_kinds((heads[1] + heads[2])[None] / 2, mask, ids + 4 * steps, starts)
    assert name in ("one back", "two back")
    near = (to(steps, 0.35) + to(steps - 1, 0.35) + to(steps - 3, 0.35))[None] / 3
    assert head_kinds(near, mask, steps, starts)[0][0] == "spread"
    near = (to(steps) + to(steps - 1) + to(steps - 3))[None] / 3
    assert head_kinds(near, mask, steps, starts)[0][0] == "nearby"
    assert head_kinds(heads[0][None, :5, :5], mask[:5, :5], ids[:5], starts[:5]) == [("", 0.0)], "too short to tell"


# ---- text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the", "␣the"),
        (b"\n\n\t\r", "⏎⏎⇥␍"),
        (b"\xe4\xb8", "\\xe4\\xb8"),
        ("世".encode(), "世"),
        (b"\x00\x1b[2J", "\\x00\\x1b[2J"),
        ("\u202e\u200b\u00a0".encode(), "\\u202e\\u200b\\xa0"),
        ("\u0301x".encode(), "◌\u0301x"),
        (b"<b>&amp;", "<b>&amp;"),
        (None, "⟨end⟩"),
    ],
)
def test_invisible_characters_are_made_visible(token, shown):
    tokenizer = Tokenizer("bpe", "gpt2", [token or b"x", None], 1)
    assert printable(tokenizer, 0 if token else 1) == shown


class Scripts(HTMLParser):
    """Collects the contents of script elements, and all tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


def test_no_text_can_inject_markup_and_the_page_makes_no_requests():
    evil = [
        "</script>",
        "<script>",
        "<!--",
        "&lt;",
        "<img src=x onerror=alert(1)>",
        "]]>",
        "DATA_OF_THE_PAGE",
        "'\"`${alert(1)}",
        "\u2028",
    ]
    tokenizer = Tokenizer(
        "bpe", "gpt2", [*(bytes([i]) for i in range(256)), *(text.encode() for text in evil), None], 256 + len(evil)
    )
    model = make("learned", vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    data = inspect_prompt(model, tokenizer, list(range(256, tokenizer.vocab_size)), PLAIN)
    html = render_page(data, "</title><script>alert(1)</script>")
    parsed = Scripts(html)
    assert parsed.tags.count("script") == 2
    assert "img" not in parsed.tags
    assert not {"src", "href", "onerror"} & {name for name, _ in parsed.attributes}
    content = json.loads(parsed.scripts[0])
    assert [content["texts"][str(256 + i)].replace("␣", " ") for i in range(len(evil) - 1)] == evil[:-1]
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", html)
    assert "default-src 'none'" in html


# ---- sample.py


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("läufe") / "bytes", bytes_tokenizer()
    content = {"model": export_weights(make("learned")), "config": SMALL.to_dict(), "tokenizer": tokenizer.to_dict()}
    save_checkpoint(path, 7, **content, optimizer={}, state={"val_loss": 1.5})
    return path


def test_sample_writes_the_page(run, tmp_path, capsys):
    out = tmp_path / "ein Blick é.html"
    out.write_text("old")
    for prompt, count, note in (("Once <b>", 9, False), ("", 1, False), ("long " * 100, 96, True)):
        assert sample.main([f"--run={run}", f"--prompt={prompt}", f"--inspect={out}", "--top_k=3"]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"wrote {out} (open it in a browser)\n"
        assert ("too long to be shown in full: the model sees " in printed.err) == note
        content = json.loads(Scripts(out.read_text(encoding="utf-8")).scripts[0])
        assert (len(content["tokens"]), content["flags"]) == (count, "--temperature=0.8 --top_k=3")
        assert "step-00000007 (step 7, best, val loss 1.5000)" in content["title"]
    assert list(tmp_path.iterdir()) == [out], "no temporary file is left"


def test_paths_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for place, reason in (
        ("folder", "it is a folder"),
        ("missing/out.html", "No such file or directory"),
    ):
        with pytest.raises(UserError, match=rf"--inspect=.* cannot be written: .*{reason}; give a file"):
            sample.main([f"--run={run}", f"--inspect={tmp_path / place}"])
    with pytest.raises(UserError, match="it is a folder"):
        sample.main([f"--run={run}", "--inspect="])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flag", ["--prompts=many.jsonl", "--interactive=true", "--num_samples=2", "--output=jsonl"])
def test_inspect_excludes_other_modes_and_several_prompts(run, flag):
    with pytest.raises(UserError, match="--inspect shows one prompt and draws no samples"):
        sample.main([f"--run={run}", "--inspect=out.html", flag])
