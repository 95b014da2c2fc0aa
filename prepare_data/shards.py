"""Datasets on disk: `open_dataset`, and the only reader of shards; the only writer is shard_writer.py.

A dataset is a folder of shards (shard_format.py) and `dataset.json`, which holds the counts, the crc32 of each shard's
ids (without the header), and the whole tokenizer. Folders without it are read too: foreign.py.

Files are read, never memory-mapped: a mapped file that is truncated kills the process with SIGBUS.
Reading order: Split, open_dataset, _read_meta; then shard_check.py.
"""

import bisect
import errno
import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import Tokenizer, tokenizer_from_dict
from errors import UserError
from prepare_data.foreign import describe_foreign, is_foreign
from prepare_data.shard_check import ContentCheck, patiently
from prepare_data.shard_format import HEADER_BYTES, PREPARE_AGAIN, SPLITS, Shard, check_ids, dtype_for, read_header

FORMAT = "sprout-dataset"
VERSION = 1


class Split:
    """The shards of one split as one stream of ids; a read may cross shards. Thread-safe.

    Reads raise UserError on a damaged or truncated file, IndexError outside the split.
    """

    def __init__(self, name: str, shards: list[Shard], vocab_size: int) -> None:
        self.name, self.shards, self.vocab_size = name, shards, vocab_size
        self.masked = shards[0].mask_crc32 is not None
        self._ends = np.cumsum([shard.tokens for shard in shards]).tolist()
        self.check = ContentCheck(shards, vocab_size)
        self._files: dict[Path, FileIO] = {}  # the most recently used one is last
        self._max_open_files = 0  # 0: not known yet
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids [start, start + count), int64 (count,)."""
        self.check()
        parts = [self._read_ids(*part) for part in self._parts(start, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def mask(self, start: int, count: int) -> np.ndarray | None:
        """bool (count,): whether each of the same ids counts as a target. None if the split has no masks: all do."""
        if not self.masked:
            return None
        self.check()
        return np.concatenate([self._read_mask(*part) for part in self._parts(start, count)])

    def _parts(self, start: int, count: int) -> list[tuple[Shard, int, int]]:
        """The parts of [start, start + count) by shard: (shard, index of the first id in it, number of ids)."""
        if not 0 <= start < start + count <= self._ends[-1]:
            raise IndexError(f"ids [{start}, {start + count}) of the {self.name} split, which has {len(self)}")
        i = bisect.bisect_right(self._ends, start)
        parts = []
        while True:
            shard = self.shards[i]
            first = start - (self._ends[i] - shard.tokens)
            taken = min(count, shard.tokens - first)
            parts.append((shard, first, taken))
            start, count, i = start + taken, count - taken, i + 1
            if not count:
                return parts

    def _read_ids(self, shard: Shard, first: int, count: int) -> np.ndarray:
        size = shard.dtype.itemsize
        data = self._read_bytes(shard.path, shard.offset + first * size, count * size)
        ids = np.frombuffer(data, shard.dtype)
        check_ids(shard, ids, self.vocab_size)
        return ids.astype(np.int64)

    def _read_mask(self, shard: Shard, first: int, count: int) -> np.ndarray:
        begin = first // 8
        data = self._read_bytes(shard.mask_path, begin, (first + count + 7) // 8 - begin)
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return bits[first - 8 * begin :][:count].astype(bool)

    def _read_bytes(self, path: Path, offset: int, size: int) -> bytes:
        def read() -> bytes:
            with self._lock:  # seek and read must not interleave with another thread's
                file = self._open_file(path)
                try:
                    file.seek(offset)
                    return file.read(size)
                except OSError:
                    self._files.pop(path).close()  # it is opened again: a network disk may have changed below it
                    raise

        data = patiently(path, read)
        if len(data) != size:
            raise UserError(f"{path}: ends before byte {offset + size}: truncated while in use; {PREPARE_AGAIN}")
        return data

    def _open_file(self, path: Path) -> FileIO:
        """The open file. Closes the least recently used ones where the system allows no more."""
        if path in self._files:
            self._files[path] = self._files.pop(path)
            return self._files[path]
        self._max_open_files = self._max_open_files or max_open_files(len(self.shards) * (2 if self.masked else 1))
        while True:
            while len(self._files) >= self._max_open_files:
                self._files.pop(next(iter(self._files))).close()
            try:
                self._files[path] = path.open("rb", buffering=0)
                return self._files[path]
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                    raise
                self._max_open_files = max(1, len(self._files) // 2)  # the process has opened many others


def max_open_files(wanted: int) -> int:
    """How many of `wanted` files one of two splits may keep open. Raises the process's limit up to the system's."""
    try:
        import resource
    except ImportError:  # Windows allows 8,192 in a process
        return min(wanted, 2048)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, unlimited = 2 * wanted + 128, resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        raised = needed if hard == unlimited else min(needed, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return wanted if soft == unlimited else max(1, min(wanted, (soft - 128) // 2))


@dataclass
class Dataset:
    """A folder of shards, open for reading. `meta`: dataset.json without its tokenizer, or describe_foreign's."""

    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train: Split
    val: Split

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.meta, self.tokenizer)


