"""The token shards of other programs, as their loaders expect them: file names, headers, where documents begin or end.

foreign.py reads them. Knows no folders: the caller makes and renames them. Entry points: `TARGETS`, `files_for`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from files import write_parts
from prepare_data.shard_format import header
from prepare_data.shards import Split

BLOCK = 1 << 20  # ids that are read and written at a time
FIRST = {"train": 1, "val": 0}  # number of the first file of a split, where files are numbered


@dataclass(frozen=True)
class Target:
    """How a program's files are named and begin. eos_first: its documents begin with EOS; otherwise they end with it.

    rows: ids of its own model, for which it has no flag. setting: where its source says so.
    """

    program: str
    dtype: str
    pattern: str  # of file names, with {split}, and with {number} where a split has several files
    header: Callable[[int], bytes]  # number of ids → what comes before them
    eos_first: bool
    rows: int
    setting: str

    @property
    def is_numbered(self) -> bool:
        return "{number" in self.pattern

    def is_file(self, name: str) -> bool:
        """Whether a file of this name is one that this target writes."""
        return bool(re.fullmatch(self.pattern.replace(".", r"\.").format(split="(train|val)", number=r"\d{6}"), name))


def _numpy_header(tokens: int) -> bytes:
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return file.getvalue()


_SHARD = "fineweb_{split}_{number}.bin"
TARGETS = {
    "nanogpt": Target(
        "nanoGPT", "uint16", "{split}.bin", lambda tokens: b"", False, 50_304, "meta_vocab_size in its train.py"
    ),
    "llmc": Target(
        "llm.c", "uint16", _SHARD, partial(header, "uint16"), True, 50_257, "vocab_size in its train_gpt2.cu"
    ),
    "llmc-uint32": Target(
        "llm.c", "uint32", _SHARD, partial(header, "uint32"), True, 128_256, "vocab_size in its train_llama3.py"
    ),
    "modded-nanogpt": Target(
        "modded-nanogpt", "uint16", _SHARD, partial(header, "uint16"), True, 50_257,
        "vocab_size, and BOS_ID where there is one, in its train_gpt.py",
    ),
    "build-nanogpt": Target(
        "build-nanogpt", "uint16", "edufineweb_{split}_{number}.npy", _numpy_header, True, 50_304,
        "vocab_size in its train_gpt2.py",
    ),
}  # fmt: skip
"""--to → what is written."""


@dataclass(frozen=True)
class Ids:
    """The ids of a split, with an EOS added at either end (1), its own one dropped there (-1), or as they are (0)."""

    split: Split
    eos_id: int
    front: int = 0
    back: int = 0

    def __len__(self) -> int:
        return len(self.split) + self.front + self.back

    def blocks(self, start: int, count: int) -> Iterator[np.ndarray]:
        """The ids [start, start + count), int64, block by block."""
        end = start + count
        for begin in range(start, end, BLOCK):
            yield self._read(begin, min(end, begin + BLOCK))

    def _read(self, begin: int, end: int) -> np.ndarray:
        begin, end = begin - self.front, end - self.front  # places in the split
        first, last = max(begin, 0), min(end, len(self.split))
        ids = self.split.read(first, last - first) if last > first else np.empty(0, np.int64)
        return np.pad(ids, (first - begin, end - last), constant_values=self.eos_id)


@dataclass(frozen=True)
class ForeignFile:
    """A file to be written, or compared with one that exists: `tokens` ids of a split, from `start` on."""

    name: str
    target: Target
    ids: Ids
    start: int
    tokens: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.target.header(self.tokens)) + self.tokens * np.dtype(self.target.dtype).itemsize

    def write(self, folder: Path, update: Callable[[int], object]) -> None:
        """update: called with the number of bytes of each block. Raises OSError."""
        write_parts(folder / self.name, self._parts(update))

    def is_in(self, folder: Path, update: Callable[[int], object]) -> bool:
        """Whether a folder has this very file."""
        path = folder / self.name
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return all(file.read(len(part)) == part for part in self._parts(update))

    def _parts(self, update: Callable[[int], object]) -> Iterator[bytes]:
        yield self.target.header(self.tokens)
        dtype = np.dtype(self.target.dtype).newbyteorder("<")
        for block in self.ids.blocks(self.start, self.tokens):
            data = block.astype(dtype).tobytes()
            yield data
            update(len(data))


def files_for(target: Target, splits: Mapping[str, Ids], shard_tokens: int) -> list[ForeignFile]:
    """The files of a dataset, in order. Those of a split are equally long, give or take one id: llm.c refuses a file
    with less than a batch, and others skip the end of each file, so a short one at the end would be lost."""
    files = []
    for split, ids in splits.items():
        count = -(-len(ids) // shard_tokens) if target.is_numbered else 1
        ends = [len(ids) * i // count for i in range(count + 1)]
        for i in range(count):
            name = target.pattern.format(split=split, number=f"{FIRST[split] + i:06d}")
            files.append(ForeignFile(name, target, ids, ends[i], ends[i + 1] - ends[i]))
    return files
