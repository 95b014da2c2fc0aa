"""One small file per corpus. A source yields text in pieces and knows nothing of tokens; almost always a piece is a document.

`Corpus.pieces()` may be called again and gives the same pieces in the same order: (text, whether a document ends with it).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from common.tokenizer import PIECE, cut_point

Piece = tuple[str, bool]


@dataclass(frozen=True)
class Corpus:
    name: str
    """What a dataset of it is called by default."""
    origin: str
    """Where it comes from, for dataset.json."""
    pieces: Callable[[], Iterator[Piece]]
    notes: list[str] = field(default_factory=list)
    """Lines for the user that come up while reading."""


def documents(chunks: Iterable[str], separator: str | None) -> Iterator[Piece]:
    """The pieces of one file's text. Documents end at each separator and at the end; those without a visible character are dropped.
    A long document is cut where no token crosses, so that memory stays the same however long it is."""
    pending, cut = "", False  # what is not given out yet of the document; whether some of it is out already
    for chunk in chunks:
        *complete, pending = (pending + chunk).split(separator) if separator else [pending + chunk]
        for text in complete:
            if cut or text.strip():
                yield text, True
            cut = False
        while len(pending) > 2 * PIECE:  # more than a piece stays: a separator may have begun in it
            end = cut_point(pending, PIECE)
            yield pending[:end], False
            pending, cut = pending[end:], True
    if cut or pending.strip():
        yield pending, True
