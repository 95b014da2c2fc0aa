"""Tokenizers: round trips, rustbpe's ids equal tiktoken's, EOS is never encoded, foreign files are validated."""

import copy
import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from common import tokenizer as tokenizers
from common.download import DownloadFailed
from common.tokenizer import (
    PATTERNS,
    TRAINING_PATTERNS,
    bytes_per_token,
    bytes_tokenizer,
    char_tokenizer,
    cut_pieces,
    load_tokenizer,
    named_tokenizer,
    published_tokenizer,
    tokenizer_from_dict,
    train_bpe,
)
from errors import UserError
from tests.conftest import ROOT

CACHE = ROOT.parent / "shared" / "data" / "tiktoken"
HARD = [
    "def f(self, x_1=10_000):\n    return {'a': [x**2 for x in range(12345)]}  # don't, we'LL\n\n\n\tif x:\n\t\tpass\n",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少？\r\n日本語のテキスト、한국어 텍스트。",
    "🎉👩‍👩‍👧‍👦🇫🇷 ok🙂\u0301 e\u0301 café ﷽ ①²½ Ⅷ ǅ",
    "   \t \n\n  \r\n \r\n\r\r\n   x  y\u00a0z\u3000w\u2028v   ",
    "a\r\nb\r\n\r\nc\n\r\nd" + " " * 300 + "e" + "\n" * 50,
    "0 12 123 1234 12345 3.14159 1e-10 ٣٤٥ 100,000",
    "<|endoftext|> and again <|endoftext|>",
    "\x00\x1c\x1f\x7f\ufeff\uffff\U0010ffff",
]
SMALL = train_bpe(HARD * 3 + [(ROOT / "errors.py").read_text(encoding="utf-8")], 600, "gpt4o")
SMALL_GPT2 = train_bpe(HARD * 3 + [(ROOT / "errors.py").read_text(encoding="utf-8")], 600, "gpt2")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=["gpt4o", "gpt2"])
def bpe(request):
    return train_bpe([(ROOT / "model.py").read_text(encoding="utf-8"), *HARD * 3], 700, request.param)


