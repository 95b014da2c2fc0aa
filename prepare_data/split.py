"""Which part of a corpus is for training and which for validation: one pass counts, a rule follows, and the rule labels every piece.

By documents, the content of a document's first piece decides, so a document keeps its side whatever else the corpus holds, and copies
stay together. By tail, the text is cut at a character; that cut is no document end.
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

HASHES = 1 << 64
FEW_DOCUMENTS = 20  # below this, a split by documents would be too uneven


class LabelledPiece(NamedTuple):
    split: str  # "train" or "val"
    text: str
    starts: bool  # a document starts with it
    ends: bool  # a document ends with it


@dataclass
class Counts:
    """What one pass over a corpus finds out."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    lowest: int = HASHES  # document hash
    highest: int = 0
    alphabet: set[str] = field(default_factory=set)
    content: str = ""  # hash of the documents


@dataclass(frozen=True)
class SplitRule:
    name: str  # "documents" or "tail"
    limit: int
    """documents: those with a hash below it are for validation. tail: the number of characters for training."""

    def pieces(self, corpus: Corpus) -> Iterator[LabelledPiece]:
        starts, position, split = True, 0, ""
        for text, ends in corpus.pieces():
            if self.name == "documents":
                if starts:
                    split = "val" if document_hash(text.encode()) < self.limit else "train"
                yield LabelledPiece(split, text, starts, ends)
            else:
                head, tail = text[: max(0, self.limit - position)], text[max(0, self.limit - position) :]
                if head:
                    yield LabelledPiece("train", head, starts, ends and not tail)
                if tail:
                    yield LabelledPiece("val", tail, starts and not head, ends)
                position += len(text)
            starts = ends


def document_hash(first_piece: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(first_piece, digest_size=8).digest(), "little")


def count(corpus: Corpus, alphabet: bool) -> Counts:
    """Reads the corpus once, checking that all of it decodes; collects its characters where asked (a third of the time)."""
    counts, digest, starts = Counts(), hashlib.blake2b(digest_size=32), True
    with tqdm(
        unit="B", unit_scale=True, desc=f"reading {corpus.name}", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        for text, ends in corpus.pieces():
            data = text.encode()
            digest.update(data + b"\xff" if ends else data)  # no UTF-8 text holds this byte
            if starts:
                mark = document_hash(data)
                counts.lowest, counts.highest = min(counts.lowest, mark), max(counts.highest, mark)
            counts.documents += ends
            counts.characters += len(text)
            counts.bytes += len(data)
            if alphabet:
                counts.alphabet.update(text)
            bar.update(len(data))
            starts = ends
    if counts.characters == 0:
        raise UserError(
            f"{corpus.origin}: there is no text in it; expected at least a few hundred characters: check the path and the separator"
        )
    counts.content = digest.hexdigest()
    return counts


def choose_rule(counts: Counts, options: PrepareOptions) -> SplitRule:
    """The rule that the options ask for, moved where needed so that both splits get something."""
    if options.split == "tail" or (options.split == "auto" and counts.documents < FEW_DOCUMENTS):
        if counts.characters < 2:
            raise UserError("the text is one character long: nothing is left for validation; give more text")
        train = int(counts.characters * (1 - options.val_fraction))
        return SplitRule("tail", min(max(train, 1), counts.characters - 1))
    if counts.lowest == counts.highest:
        raise UserError(
            f"--split=documents: {counts.documents} documents with one content cannot be divided; use --split=tail"
        )
    limit = int(options.val_fraction * HASHES)
    return SplitRule("documents", min(max(limit, counts.lowest + 1), counts.highest))
