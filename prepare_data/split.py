"""Train/validation split: `count` reads the corpus once, `choose_rule` picks a rule, and the rule labels every piece.

By documents, a hash of a document's first piece decides: a document's split does not depend on the rest of the corpus,
and copies fall into the same split. By tail, the text is cut at a character; the cut does not end a document.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm import tqdm

from errors import UserError
from prepare_data import PrepareOptions
from prepare_data.sources import Corpus

HASHES = 1 << 64  # document hashes are below it
MIN_DOCUMENTS = 20  # split=auto: with fewer, a split by documents would be too uneven


class LabeledPiece(NamedTuple):
    split: str  # "train" or "val"
    text: str
    starts: bool  # a document starts with it
    ends: bool  # a document ends with it


@dataclass
class Counts:
    """Statistics of one pass over a corpus."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    min_hash: int = HASHES  # of all documents
    max_hash: int = 0
    alphabet: set[str] = field(default_factory=set)  # every character; empty unless requested
    content: str = ""  # hash of all documents in order


@dataclass(frozen=True)
class SplitRule:
    name: str  # "documents" or "tail"
    limit: int
    """documents: hashes below it go to validation. tail: the number of characters for training."""

    def pieces(self, corpus: Corpus) -> Iterator[LabeledPiece]:
        """The corpus's pieces in order, with their split; a piece that crosses the tail's cut becomes two."""
        starts, position, split = True, 0, ""
        for text, ends in corpus.pieces():
            if self.name == "documents":
                if starts:
                    split = "val" if document_hash(text.encode()) < self.limit else "train"
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


def count(corpus: Corpus, alphabet: bool) -> Counts:
    """Reads the whole corpus once. Raises UserError if any of it does not decode, or if it is empty.

    `alphabet`: collect the characters too, which takes a third of the time.
    """
    counts, digest, starts = Counts(), hashlib.blake2b(digest_size=32), True
    desc = f"reading {corpus.name}"
    with tqdm(unit="B", unit_scale=True, desc=desc, leave=False, disable=not sys.stderr.isatty()) as bar:
        for text, ends in corpus.pieces():
            data = text.encode()
            digest.update(data + b"\xff" if ends else data)  # a separator: UTF-8 text never contains this byte
            if starts:
                value = document_hash(data)
                counts.min_hash, counts.max_hash = min(counts.min_hash, value), max(counts.max_hash, value)
            counts.documents += ends
            counts.characters += len(text)
            counts.bytes += len(data)
            if alphabet:
                counts.alphabet.update(text)
            bar.update(len(data))
            starts = ends
    if counts.characters == 0:
        raise UserError(
            f"{corpus.origin}: contains no text; expected at least a few hundred characters:"
            " check the path and the separator"
        )
    counts.content = digest.hexdigest()
    return counts


def choose_rule(counts: Counts, options: PrepareOptions) -> SplitRule:
    """The rule of the options, adjusted so that neither split is empty. Raises UserError if that is impossible."""
    if options.split == "tail" or (options.split == "auto" and counts.documents < MIN_DOCUMENTS):
        if counts.characters < 2:
            raise UserError("the text is one character long: nothing is left for validation; provide more text")
        n_train = int(counts.characters * (1 - options.val_fraction))
        return SplitRule("tail", min(max(n_train, 1), counts.characters - 1))
    if counts.min_hash == counts.max_hash:
        raise UserError(
            f"--split=documents: cannot split {counts.documents} documents with the same content; use --split=tail"
        )
    limit = int(options.val_fraction * HASHES)
    return SplitRule("documents", min(max(limit, counts.min_hash + 1), counts.max_hash))
