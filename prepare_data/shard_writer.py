"""The only writer of a dataset's shards (format: shard_format.py) and its dataset.json. The caller makes and
renames the folder.
"""

import json
import os
import zlib
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from common.signature import signed
from common.tokenizer import Tokenizer
from errors import UserError
from files import sync_directory
from prepare_data.shard_format import HEADER_BYTES, dtype_for, header
from prepare_data.shards import FORMAT, VERSION, fingerprint

BUFFER = 1 << 20  # tokens kept in memory before a write


class ShardWriter:
    """Writes one split: `append` ids (and their mask) in order, then `close`."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int = 10**8, masked: bool = False
    ) -> None:
        self.folder, self.split, self.shard_tokens, self.masked = folder, split, shard_tokens, masked
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.eos_id = tokenizer.eos_id
        self.byte_lengths = np.array([len(token) for token in tokenizer.token_bytes], dtype=np.int64)
        self.tokens = 0  # of all shards, buffered ones included
        self.entries: list[dict[str, Any]] = []
        self._ids: list[np.ndarray] = []
        self._mask: list[np.ndarray] = []
        self._buffered = 0  # tokens in _ids
        self._file: FileIO | None = None
        self._mask_file: FileIO | None = None

    def append(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """ids: int64 (n,). mask: bool (n,), True where the token counts as a target; None means all.

        Raises UserError on an id outside the vocabulary, at the latest in `close`.
        """
        self._ids.append(ids)
        if self.masked:
            self._mask.append(np.ones(len(ids), dtype=bool) if mask is None else mask)
        self.tokens += len(ids)
        self._buffered += len(ids)
        if self._buffered >= BUFFER:
            self._flush(final=False)

    def close(self) -> list[dict[str, Any]]:
        """Writes the remaining tokens and returns the shards' entries for dataset.json."""
        self._flush(final=True)
        self._finish_shard()
        return self.entries

    def abort(self) -> None:
        """Closes the files without finishing them; the caller deletes the folder."""
        for file in (self._file, self._mask_file):
            if file:
                file.close()

    def _flush(self, final: bool) -> None:
        if not self._ids:
            return
        ids = np.concatenate(self._ids)
        mask = np.concatenate(self._mask) if self.masked else None
        start = 0
        while start < len(ids):
            written = self.entries[-1]["tokens"] if self._file else 0
            count = min(len(ids) - start, self.shard_tokens - written)
            if not final and written + count < self.shard_tokens:
                count -= count % 8  # so that the mask is written in whole bytes
                if count == 0:
                    break
            self._write(ids[start : start + count], None if mask is None else mask[start : start + count])
            start += count
            if self.entries[-1]["tokens"] == self.shard_tokens:
                self._finish_shard()
        self._ids, self._buffered = [ids[start:]], len(ids) - start
        self._mask = [] if mask is None else [mask[start:]]

    def _write(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        vocab_size = len(self.byte_lengths)
        invalid = ids[(ids < 0) | (ids >= vocab_size)]
        if len(invalid):
            raise UserError(f"token id {invalid[0]} is outside the vocabulary of {vocab_size} ids; it was not written")
        if self._file is None:
            name = f"{self.split}_{len(self.entries):06d}"
            self._file = (self.folder / f"{name}.bin").open("xb", buffering=0)
            _write_all(self._file, bytes(HEADER_BYTES))
            self.entries.append({"file": f"{name}.bin", "tokens": 0, "documents": 0, "bytes": 0, "crc32": 0})
            if self.masked:
                self._mask_file = (self.folder / f"{name}.mask").open("xb", buffering=0)
                self.entries[-1]["mask_crc32"] = 0
        entry = self.entries[-1]
        data = ids.astype("<u2" if self.dtype == "uint16" else "<u4").tobytes()
        _write_all(self._file, data)
        if len(self.entries) == 1 and entry["tokens"] == 0 and ids[0] == self.eos_id:
            entry["documents"] = -1  # documents are counted by EOS, and the EOS before the first document ends none
        entry["tokens"] += len(ids)
        entry["documents"] += int(np.count_nonzero(ids == self.eos_id))
        entry["bytes"] += int(self.byte_lengths[ids].sum())
        entry["crc32"] = zlib.crc32(data, entry["crc32"])
        if self._mask_file and mask is not None:
            bits = np.packbits(mask, bitorder="little").tobytes()
            _write_all(self._mask_file, bits)
            entry["mask_crc32"] = zlib.crc32(bits, entry["mask_crc32"])

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        _write_all(self._file, header(self.dtype, self.entries[-1]["tokens"]))
        for file in (self._file, self._mask_file):
            if file:
                os.fsync(file.fileno())
                file.close()
        self._file = self._mask_file = None


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def write_dataset(
    folder: Path, tokenizer: Tokenizer, shards: dict[str, list[dict[str, Any]]], metadata: dict[str, Any]
) -> None:
    """Writes dataset.json, the last file of a dataset. `metadata`: source, options, split rule and request."""
    meta = {
        "format": FORMAT,
        "version": VERSION,
        **metadata,
        "dtype": dtype_for(tokenizer.vocab_size),
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.content_hash,
        "shards": shards,
    }
    meta["fingerprint"] = fingerprint(meta, tokenizer)
    text = json.dumps(signed(meta), ensure_ascii=False, indent=1)
    # the tokenizer, which is long, goes on one line
    text = text[:-2] + ',\n "tokenizer": ' + json.dumps(tokenizer.to_dict(), ensure_ascii=False) + "\n}\n"
    # lone surrogates, from file names that are not UTF-8, become JSON's escapes
    with (folder / "dataset.json").open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(folder)
