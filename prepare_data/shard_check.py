"""The check of a split's contents: the crc32 of every shard and mask, and that every id is in the vocabulary.

A small split is checked before its first read. A larger one is read by a thread, in the background of the training,
because checksums of 20 GB take half a minute or more; whatever it finds is raised by the next read. Until then every
read checks its own ids, so an id outside the vocabulary never reaches a model.
"""

import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import TypeVar

import numpy as np

from errors import UserError
from prepare_data.shard_format import PREPARE_AGAIN, Shard, check_ids

BLOCK = 1 << 22  # bytes per read
MAX_AT_ONCE = 1 << 27  # bytes of a split that is checked before its first read: about 0.2 seconds
PAUSES = (0.1, 0.5, 2.0)  # seconds before a file that could not be read is tried again
PAUSE = 3  # the thread rests three times as long as it works: a quarter of one core at most
T = TypeVar("T")


class LostShard(UserError):
    """A file of a dataset can no longer be read."""


def patiently(path: Path, read: Callable[[], T]) -> T:
    """The result of `read`, which is called again after PAUSES where it raises OSError. Raises LostShard."""
    for seconds in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            problem = error.strerror or str(error)
        if seconds is not None:
            print(f"{path}: cannot be read ({problem}); trying again", file=sys.stderr, flush=True)
            time.sleep(seconds)
    raise LostShard(f"{path}: can no longer be read ({problem}); {PREPARE_AGAIN}")


class ContentCheck:
    """Call it before each read. Raises UserError on damage that has been found. Thread-safe."""

    def __init__(self, shards: Sequence[Shard], vocab_size: int) -> None:
        self.shards, self.vocab_size = shards, vocab_size
        self.bytes = sum(shard.tokens * shard.dtype.itemsize for shard in shards)
        self.in_background = self.bytes > MAX_AT_ONCE
        self.is_complete = False
        self._found: UserError | None = None
        self._is_started = False
        self._lock = threading.Lock()

    def __call__(self) -> None:
        if not self._is_started:
            with self._lock:
                if not self._is_started:
                    if self.in_background:
                        threading.Thread(target=self._run, name="shard check", daemon=True).start()
                    else:
                        self._run()
                    self._is_started = True
        if self._found is not None:
            raise self._found

    def complete(self) -> None:
        """Checks everything now, in this thread: for what reads the split once, from its beginning to its end."""
        with self._lock:
            self.in_background = False
            if not self.is_complete:
                self._run()
            self._is_started = True
        self()

    def _run(self) -> None:
        try:
            for shard in self.shards:
                self._check(shard)
            self.is_complete = True
        except UserError as error:
            self._found = error

    def _check(self, shard: Shard) -> None:
        crc = 0
        for data in self._blocks(shard.path, shard.offset, shard.tokens * shard.dtype.itemsize):
            crc = zlib.crc32(data, crc)
            check_ids(shard, np.frombuffer(data, shard.dtype), self.vocab_size)
        _compare(shard.path, crc, shard.crc32)
        if shard.mask_crc32 is not None:
            crc = 0
            for data in self._blocks(shard.mask_path, 0, (shard.tokens + 7) // 8):
                crc = zlib.crc32(data, crc)
            _compare(shard.mask_path, crc, shard.mask_crc32)

    def _blocks(self, path: Path, offset: int, size: int) -> Iterator[bytes]:
        with patiently(path, lambda: path.open("rb", buffering=0)) as file:
            while size:
                start = time.perf_counter()
                data = patiently(path, lambda: _read_at(file, offset, min(BLOCK, size)))  # noqa: B023 - called here
                if len(data) < min(BLOCK, size):
                    raise UserError(f"{path}: is too short: truncated while in use; {PREPARE_AGAIN}")
                yield data
                offset, size = offset + len(data), size - len(data)
                if self.in_background:
                    time.sleep(PAUSE * (time.perf_counter() - start))


def _read_at(file: FileIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _compare(path: Path, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise UserError(f"{path}: damaged: its crc32 is {found:08x}, dataset.json says {expected:08x}; {PREPARE_AGAIN}")
