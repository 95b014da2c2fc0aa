"""Text around the engine: encoding prompts, incremental decoding, stop strings, offsets of tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import generation.engine as engine
from common.tokenizer import Tokenizer, bytes_tokenizer, char_tokenizer
from errors import UserError
from generation.engine import END_OF_SEQUENCE, LENGTH, STOP
from generation.options import SamplingOptions
from generation.text import prompt_ids, sample_texts, stream_texts
from tests.test_generation import tiny_model


def scripted(monkeypatch, ids, eos):
    """Replaces generate() by one that yields these ids, then the end-of-sequence."""

    def generate(*args, stopped=frozenset(), **kwargs):
        for token in ids:
            if 0 in stopped:
                return
            yield engine.Event(0, token, None, -1.0 * token, ((token, -0.5),))
        if 0 not in stopped:
            yield engine.Event(0, eos, END_OF_SEQUENCE, -0.25)

    monkeypatch.setattr("generation.text.generate", generate)


def streamed(data, tokenizer=None, **options):
    tokenizer = tokenizer or bytes_tokenizer()
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripted(monkeypatch, list(data), tokenizer.eos_id)
        return list(stream_texts(None, tokenizer, [[tokenizer.eos_id]], SamplingOptions(**options), 0))


@settings(max_examples=200)
@given(st.one_of(st.text().map(str.encode), st.binary()))
def test_streamed_pieces_add_up_to_the_decoded_text(data):
    pieces = streamed(data)
    assert "".join(piece.text for piece in pieces) == data.decode("utf-8", errors="replace")
    assert [piece.reason for piece in pieces] == [None] * len(data) + [END_OF_SEQUENCE]


def test_pieces_hold_complete_characters():
    text = "héllo 世界 👩‍🚀"
    pieces = [piece.text for piece in streamed(text.encode())]
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
def test_sample_texts_is_reproducible_and_restores_mode_and_rng(training):
    tokenizer: Tokenizer = bytes_tokenizer()
    model = tiny_model(torch.float32, vocab_size=257, eos_id=256, dropout=0.3).train(training)
    state = torch.get_rng_state()
    once = sample_texts(model, tokenizer, "ab", num_samples=3, max_new_tokens=20, temperature=1.0, seed=4)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(text.startswith("ab") and reason in (LENGTH, END_OF_SEQUENCE) for text, reason in once)
    autocast = torch.inference_mode  # any context
    assert (
        sample_texts(
            model, tokenizer, "ab", num_samples=2, max_new_tokens=20, temperature=1.0, seed=4, autocast=autocast
        )
        == once[:2]
    )


# ---- stop strings


def cut_at_stop(text, stop):
    """Reference: reads character by character, ends where a stop string is complete and cuts that off (the longest)."""
    for end in range(1, len(text) + 1):
        if found := [string for string in stop if text[:end].endswith(string)]:
            return text[: end - max(map(len, found))], True
    return text, False


letters = st.text("ab ", min_size=1, max_size=4)


@settings(max_examples=300)
@given(st.text("ab ", max_size=25), st.lists(letters, min_size=1, max_size=3), st.randoms())
@example("aab", ["ab", "aab"], None)  # overlapping, the same end
@example("abab", ["bab", "ba"], None)
def test_stop_strings_are_cut_off_however_they_are_split_into_tokens(text, stop, random):
    tokens, remainder = [], text
    while remainder:
        n = random.randint(1, 5) if random else 2
        tokens.append(remainder[:n].encode())
        remainder = remainder[n:]
    tokenizer = Tokenizer("made up", "gpt2", [*tokens, None], len(tokens))
    pieces = streamed(range(len(tokens)), tokenizer, stop=tuple(stop))
    expected, stopped = cut_at_stop(text, stop)
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].reason == (STOP if stopped else END_OF_SEQUENCE)
    assert all(piece.reason is None for piece in pieces[:-1])
    shown = [token for piece in pieces for token in piece.tokens]
    if not stopped:
        end = shown.pop()
        assert (end.id, end.text, end.start) == (tokenizer.eos_id, "", len(expected))
    assert [token.id for token in shown] == list(range(len(shown)))
    assert all(token.start < len(expected) for token in shown)
    assert not expected or shown[-1].start + len(shown[-1].text) >= len(expected)
    for token in shown:  # its offset is right
        assert expected[token.start :].startswith(token.text[: len(expected) - token.start])


def test_only_prefixes_of_stop_strings_are_held_back():
    pieces = streamed(b"abcabd", stop=("abd",))
    assert [piece.text for piece in pieces] == ["", "", "abc", "", "", ""]
    assert [piece.reason for piece in pieces] == [None] * 5 + [STOP]
    assert [[token.start for token in piece.tokens] for piece in pieces] == [[], [], [0, 1, 2], [], [], []]


def test_held_back_text_is_released_at_the_end():
    pieces = streamed("x界en".encode(), stop=("end", "界!"))
    assert "".join(piece.text for piece in pieces) == "x界en"
    assert len([token for piece in pieces for token in piece.tokens]) == 7
    assert pieces[-1][1:] == ("en", pieces[-1].tokens, END_OF_SEQUENCE)


def test_tokens_carry_the_log_probabilities_of_their_events():
    (token,) = streamed(b"a")[0].tokens
    assert token == (97, "a", 0, -97.0, ((97, -0.5),))


def test_an_end_of_sequence_is_the_last_token_after_an_incomplete_character():
    pieces = streamed(b"a\xe4\xb8")
    assert [piece.text for piece in pieces] == ["a", "", "", "\ufffd"]
    shown = [token for piece in pieces for token in piece.tokens]
    assert [(token.id, token.start) for token in shown] == [(97, 0), (228, 1), (184, 1), (256, 2)]
    assert shown[-1].logprob == -0.25
    assert [token.id for token in streamed(b"")[0].tokens] == [256]
    assert [token.id for piece in streamed(b"ab", stop=("b",)) for token in piece.tokens] == [97]  # it was not drawn


def test_a_sample_ends_at_its_stop_string_while_the_others_continue():
    model = tiny_model(torch.float32, vocab_size=257, eos_id=256)
    options = SamplingOptions(max_new_tokens=60, temperature=1.0, stop_at_eos=False)

    def texts(options, prompts):
        found, reasons = [""] * len(prompts), [None] * len(prompts)
        for piece in stream_texts(model, bytes_tokenizer(), prompts, options, 3):
            assert reasons[piece.sample] is None, "a piece after the end"
            found[piece.sample] += piece.text
            reasons[piece.sample] = piece.reason
        return list(zip(found, reasons, strict=True))

    prompts = [[256], [256, 65], [256], [256, 66, 67]]
    whole = texts(options, prompts)
    stop = (whole[0][0][5:7], whole[1][0][20:22])
    expected = [cut_at_stop(text, stop) for text, _ in whole]
    assert any(stopped for _, stopped in expected)
    assert texts(replace(options, stop=stop), prompts) == [
        (text, STOP if stopped else LENGTH) for text, stopped in expected
    ]
