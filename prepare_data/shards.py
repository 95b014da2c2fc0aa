"""Token shards on disk: their format and the one reader; the one writer is shard_writer.py.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] token count), then the ids: uint16 (magic 20240520,
version 1), or uint32 (20240801, version 7) for vocabularies above 65,535. A mask is `train_000000.mask`, bit i % 8 of byte i // 8
for token i, set where the token counts as a target. `dataset.json` beside them holds crc32s (of the ids, without the header), counts and
the whole tokenizer. Folders without it are read too: shards of that layout, and headerless uint16 `train.bin` and `val.bin` (nanoGPT's).
Files are read, never mapped: a mapped file that is truncated kills the process without a message.
"""

import bisect
import hashlib
import json
import threading
import zlib
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import Tokenizer, named_tokenizer, tokenizer_from_dict
from errors import UserError

KINDS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # dtype: (magic, version)
HEADER_BYTES = 1024
FORMAT = "sprout-dataset"
VERSION = 1
SPLITS = ("train", "val")
BLOCK = 1 << 24  # bytes checked at a time
OPEN_FILES = 128
AGAIN = "delete this dataset's folder and prepare (or fetch) it again"


def kind_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 65_535 else "uint32"


@dataclass
class Shard:
    """One file of ids, as a reader knows it after `open_dataset` compared its header and size."""

    path: Path
    offset: int  # bytes before the first id
    dtype: np.dtype
    tokens: int
    crc32: int | None = None
    mask_crc32: int | None = None
    checked: bool = False

    @property
    def mask_path(self) -> Path:
        return self.path.with_suffix(".mask")


class Split:
    """The shards of one split as one stream of ids; a window may cross shards. Safe to use from several threads."""

    def __init__(self, name: str, shards: list[Shard], vocab_size: int) -> None:
        self.name, self.shards, self.vocab_size = name, shards, vocab_size
        self.masked = shards[0].mask_crc32 is not None
        self._ends = np.cumsum([shard.tokens for shard in shards]).tolist()
        self._files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids start … start+count−1, int64 (count,)."""
        parts = [self._read_ids(*part) for part in self._parts(start, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def mask(self, start: int, count: int) -> np.ndarray | None:
        """For the same ids, bool (count,): whether each counts as a target. None where the split has no masks: all do."""
        if not self.masked:
            return None
        return np.concatenate([self._read_mask(*part) for part in self._parts(start, count)])

    def _parts(self, start: int, count: int) -> list[tuple[Shard, int, int]]:
        """The pieces of a window: (shard, first id in it, number of ids)."""
        if not 0 <= start < start + count <= self._ends[-1]:
            raise IndexError(f"{count} ids from {start} of the {self.name} split, which has {len(self)}")
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
        if not shard.checked:
            self._check_content(shard)
        size = shard.dtype.itemsize
        data = self._read_bytes(shard.path, shard.offset + first * size, count * size)
        return np.frombuffer(data, shard.dtype).astype(np.int64)

    def _read_mask(self, shard: Shard, first: int, count: int) -> np.ndarray:
        if not shard.checked:
            self._check_content(shard)
        begin = first // 8
        data = self._read_bytes(shard.mask_path, begin, (first + count + 7) // 8 - begin)
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return bits[first - 8 * begin :][:count].astype(bool)

    def _read_bytes(self, path: Path, offset: int, size: int) -> bytes:
        try:
            with self._lock:  # position and read belong together
                file = self._files.get(path) or self._open_file(path)
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read any more ({error.strerror}); {AGAIN}") from None
        if len(data) != size:
            raise UserError(f"{path}: ends before byte {offset + size}; the file was cut while in use; {AGAIN}")
        return data

    def _open_file(self, path: Path) -> FileIO:
        if len(self._files) >= OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        self._files[path] = path.open("rb", buffering=0)
        return self._files[path]

    def _check_content(self, shard: Shard) -> None:
        """Once a shard, before its first id is given out: crc32, and every id within the vocabulary."""
        crc, largest = 0, 0
        end = shard.offset + shard.tokens * shard.dtype.itemsize
        for offset in range(shard.offset, end, BLOCK):
            data = self._read_bytes(shard.path, offset, min(BLOCK, end - offset))
            crc = zlib.crc32(data, crc)
            largest = max(largest, int(np.frombuffer(data, shard.dtype).max()))
        _compare_crc(shard.path, crc, shard.crc32)
        if shard.mask_crc32 is not None:
            _compare_crc(
                shard.mask_path,
                zlib.crc32(self._read_bytes(shard.mask_path, 0, (shard.tokens + 7) // 8)),
                shard.mask_crc32,
            )
        if largest >= self.vocab_size:
            advice = "name the tokenizer it was made with (--tokenizer=…)" if shard.crc32 is None else AGAIN
            raise UserError(
                f"{shard.path}: holds the id {largest}, but the vocabulary has {self.vocab_size} ids; {advice}"
            )
        shard.checked = True


def _compare_crc(path: Path, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise UserError(f"{path}: damaged: its crc32 is {found:08x}, dataset.json says {expected:08x}; {AGAIN}")


@dataclass
class Dataset:
    """A folder of shards, open for reading. `meta` is dataset.json without the tokenizer, or the like made up for a folder without one."""

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
        """sha256 of all that decides the data: ids (their crc32), counts, masks, tokenizer."""
        return fingerprint(self.meta, self.tokenizer)


def fingerprint(meta: dict[str, Any], tokenizer: Tokenizer) -> str:
    content = {"dtype": meta["dtype"], "shards": meta["shards"], "tokenizer": tokenizer.content_hash}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_dataset(folder: Path | str, tokenizer_name: str | None = None) -> Dataset:
    """Opens a dataset and checks headers, sizes and dataset.json; contents are checked on first use. `tokenizer_name` is for folders
    without a dataset.json: a published encoding, bytes, or a tokenizer's file. Raises UserError."""
    folder = Path(folder)
    if (folder / "dataset.json").is_file():
        meta, tokenizer = _read_meta(folder / "dataset.json")
    else:
        meta, tokenizer = _describe_foreign(folder, tokenizer_name)
    splits = {}
    for split in SPLITS:
        shards = [_open_shard(folder, entry, meta["dtype"]) for entry in meta["shards"][split]]
        splits[split] = Split(split, shards, tokenizer.vocab_size)
    return Dataset(folder, meta, tokenizer, **splits)


