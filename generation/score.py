"""Scores texts: bits per byte and nats a token of each file or document, and the nats of every token.

A document is scored on its own, as text that follows an end-of-sequence token (EOS), so that its score depends on
nothing else. The EOS that ends it is a target too, of no bytes, as in the val loss; --score_end=false leaves it out.
Bits per byte = nats / ln 2 / bytes of the text in UTF-8, which can be compared between models of any tokenizer.
Files are read in pieces, so their size does not matter. Reading order: print_scores, Scorer, Row, the three outputs.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from common.clusters import DOCUMENT_CLUSTERS, Clusters, block_count
from common.scoring import Scored, Window, cut_windows, score_windows
from common.tokenizer import Tokenizer, describe_unknown
from errors import UserError, quote
from generation.options import SampleScriptOptions
from model import GPT
from prepare_data import TextOptions
from prepare_data.sources.listing import first_three
from prepare_data.sources.text import open_text
from terminal import progress_bar

BEGINNING = 60  # characters of a document that name it
LARGE_EOS = 0.02  # share of a text's nats from which its EOS is worth a note
NOT_FINITE = "the model computes NaN or infinity: try another --checkpoint (latest or step-N), or --dtype=float32"
COLUMNS = "bits/byte", "±", "nats/token", "tokens", "bytes"


class Row:
    """A document, or a file that is one: its sums so far, and those of each window, for the standard error.

    document: its number in the file, from 1; None where a file is one document. beginning: its first words.
    """

    def __init__(self, file: str, document: int | None, beginning: str) -> None:
        self.file, self.document, self.beginning = file, document, beginning
        self.nats, self.tokens, self.bytes, self.eos_nats = 0.0, 0, 0, 0.0
        self.window_nats, self.window_bytes = array("d"), array("q")

    def add(self, nats: float, tokens: int, n_bytes: int, eos_nats: float) -> None:
        """Adds a window. eos_nats: the part of `nats` that is the EOS at the end of the document, which says nothing
        about the spread within it."""
        self.nats, self.tokens, self.bytes = self.nats + nats, self.tokens + tokens, self.bytes + n_bytes
        self.eos_nats += eos_nats
        if n_bytes:
            self.window_nats.append(nats - eos_nats)
            self.window_bytes.append(n_bytes)

    @property
    def bits_per_byte(self) -> float:
        return bits(self.nats, self.bytes)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    def standard_error(self) -> float | None:
        """Of bits per byte, as an estimate for more text of the kind, over blocks of windows. None for one window."""
        return error_of([blocks(self)])


def bits(nats: float, n_bytes: int) -> float:
    """Bits per byte; nan for no bytes."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def blocks(row: Row) -> Clusters:
    """Its windows in blocks of about equal numbers."""
    count = len(row.window_nats)
    size = block_count(count)
    return clusters(row.window_nats, row.window_bytes, np.arange(count) * size // max(1, count), size)


def clusters(nats: Sequence[float], n_bytes: Sequence[int], places: np.ndarray, size: int) -> Clusters:
    """Sums by place; those without bytes are left out."""
    sums = np.bincount(places, nats, size), np.bincount(places, n_bytes, size)
    return Clusters(sums[0][sums[1] > 0].tolist(), sums[1][sums[1] > 0].astype(int).tolist())


def error_of(kinds: Sequence[Clusters]) -> float | None:
    """The largest standard error, in bits per byte, of those that have more than one cluster."""
    return max((kind.standard_error() / math.log(2) for kind in kinds if len(kind.counts) > 1), default=None)


def total_of(rows: Sequence[Row]) -> tuple[Row, float | None]:
    """All rows as one, and its standard error: over documents or blocks of windows, the larger one."""
    total = Row("all", None, "")
    for row in rows:
        total.nats, total.tokens = total.nats + row.nats, total.tokens + row.tokens
        total.bytes += row.bytes
        total.window_nats += row.window_nats
        total.window_bytes += row.window_bytes
    ends = np.cumsum([row.bytes for row in rows])
    places = (ends - [row.bytes for row in rows]) * DOCUMENT_CLUSTERS // max(1, total.bytes)
    documents = clusters([row.nats for row in rows], [row.bytes for row in rows], places, DOCUMENT_CLUSTERS)
    whole = [documents] if len(documents.counts) > 1 and documents.effective >= 2 else []
    return total, error_of([*whole, blocks(total)])


class Scorer:
    """Reads texts, and scores their documents: `run` fills `rows` and `notes`."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, script: SampleScriptOptions, options: TextOptions) -> None:
        self.model, self.tokenizer, self.script = model, tokenizer, script
        block_size, stride = model.config.block_size, script.eval_stride
        if stride is not None and stride > block_size:
            raise UserError(
                f"--eval_stride={stride} is more than the model's context: the window of {block_size} tokens would skip"
                f" some; give 1 to {block_size}, or leave the flag out"
            )
        how = options.encoding, options.separator, options.exclude, options.follow_links
        self.sources = [open_text(path, *how) for path in script.score]
        self.by_document = options.separator is not None
        self.rows, self.notes = list[Row](), list[str]()
        self._owners = deque[Row]()  # of the windows that are not scored yet
        self._unknown: dict[str, Counter[str]] = {}  # file → character that the tokenizer lacks → how often

    def run(
        self, autocast: Callable[[], AbstractContextManager[object]], each: Callable[[Row, Scored], None] | None = None
    ) -> None:
        """each: is called with every scored window and its row, before it is added to the row. Raises UserError."""
        lengths = np.array([len(token) for token in self.tokenizer.token_bytes])
        log = partial(print, file=sys.stderr)
        with progress_bar("scoring", self._survey()) as bar:
            for batch in score_windows(self.model, self._windows(), autocast=autocast, log=log):
                for scored in batch:
                    row, nats = self._owners.popleft(), float(scored.nats.sum())
                    n_bytes = int(lengths[scored.targets].sum())
                    if not math.isfinite(nats):
                        raise UserError(NOT_FINITE)
                    if each is not None:
                        each(row, scored)
                    eos_nats = float(scored.nats[scored.targets == self.tokenizer.eos_id].sum())
                    row.add(nats, len(scored.nats), n_bytes, eos_nats)
                    bar.update(n_bytes)
        self._add_notes()

    def _survey(self) -> int:
        """Reads all texts once, so that an error in one comes before hours of scoring. Returns their bytes."""
        n_bytes, crlf = 0, dict[str, None]()
        for source in self.sources:
            for number, text, _ in source.pieces_by_file():
                n_bytes += len(text.encode())
                if "\r\n" in text:
                    crlf[source.files[number].name] = None
            self.notes += source.notes
        if n_bytes == 0:
            raise UserError("--score: nothing but white space\n  " + "\n  ".join(self.notes))
        if crlf:
            self.notes.append(f"files whose lines end in \\r\\n (Windows), scored as they are: {first_three(crlf)}")
        return n_bytes

    def _windows(self) -> Iterator[Window]:
        T, stride = self.model.config.block_size, self.script.eval_stride
        for row, chunks in groupby(self._chunks(), key=itemgetter(0)):
            for window in cut_windows((np.stack((ids, ids)) for _, ids in chunks), T, stride):
                self._owners.append(row)
                yield window

    def _chunks(self) -> Iterator[tuple[Row, np.ndarray]]:
        """The ids of all documents, with their rows, which are made here."""
        start, eos = np.array([self.tokenizer.start_id]), np.array([self.tokenizer.eos_id])
        for source in self.sources:
            row, number, last = None, 0, -1
            for file, text, ends in source.pieces_by_file():
                name = source.files[file].name
                if row is None:
                    number, last = (number + 1 if file == last else 1), file
                    row = Row(name, number if self.by_document else None, " ".join(text[:1000].split())[:BEGINNING])
                    self.rows.append(row)
                    yield row, start
                yield row, self.tokenizer.encode(self._known(text, name))
                if ends and self.script.score_end:
                    yield row, eos
                row = None if ends else row

    def _known(self, text: str, file: str) -> str:
        """The text without characters that the tokenizer lacks, which are counted."""
        if unknown := self.tokenizer.unknown(text):
            counts = self._unknown.setdefault(file, Counter())
            counts.update({char: text.count(char) for char in unknown})
            text = text.translate(dict.fromkeys(map(ord, unknown)))
        return text

    def _add_notes(self) -> None:
        for file, counts in list(self._unknown.items())[:3]:
            self.notes.append(f"{file}: left out {describe_unknown(counts)}")
        if len(self._unknown) > 3:
            self.notes.append(f"characters left out in {len(self._unknown):,} files in all")
        large = [row for row in self.rows if row.eos_nats > LARGE_EOS * row.nats]
        if large:
            share = max(row.eos_nats / row.nats for row in large)
            self.notes.append(
                f"the end-of-sequence token is up to {share:.0%} of the nats of short texts ({len(large):,} of"
                f" {len(self.rows):,}); --score_end=false leaves it out"
            )


def print_scores(
    model: GPT,
    tokenizer: Tokenizer,
    script: SampleScriptOptions,
    options: TextOptions,
    autocast: Callable[[], AbstractContextManager[object]],
    state: Mapping[str, Any],
) -> int:
    """Prints what --score and --output ask for, and returns the exit code. state: of the checkpoint, where there is
    one: its val loss is printed below the table. Raises UserError."""
    separator = state.get("options", {}).get("separator")
    if separator is not None and options.separator is None:
        print(
            f"note: this model's text was prepared with --separator={quote(separator)}; add it, and each document is"
            " scored on its own",
            file=sys.stderr,
        )
    scorer = Scorer(model, tokenizer, script, options)
    scorer.run(autocast, token_printer(tokenizer) if script.output == "jsonl" else None)
    for note in scorer.notes:
        print(f"note: {note}", file=sys.stderr)
    rows = sorted(scorer.rows, key=lambda row: (math.isnan(row.bits_per_byte), row.bits_per_byte))
    if script.output == "csv":
        print_csv(rows)
    elif script.output == "text":
        print_table(rows, state)
    return 0


def token_printer(tokenizer: Tokenizer) -> Callable[[Row, Scored], None]:
    """Prints a JSON line for each token: file, document, position in the document, byte offset there, id, text, nats.
    The text of a token that is part of a character is U+FFFD."""

    def print_tokens(row: Row, scored: Scored) -> None:
        document = {} if row.document is None else {"document": row.document}
        offset = row.bytes
        pairs = zip(scored.targets.tolist(), scored.nats.tolist(), strict=True)
        for position, (token, nats) in enumerate(pairs, row.tokens):
            fields = {"file": row.file, **document, "position": position, "offset": offset, "id": token}
            print(json.dumps(fields | {"text": tokenizer.decode([token]), "nats": nats}, ensure_ascii=False))
            offset += len(tokenizer.token_bytes[token])

    return print_tokens


def print_csv(rows: Sequence[Row]) -> None:
    """Prints a line for each row, after the names of the columns."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["file", "document", "bits_per_byte", "standard_error", "nats_per_token", "tokens", "bytes", "beginning"]
    )
    for row in rows:
        numbers = row.bits_per_byte, row.standard_error(), row.nats_per_token, row.tokens, row.bytes
        writer.writerow([row.file, row.document, *numbers, row.beginning])


