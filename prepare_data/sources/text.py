"""Text of the user's own: a file, a folder, a glob, or standard input.

A folder gives every file below it in the order of their paths, except those whose name, or whose folder's name, begins with a dot. Each
file is a document, or several with a separator. Newlines stay as they are, a byte order mark goes. What is no text stops the preparation.
"""

import codecs
import glob
import gzip
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from errors import UserError
from prepare_data.sources import Corpus, Piece, documents

CHUNK = 1 << 20  # bytes read at a time


def corpus(source: str, encoding: str = "utf-8", separator: str | None = None) -> Corpus:
    """The text at `source`: a path, a glob, or - for standard input, which is copied to a temporary file since it is read several times."""
    try:
        " ".encode(encoding)
    except (LookupError, UnicodeError):
        raise UserError(
            f"--encoding={encoding}: Python knows no such encoding; try utf-8, gb18030, utf-16 or latin-1"
        ) from None
    if source == "-":
        spool = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the corpus
        shutil.copyfileobj(sys.stdin.buffer, spool)
        return Corpus("stdin", "standard input", lambda: _read(spool, "standard input", encoding, separator))
    paths = find_files(source)
    if not paths:
        raise UserError(
            f"--input={source}: no such file or folder, and no file fits it as a glob; check the path from {Path.cwd()}"
        )

    def pieces() -> Iterator[Piece]:
        for path in paths:
            try:
                with path.open("rb") as file:
                    yield from _read(file, str(path), encoding, separator)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror or error}); leave it out with a glob, as in {_glob(path)}"
                ) from None

    return Corpus(_name(Path(source)), source, pieces)


def _name(path: Path) -> str:
    """What a dataset of this path is called: a file's name without its ending, a folder's, of a glob the folder it looks in."""
    if path.is_dir():
        return path.resolve().name or "text"
    if path.is_file():
        return Path(path.name.removesuffix(".gz")).stem
    return next((parent.resolve().name for parent in path.parents if parent.is_dir()), "") or "text"


def find_files(source: str) -> list[Path]:
    """The files that `source` names; none where it names nothing."""
    path = Path(source)
    if path.is_dir():
        found = []
        for folder, names, files in os.walk(path):
            names[:] = sorted(name for name in names if not name.startswith("."))
            found += [Path(folder, name) for name in files if not name.startswith(".") and Path(folder, name).is_file()]
        if not found:
            raise UserError(
                f"{path}: the folder holds no files (names that begin with a dot are passed over); expected text files"
            )
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if path.exists():
        return [path]
    return sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())


def _read(file: IO[bytes], name: str, encoding: str, separator: str | None) -> Iterator[Piece]:
    file.seek(0)
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not packed:
        yield from documents(_decode(file, name, encoding), separator)
        return
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from documents(_decode(unpacked, name, encoding), separator)  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: damaged gzip file ({error}); fetch it again, or unpack it by hand") from None


def _decode(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """The text of a file, a chunk at a time; strict: what does not decode, and what is binary, is an error with its place."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    position = 0  # of the next chunk in the file
    while True:
        data = file.read(CHUNK)
        held = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(
                _undecodable(data, name, encoding, position - held + error.start, first=position == 0)
            ) from None
        except UnicodeError as error:  # a missing byte order mark
            raise UserError(
                f"{name}: {error}; name the byte order: --encoding=utf-16-le or utf-16-be (utf-32 likewise)"
            ) from None
        if "\0" in text:
            raise UserError(f"{name}: holds NUL characters, so it is a binary file{_way_out(name)}")
        if position == 0:
            text = text.removeprefix("\ufeff")
        if text:
            yield text
        if not data:
            return
        position += len(data)


def _undecodable(data: bytes, name: str, encoding: str, offset: int, first: bool) -> str:
    if first and data[:2] in (b"\xff\xfe", b"\xfe\xff") and "16" not in encoding:
        return f"{name}: begins with the mark of UTF-16 text (byte offset 0); try --encoding=utf-16"
    if b"\0" in data:
        return (
            f"{name}: is a binary file (not {encoding} at byte offset {offset}, and it holds NUL bytes){_way_out(name)}"
        )
    others = [other for other in ("gb18030", "latin-1", "utf-8") if codecs.lookup(other) != codecs.lookup(encoding)]
    return f"{name}: not {encoding} text at byte offset {offset}; try --encoding={others[0]} (or {others[1]}), whichever it was written in"


def _way_out(name: str) -> str:
    return f"; expected text: leave it out by a glob, such as --input='{_glob(Path(name))}'"


def _glob(path: Path) -> str:
    return str(path.parent / "**" / "*.txt")
