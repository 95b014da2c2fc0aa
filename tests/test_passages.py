"""Copied passages against their definition: all runs of whole words, looked up one by one."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare_data import passages
from prepare_data.passages import SEPARATOR, Block, Checked, Passage, find_passages, share, suffix_order

ALPHABET = "ab ,é世×\n_"  # letters of one and two bytes, a character without spaces around it, one that is no letter
TEXTS = st.text(ALPHABET, max_size=24)


def kind(char: str) -> str:
    if char.isspace():
        return "space"
    is_word = char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")
    return "word" if is_word and char not in "世界" else "single"


def is_end(text: str, at: int) -> bool:
    """Whether a word, or another character but a space, ends before character `at`."""
    return at > 0 and kind(text[at - 1]) != "space" and not joined(text, at)


def is_start(text: str, at: int) -> bool:
    return at < len(text) and kind(text[at]) != "space" and not joined(text, at)


def joined(text: str, at: int) -> bool:
    return 0 < at < len(text) and kind(text[at - 1]) == kind(text[at]) == "word"


def stands_in(document: str, passage: str, is_cut: bool) -> bool:
    at = document.find(passage)
    while at >= 0:
        if is_start(document, at) and (is_cut or is_end(document, at + len(passage))):
            return True
        at = document.find(passage, at + 1)
    return False


def expected(text: str, documents: list[str]) -> list[tuple[int, int]]:
    """The definition: runs of whole words that stand in a document, without those that are part of a longer one. The
    last word of the text may be cut."""
    runs = [
        (start, end)
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
        if is_start(text, start)
        and is_end(text, end)
        and any(stands_in(document, text[start:end], end == len(text)) for document in documents)
    ]
    return [
        run for run in runs if not any(other != run and other[0] <= run[0] and run[1] <= other[1] for other in runs)
    ]


def joined_documents(documents: list[str]) -> bytes:
    return SEPARATOR + SEPARATOR.join(document.encode() for document in documents) + SEPARATOR


def found_in(train: bytes, *texts: Checked) -> list[list[Passage]]:
    return find_passages([Block(train, suffix_order(train, len(train), False).tobytes(), 0)], texts)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=40), min_size=1, max_size=3), TEXTS, TEXTS, st.data())
def test_passages_are_those_of_the_definition(documents, before, after, data):
    document = data.draw(st.sampled_from(documents))
    start = data.draw(st.integers(0, len(document)))
    text = before + document[start : data.draw(st.integers(start, len(document)))] + after
    train = joined_documents(documents)
    [found] = found_in(train, Checked(text))
    assert [(passage.start, passage.end) for passage in found] == expected(text, documents)
    for passage in found:
        assert train[passage.at :].startswith(text[passage.start : passage.end].encode())


def test_what_a_word_is():
    text = "Der Fluß_2, naïve 世界 สวัส e\u0301t"
    checked = Checked(text)
    assert checked.words(0, len(text)) == len(["Der", "Fluß_2", "naïve", "世", "界", "ส", "ว", "ส", "e\u0301t"])
    assert [text[start] for start in checked.starts[:4]] == ["D", "F", ",", "n"]


@pytest.mark.parametrize(
    ("document", "text", "copied"),
    [
        ("he said so", "she said so", ["said so"]),  # a passage does not begin within a word
        ("she saw the cat.", "she saw them", ["she saw"]),  # nor end within one
        ("she saw the cat.", "she saw th", ["she saw th"]),  # but the text may have been cut there
        ("one two\nthree", "one two three", ["one two", "three"]),  # a line break is no space
        ("nine ten", "ten nine ten nine", ["ten", "nine ten", "nine"]),
        ("世界和平", "新世界和", ["世界和"]),
        ("a b", "", []),
    ],
)
def test_passages_are_whole_words(document, text, copied):
    [found] = found_in(joined_documents([document]), Checked(text))
    assert [text[passage.start : passage.end] for passage in found] == copied


def test_a_passage_does_not_cross_the_end_of_a_document():
    [found] = found_in(joined_documents(["the end", "the start"]), Checked("the endthe start"))
    assert [(passage.start, passage.end) for passage in found] == [(0, 3), (11, 16)]


@pytest.mark.parametrize(
    ("prompt", "generated", "passages"),
    [
        ("Once upon", " a time there", [" a time there".strip()]),
        ("Once upon a ti", "me there", ["me there"]),  # the word began in the prompt
        ("Once upon a xx", "me there", ["there"]),  # another word
        ("Once upon a time there", "", []),
    ],
)
def test_a_prompt_is_not_counted(prompt, generated, passages):
    [found] = found_in(joined_documents(["Once upon a time there was"]), Checked(prompt + generated, len(prompt)))
    whole = prompt + generated
    assert [whole[passage.start : passage.end] for passage in found] == passages
    assert all(passage.start >= len(prompt) for passage in found)


def test_shares_count_overlaps_once():
    assert share([Passage(0, 10, 2, 0), Passage(5, 12, 2, 0), Passage(6, 8, 1, 0), Passage(20, 21, 1, 0)]) == 13
    assert share([]) == 0


def test_a_passage_longer_than_the_longest_is_found_as_several(monkeypatch):
    monkeypatch.setattr(passages, "MAX_BYTES", 64)
    text = " ".join(f"word{i}" for i in range(60))
    [found] = found_in(joined_documents([text]), Checked(text))
    assert share(found) == len(text)


def test_repetitions_do_not_take_quadratic_time():
    train = joined_documents(["a " * 50_000, "spam " * 50_000])
    [found] = found_in(train, Checked("a " * 500))
    assert [(passage.start, passage.end) for passage in found] == [(0, 999)]