def print_table(rows: Sequence[Row], state: Mapping[str, Any]) -> None:
    """Prints the rows, their total if there are several, and the val loss in `state`, in columns. On a terminal, names
    are cut to its width."""
    cells = [cells_of(row, row.standard_error()) for row in rows]
    names = names_of(rows)
    if len(rows) > 1:
        cells.append(cells_of(*total_of(rows)))
        names.append("all")
    if state.get("val_loss") is not None:
        cells.append([_number(state.get("val_bits_per_byte")), "", _number(state["val_loss"]), "", ""])
        names.append(f"val split, step {state.get('step')}")
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    by_file = rows[0].document is None
    left = shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths) - 1 if sys.stdout.isatty() else None
    for row_cells, name in zip([COLUMNS, *cells], ["text", *names], strict=True):
        shown = "  ".join(cell.rjust(width) for cell, width in zip(row_cells, widths, strict=True))
        print(f"{shown}  {name if left is None else shortened(name, max(left, 12), by_file)}")


def cells_of(row: Row, error: float | None) -> list[str]:
    numbers = row.bits_per_byte, error, row.nats_per_token
    return [*map(_number, numbers), f"{row.tokens:,}", f"{row.bytes:,}"]


def _number(x: float | None) -> str:
    return "" if x is None else "-" if math.isnan(x) else f"{x:.4f}"


def names_of(rows: Sequence[Row]) -> list[str]:
    """Of files without the folders that all share; of documents their numbers and first words."""
    files = {row.file for row in rows}
    folders = [Path(file).parts[:-1] for file in files]
    depths = (depth for depth, level in enumerate(zip(*folders, strict=False)) if len(set(level)) > 1)
    shared = next(depths, min(map(len, folders))) if len(files) > 1 else 0
    names = []
    for row in rows:
        file, document = str(Path(*Path(row.file).parts[shared:])), f"{row.document}: {row.beginning}"
        names.append(file if row.document is None else f"{file}:{document}" if len(files) > 1 else document)
    return names


def shortened(name: str, width: int, end: bool) -> str:
    """At most `width` characters: the end of a path, or the beginning of another name."""
    if len(name) <= width:
        return name
    return "…" + name[1 - width :] if end else name[: width - 1] + "…"
