"""How much of a text is copied from a dataset's train split, beside the same for its val split.

Copied is what stands in passages of at least `min_words` words (passages.py). The val split is the yardstick: its
author did not copy, and yet wrote passages that the train split has too. Reading order: Copied, Novelty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from files import DamagedFile
from prepare_data.origin import Origins
from prepare_data.passage_index import INDEX, READ, Source, build, open_train_text
from prepare_data.passages import Checked, Passage, share
from prepare_data.shards import Dataset

T = TypeVar("T")
PIECES = 16  # of the val split
MIN_PIECE = 200  # characters


class Found(NamedTuple):
    """A passage, by characters of what was generated; its text, and where it stands in the train split."""

    passage: Passage
    text: str
    source: Source


@dataclass(frozen=True)
class Copied:
    """What was found in a text of so many characters, prompts not counted. passages: those that are long enough;
    longest: of any length."""

    characters: int
    copied: int
    passages: list[Found]
    longest: Found | None

    @property
    def share(self) -> float:
        return self.copied / max(1, self.characters)


class Yardstick(NamedTuple):
    """The same for pieces of the val split; longest: words."""

    pieces: int
    characters: int
    copied: int
    longest: int

    @property
    def share(self) -> float:
        return self.copied / max(1, self.characters)


class Novelty:
    """Finds what is copied from the train split of a dataset, whose index is built first where there is none."""

    def __init__(self, dataset: Dataset, min_words: int) -> None:
        self.dataset, self.min_words = dataset, min_words
        self.text = open_train_text(dataset)
        self._origins = Origins(dataset.meta)
        self._yardsticks: dict[int, Yardstick] = {}

    def check(self, texts: Sequence[tuple[str, str]]) -> list[Copied]:
        """texts: each a prompt and what was generated from it. Raises UserError where the dataset is damaged."""
        checked = [Checked(prompt + text, len(prompt)) for prompt, text in texts]
        return self._reading(
            lambda: [self._copied(*pair) for pair in zip(checked, self.text.find(checked), strict=True)]
        )

    def yardstick(self, characters: int) -> Yardstick:
        """What is copied in pieces of the val split of about so many characters. Raises UserError."""
        size = max(MIN_PIECE, int(float(f"{characters:.1g}")))
        if size not in self._yardsticks:
            pieces = self._pieces(size)
            checked = [Checked(document) for piece in pieces for document in piece]
            found = self._reading(lambda: self.text.find(checked))
            longest = max((passage.words for passages in found for passage in passages), default=0)
            copied = sum(share(self._long_enough(passages)) for passages in found)
            self._yardsticks[size] = Yardstick(len(pieces), sum(len(text.text) for text in checked), copied, longest)
        return self._yardsticks[size]

    def describe(self, found: Found) -> str:
        """Where a passage stands, in words: the file where that is known, else the number of the document."""
        source, context = found.source, found.source.before + found.text + found.source.after
        begin = source.byte - len(source.before.encode())
        if file := self._origins.file(source.document, begin, context.encode("utf-8", "surrogatepass")):
            return f"{file}, line {source.line:,}"
        if self._origins.whole:  # a file that is packed, or gone
            return f"{self._origins.whole}, line {source.line:,}"
        counts = [shard.get("documents") for shard in self.dataset.meta["shards"]["train"]]
        of = "" if None in counts or not sum(counts) else f" of {sum(counts):,}"  # 0: val has the end of the only one
        return f"document {source.document:,}{of} of the train split, line {source.line:,}"

    def _copied(self, checked: Checked, passages: list[Passage]) -> Copied:
        kept = self._long_enough(passages)
        longest = max(passages, key=lambda passage: (passage.words, passage.end - passage.start), default=None)
        found = {passage: self._found(checked, passage) for passage in [*kept, *([longest] if longest else [])]}
        characters = len(checked.text) - checked.given
        return Copied(characters, share(kept), [found[passage] for passage in kept], longest and found[longest])

    def _found(self, checked: Checked, passage: Passage) -> Found:
        source = self.text.source(passage, checked.size(passage))
        start, end = passage.start - checked.given, passage.end - checked.given
        return Found(passage._replace(start=start, end=end), checked.text[passage.start : passage.end], source)

    def _long_enough(self, passages: Sequence[Passage]) -> list[Passage]:
        return [passage for passage in passages if passage.words >= self.min_words]

    def _pieces(self, characters: int) -> list[list[str]]:
        """Pieces of the val split of about so many characters, spread evenly over it, each as its documents."""
        val, tokenizer = self.dataset.val, self.dataset.tokenizer
        known = min(len(val), READ)
        per_token = len(tokenizer.decode(val.read(0, known).tolist())) / known
        size = min(len(val), math.ceil(characters / max(per_token, 0.01)))
        count = max(1, min(PIECES, len(val) // size))
        pieces = []
        for i in range(count):
            ids = val.read(i * len(val) // count, size)
            documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id))
            texts = [tokenizer.decode(document.tolist()) for document in documents]
            pieces.append([re.sub(r"^\w+", "", texts[0]), *texts[1:]])  # which may begin within a word
        return pieces

    def _reading(self, read: Callable[[], T]) -> T:
        """read(), a second time after the index was built again where it is damaged."""
        try:
            return read()
        except DamagedFile as error:
            self.text = build(self.dataset, f" again ({INDEX}: {error.problem})")
            return read()
