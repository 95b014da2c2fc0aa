"""The format of a token shard: its header, its names for numbers, one file of ids.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] token count), then the ids: uint16 (magic
20240520, version 1), or uint32 (20240801, version 7) for vocabularies above 65,535. A mask is `train_000000.mask`:
bit i % 8 of byte i // 8 is set if token i counts as a target.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError

HEADERS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # dtype: (magic, version)
HEADER_BYTES = 1024
SPLITS = ("train", "val")
PREPARE_AGAIN = "delete this dataset's folder and prepare (or fetch) it again"


def dtype_for(vocab_size: int) -> str:
    """The dtype of the ids: uint16 holds a vocabulary of up to 65,535."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def header(dtype: str, tokens: int) -> bytes:
    """The header of a shard of so many ids."""
    numbers = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    numbers[:3] = *HEADERS[dtype], tokens
    return numbers.tobytes()


@dataclass(frozen=True)
class Shard:
    """One file of ids whose header and size have been checked by `open_dataset`."""

    path: Path
    offset: int  # bytes before the first id
    dtype: np.dtype
    tokens: int
    crc32: int | None = None
    mask_crc32: int | None = None  # None: no mask

    @property
    def mask_path(self) -> Path:
        return self.path.with_suffix(".mask")


def has_magic(path: Path) -> bool:
    """Whether a file begins like a shard with a header."""
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(4), "little") in [magic for magic, _ in HEADERS.values()]
    except OSError:
        return False


def read_header(path: Path) -> tuple[str, int]:
    """(dtype, token count) of a shard's header. Raises UserError if it is invalid or does not match the file's size."""
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
    size = path.stat().st_size
    if len(data) < HEADER_BYTES:
        raise UserError(
            f"{path}: has {size} bytes, but a shard's header alone has {HEADER_BYTES}: truncated; {PREPARE_AGAIN}"
        )
    magic, version, tokens = np.frombuffer(data, "<i4")[:3].tolist()
    dtype = next((name for name, numbers in HEADERS.items() if numbers[0] == magic), None)
    if dtype is None:
        known = " or ".join(str(numbers[0]) for numbers in HEADERS.values())
        raise UserError(f"{path}: not a token shard: magic number {magic}, expected {known}; {PREPARE_AGAIN}")
    if version != HEADERS[dtype][1]:
        raise UserError(f"{path}: shard version {version}, expected {HEADERS[dtype][1]}; {PREPARE_AGAIN}")
    if tokens < 1 or size != HEADER_BYTES + tokens * np.dtype(dtype).itemsize:
        what = "truncated" if size < HEADER_BYTES + tokens * np.dtype(dtype).itemsize else "damaged"
        raise UserError(
            f"{path}: the header says {tokens} ids of {dtype}, the file has {size} bytes: {what}; {PREPARE_AGAIN}"
        )
    return dtype, tokens


def check_ids(shard: Shard, ids: np.ndarray, vocab_size: int) -> None:
    """Raises UserError if one of these ids of a shard, in the shard's dtype, is outside the vocabulary."""
    largest = int(ids.max())
    if largest >= vocab_size:
        advice = "pass the tokenizer it was made with (--tokenizer=…)" if shard.crc32 is None else PREPARE_AGAIN
        raise UserError(f"{shard.path}: contains id {largest}, but the vocabulary has {vocab_size} ids; {advice}")
