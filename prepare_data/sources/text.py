"""The user's own text: a file, a folder, a glob, or standard input.

A folder means all files below it, sorted by path, except hidden files and folders (names that begin with a dot). Each
file is one document, or several with a separator. Newlines are kept, a byte order mark is removed, gzip files are
decompressed. A file that does not decode, or is binary, is an error: nothing is skipped or replaced silently.
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
    """The text of a path, a glob, or - for standard input. Raises UserError, also while its pieces are read."""
    try:
        " ".encode(encoding)
    except (LookupError, UnicodeError):
        raise UserError(
            f"--encoding={encoding}: not a text encoding of Python; try utf-8, gb18030, utf-16 or latin-1"
        ) from None
    if source == "-":
        spool = tempfile.TemporaryFile()  # noqa: SIM115  the corpus reads it several times
        shutil.copyfileobj(sys.stdin.buffer, spool)
        return Corpus("stdin", "standard input", lambda: _read(spool, "standard input", encoding, separator))
    paths = find_files(source)
    if not paths:
        raise UserError(
            f"--input={source}: no such file or folder, and no match for it as a glob; check the path from {Path.cwd()}"
        )

    def pieces() -> Iterator[Piece]:
        for path in paths:
            try:
                with path.open("rb") as file:
                    yield from _read(file, str(path), encoding, separator)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror or error}); exclude it with a glob: '{_glob(path)}'"
                ) from None

    return Corpus(_name(Path(source)), source, pieces)


def _name(path: Path) -> str:
    """Default dataset name: a file's name without extension, a folder's name; for a glob, the folder it searches."""
    if path.is_dir():
        return path.resolve().name or "text"
    if path.is_file():
        return Path(path.name.removesuffix(".gz")).stem
    return next((parent.resolve().name for parent in path.parents if parent.is_dir()), "") or "text"


def find_files(source: str) -> list[Path]:
    """The files of a path or glob; [] if nothing matches. Raises UserError for a folder without files."""
    path = Path(source)
    if path.is_dir():
        found = []
        for folder, names, files in os.walk(path):
            names[:] = sorted(name for name in names if not name.startswith("."))
            found += [Path(folder, name) for name in files if not name.startswith(".") and Path(folder, name).is_file()]
        if not found:
            raise UserError(f"{path}: the folder contains no files (hidden ones are skipped); expected text files")
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if path.exists():
        return [path]
    return sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())


def _read(file: IO[bytes], name: str, encoding: str, separator: str | None) -> Iterator[Piece]:
    file.seek(0)
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not is_gzip:
        yield from documents(_decode(file, name, encoding), separator)
        return
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from documents(_decode(unpacked, name, encoding), separator)  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: damaged gzip file ({error}); download it again, or decompress it first") from None


def _decode(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """The text of a file in chunks. Raises UserError with the byte offset where it does not decode or is binary."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    position = 0  # byte offset of the next chunk
    while True:
        data = file.read(CHUNK)
        buffered = len(decoder.getstate()[0])  # bytes of a character that began in the previous chunk
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = position - buffered + error.start
            raise UserError(_decode_error(data, name, encoding, offset, first=position == 0)) from None
        except UnicodeError as error:  # a missing byte order mark
            raise UserError(
                f"{name}: {error}; give the byte order: --encoding=utf-16-le or utf-16-be (or utf-32-le, utf-32-be)"
            ) from None
        if "\0" in text:
            raise UserError(f"{name}: contains NUL characters, so it is a binary file{_exclude_hint(name)}")
        if position == 0:
            text = text.removeprefix("\ufeff")
        if text:
            yield text
        if not data:
            return
        position += len(data)


def _decode_error(data: bytes, name: str, encoding: str, offset: int, first: bool) -> str:
    if first and data[:2] in (b"\xff\xfe", b"\xfe\xff") and "16" not in encoding:
        return f"{name}: begins with a UTF-16 byte order mark (byte offset 0); try --encoding=utf-16"
    if b"\0" in data:
        found = f"not {encoding} at byte offset {offset}, and it contains NUL bytes"
        return f"{name}: is a binary file ({found}){_exclude_hint(name)}"
    others = [other for other in ("gb18030", "latin-1", "utf-8") if codecs.lookup(other) != codecs.lookup(encoding)]
    return f"{name}: not {encoding} text at byte offset {offset}; try --encoding={others[0]} or --encoding={others[1]}"


def _exclude_hint(name: str) -> str:
    return f"; expected text: exclude it with a glob, such as --input='{_glob(Path(name))}'"


def _glob(path: Path) -> str:
    return str(path.parent / "**" / "*.txt")
