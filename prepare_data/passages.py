"""Passages of one text that stand word for word in another: what a word is, which runs of words count, their share.

A passage is a run of whole words, with all that is between them, which the other text holds in exactly the same bytes:
each space, line break and comma. Its ends are those of words, so it does not matter into which tokens either text is
split. A word is a run of letters, digits, marks and underscores; in scripts that are written without spaces (Chinese,
Japanese, Thai, …) every character is one.

Knows neither files nor datasets. Reading order: Checked (the text that is checked), Block (a part of the text that may
hold its passages, with a suffix array), find_passages.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from errors import UserError

SINGLE, WORD, SPACE = 0, 1, 2  # kinds of characters; SINGLE: a comma, 世: not in a run
SEPARATOR = b"\xff"  # between two documents: no byte of a text in UTF-8, so no passage crosses it
MAX_BYTES = 1 << 16  # of a passage; a longer one is found as several, which overlap
CHUNK = 1 << 20  # bytes of a block whose words are found at a time
LAST = 0x20000  # code points from here on, mostly Chinese characters, are SINGLE
WITHOUT_SPACES = [(0xE00, 0xFFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x1AAF), (0x2E80, 0xA4CF)]
WITHOUT_SPACES += [(0xF900, 0xFAFF), (0xFE30, 0xFE4F), (0xFF66, 0xFF9F), (0x1B000, 0x1B2FF)]
JOINERS = "_\u200c\u200d"


# ---- words -----------------------------------------------------------------------------------------------------------


@cache
def _kind_table() -> np.ndarray:
    """uint8 (LAST + 1,): the kind of each code point below LAST, then that of all others."""
    table = np.full(LAST + 1, SINGLE, np.uint8)
    for code in range(LAST):
        char = chr(code)
        if char.isspace():
            table[code] = SPACE
        elif char.isalnum() or char in JOINERS or unicodedata.category(char)[0] == "M":
            table[code] = WORD
    for first, last in WITHOUT_SPACES:
        table[first : last + 1][table[first : last + 1] == WORD] = SINGLE
    return table


def _code_points(text: str) -> tuple[np.ndarray, np.ndarray]:
    """uint32 (n,): code points, and int64 (n,): bytes of each in UTF-8."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return codes, 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000).astype(np.int64)


def _joined(kinds: np.ndarray, after_word: bool = False) -> np.ndarray:
    """bool (n + 1,): whether a word goes on from character i - 1 to character i."""
    is_word = np.concatenate(([after_word], kinds == WORD, [False]))
    return is_word[1:] & is_word[:-1]


def _starts(data: bytes, after_word: bool) -> np.ndarray:
    """bool (n,): the bytes where a word, or another character but a space, begins. A byte that is not UTF-8 is a
    character. after_word: `data` begins within a word."""
    marks = np.zeros(len(data), bool)
    at = 0
    while at < len(data):
        end = character_start(data, at + CHUNK)
        codes, sizes = _code_points(data[at:end].decode("utf-8", "surrogateescape"))
        sizes[codes >> 8 == 0xDC] = 1  # what stands for a byte that is not UTF-8
        kinds = _kind_table()[np.minimum(codes, LAST)]
        starts = (kinds != SPACE) & ~_joined(kinds, after_word)[:-1]
        marks[at + (np.cumsum(sizes) - sizes)[starts]] = True
        after_word, at = bool(kinds[-1] == WORD), end
    return marks


def character_start(data: bytes | bytearray, at: int) -> int:
    """`at`, or the start of the character that it is within."""
    end = min(at, len(data))
    back = next((n for n in range(4) if end == len(data) or data[end - n] & 0xC0 != 0x80), 0)
    return end - back


def _is_of_word(char: str) -> bool:
    """Whether a character, or "" for none, is one of a word."""
    return char != "" and bool(_kind_table()[min(ord(char), LAST)] == WORD)


def ends_with_word(data: bytes) -> bool:
    """Whether the last character is one of a word."""
    return data[-1:] != SEPARATOR and _is_of_word(data[-4:].decode("utf-8", "ignore")[-1:])


# ---- the text that is checked ----------------------------------------------------------------------------------------


class Passage(NamedTuple):
    """Characters [start, end) of the checked text, the number of words in them, and the byte where they begin in the
    text that holds them."""

    start: int
    end: int
    words: int
    at: int


