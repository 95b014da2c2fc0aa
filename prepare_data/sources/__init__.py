"""Text sources, one small file per corpus. A source yields text in pieces and knows nothing of tokens.

A piece is a document, or part of a long one. `Corpus.pieces()` yields (text, whether a document ends with it) and can
be called repeatedly with the same result.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from common.tokenizer import PIECE, cut_point

Piece = tuple[str, bool]


@dataclass(frozen=True)
class Corpus:
    name: str
    """Default name of the dataset."""
    origin: str
    """Path, address or description of the text, for dataset.json."""
    pieces: Callable[[], Iterator[Piece]]
    notes: list[str] = field(default_factory=list)
    """Messages for the user, filled in while `pieces` runs."""


def documents(chunks: Iterable[str], separator: str | None) -> Iterator[Piece]:
    """The pieces of one file, whose text comes in chunks of any size.

    Documents end at each separator and at the end of the file; whitespace-only documents are dropped. A line end in
    the separator stands for that of Windows too. A document longer than PIECE characters is cut where no token crosses
    the cut, so memory use does not depend on its length.
    """
    pattern = None
    if separator:
        pattern = re.compile(re.escape(separator.replace("\r\n", "\n")).replace("\\\n", "\r?\n"))
    pending, cut = "", False  # the part of the document not yet yielded; whether an earlier part was yielded
    for chunk in chunks:
        *complete, pending = pattern.split(pending + chunk) if pattern else [pending + chunk]
        for text in complete:
            if cut or text.strip():
                yield text, True
            cut = False
        while len(pending) > 2 * PIECE:  # at least PIECE characters stay pending: they may end in half a separator
            end = cut_point(pending, PIECE)
            yield pending[:end], False
            pending, cut = pending[end:], True
    if cut or pending.strip():
        yield pending, True