def fingerprint(meta: dict[str, Any], tokenizer: Tokenizer) -> str:
    """sha256 over the shards' entries (counts and crc32 of ids and masks) and the tokenizer; names do not matter."""
    content = {"dtype": meta["dtype"], "shards": meta["shards"], "tokenizer": tokenizer.content_hash}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_dataset(folder: Path | str, tokenizer_name: str | None = None) -> Dataset:
    """Opens a dataset and checks dataset.json, headers and sizes; ids are checked when they are read (shard_check.py).

    `tokenizer_name` is used for folders without a dataset.json: a published encoding, bytes, or a tokenizer's file.
    Raises UserError.
    """
    folder = Path(folder)
    try:
        if (folder / "dataset.json").is_file():
            meta, tokenizer = _read_meta(folder / "dataset.json")
        else:
            meta, tokenizer = describe_foreign(folder, tokenizer_name)
        splits = {}
        for split in SPLITS:
            shards = [_open_shard(folder, entry, meta["dtype"]) for entry in meta["shards"][split]]
            splits[split] = Split(split, shards, tokenizer.vocab_size)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None
    return Dataset(folder, meta, tokenizer, **splits)


def is_dataset(folder: Path) -> bool:
    """Whether the folder looks like a dataset; `open_dataset` may still raise."""
    return (folder / "dataset.json").is_file() or is_foreign(folder)


def _open_shard(folder: Path, entry: dict[str, Any], dtype: str) -> Shard:
    path = folder / entry["file"]
    offset = entry.get("offset", HEADER_BYTES)
    shard = Shard(
        path, offset, np.dtype(dtype).newbyteorder("<"), entry["tokens"], entry.get("crc32"), entry.get("mask_crc32")
    )
    files = [(path, offset + shard.tokens * shard.dtype.itemsize)]
    if shard.mask_crc32 is not None:
        files.append((shard.mask_path, (shard.tokens + 7) // 8))
    for file, size in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, but listed in dataset.json; restore it, or {PREPARE_AGAIN}")
        if file.stat().st_size != size:
            raise UserError(
                f"{file}: has {file.stat().st_size} bytes, expected {size}: truncated or changed; {PREPARE_AGAIN}"
            )
    if "offset" not in entry:  # `describe_foreign` has checked the others
        found_dtype, tokens = read_header(path)
        if (found_dtype, tokens) != (dtype, shard.tokens):
            expected = f"dataset.json and the vocabulary imply {shard.tokens} {dtype} ids"
            raise UserError(f"{path}: the header says {tokens} {found_dtype} ids, but {expected}; {PREPARE_AGAIN}")
    return shard


def _read_meta(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    """dataset.json, untrusted until every field has been checked. Raises UserError."""
    expect = partial(_expect, path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {PREPARE_AGAIN}") from None
    expect(isinstance(meta, dict) and meta.get("format") == FORMAT, f'expected an object with "format": "{FORMAT}"')
    expect(meta.get("version") == VERSION, f"its version is {meta.get('version')!r}, expected {VERSION}")
    try:
        tokenizer = tokenizer_from_dict(meta.pop("tokenizer", None))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    found = {"dtype": meta.get("dtype"), "eos_id": meta.get("eos_id"), "vocab_size": meta.get("vocab_size")}
    expected = {
        "dtype": dtype_for(tokenizer.vocab_size),
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
    }
    expect(found == expected, f"it says {found}, but its tokenizer implies {expected}")
    shards = meta.get("shards")
    expect(isinstance(shards, dict) and set(shards) == set(SPLITS), "expected shards of train and val")
    for split in SPLITS:
        entries = shards[split]
        expect(isinstance(entries, list) and len(entries) > 0, f"the {split} split has no shards")
        for i, entry in enumerate(entries):
            name = f"{split}_{i:06d}.bin"
            expect(isinstance(entry, dict) and entry.get("file") == name, f"shard {i} of {split} must be {name}")
            numbers = [entry.get(key) for key in ("tokens", "documents", "bytes", "crc32")]
            numbers.append(entry.get("mask_crc32", 0))
            valid = all(type(number) is int and number >= 0 for number in numbers)
            expect(valid, f"the numbers of {name} are {numbers}, expected whole numbers >= 0")
            known = {"file", "tokens", "documents", "bytes", "crc32", "mask_crc32"}
            expect(set(entry) == set(entries[0]) <= known, f"the keys of {name} are {sorted(entry)}")
    unchanged = meta.get("fingerprint") == fingerprint(meta, tokenizer)
    expect(unchanged, "its fingerprint does not match: it was changed after it was written")
    return meta, tokenizer


def _expect(path: Path, condition: bool, problem: str) -> None:
    if not condition:
        raise UserError(f"{path}: not a valid dataset.json: {problem}; {PREPARE_AGAIN}")