@pytest.mark.parametrize("pattern", TRAINING_PATTERNS)
def test_rustbpe_and_tiktoken_give_identical_ids(pattern):
    import rustbpe

    corpus = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("*.py"))] + HARD * 3
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(corpus), vocab_size=1499, pattern=TRAINING_PATTERNS[pattern])
    ours = train_bpe(corpus, 1500, pattern)
    every_character = "".join(f" {chr(i)}a{chr(i)}" for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    for text in [*corpus, every_character]:
        assert np.array_equal(ours.encode(text), trainer.encode(text))


def test_patterns_are_the_published_ones(monkeypatch):
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    constructors = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS
    for name, pattern in {
        "r50k_base": "gpt2",
        "p50k_base": "gpt2",
        "cl100k_base": "gpt4",
        "o200k_base": "gpt4o",
    }.items():
        assert constructors[name]()["pat_str"] == PATTERNS[pattern], f"tiktoken changed the pattern of {name}"


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_round_trip(text):
    for tokenizer in (SMALL, bytes_tokenizer(), char_tokenizer(text + "x")):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == text
        assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()


@given(
    st.lists(
        st.sampled_from(
            ["\n", " ", "\r\n", "\t", "ab", "Ab", "'s", "12", "1234", "字", "🎉", ".", "/", "_", "\u0301", "²", "\x1c"]
        ),
        max_size=80,
    )
)
@settings(max_examples=300, deadline=None)
def test_cutting_a_text_does_not_change_its_ids(words):
    text = "".join(words)
    for tokenizer in (SMALL, SMALL_GPT2):
        whole = tokenizer._encode_piece(text)
        for limit in (8, 16):
            pieces = list(cut_pieces(text, limit))
            assert "".join(pieces) == text
            assert all(len(piece) <= limit for piece in pieces)
            if all(piece[-1:].isalnum() and after[0].isspace() for piece, after in pairwise(pieces)):
                assert np.array_equal(np.concatenate([tokenizer._encode_piece(piece) for piece in pieces]), whole)


def test_two_million_characters_without_a_break():
    for text in (" " * 2_000_000, "A" * 2_000_000, "\n\t" * 1_000_000):  # tiktoken alone fails on the first
        assert SMALL.decode(SMALL.encode(text)) == text


def test_bpe_is_reproducible_and_ends_with_eos(bpe):
    again = train_bpe([(ROOT / "model.py").read_text(encoding="utf-8"), *HARD * 3], 700, bpe.pattern)
    assert again.content_hash == bpe.content_hash
    assert (bpe.vocab_size, bpe.eos_id, len(bpe.token_bytes)) == (700, 699, 700)
    assert bpe.token_bytes[bpe.eos_id] == b""


def test_a_small_corpus_gives_a_small_vocabulary():
    assert train_bpe(["abab"], 5000, "gpt4o").vocab_size < 270
    with pytest.raises(UserError, match=r"vocab_size=256.*257"):
        train_bpe(["abab"], 256, "gpt4o")


def test_encode_batch_equals_encode(bpe):
    texts = HARD * 5 + [""]
    for threads in (1, 3, None):
        for ids, text in zip(bpe.encode_batch(texts, threads), texts, strict=True):
            assert np.array_equal(ids, bpe.encode(text))


def test_char_ids_equal_nanogpts():
    tokenizer = char_tokenizer("hello\nworld")
    assert tokenizer.encode("\ndeh").tolist() == [0, 1, 2, 3]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (9, 8)
    with pytest.raises(UserError, match=r"knows 8 characters, but not '\\t', 'ü'"):
        tokenizer.encode("hellü\tü")


def test_half_a_surrogate_pair_is_refused():
    for tokenizer in (SMALL, char_tokenizer("ab")):
        with pytest.raises(UserError, match="character 1"):
            tokenizer.encode("a\ud83db")


@pytest.mark.parametrize("tokenizer", [SMALL, bytes_tokenizer(), char_tokenizer("字a b")], ids=lambda t: t.name)
def test_to_dict_round_trips_through_json(tokenizer, tmp_path):
    path = tmp_path / "sprout_tokenizer.json"
    path.write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
    again = load_tokenizer(path)
    assert again.to_dict() == tokenizer.to_dict()
    assert again.content_hash == tokenizer.content_hash
    assert again.encode("a 字a").tolist() == tokenizer.encode("a 字a").tolist()
    assert named_tokenizer(str(path)).content_hash == tokenizer.content_hash


def change(**values):
    return lambda content: content.update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(format="other"), "sprout-tokenizer"),
        (change(version=2), "expected version 1"),
        (change(name="../x"), "unknown name '../x'"),
        (change(pattern="(a+)+$"), "unknown split pattern"),
        (change(eos_id="599"), "expected an integer"),
        (change(eos_id=True), "expected an integer"),
        (change(eos_id=10**9), "ids without text"),
        (change(eos_id=5), "ids without text"),
        (change(tokens="AA=="), "not a list of text"),
        (lambda content: content["tokens"].__setitem__(300, 7), "not a list of text"),
        (lambda content: content["tokens"].__setitem__(300, "***"), "not base64"),
        (lambda content: content["tokens"].__setitem__(300, "é"), "not base64"),
        (lambda content: content["tokens"].__setitem__(300, ""), "empty or duplicate"),
        (lambda content: content["tokens"].__setitem__(300, content["tokens"][301]), "duplicate"),
        (lambda content: content["tokens"].__setitem__(300, None), "not contiguous"),
        (lambda content: content["tokens"].append("YWJjZA=="), "not contiguous"),
        (lambda content: content["tokens"].__setitem__(65, "enp6eg=="), "single bytes"),
        (change(name="char", chars="ba", eos_id=2), "sorted"),
        (change(name="char", chars="ab", eos_id=3), "expected 2"),
        (change(name="char", chars="a\ud83d", eos_id=2), "surrogate"),
        (change(name="char", chars=["a"], eos_id=1), "expected text"),
    ],
)
def test_an_invalid_tokenizer_is_refused(damage, message):
    content = copy.deepcopy(SMALL.to_dict())
    damage(content)
    with pytest.raises(UserError, match=message):
        tokenizer_from_dict(content)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": ', "[" * 100_000])
def test_a_file_without_a_tokenizer_is_named_in_the_error(text, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.json"):
        load_tokenizer(path)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(UserError, match=r"--tokenizer=o200k_bsae.*did you mean o200k_base"):
        named_tokenizer("o200k_bsae")


def test_a_published_encoding_that_cannot_be_downloaded_names_its_files(monkeypatch, tmp_path):
    def refuse(*args):
        raise DownloadFailed("no connection to HOST")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizers, "download", refuse)
    with pytest.raises(UserError) as caught:
        published_tokenizer("gpt2")
    for part in (
        "vocab.bpe",
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json",
        str(tmp_path),
        "TIKTOKEN_CACHE_DIR",
        "bpe, bytes or char",
    ):
        assert part in str(caught.value)


def test_gpt2(monkeypatch):
    if not CACHE.is_dir() and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary files are not on this machine (TIKTOKEN_CACHE_DIR)")
    if CACHE.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    monkeypatch.setattr(
        tokenizers, "download", lambda *args: pytest.skip("GPT-2's vocabulary files are not on this machine")
    )
    gpt2 = published_tokenizer("gpt2")
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    again = tokenizer_from_dict(json.loads(json.dumps(gpt2.to_dict())))
    assert again.content_hash == gpt2.content_hash
    shakespeare = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if shakespeare.is_file():
        text = shakespeare.read_text(encoding="utf-8")
        assert len(again.encode(text)) == 338_025  # nanoGPT's count


def test_importing_prepare_data_imports_no_heavy_package():
    code = "import sys, prepare_data; sys.exit(any(name in sys.modules for name in ('tiktoken', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_bytes_per_token_are_those_of_tokenizers_trained_to_that_size():
    texts = [f"The cat no. {i % 37} sees {'two' * (i % 3)} moons over the water.\n" for i in range(3000)]
    found = bytes_per_token(texts, [260, 300, 400], "gpt4o")
    for size, rate in found.items():
        tokenizer = train_bpe(texts, size, "gpt4o")
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        assert rate == pytest.approx(sum(map(len, texts)) / tokens)
    assert 1 < found[260] < found[300] < found[400]
    assert bytes_per_token(["ab" * 50], [512], "gpt2")[512] > 1  # fewer pairs than asked for
