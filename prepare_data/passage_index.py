"""The index of a dataset's train split, in which passages of other texts are found: its format, writer and reader.

`novelty.index` in the dataset's folder: for each block of the text, its bytes and the sorted places where words begin
(passages.Block); then a JSON object with the place and crc32 of each block and the fingerprint of the dataset; then
its length, crc32 and a magic. It is built block by block and read block by block, so memory does not depend on the
size of the text. An index that is stale, damaged or of another version is built again. The text is kept here because
one that is put together from ids takes ten times as long to read.

A token that is masked out of the loss is part of the text: the model reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.tokenizer import Tokenizer
from files import DamagedFile, parse_json, reading, sync_directory
from prepare_data import folders
from prepare_data.passages import (
    MAX_BYTES,
    SEPARATOR,
    Block,
    Checked,
    Passage,
    character_start,
    ends_with_word,
    find_passages,
    suffix_order,
)
from prepare_data.shards import Dataset, Split
from terminal import progress_bar

INDEX = "novelty.index"
MAGIC = b"sprout-novelty\0\1"  # the last byte is the version
TRAILER = struct.Struct("<QI16s")  # length and crc32 of the JSON object, MAGIC
BLOCK = 1 << 24  # bytes of text; a suffix array of one takes about 1.5 seconds and 6 times the memory
READ = 1 << 17  # ids that are decoded at a time
CONTEXT = 60  # bytes that are shown before and after a passage
INDEX_BYTES = 2.4  # for one of text; more where words are short


@dataclass(frozen=True)
class BlockEntry:
    """Where a block is in the file, and what comes before it in the text: documents that have begun, line breaks and
    bytes of the last of them."""

    position: int
    text_bytes: int
    places: int
    crc32: int
    offset: int
    documents: int
    lines: int
    bytes: int


class Source(NamedTuple):
    """Where a passage stands: which document of the train split (from 1), its line (from 1) and byte (from 0) there,
    and the text around it."""

    document: int
    line: int
    byte: int
    before: str
    after: str


class TrainText:
    """The indexed text of a train split, in a file or in memory."""

    def __init__(self, entries: Sequence[BlockEntry], file: Path | None, memory: Sequence[tuple[bytes, bytes]]) -> None:
        self.entries, self.file, self.memory = entries, file, memory
        self._last: tuple[int, tuple[bytes, bytes]] | None = None  # the block that was read last

    def find(self, texts: Sequence[Checked]) -> list[list[Passage]]:
        """The passages of each text that are not part of a longer one. Raises DamagedFile."""
        return find_passages(self._blocks(), texts)

    def source(self, passage: Passage, size: int) -> Source:
        """Where a passage of `size` bytes stands. Raises DamagedFile."""
        number = max(i for i, entry in enumerate(self.entries) if entry.offset <= passage.at)
        entry, text = self.entries[number], self._text(number)
        at = passage.at - entry.offset
        begin = text.rfind(SEPARATOR, 0, at) + 1  # 0: the document began before this block
        document = entry.documents + text.count(SEPARATOR, 0, at)
        lines, skipped = (0, 0) if begin else (entry.lines, entry.bytes)
        line, byte = lines + text.count(b"\n", begin, at) + 1, skipped + at - begin
        before = text[max(begin, at - CONTEXT) : at].decode("utf-8", "ignore")
        after = text[at + size : at + size + CONTEXT].partition(SEPARATOR)[0].decode("utf-8", "ignore")
        return Source(max(1, document), line, byte, before, after)

    def _blocks(self) -> Iterator[Block]:
        for number, entry in enumerate(self.entries):
            text, order = self._read(number)
            yield Block(text, order, entry.offset)

    def _text(self, number: int) -> bytes:
        return self._read(number)[0]

    def _read(self, number: int) -> tuple[bytes, bytes]:
        """The bytes of a block's text and of its order."""
        if self.file is None:
            return self.memory[number]
        if self._last and self._last[0] == number:
            return self._last[1]
        entry = self.entries[number]
        with reading(self.file), self.file.open("rb") as file:
            file.seek(entry.position)
            text, order = file.read(entry.text_bytes), file.read(4 * entry.places)
        if zlib.crc32(order, zlib.crc32(text)) != entry.crc32:
            raise DamagedFile(self.file, f"the checksum of its block {number} is wrong")
        if np.frombuffer(order, "<u4").max(initial=0) > len(text):
            raise DamagedFile(self.file, f"its block {number} has places beyond its text")
        self._last = number, (text, order)
        return text, order


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_train_text(dataset: Dataset) -> TrainText:
    """The index of a dataset: read if it is there and up to date, else built, with a line on standard error. Where the
    dataset's folder cannot be written, it is kept in memory. Raises UserError on a damaged dataset."""
    path = dataset.folder / INDEX
    reason = ""
    if os.path.lexists(path):
        try:
            return _open(path, dataset.fingerprint)
        except DamagedFile as error:
            reason = f" again ({INDEX}: {error.problem})"
    return build(dataset, reason)


