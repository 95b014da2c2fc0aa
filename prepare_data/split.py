"""Train/validation split: `count` reads the corpus once, `choose_rule` picks a rule, and the rule labels every piece.

By documents, a hash of a document's first piece decides, so copies fall into the same split. Hashes below val_fraction
go to validation where that is near val_fraction of the bytes too: then a document's split does not depend on the rest
of the corpus. Otherwise documents are taken in the order of their hashes, without those that are too large, until their
bytes come near. By tail, the text is cut at a character; the cut does not end a document. split=auto is by documents
where that comes near val_fraction and no document is more than half of the text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from errors import UserError
from prepare_data import PrepareOptions
from prepare_data.sources import Corpus
from terminal import progress_bar

HASHES = 1 << 64  # document hashes are below it
MIN_DOCUMENTS = 20  # split=auto: with fewer, a split by documents would be too uneven
SLICE, SAMPLE_CHARACTERS = 20_000, 1_000_000  # characters of a slice, and of a sample at most
NEAR = 1.5  # the validation split is near val_fraction if the two differ by no more than this factor


class LabeledPiece(NamedTuple):
    split: str  # "train" or "val"
    text: str
    starts: bool  # a document starts with it
    ends: bool  # a document ends with it


@dataclass
class Sample:
    """Text from all over a corpus whose length is not known before: every `stride`-th slice; half of SAMPLE_CHARACTERS
    or more, if there is as much. Where it would have more than all of them, every other slice goes."""

    slices: list[str] = field(default_factory=list)
    characters: int = 0
    stride: int = 1
    seen: int = 0  # slices

    def add(self, text: str) -> None:
        for start in range(0, len(text), SLICE):
            if self.seen % self.stride == 0:
                self.slices.append(text[start : start + SLICE])
                self.characters += len(self.slices[-1])
            self.seen += 1
            if self.characters > SAMPLE_CHARACTERS:
                self.slices, self.stride = self.slices[::2], 2 * self.stride
                self.characters = sum(map(len, self.slices))


@dataclass
class Counts:
    """Statistics of one pass over a corpus."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    hashes: array[int] = field(default_factory=lambda: array("Q"))  # of each document's first piece
    sizes: array[int] = field(default_factory=lambda: array("Q"))  # bytes of each document
    alphabet: set[str] = field(default_factory=set)  # every character; empty unless requested
    sample: Sample = field(default_factory=Sample)  # with the alphabet
    content: str = ""  # hash of all documents in order

    def n_documents(self) -> str:
        return f"{self.documents:,} document{'' if self.documents == 1 else 's'}"


@dataclass(frozen=True)
class SplitRule:
    name: str  # "documents" or "tail"
    limit: int
    """documents: hashes below it go to validation. tail: the number of characters for training."""
    too_large: frozenset[int] = frozenset()
    """Hashes below the limit of documents that stay in training."""
    reason: str = ""
    """Why split=auto chose it; empty where nothing is unusual."""
    notes: tuple[str, ...] = ()
    """What the user should know of this split."""

    def pieces(self, corpus: Corpus) -> Iterator[LabeledPiece]:
        """The corpus's pieces in order, with their split; a piece that crosses the tail's cut becomes two."""
        starts, position, split = True, 0, ""
        for text, ends in corpus.pieces():
            if self.name == "documents":
                if starts:
                    value = document_hash(text.encode())
                    split = "val" if value < self.limit and value not in self.too_large else "train"
                yield LabeledPiece(split, text, starts, ends)
            else:
                head, tail = text[: max(0, self.limit - position)], text[max(0, self.limit - position) :]
                if head:
                    yield LabeledPiece("train", head, starts, ends and not tail)
                if tail:
                    yield LabeledPiece("val", tail, starts and not head, ends)
                position += len(text)
            starts = ends


def document_hash(first_piece: bytes) -> int:
    """Uniform in [0, HASHES)."""
    return int.from_bytes(hashlib.blake2b(first_piece, digest_size=8).digest(), "little")


