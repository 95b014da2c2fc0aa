"""What the samples of a run have copied from its text, for the report: marks in the samples, and a sentence on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import list_checkpoints, with_checkpoint
from common.signature import own_texts
from errors import UserError, quote
from files import DamagedFile, read_json
from model_folder import CONFIG, STATE, TOKENIZER
from prepare_data.novelty import Novelty
from prepare_data.passage_index import INDEX
from prepare_data.resolve import training_text
from prepare_data.shards import Dataset
from state_file import read_state

MIN_WORDS = 6  # of a passage, as sample.py's --novelty_words
MAX_INDEXED = 20_000_000  # tokens of a text that is indexed for a report: about 20 seconds


class Mark(NamedTuple):
    """Characters [start, end) of a sample, and where they stand in the text."""

    start: int
    end: int
    title: str


def check_samples(run: Path, samples: Sequence[str]) -> tuple[list[list[Mark]], str]:
    """The marks of each sample, and a sentence: the share of all that is copied, beside that of the val split, or why
    it is not known."""
    unknown = [list[Mark]() for _ in samples]
    if not any(samples):
        return unknown, ""
    try:
        if not list_checkpoints(run):
            raise UserError("there is no checkpoint yet, which says what its text is")
        recorded, dataset = with_checkpoint(run, "latest", _recorded_text)
        if len(dataset.train) > MAX_INDEXED and not (dataset.folder / INDEX).exists():
            raise UserError(f"for a text of this size, first run python sample.py --run={quote(str(run))} --novelty")
        novelty = Novelty(dataset, MIN_WORDS)
        prompt = _prompt(run, recorded.get("example_prompt"))
        given = [prompt if text.startswith(prompt) else "" for text in samples]
        found = novelty.check([(start, text[len(start) :]) for start, text in zip(given, samples, strict=True)])
    except UserError as error:
        return unknown, f"What they have copied is not known: {error}"
    place = novelty.describe
    characters = sum(copied.characters for copied in found)
    share = sum(copied.copied for copied in found) / max(1, characters)
    held_out = novelty.yardstick(characters // len(found))
    sentence = (
        f"Copied word for word from the training text, in passages of {MIN_WORDS} words or more: {share:.1%} of the"
        f" samples, {held_out.share:.1%} of the val split."
    )
    marks = [
        [
            Mark(
                len(start) + copy.passage.start,
                len(start) + copy.passage.end,
                f"{copy.passage.words} words, {place(copy)}",
            )
            for copy in copied.passages
        ]
        for start, copied in zip(given, found, strict=True)
    ]
    return marks, sentence


def _recorded_text(model_folder: Path) -> tuple[Mapping[str, Any], Dataset]:
    """The dataset of a checkpoint, as its state.json names it, and opened."""
    recorded = next(iter(own_texts(read_state(model_folder.parent / STATE))), {})
    return recorded, training_text(None, recorded, model_folder / TOKENIZER)


def _prompt(run: Path, example: str | None) -> str:
    """The prompt of the run's samples."""
    options: Any = None
    with suppress(DamagedFile):
        options = read_json(run / CONFIG).get("options")
    given = options.get("sample_prompt") if isinstance(options, dict) else None
    return given if isinstance(given, str) else example or ""
