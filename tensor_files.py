"""Files of tensors in the safetensors format: written part by part with checksums, checked before they are read, whole
or row by row.

A tensor is in one file, or its rows are in several, the shards. Their `__metadata__` then holds for each tensor, as
JSON text, the shape of the whole and the first row that is here: {"shape": [50257, 768], "start": 12565}.

Files are data: nothing read is executed, and text from them is shown by repr. Knows neither model nor checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files import CHUNK, DamagedFile, UnreadableFile, compare, parse_json, plain_file, reading

DTYPES = {  # safetensors' names; a file holds the tensors in the order of these dtypes, then by name
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Of a header: its bytes, and its tensors. The deepest model that options allow has fewer, with its moments and averaged
# weights in the shard of one rank.
MAX_HEADER, MAX_TENSORS = 2**24, 2**15
RANKS = {dtype: (rank, name) for rank, (name, dtype) in enumerate(DTYPES.items())}

# ---- Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Rows of a tensor: `tensor` (n, …) is whole[start : start + n], where n may be 0. shape: of the whole tensor. A
    tensor without dimensions is its own only part, with start 0."""

    tensor: Tensor
    shape: tuple[int, ...]
    start: int


def parts_of(content: bytes | dict[str, Tensor]) -> Iterable[bytes | memoryview]:
    """What a file of this content holds, part by part."""
    return [content] if isinstance(content, bytes) else safetensors_bytes(content)


def bytes_needed(contents: Mapping[str, bytes | dict[str, Tensor]]) -> int:
    """The bytes of files with these contents, and of headers and a manifest."""
    tensors = [content for content in contents.values() if not isinstance(content, bytes)]
    texts = [content for content in contents.values() if isinstance(content, bytes)]
    return CHUNK + sum(map(len, texts)) + sum(tensor.nbytes for some in tensors for tensor in some.values())


def shard_bytes(parts: Mapping[str, Part]) -> Iterator[bytes | memoryview]:
    """The bytes of a shard, part by part."""
    metadata = {name: json.dumps({"shape": [*part.shape], "start": part.start}) for name, part in parts.items()}
    return safetensors_bytes({name: part.tensor for name, part in parts.items()}, metadata)


def safetensors_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes that safetensors.torch.save returns, part by part: header length, header, and the tensors one by one.

    The library itself needs all tensors on the CPU and contiguous at once, and keeps their checksum to itself.
    """
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    yield from _header_bytes(layout, metadata)
    for name in _in_order(layout):
        yield bytes_of(tensors[name].detach().cpu().contiguous())


def _header_bytes(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None
) -> list[bytes]:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in _in_order(layout):
        (dtype, shape), begin = layout[name], end
        end += dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": RANKS[dtype][1], "shape": [*shape], "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    return [len(encoded).to_bytes(8, "little"), encoded]


def _in_order(layout: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    return sorted(layout, key=lambda name: (RANKS[layout[name][0]][0], name))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as the file has it: little-endian."""
    assert sys.byteorder == "little"
    return tensor.view(-1).view(torch.uint8).numpy().data


# ---- Headers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """data: where the tensors begin in the file. layout: dtype and shape of each, in the order of the data."""

    data: int
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Checks a safetensors file: header length (8 bytes), header, data. The library checks that the tensors fill the
    data without a gap. Raises DamagedFile."""
    with reading(path) as size, open(path, "rb", opener=plain_file) as file:
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise DamagedFile(path, f"its header length of {length} bytes is impossible in a file of {size} bytes")
    try:
        with reading(path), safe_open(path, framework="pt") as tensors:
            names = tensors.offset_keys()
            if len(names) > MAX_TENSORS:
                raise DamagedFile(path, f"{len(names):,} tensors; Sprout writes at most {MAX_TENSORS:,}")
            slices = {name: tensors.get_slice(name) for name in names}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            metadata = tensors.metadata() or {}
    except SafetensorError as error:
        raise DamagedFile(path, f"damaged ({error})") from error
    except RuntimeError as error:  # the library's, where the file cannot be opened
        raise UnreadableFile(path, f"cannot be opened ({str(error)[-60:]})") from error
    for name, (dtype, _) in found.items():
        if len(name) > 256 or not name.isprintable() or dtype not in DTYPES:
            raise DamagedFile(path, f"tensor {name[:300]!r} of dtype {dtype!r}: Sprout writes no such name or dtype")
    return Header(8 + length, {name: (DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in found.items()}, metadata)


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a file. offset: of their first byte in it. start: the first row in the whole tensor."""

    path: Path
    offset: int
    start: int
    rows: int


