"""Token shards on disk: their format and the only reader; the only writer is shard_writer.py.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] token count), then the ids: uint16 (magic
20240520, version 1), or uint32 (20240801, version 7) for vocabularies above 65,535. A mask is `train_000000.mask`:
bit i % 8 of byte i // 8 is set if token i counts as a target. `dataset.json` holds the counts, the crc32 of each
shard's ids (without the header), and the whole tokenizer. Folders without it are read too: shards of the same layout
(llm.c's and modded-nanogpt's) and headerless uint16 `train.bin` and `val.bin` (nanoGPT's).

Files are read, never memory-mapped: a mapped file that is truncated kills the process with SIGBUS.
Reading order: Split, open_dataset, _read_meta, then folders without dataset.json.
"""

import bisect
import hashlib
import json
import threading
import zlib
from dataclasses import dataclass
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import Tokenizer, named_tokenizer, tokenizer_from_dict
from errors import UserError

HEADERS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # dtype: (magic, version)
HEADER_BYTES = 1024
FORMAT = "sprout-dataset"
VERSION = 1
SPLITS = ("train", "val")
BLOCK = 1 << 24  # bytes per read of a checksum
MAX_OPEN_FILES = 128
PREPARE_AGAIN = "delete this dataset's folder and prepare (or fetch) it again"


