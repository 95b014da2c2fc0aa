"""Standard input and pipes: what can be read only once is copied, because a corpus is read several times.

A small text stays in memory; a larger one goes to a temporary file that the system deletes with the process.
"""

import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from errors import UserError
from prepare_data.sources.listing import readable

CHUNK = 1 << 20
IN_MEMORY = 1 << 26  # bytes
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def name_of_pipe(source: str) -> str | None:
    """What a source that can be read only once is called in messages; None for files and folders."""
    if source in STANDARD_INPUT:
        return "standard input"
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError):
        return None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else f"the pipe {readable(source)}"


def spooled(source: str) -> IO[bytes]:
    """The bytes of standard input, a named pipe or a shell's `<(command)`, in a file that can be rewound.

    Raises UserError if it cannot be read, or if the temporary folder is full.
    """
    name = name_of_pipe(source)
    spool: IO[bytes] = io.BytesIO()
    size = 0
    with _opened(source) as file:
        while True:
            try:
                data = file.read(CHUNK)
            except OSError as error:
                raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None
            if not data and not size:
                raise UserError(f"{name}: is empty or closed; pipe a text in, or name a file")
            if not data:
                return spool
            try:
                if isinstance(spool, io.BytesIO) and size + len(data) > IN_MEMORY:
                    data = spool.getvalue() + data
                    spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  the corpus keeps it
                _write(spool, data)
            except OSError as error:
                spool.close()
                raise UserError(_full(name, size, error)) from None
            size = spool.tell()


def _write(file: IO[bytes], data: bytes) -> None:
    remainder = memoryview(data)
    while remainder:  # an unbuffered file may take only a part
        remainder = remainder[file.write(remainder) :]


def _full(name: str | None, size: int, error: OSError) -> str:
    folder = tempfile.gettempdir() if tempfile.tempdir else "the folder of temporary files"
    return (
        f"{folder}: no room for a copy of {name}, after {size:,} bytes ({error.strerror or error}); set TMPDIR to a"
        " folder with more space, or save the text in a file and name that"
    )


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source in STANDARD_INPUT:
        if sys.stdin is None:
            raise UserError("standard input: is closed; pipe a text in, or name a file")
        if sys.stdin.isatty():
            print("reading standard input: type or paste the text, then Ctrl-D (Windows: Ctrl-Z and Enter)")
        yield sys.stdin.buffer
        return
    mode = os.stat(source).st_mode
    if not stat.S_ISFIFO(mode):
        raise UserError(f"{readable(source)}: is a device or a socket; expected a file, a folder or a pipe")
    try:
        with open(source, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{readable(source)}: cannot be read ({error.strerror or error})") from None