class Checked:
    """A text to be checked. Its first `given` characters, a prompt, are not part of any passage; if they end within a
    word, the passage from there on is the rest of that word in the other text too.

    Its last word may be incomplete, like that of a sample which was cut at its maximum length.
    """

    def __init__(self, text: str, given: int = 0) -> None:
        self.text, self.given = text, given
        self.data = text.encode("utf-8", "surrogatepass")
        codes, sizes = _code_points(text)
        kinds = _kind_table()[np.minimum(codes, LAST)]
        joined = _joined(kinds)
        self.joined: list[bool] = joined.tolist()
        self.offsets: list[int] = [0, *np.cumsum(sizes).tolist()]  # character → byte
        starts = (kinds != SPACE) & ~joined[:-1]
        self.ends: list[int] = (np.flatnonzero((kinds != SPACE) & ~joined[1:]) + 1).tolist()
        is_word = starts & ((kinds == WORD) | np.fromiter(map(str.isalnum, text), bool, len(text)))
        self._words = np.concatenate(([0], np.cumsum(is_word)))
        begins: list[int] = np.flatnonzero(starts).tolist()
        first = bisect_left(begins, given)
        self.starts = begins[first - 1 if self.joined[given] else first :]  # where a passage may begin

    def words(self, start: int, end: int) -> int:
        """The number of words in characters [start, end), partial ones included."""
        return int(self._words[end] - self._words[start]) + (self.joined[start] and end > start)

    def size(self, passage: Passage) -> int:
        """The bytes of a passage."""
        return self.offsets[passage.end] - self.offsets[passage.start]

    def characters(self, start: int, length: int) -> int:
        """The end of the characters that are complete in `length` bytes from character `start` on."""
        return bisect_right(self.offsets, self.offsets[start] + length) - 1

    def ends_word(self, end: int) -> bool:
        """Whether a word ends before character `end`, which is not that of the text."""
        return 0 < end < len(self.text) and not self.joined[end] and _is_of_word(self.text[end - 1])

    def last_end(self, start: int, end: int) -> int:
        """The last end of a word, or of another character but a space, in characters (start, end]; else `start`."""
        found = bisect_right(self.ends, end)
        return max(start, self.ends[found - 1]) if found else start

    def passages(self, ends: Sequence[int], places: Sequence[int]) -> list[Passage]:
        """Those that are not part of a longer one. ends: of the longest passage from each of `starts` on; places: its
        first byte in the other text."""
        found, last = [], self.given
        for start, end, at in zip(self.starts, ends, places, strict=True):
            begin = max(start, self.given)
            if end > max(last, begin):
                last = end
                at += self.offsets[begin] - self.offsets[start]
                found.append(Passage(begin, end, self.words(begin, end), at))
        return found


def share(passages: Iterable[Passage]) -> int:
    """The number of characters in them, counted once where they overlap."""
    total = last = 0
    for passage in sorted(passages):
        total += max(0, passage.end - max(passage.start, last))
        last = max(last, passage.end)
    return total


# ---- the text that may hold its passages -----------------------------------------------------------------------------


class Block:
    """Part of a text, from byte `offset` of it on. order: the bytes of int32 (n,), the places in `text` where a word or
    another character but a space begins, sorted by the bytes that follow. The block's last MAX_BYTES belong to the next
    one too, and no passage begins there."""

    def __init__(self, text: bytes, order: bytes, offset: int) -> None:
        self.text, self.order, self.offset = text, memoryview(order).cast("i"), offset

    def longest(self, checked: Checked, start: int) -> tuple[int, int]:
        """The end of the longest passage from character `start` of the checked text on, and its place in the whole
        text."""
        data, begin = checked.data, checked.offsets[start]
        low, high, size = 0, len(self.order), 32
        while True:  # the places that have the first `size` bytes of it, where there are any
            wanted = data[begin : begin + size]
            low = bisect_left(self.order, wanted, low, high, key=lambda at: self.text[at : at + size])
            high = bisect_right(self.order, wanted, low, high, key=lambda at: self.text[at : at + size])
            if low == high or size >= min(MAX_BYTES, len(data) - begin):
                break
            size *= 4
        neighbors = [self.order[place] for place in (low - 1, low) if 0 <= place < len(self.order)]
        length, at = max(((_common_length(data, begin, self.text, at), at) for at in neighbors), default=(0, 0))
        end = checked.characters(start, length)
        if checked.ends_word(end):  # where the word must end too
            ended = self._ended(data[begin : checked.offsets[end]])
            at, end = (at, end - 1) if ended is None else (ended, end)
        return checked.last_end(start, end), self.offset + at

    def _ended(self, word: bytes) -> int | None:
        """A place that has these bytes, but no more of the word that they end with; None: there is none."""
        size = len(word)
        low = bisect_left(self.order, word, key=lambda at: self.text[at : at + size])
        while low < len(self.order) and self.text.startswith(word, self.order[low]):
            after = self.order[low] + size
            follows = self.text[after : after + 4].decode("utf-8", "replace")
            if not _is_of_word(follows[:1]):
                return self.order[low]
            longer = word + follows[0].encode()  # the words that go on in this way come next
            low = bisect_right(self.order, longer, low, key=lambda at: self.text[at : at + len(longer)])
        return None


def _common_length(one: bytes, i: int, other: bytes, j: int) -> int:
    """The number of equal bytes from one[i] and other[j] on, at most MAX_BYTES."""
    length, step = 0, 64
    while length < MAX_BYTES:
        a, b = one[i + length : i + length + step], other[j + length : j + length + step]
        size = min(len(a), len(b))
        if different := int.from_bytes(a[:size], "little") ^ int.from_bytes(b[:size], "little"):
            return length + ((different & -different).bit_length() - 1) // 8
        length += size
        if size < step:
            break
        step = min(2 * step, MAX_BYTES - length) or step
    return min(length, MAX_BYTES)


def suffix_order(text: bytes, own: int, after_word: bool) -> np.ndarray:
    """The `order` of a block. own: bytes that belong to it alone; after_word: whether it begins within a word. Raises
    UserError where a package is missing."""
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise UserError("--novelty needs pydivsufsort, which is not installed: pip install pydivsufsort") from None
    starts = _starts(text, after_word)
    starts[own:] = False
    order = divsufsort(text)
    return order[starts[order]]


def find_passages(blocks: Iterable[Block], texts: Sequence[Checked]) -> list[list[Passage]]:
    """The passages of each text that are not part of a longer one, in order; they may overlap."""
    best = [[(start, 0) for start in text.starts] for text in texts]
    for block in blocks:
        for text, found in zip(texts, best, strict=True):
            for i, start in enumerate(text.starts):
                found[i] = max(found[i], block.longest(text, start), key=lambda pair: pair[0])
    return [
        text.passages([end for end, _ in found], [at for _, at in found])
        for text, found in zip(texts, best, strict=True)
    ]