def _pieces(path: Path, header: Header, is_shard: bool) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Piece]]:
    """(name, dtype and shape of the whole tensor, the rows that are here). Raises DamagedFile."""
    if is_shard and header.metadata.keys() != header.layout.keys():
        raise DamagedFile(path, "its metadata does not name the same tensors as its header")
    offset = header.data
    for name, (dtype, shape) in header.layout.items():
        whole, start = _placed(path, name, header.metadata[name], shape) if is_shard else (shape, 0)
        yield name, dtype, whole, Piece(path, offset, start, rows_of(shape))
        offset += dtype.itemsize * math.prod(shape)


def _placed(path: Path, name: str, text: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The whole shape and the first row from the metadata of a part of this shape. Raises DamagedFile."""
    try:
        value = parse_json(text.encode()) if len(text) <= 2000 else None
    except ValueError:
        value = None
    whole: Any
    start: Any
    whole, start = (value.get("shape"), value.get("start")) if isinstance(value, dict) else (None, 0)
    if not (
        isinstance(whole, list)
        and all(type(n) is int and 0 <= n < 2**63 for n in [*whole, start])
        and len(whole) == len(shape)
        and tuple(whole[1:]) == shape[1:]
        and start + rows_of(shape) <= rows_of(whole)
    ):
        raise DamagedFile(path, f"its metadata of tensor {name!r}, of shape {list(shape)} here, is {text[:200]!r}")
    return tuple(whole), start


def rows_of(shape: Sequence[int]) -> int:
    """The rows of a tensor: its first dimension; 1 without dimensions."""
    return shape[0] if shape else 1


def check_cover(rows: Iterable[tuple[int, int]], count: int) -> None:
    """Raises ValueError where (first row, rows) of the parts of a tensor are not each of its `count` rows once."""
    end = 0
    for start, some in sorted(rows):
        if some and start != end:
            problem = "in no part" if start > end else "in two parts"
            raise ValueError(f"rows {min(start, end)} to {max(start, end) - 1} of {count} are {problem}")
        end = max(end, start + some)
    if end != count:
        raise ValueError(f"rows {end} to {count - 1} of {count} are in no part")


# ---- Reading ---------------------------------------------------------------------------------------------------------


class TensorReader:
    """Reads rows of the tensors of files, and no other bytes. files: each with its entry in the manifest, None where
    there is none. prefix: None for a whole file; of shards, the tensors whose name begins so are read, without it.

    Here only the headers are checked, and that the shards hold every row of every tensor once. No checksum can be
    compared for a part of a file: `open_checkpoint` has done that. Files are not memory-mapped: a truncated one would
    raise SIGBUS. Raises DamagedFile, in all methods.
    """

    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Dtype and shape of each whole tensor, in the order of a whole file."""

    def __init__(self, files: Mapping[Path, object], prefix: str | None = None) -> None:
        self.prefix, self._files = prefix or "", files
        self._headers = {path: read_header(path) for path in files}
        layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]()
        pieces = dict[str, list[Piece]]()
        for path, header in self._headers.items():
            for name, dtype, shape, piece in _pieces(path, header, is_shard=prefix is not None):
                if layout.setdefault(name, (dtype, shape)) != (dtype, shape):
                    first = pieces[name][0].path.name
                    raise DamagedFile(path, f"tensor {name!r} has another dtype or shape than in {first}")
                pieces.setdefault(name, []).append(piece)
        for name, (_, shape) in layout.items():
            try:
                check_cover([(piece.start, piece.rows) for piece in pieces[name]], rows_of(shape))
            except ValueError as error:
                raise DamagedFile(pieces[name][0].path, f"tensor {name!r}: {error}") from None
        wanted = [name for name in _in_order(layout) if name.startswith(self.prefix)]
        self.layout = {name.removeprefix(self.prefix): layout[name] for name in wanted}
        self._pieces = {name.removeprefix(self.prefix): pieces[name] for name in wanted}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1 of a tensor, (stop - start, …), on the CPU, in memory of their own. A tensor without
        dimensions is its row 0."""
        dtype, shape = self.layout[name]
        assert 0 <= start <= stop <= rows_of(shape), f"rows {start} to {stop} of {name} {shape}"
        found = _empty(self._pieces[name][0].path, dtype, (stop - start, *shape[1:]))
        data, size = bytes_of(found), dtype.itemsize * math.prod(shape[1:])
        for piece in self._pieces[name]:
            first, last = max(start, piece.start), min(stop, piece.start + piece.rows)
            if first < last:
                part = data[(first - start) * size : (last - start) * size]
                _read_at(piece.path, piece.offset + (first - piece.start) * size, part)
        return found if shape else found.reshape(shape if stop > start else (0,))

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, rows_of(self.layout[name][1]))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors. Reads every byte of the files once, and compares sizes and checksums with the entries."""
        found, targets = {}, dict[tuple[Path, str], memoryview]()
        for name, (dtype, shape) in self.layout.items():
            pieces, size = self._pieces[name], dtype.itemsize * math.prod(shape[1:])
            found[name] = _empty(pieces[0].path, dtype, shape)
            data = bytes_of(found[name])
            for piece in pieces:
                part = data[piece.start * size : (piece.start + piece.rows) * size]
                targets[piece.path, self.prefix + name] = part
        for path, expected in self._files.items():
            entry = _read_whole(path, self._headers[path], targets)
            if expected is not None:
                compare(path, entry, expected)
        return found

    def entry(self) -> dict[str, int]:
        """Bytes and crc32 that a whole file of these tensors has, or would have."""
        size = crc = 0
        for part in self._as_one_file():
            size, crc = size + len(part), zlib.crc32(part, crc)
        return {"bytes": size, "crc32": crc}

    def _as_one_file(self) -> Iterator[bytes | memoryview]:
        yield from _header_bytes(self.layout, None)
        for name in _in_order(self.layout):
            yield bytes_of(self.tensor(name))