def dtype_for(vocab_size: int) -> str:
    """The dtype of the ids: uint16 holds a vocabulary of up to 65,535."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


@dataclass
class Shard:
    """One file of ids whose header and size have been checked by `open_dataset`."""

    path: Path
    offset: int  # bytes before the first id
    dtype: np.dtype
    tokens: int
    crc32: int | None = None
    mask_crc32: int | None = None  # None: no mask
    checked: bool = False  # contents too, on the first read

    @property
    def mask_path(self) -> Path:
        return self.path.with_suffix(".mask")


class Split:
    """The shards of one split as one stream of ids; a read may cross shards. Thread-safe.

    Reads raise UserError on a damaged or truncated file, IndexError outside the split.
    """

    def __init__(self, name: str, shards: list[Shard], vocab_size: int) -> None:
        self.name, self.shards, self.vocab_size = name, shards, vocab_size
        self.masked = shards[0].mask_crc32 is not None
        self._ends = np.cumsum([shard.tokens for shard in shards]).tolist()
        self._files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids [start, start + count), int64 (count,)."""
        parts = [self._read_ids(*part) for part in self._parts(start, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def mask(self, start: int, count: int) -> np.ndarray | None:
        """bool (count,): whether each of the same ids counts as a target. None if the split has no masks: all do."""
        if not self.masked:
            return None
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
            with self._lock:  # seek and read must not interleave with another thread's
                file = self._files.get(path) or self._open_file(path)
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise UserError(f"{path}: can no longer be read ({error.strerror}); {PREPARE_AGAIN}") from None
        if len(data) != size:
            raise UserError(f"{path}: ends before byte {offset + size}: truncated while in use; {PREPARE_AGAIN}")
        return data

    def _open_file(self, path: Path) -> FileIO:
        if len(self._files) >= MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        self._files[path] = path.open("rb", buffering=0)
        return self._files[path]

    def _check_content(self, shard: Shard) -> None:
        """Checks the crc32 of ids and mask, and that every id is below vocab_size. Runs before a shard's first read."""
        crc, largest = 0, 0
        end = shard.offset + shard.tokens * shard.dtype.itemsize
        for offset in range(shard.offset, end, BLOCK):
            data = self._read_bytes(shard.path, offset, min(BLOCK, end - offset))
            crc = zlib.crc32(data, crc)
            largest = max(largest, int(np.frombuffer(data, shard.dtype).max()))
        _compare_crc(shard.path, crc, shard.crc32)
        if shard.mask_crc32 is not None:
            mask = self._read_bytes(shard.mask_path, 0, (shard.tokens + 7) // 8)
            _compare_crc(shard.mask_path, zlib.crc32(mask), shard.mask_crc32)
        if largest >= self.vocab_size:
            advice = "pass the tokenizer it was made with (--tokenizer=…)" if shard.crc32 is None else PREPARE_AGAIN
            raise UserError(
                f"{shard.path}: contains id {largest}, but the vocabulary has {self.vocab_size} ids; {advice}"
            )
        shard.checked = True


def _compare_crc(path: Path, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise UserError(f"{path}: damaged: its crc32 is {found:08x}, dataset.json says {expected:08x}; {PREPARE_AGAIN}")


@dataclass
class Dataset:
    """A folder of shards, open for reading. `meta`: dataset.json without its tokenizer, or _describe_foreign's."""

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
    """Opens a dataset and checks dataset.json, headers and sizes; ids are checked on the first read of a shard.

    `tokenizer_name` is used for folders without a dataset.json: a published encoding, bytes, or a tokenizer's file.
    Raises UserError.
    """
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
    """Whether the folder looks like a dataset; `open_dataset` may still raise."""
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
            raise UserError(f"{file}: missing, but listed in dataset.json; restore it, or {PREPARE_AGAIN}")
        if file.stat().st_size != size:
            raise UserError(
                f"{file}: has {file.stat().st_size} bytes, expected {size}: truncated or changed; {PREPARE_AGAIN}"
            )
    if offset:
        found_dtype, tokens = _read_header(path)
        if (found_dtype, tokens) != (dtype, shard.tokens):
            expected = f"dataset.json and the vocabulary imply {shard.tokens} {dtype} ids"
            raise UserError(f"{path}: the header says {tokens} {found_dtype} ids, but {expected}; {PREPARE_AGAIN}")
    return shard


def _read_header(path: Path) -> tuple[str, int]:
    """(dtype, token count) of a shard's header. Raises UserError if it is invalid or does not match the file's size."""
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
    size = path.stat().st_size
    if len(data) < HEADER_BYTES:
        raise UserError(
            f"{path}: has {size} bytes, but a shard's header alone has {HEADER_BYTES}: truncated; {PREPARE_AGAIN}"
        )
    magic, version, tokens = np.frombuffer(data, "<i4")[:3].tolist()
    dtype = next((name for name, header in HEADERS.items() if header[0] == magic), None)
    if dtype is None:
        known = " or ".join(str(header[0]) for header in HEADERS.values())
        raise UserError(f"{path}: not a token shard: magic number {magic}, expected {known}; {PREPARE_AGAIN}")
    if version != HEADERS[dtype][1]:
        raise UserError(f"{path}: shard version {version}, expected {HEADERS[dtype][1]}; {PREPARE_AGAIN}")
    if tokens < 1 or size != HEADER_BYTES + tokens * np.dtype(dtype).itemsize:
        raise UserError(
            f"{path}: the header says {tokens} ids of {dtype}, the file has {size} bytes: truncated; {PREPARE_AGAIN}"
        )
    return dtype, tokens


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


def _describe_foreign(folder: Path, tokenizer_name: str | None) -> tuple[dict[str, Any], Tokenizer]:
    """Metadata like that of a dataset.json for a folder of another program's shards. Raises UserError."""
    found = {split: sorted(path for path in folder.glob(f"*{split}*.bin") if path.is_file()) for split in SPLITS}
    for split, paths in found.items():
        if not paths:
            raise UserError(
                f"{folder}: not a dataset: neither a dataset.json nor a file like {split}.bin or {split}_000000.bin"
            )
    if tokenizer_name in (None, "bpe", "char"):
        raise UserError(
            f"{folder}: has no dataset.json, so its tokenizer is unknown: pass --tokenizer=gpt2, for example,"
            " or a tokenizer's file (for nanoGPT's meta.pkl: prepare the text again with --tokenizer=char)"
        )
    tokenizer = named_tokenizer(str(tokenizer_name))
    dtypes, shards = set(), {}
    for split, paths in found.items():
        shards[split] = [_describe_shard(path) for path in paths]
        dtypes |= {entry.pop("dtype") for entry in shards[split]}
    dtype = dtypes.pop()
    if dtypes or (dtype == "uint16" and tokenizer.vocab_size > 65_536):
        raise UserError(
            f"{folder}: the shards differ in dtype, or {dtype} is too small for the {tokenizer.vocab_size} ids of"
            f" {tokenizer.name}; expected one dtype that fits the tokenizer"
        )
    meta = {"dtype": dtype, "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size, "shards": shards}
    return meta | {"source": {"name": "shards without dataset.json", "folder": folder.name}}, tokenizer


def _describe_shard(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if path.name in ("train.bin", "val.bin") and not _has_magic(path):
        if size == 0 or size % 2:
            raise UserError(
                f"{path}: {size} bytes cannot be uint16 ids; expected an even number, at least 2; {PREPARE_AGAIN}"
            )
        dtype, tokens, offset = "uint16", size // 2, 0
    else:
        dtype, tokens = _read_header(path)
        offset = HEADER_BYTES
    with path.open("rb") as file:  # only both ends: a checksum of a large file takes longer than a hundred steps
        crc = zlib.crc32(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        crc = zlib.crc32(file.read(1 << 20), crc)
    return {"file": path.name, "offset": offset, "dtype": dtype, "tokens": tokens, "ends_crc32": crc}


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return int.from_bytes(file.read(4), "little") in [magic for magic, _ in HEADERS.values()]
