"""Files of tensors in the safetensors format: written part by part with checksums, checked before they are read.

Files are data: nothing read is executed, and text from them is shown by repr. Knows neither model nor checkpoint.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files import CHUNK, MAX_JSON, DamagedFile, compare, reading

DTYPES = {  # safetensors' names; a file holds the tensors in the order of these dtypes, then by name
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def parts_of(content: bytes | dict[str, Tensor]) -> Iterable[bytes | memoryview]:
    """What a file of this content holds, part by part."""
    return [content] if isinstance(content, bytes) else safetensors_bytes(content)


def bytes_needed(contents: Mapping[str, bytes | dict[str, Tensor]]) -> int:
    """The bytes of files with these contents, and of headers and a manifest."""
    tensors = [content for content in contents.values() if not isinstance(content, bytes)]
    texts = [content for content in contents.values() if isinstance(content, bytes)]
    return CHUNK + sum(map(len, texts)) + sum(tensor.nbytes for some in tensors for tensor in some.values())


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes that safetensors.torch.save returns, part by part: header length, header, and the tensors one by one.

    The library itself needs all tensors on the CPU and contiguous at once, and keeps their checksum to itself.
    """
    ranks = {dtype: (rank, name) for rank, (name, dtype) in enumerate(DTYPES.items())}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype][0], name))
    header, end = {}, 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": ranks[tensor.dtype][1], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for name in names:
        yield bytes_of(tensors[name].detach().cpu().contiguous())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as the file has it: little-endian."""
    assert sys.byteorder == "little"
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path, expected: object = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. expected: its entry in the manifest; None: not checked.

    Each tensor is read once, into its own memory. Not memory-mapped: a truncated file would raise SIGBUS.
    """
    layout, tensors = check_header(path), {}
    try:
        with reading(path) as size, open(path, "rb") as file:
            length = file.read(8)
            crc = zlib.crc32(file.read(int.from_bytes(length, "little")), zlib.crc32(length))
            for name, (dtype, shape) in layout.items():
                tensors[name] = torch.empty(shape, dtype=dtype)
                data = bytes_of(tensors[name])
                if file.readinto(data) < len(data):
                    raise DamagedFile(path, f"it ends in tensor {name!r}")
                crc = zlib.crc32(data, crc)
    except RuntimeError as error:  # a shape such as (0, 2**62, 2**62)
        raise DamagedFile(path, f"damaged ({error})") from error
    if expected is not None:
        compare(path, {"bytes": size, "crc32": crc}, expected)
    return tensors


def check_header(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Checks a safetensors file: header length (8 bytes), header, data. The library checks that the tensors fill the
    data without a gap. Returns dtype and shape of each, in the order of the data."""
    with reading(path) as size, open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_JSON, size - 8):
        raise DamagedFile(path, f"its header length of {length} bytes is impossible in a file of {size} bytes")
    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise DamagedFile(path, f"damaged ({error})") from error
    for name, (dtype, _) in found.items():
        if len(name) > 256 or not name.isprintable() or dtype not in DTYPES:
            raise DamagedFile(path, f"tensor {name[:300]!r} of dtype {dtype!r}: Sprout writes no such name or dtype")
    return {name: (DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}