def count(corpus: Corpus, alphabet: bool, quiet: bool = False) -> Counts:
    """Reads the whole corpus once. Raises UserError if any of it does not decode, or if it is empty.

    `alphabet`: collect the characters too, which takes a third of the time. The notes are printed unless `quiet`.
    """
    counts, digest, starts = Counts(), hashlib.blake2b(digest_size=32), True
    with progress_bar(f"reading {corpus.name}", leave=False) as bar:
        for text, ends in corpus.pieces():
            data = text.encode()
            digest.update(data + b"\xff" if ends else data)  # a separator: UTF-8 text never contains this byte
            if starts:
                counts.hashes.append(document_hash(data))
                counts.sizes.append(0)
            counts.sizes[-1] += len(data)
            counts.documents += ends
            counts.characters += len(text)
            counts.bytes += len(data)
            if alphabet:
                counts.alphabet.update(text)
                counts.sample.add(text)
            bar.update(len(data))
            starts = ends
    if counts.characters == 0:
        raise UserError(
            f"{corpus.origin}: contains no text; expected at least a few hundred characters:"
            " check the path and the separator"
        )
    counts.content = digest.hexdigest()
    for note in () if quiet else corpus.notes:
        print(f"note: {note}")
    return counts


def choose_rule(counts: Counts, options: PrepareOptions) -> SplitRule:
    """The rule of the options; neither split is empty. Raises UserError if that is impossible."""
    fraction = options.val_fraction
    if options.split == "tail":
        return _tail(counts, fraction, "")
    if options.split == "auto" and counts.documents < MIN_DOCUMENTS:
        return _tail(counts, fraction, f"fewer than {MIN_DOCUMENTS} documents")
    largest = max(counts.sizes) / counts.bytes
    if options.split == "auto" and largest > 0.5:
        return _tail(counts, fraction, f"one document is {percent(largest)} of the text")
    hashes, sizes = np.array(counts.hashes, np.uint64), np.array(counts.sizes, np.float64)
    if hashes.min() == hashes.max():
        if options.split == "auto":
            return _tail(counts, fraction, f"all {counts.documents:,} documents are the same")
        raise UserError(
            f"--split=documents: cannot split {counts.documents} documents with the same content; use --split=tail"
        )
    rule, share = _by_documents(hashes, sizes / counts.bytes, fraction)
    if _is_near(share, fraction):
        return rule
    if options.split == "auto":
        return _tail(counts, fraction, f"whole documents would make val {percent(share)} of the text")
    note = (
        f"val is {percent(share)} of the text: whole documents come no nearer to {percent(fraction)}, --split=tail does"
    )
    return replace(rule, notes=(note,))


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _is_near(share: float, fraction: float) -> bool:
    wanted, found = (fraction, share) if fraction <= 0.5 else (1 - fraction, 1 - share)  # of the smaller split
    return wanted / NEAR <= found <= wanted * NEAR


def _by_documents(hashes: np.ndarray, shares: np.ndarray, fraction: float) -> tuple[SplitRule, float]:
    """The rule by documents, and its share of the bytes. shares: of each document; there are two hashes or more."""
    limit = int(fraction * HASHES)
    share = float(shares[hashes < limit].sum())
    if _is_near(share, fraction):
        return SplitRule("documents", limit), share
    hashes, copies = np.unique(hashes, return_inverse=True)
    shares = np.bincount(copies, weights=shares)
    taken, too_large, share = 0, [], 0.0
    for i, size in enumerate(shares.tolist()):
        if fraction - share < 0.1 * min(fraction, 1 - fraction) or taken == len(hashes) - 1:
            break
        if share + size > min(NEAR * fraction, 2 * fraction - share):  # too far, or farther than without it
            too_large.append(int(hashes[i]))
        else:
            taken, share, limit = taken + 1, share + size, int(hashes[i]) + 1
    if not taken:
        smallest = int(shares.argmin())
        limit, share = int(hashes[smallest]) + 1, float(shares[smallest])
        too_large = hashes[:smallest].tolist()
    return SplitRule("documents", limit, frozenset(value for value in too_large if value < limit)), share


def _tail(counts: Counts, fraction: float, reason: str) -> SplitRule:
    if counts.characters < 2:
        raise UserError("the text is one character long: nothing is left for validation; provide more text")
    n_train = min(max(int(counts.characters * (1 - fraction)), 1), counts.characters - 1)
    copies = counts.documents - len(np.unique(np.array(counts.hashes, np.uint64)))
    note = (
        f"{copies:,} of {counts.documents:,} documents are copies of another one; cut by tail, val may repeat what"
        " train holds, and the val loss then says little about new text"
    )
    return SplitRule("tail", n_train, reason=reason, notes=(note,) if copies else ())
