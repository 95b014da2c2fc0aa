"""Files that torch.save wrote, by torch's restricted unpickler: tensors and plain values, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.option import show
from errors import UserError
from files import DamagedFile


def load_pickled(path: Path, allowed: bool) -> dict[str, Any]:
    """The dict that torch.save wrote. Raises UserError."""
    if not allowed:
        raise UserError(
            f"{path}: a pickle file, which Sprout reads only when asked: add --pt. torch's restricted unpickler then"
            " reads tensors and plain values, and refuses everything else"
        )
    import pickle
    import struct
    import zipfile

    # what a damaged stream of instructions makes the unpickler raise
    errors = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                    raise DamagedFile(path, "is compressed, as torch.save's files never are")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=path.stat().st_size > 2**20)
    except (*errors, EOFError, OSError, MemoryError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        why = " ".join(str(error)[:300].split())
        raise UserError(f"{path}: torch's restricted unpickler does not read it ({why})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    return content


def plain_tensors(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """content, which a pickle file gave, as tensors that have their memory in the file. Raises UserError."""
    size = 0
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise DamagedFile(path, f"holds something else than tensors by name: {show(repr(name))}")
        is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not is_plain or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
            raise DamagedFile(
                path, f"{show(repr(name))} is no plain tensor (sparse, nested, quantized or without data)"
            )
        size += tensor.nbytes
    if size > 2 * path.stat().st_size + 2**20:  # tied tensors share their memory; an expanded one has none
        raise UserError(
            f"{path}: its tensors would take {size:,} bytes, the file has {path.stat().st_size:,}: not read"
        )
    return dict(content)
