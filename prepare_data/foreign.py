"""Folders of token shards that other programs wrote, without a dataset.json: llm.c's and modded-nanogpt's shards with a
header, nanoGPT's headerless `train.bin` and `val.bin`, and shards that np.save wrote (build-nanogpt).

A file belongs to the split that a whole word of its name, or of its subfolder's, says: medieval_train_000001.bin is
train, since words end where letters do. Nothing is unpickled. Entry points: `is_foreign`, `describe_foreign`.
"""

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import Tokenizer, named_tokenizer
from errors import UserError, quote
from prepare_data.folders import safe_name
from prepare_data.shard_format import HEADER_BYTES, SPLITS, Shard, check_ids, has_magic, read_header

WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "dev": {"dev", "eval"},  # val where there is no other
    "test": {"test", "testing"},  # left out
}
NUMPY = b"\x93NUMPY"
END = 1 << 20  # bytes at each end of a file that are read when it is opened


def is_foreign(folder: Path) -> bool:
    """Whether a folder looks like shards of another program; `describe_foreign` may still raise."""
    words = _split_words(folder)
    found = set().union(*words.values())
    both = "train" in found and bool(found & {"val", "dev"})  # training_args.bin alone is no shard
    return both or any(path.name == "train.bin" or has_magic(path) for path in words)