def _empty(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # a shape such as (0, 2**62, 2**62)
        raise DamagedFile(path, f"damaged ({error})") from error


def _read_at(path: Path, offset: int, data: memoryview) -> None:
    with reading(path), open(path, "rb", opener=plain_file) as file:
        file.seek(offset)
        if file.readinto(data) < len(data):
            raise DamagedFile(path, f"it ends before byte {offset + len(data)}")


def _read_whole(path: Path, header: Header, targets: Mapping[tuple[Path, str], memoryview]) -> dict[str, int]:
    """Reads a file, each tensor in `targets` into that memory. Returns the file's bytes and crc32."""
    scratch = memoryview(bytearray(CHUNK))
    with reading(path) as size, open(path, "rb", opener=plain_file) as file:
        crc = zlib.crc32(file.read(header.data))
        for name, (dtype, shape) in header.layout.items():
            length = dtype.itemsize * math.prod(shape)
            parts: Iterable[memoryview]
            if (path, name) in targets:
                parts = [targets[path, name]]
            else:
                parts = (scratch[: min(CHUNK, length - done)] for done in range(0, length, CHUNK))
            for part in parts:
                if file.readinto(part) < len(part):
                    raise DamagedFile(path, f"it ends in tensor {name!r}")
                crc = zlib.crc32(part, crc)
    return {"bytes": size, "crc32": crc}