def is_dataset(folder: Path) -> bool:
    return (folder / "dataset.json").is_file() or any(folder.glob("*train*.bin"))


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
            raise UserError(f"{file}: missing, though it belongs to the dataset; put it back, or {AGAIN}")
        if file.stat().st_size != size:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, expected {size}; it was cut or changed: {AGAIN}")
    if offset:
        found_dtype, tokens = _read_header(path)
        if (found_dtype, tokens) != (dtype, shard.tokens):
            expected = f"{shard.tokens} {dtype} ids were expected from dataset.json and the vocabulary"
            raise UserError(f"{path}: its header says {tokens} {found_dtype} ids, but {expected}; {AGAIN}")
    return shard


def _read_header(path: Path) -> tuple[str, int]:
    """(dtype, token count) of a shard with a header, compared with the file's size."""
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
    size = path.stat().st_size
    if len(data) < HEADER_BYTES:
        raise UserError(
            f"{path}: {size} bytes are too few for a shard's header of {HEADER_BYTES}; the file was cut: {AGAIN}"
        )
    magic, version, tokens = np.frombuffer(data, "<i4")[:3].tolist()
    dtype = next((name for name, kind in KINDS.items() if kind[0] == magic), None)
    if dtype is None:
        known = " or ".join(str(kind[0]) for kind in KINDS.values())
        raise UserError(f"{path}: not a token shard: it begins with the number {magic}, expected {known}; {AGAIN}")
    if version != KINDS[dtype][1]:
        raise UserError(f"{path}: shard of version {version}, expected {KINDS[dtype][1]}; {AGAIN}")
    if tokens < 1 or size != HEADER_BYTES + tokens * np.dtype(dtype).itemsize:
        raise UserError(
            f"{path}: its header says {tokens} ids of {dtype}, but the file has {size} bytes; it was cut: {AGAIN}"
        )
    return dtype, tokens