def describe_foreign(folder: Path, tokenizer_name: str | None) -> tuple[dict[str, Any], Tokenizer]:
    """Metadata like that of a dataset.json, and the tokenizer. meta["notes"]: for the user. Raises UserError."""
    found, notes = _files_of_splits(folder)
    pickle = folder / "meta.pkl"
    if pickle.is_file() and not Path(tokenizer_name or "").is_file():
        text = folder / "input.txt"
        source = quote(str(text)) if text.is_file() else "FILE"
        name = safe_name(f"{folder.resolve().name}_again")
        raise UserError(
            f"{folder}: its meta.pkl says that the ids are nanoGPT's character ids, and Sprout reads no pickle files."
            f" Prepare the text again, which gives the same ids: python -m prepare_data text --input={source}"
            f" --name={quote(name)} --tokenizer=char --split=tail"
            " (or pass the file of a tokenizer that has these ids: --tokenizer=FILE)"
        )
    if tokenizer_name in (None, "bpe", "char"):
        raise UserError(
            f"{folder}: has no dataset.json, so its tokenizer is unknown: pass --tokenizer=gpt2, for example,"
            " or a tokenizer's file"
        )
    tokenizer = named_tokenizer(str(tokenizer_name))
    dtypes, shards = set(), {}
    for split, paths in found.items():
        shards[split] = [_describe_shard(path, folder, tokenizer) for path in paths]
        dtypes |= {entry.pop("dtype") for entry in shards[split]}
    if len(dtypes) > 1:
        raise UserError(f"{folder}: some of the files hold uint16 ids, others uint32; expected one dtype")
    dtype = dtypes.pop()
    if dtype == "uint16" and tokenizer.vocab_size > 65_536:
        raise UserError(
            f"{folder}: uint16 is too small for the {tokenizer.vocab_size} ids of {tokenizer.name}; pass the tokenizer"
            " that these files were made with (--tokenizer=…)"
        )
    if dtype == "uint32" and shards["train"][0]["offset"] == 0:
        notes.append(f"{found['train'][0].name} has no header; its ids are read as uint32, by their values")
    notes += _doubts(_first_ids(found["train"][0], shards["train"][0], dtype), tokenizer)
    meta = {"dtype": dtype, "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size, "shards": shards}
    return meta | {"source": {"name": "shards without dataset.json", "folder": folder.name}, "notes": notes}, tokenizer


def _split_words(folder: Path) -> dict[Path, set[str]]:
    """The .bin files of a folder, or else its .npy files, sorted, each with the splits that words of its name say.

    Files of a subfolder count where its own name says a split.
    """
    subfolders = [path for path in folder.glob("[!.]*") if _splits_in(path.name) and path.is_dir()]
    parents = (folder, *subfolders)
    files = [path for parent in parents for path in parent.glob("[!.]*.bin")]
    files = files or [path for parent in parents for path in parent.glob("[!.]*.npy")]
    return {
        path: _splits_in(path.relative_to(folder).with_suffix("").as_posix())
        for path in sorted(files)
        if path.is_file()
    }


def _splits_in(name: str) -> set[str]:
    words = set(re.findall(r"[^\W\d_]+", name.lower()))
    return {split for split, known in WORDS.items() if words & known}


def _files_of_splits(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of train and val, and notes on what is left out. Raises UserError where a name does not decide."""
    words = _split_words(folder)
    unclear = {path: splits for path, splits in words.items() if len(splits) != 1}
    if unclear:
        shown = [
            f"{path.relative_to(folder)} ({' and '.join(sorted(splits)) or 'neither'})"
            for path, splits in list(unclear.items())[:3]
        ]
        first = next(iter(unclear))
        more = f" and {len(unclear) - 3:,} more" if len(unclear) > 3 else ""
        raise UserError(
            f"{folder}: files that are not clearly train or val: {', '.join(shown)}{more}. A whole word of a name"
            f" says the split: train, or val (valid, validation, dev, eval). Rename them, {first.name} to"
            f" train_{_number(first)}.bin or val_{_number(first)}.bin for example, or move them elsewhere"
        )
    found = {split: [path for path, splits in words.items() if split in splits] for split in WORDS}
    if not found["val"]:
        found["val"], found["dev"] = found["dev"], []
    for split in SPLITS:
        if not found[split]:
            raise UserError(
                f"{folder}: not a dataset: neither a dataset.json nor a file like {split}.bin or {split}_000000.bin"
            )
    left_out = [path.relative_to(folder).as_posix() for path in found.pop("dev") + found.pop("test")]
    names = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else "")
    return found, [f"left out, neither train nor val: {names}"] if left_out else []


def _first_ids(path: Path, entry: dict[str, Any], dtype: str) -> np.ndarray:
    return np.fromfile(path, np.dtype(dtype).newbyteorder("<"), min(END, entry["tokens"]), offset=entry["offset"])


def _doubts(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Notes where ids are in the vocabulary but do not look like the tokenizer's."""
    if len(ids) < 1000:
        return []
    if ids.max() < tokenizer.vocab_size // 10:
        found = f"the largest of the first ids is {ids.max()} of {tokenizer.vocab_size:,}"
    elif tokenizer.name == "bytes" and np.mean((ids < 32) & ~np.isin(ids, [9, 10, 13])) > 0.1:
        found = "many of the first ids are control characters as bytes"
    else:
        return []
    return [f"{found}: is {tokenizer.name} the tokenizer that these files were made with?"]


def _number(path: Path) -> str:
    digits = re.findall(r"\d+", path.stem)
    return digits[-1] if digits else "000000"


def _describe_shard(path: Path, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entry of one file. Its ends are read: for the fingerprint, and to find wrong ids before the training does."""
    size = path.stat().st_size
    with path.open("rb") as file:  # a checksum of the whole of a large file takes longer than a hundred steps
        head = file.read(END)
        file.seek(max(0, size - END))
        tail = file.read(END)
    if head.startswith(NUMPY):
        dtype, offset, tokens = _numpy_header(path, size)
    elif not has_magic(path) and not re.search(r"\d", path.stem):
        dtype, offset = _headerless_dtype(path, head, size, tokenizer.vocab_size), 0
        tokens = size // np.dtype(dtype).itemsize
    elif not has_magic(path):
        raise UserError(
            f"{path}: not a token shard: it has no header of llm.c's shards; if it holds ids without a header,"
            " rename it to train.bin or val.bin"
        )
    else:
        dtype, tokens = read_header(path)
        offset = HEADER_BYTES
    shard = Shard(path, offset, np.dtype(dtype).newbyteorder("<"), tokens)
    for data in (head[offset:], tail[max(0, offset + len(tail) - size) :]):
        ids = np.frombuffer(data, shard.dtype, len(data) // shard.dtype.itemsize)
        if ids.max() >= tokenizer.vocab_size > ids.byteswap().max():
            raise UserError(f"{path}: holds big-endian ids; expected little-endian: convert it, for example with numpy")
        check_ids(shard, ids, tokenizer.vocab_size)
    crc = zlib.crc32(tail, zlib.crc32(head))
    name = path.relative_to(folder).as_posix()
    return {"file": name, "offset": offset, "dtype": dtype, "tokens": tokens, "ends_crc32": crc}


def _numpy_header(path: Path, size: int) -> tuple[str, int, int]:
    """(dtype, bytes before the ids, number of ids) of a file that np.save wrote; nothing is unpickled."""
    with path.open("rb") as file:
        try:
            major = np.lib.format.read_magic(file)[0]
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError as error:
            raise UserError(f"{path}: not an array that np.save wrote ({error})") from None
        offset = file.tell()
    name = {2: "uint16", 4: "uint32"}.get(dtype.itemsize)
    if name is None or dtype.kind not in "ui" or dtype != dtype.newbyteorder("<") or len(shape) != 1:
        raise UserError(
            f"{path}: an array of {dtype.str} with shape {shape}; expected one row of little-endian ids of 16 or 32"
            " bits: convert it with numpy"
        )
    if shape[0] < 1 or size != offset + shape[0] * dtype.itemsize:
        raise UserError(f"{path}: the header says {shape[0]} ids of {name}, the file has {size} bytes: damaged")
    return name, offset, shape[0]


def _headerless_dtype(path: Path, head: bytes, size: int, vocab_size: int) -> str:
    """uint16 or uint32, by the values of the file's beginning. Raises UserError for another width."""
    if head.startswith((b"\x1f\x8b\x08", b"PK\3\4")):
        raise UserError(f"{path}: is a gzip file or a zip archive, not ids; unpack it first")
    if size == 0 or size % 2:
        raise UserError(
            f"{path}: {size} bytes cannot be uint16 ids; expected an even number, at least 2: incomplete, or another"
            " kind of file; fetch or make it again"
        )
    words = np.frombuffer(head[: len(head) // 8 * 8], "<u2")
    if len(words) < 32:
        return "uint16"
    low, high = words[0::2], words[1::2]  # if the ids have 32 bits
    if size % 4 == 0 and high.max() <= (vocab_size - 1) >> 16 and low.max() > high.max():
        if size % 8 == 0 and not low[1::2].any():
            raise UserError(
                f"{path}: holds ids of 64 bits; expected uint16 or uint32: convert it, for example with numpy"
            )
        return "uint32"
    values = words.view(np.uint8)
    # the low bytes of larger ids of 16 bits have all values
    if values.max() < 128 and np.count_nonzero(values[1::2]) > len(words) // 2:
        raise UserError(f"{path}: holds text, or ids of 8 bits; expected ids of uint16 or uint32")
    return "uint16"