def _open(path: Path, fingerprint: str) -> TrainText:
    """Raises DamagedFile where it has to be built again."""
    with reading(path) as size, path.open("rb") as file:
        file.seek(max(0, size - TRAILER.size))
        trailer = file.read()
        length, crc32, magic = TRAILER.unpack(trailer) if len(trailer) == TRAILER.size else (0, 0, b"")
        if magic[:-1] == MAGIC[:-1] and magic != MAGIC:
            raise DamagedFile(path, "another version of Sprout wrote it")
        if magic != MAGIC or length > min(size - TRAILER.size, 1024 + size // 2**14):  # 1 KiB for each block
            raise DamagedFile(path, "it is incomplete, or another kind of file")
        file.seek(size - TRAILER.size - length)
        data = file.read(length)
    if zlib.crc32(data) != crc32:
        raise DamagedFile(path, "its list of blocks is damaged")
    try:
        content = parse_json(data)
        entries = [BlockEntry(**entry) for entry in content["blocks"]]
        others = content["fingerprint"] != fingerprint
    except (ValueError, TypeError, LookupError):
        raise DamagedFile(path, "its list of blocks is another program's") from None
    if others:
        raise DamagedFile(path, "the dataset has changed since")
    numbers = [number for entry in entries for number in asdict(entry).values()]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or any(
        entry.position + entry.text_bytes + 4 * entry.places > size
        or entry.text_bytes > BLOCK + 4 * MAX_BYTES  # with what follows, for passages that begin in it
        or entry.places > entry.text_bytes
        for entry in entries
    ):
        raise DamagedFile(path, "its list of blocks has numbers that no index has")
    return TrainText(entries, path, [])


# ---- building --------------------------------------------------------------------------------------------------------


def build(dataset: Dataset, reason: str = "") -> TrainText:
    """Builds the index and writes it atomically. reason: why, for the line that says so."""
    tokens = len(dataset.train)
    print(f"novelty: indexing the {tokens:,} tokens of {dataset.folder}{reason}", file=sys.stderr, flush=True)
    folder = None
    try:
        folders.clean(dataset.folder)
        folder = folders.temporary(dataset.folder)
        _check_space(dataset)
        entries = _write(folder / INDEX, dataset)
        os.replace(folder / INDEX, dataset.folder / INDEX)
        sync_directory(dataset.folder)
        return TrainText(entries, dataset.folder / INDEX, [])
    except OSError as error:
        problem = error.strerror or str(error)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    note = f"novelty: the index cannot be kept in {dataset.folder} ({problem}); it is in memory for this time"
    print(note, file=sys.stderr, flush=True)
    memory, entries = list[tuple[bytes, bytes]](), list[BlockEntry]()
    for text, order, entry in _built_blocks(dataset):
        memory.append((text, order))
        entries.append(entry)
    return TrainText(entries, None, memory)


def _check_space(dataset: Dataset) -> None:
    """Raises OSError if the disk has no room for the index."""
    sizes = [entry.get("bytes", 4 * entry["tokens"]) for entry in dataset.meta["shards"]["train"]]
    needed, free = INDEX_BYTES * sum(sizes), shutil.disk_usage(dataset.folder).free
    if needed > free:
        raise OSError(f"it needs about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")


def _write(path: Path, dataset: Dataset) -> list[BlockEntry]:
    """Writes the file and returns its blocks. Raises OSError."""
    entries = []
    with path.open("xb") as file:
        for text, order, entry in _built_blocks(dataset):
            file.write(text)
            file.write(order)
            entries.append(entry)
        content = {"fingerprint": dataset.fingerprint, "blocks": [asdict(entry) for entry in entries]}
        data = json.dumps(content).encode()
        file.write(data + TRAILER.pack(len(data), zlib.crc32(data), MAGIC))
        file.flush()
        os.fsync(file.fileno())
    return entries


def _built_blocks(dataset: Dataset) -> Iterator[tuple[bytes, bytes, BlockEntry]]:
    """The blocks of the train split: bytes of its text and of its order, and its entry. Shows a progress bar."""
    split = dataset.train
    position = offset = lines = size = 0
    after_word, documents = False, int(split.read(0, 1)[0] != dataset.tokenizer.eos_id)
    with progress_bar("indexing", len(split), unit=" tokens") as bar:
        for text, own in _cut(_decoded(split, dataset.tokenizer, bar)):
            order = suffix_order(text, own, after_word).tobytes()
            crc32 = zlib.crc32(order, zlib.crc32(text))
            yield text, order, BlockEntry(position, len(text), len(order) // 4, crc32, offset, documents, lines, size)
            position, offset = position + len(text) + len(order), offset + own
            after_word, begin = ends_with_word(text[:own]), text.rfind(SEPARATOR, 0, own) + 1
            documents += text.count(SEPARATOR, 0, own)
            lines = text.count(b"\n", begin, own) + (0 if begin else lines)
            size = own - begin + (0 if begin else size)


def _decoded(split: Split, tokenizer: Tokenizer, bar: Any) -> Iterator[bytes]:
    """The text of a split, with SEPARATOR for end-of-sequence."""
    pieces = list(tokenizer.token_bytes)
    pieces[tokenizer.eos_id] = SEPARATOR
    for start in range(0, len(split), READ):
        ids = split.read(start, min(READ, len(split) - start)).tolist()
        yield b"".join([pieces[i] for i in ids])
        bar.update(len(ids))


def _cut(parts: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """The text in blocks, each with the first MAX_BYTES of the next one, and the bytes that are its own."""
    text = bytearray()
    for part in parts:
        text += part
        while len(text) > BLOCK + 2 * MAX_BYTES:
            own = character_start(text, BLOCK)
            yield bytes(text[: own + MAX_BYTES]), own
            del text[:own]
    yield bytes(text), len(text)