def _read_meta(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    """dataset.json, checked: it may come from anyone."""

    def expect(condition: bool, rule: str) -> None:
        if not condition:
            raise UserError(f"{path}: not a valid description of a dataset: {rule}; {AGAIN}")

    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from None
    expect(isinstance(meta, dict) and meta.get("format") == FORMAT, f'expected an object with "format": "{FORMAT}"')
    expect(meta.get("version") == VERSION, f"its version is {meta.get('version')!r}, this program reads {VERSION}")
    try:
        tokenizer = tokenizer_from_dict(meta.pop("tokenizer", None))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    found = {"dtype": meta.get("dtype"), "eos_id": meta.get("eos_id"), "vocab_size": meta.get("vocab_size")}
    expected = {"dtype": kind_for(tokenizer.vocab_size), "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    expect(found == expected, f"it says {found}, its tokenizer {expected}")
    shards = meta.get("shards")
    expect(isinstance(shards, dict) and set(shards) == set(SPLITS), "shards of train and val are expected")
    for split in SPLITS:
        entries = shards[split]
        expect(isinstance(entries, list) and len(entries) > 0, f"the {split} split has no shards")
        for i, entry in enumerate(entries):
            name = f"{split}_{i:06d}.bin"
            expect(
                isinstance(entry, dict) and entry.get("file") == name, f"shard {i} of {split} must be the file {name}"
            )
            numbers = [entry.get(key) for key in ("tokens", "documents", "bytes", "crc32")] + [
                entry.get("mask_crc32", 0)
            ]
            expect(
                all(type(number) is int and number >= 0 for number in numbers), f"the numbers of {name} are {numbers}"
            )
            expect(
                set(entry) == set(entries[0]) <= {"file", "tokens", "documents", "bytes", "crc32", "mask_crc32"},
                f"the keys of {name}",
            )
    expect(
        meta.get("fingerprint") == fingerprint(meta, tokenizer),
        "it was changed after it was written: the fingerprint does not fit",
    )
    return meta, tokenizer


def _describe_foreign(folder: Path, tokenizer_name: str | None) -> tuple[dict[str, Any], Tokenizer]:
    """The like of a dataset.json for a folder of another program's shards."""
    found = {split: sorted(path for path in folder.glob(f"*{split}*.bin") if path.is_file()) for split in SPLITS}
    for split, paths in found.items():
        if not paths:
            raise UserError(
                f"{folder}: no dataset: it has neither a dataset.json nor a file like {split}.bin or {split}_000000.bin"
            )
    if tokenizer_name in (None, "bpe", "char"):
        raise UserError(
            f"{folder}: has no dataset.json, so name the tokenizer its ids come from: --tokenizer=gpt2, for example, or a tokenizer's file"
            " (ids of nanoGPT's meta.pkl cannot be named: prepare the text again with --tokenizer=char)"
        )
    tokenizer = named_tokenizer(str(tokenizer_name))
    dtypes, shards = set(), {}
    for split, paths in found.items():
        shards[split] = [_describe_shard(path) for path in paths]
        dtypes |= {entry.pop("dtype") for entry in shards[split]}
    dtype = dtypes.pop()
    if dtypes or (dtype == "uint16" and tokenizer.vocab_size > 65_536):
        raise UserError(
            f"{folder}: {dtype} ids do not fit each other or the {tokenizer.vocab_size} ids of {tokenizer.name}; expected one kind"
        )
    meta = {"dtype": dtype, "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size, "shards": shards}
    return meta | {"source": {"name": "shards without dataset.json", "folder": folder.name}}, tokenizer


def _describe_shard(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if path.name in ("train.bin", "val.bin") and not _has_magic(path):
        if size == 0 or size % 2:
            raise UserError(
                f"{path}: {size} bytes are no row of uint16 ids; expected an even number of bytes, at least 2: {AGAIN}"
            )
        dtype, tokens, offset = "uint16", size // 2, 0
    else:
        dtype, tokens = _read_header(path)
        offset = HEADER_BYTES
    with path.open("rb") as file:  # a full checksum of a large file would take longer than its first hundred steps
        ends = [file.read(1 << 20)]
        file.seek(max(0, size - (1 << 20)))
        ends.append(file.read(1 << 20))
    return {
        "file": path.name,
        "offset": offset,
        "dtype": dtype,
        "tokens": tokens,
        "ends_crc32": zlib.crc32(ends[1], zlib.crc32(ends[0])),
    }


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return int.from_bytes(file.read(4), "little") in [magic for magic, _ in KINDS.values()]
