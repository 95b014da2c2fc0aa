"""The check of a split's contents: the crc32 of every shard and mask, and that every id is in the vocabulary.

A small split is checked before its first read. A larger one is read by a thread, in the background of the training,
because checksums of 20 GB take half a minute or more; whatever it finds is raised by the next read. Until then every
read checks its own ids, so an id outside the vocabulary never reaches a model.
"""

import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from errors import UserError
from prepare_data.shard_format import PREPARE_AGAIN, Shard, check_ids

BLOCK = 1 << 22  # bytes per read
MAX_AT_ONCE = 1 << 27  # bytes of a split that is checked before its first read: about 0.2 seconds
PAUSE = 3  # the thread rests three times as long as it works: a quarter of one core at most


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
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while size:
                    start = time.perf_counter()
                    data = file.read(min(BLOCK, size))
                    if len(data) < min(BLOCK, size):
                        raise UserError(f"{path}: is too short: truncated while in use; {PREPARE_AGAIN}")
                    yield data
                    size -= len(data)
                    if self.in_background:
                        time.sleep(PAUSE * (time.perf_counter() - start))
        except OSError as error:
            raise UserError(f"{path}: can no longer be read ({error.strerror}); {PREPARE_AGAIN}") from None


def _compare(path: Path, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise UserError(f"{path}: damaged: its crc32 is {found:08x}, dataset.json says {expected:08x}; {PREPARE_AGAIN}")
