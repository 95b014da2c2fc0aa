"""The user's own text: a file, a folder, a glob, a pipe, or standard input.

Each file is one document, or several with a separator. Newlines are kept, a byte order mark is removed, gzip files are
decompressed. listing.py chooses the files; what it leaves out is noted. A chosen file that is not text, or not in the
encoding, is an error (refusal.py): nothing is replaced silently.
"""

import codecs
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError
from prepare_data.sources import Corpus, Piece, documents
from prepare_data.sources.encodings import Encoding, NotDecodable, check_encoding, decode, detect
from prepare_data.sources.kinds import HEAD, kind_of
from prepare_data.sources.listing import first_three, list_files, readable
from prepare_data.sources.pipes import STANDARD_INPUT, name_of_pipe, spooled
from prepare_data.sources.refusal import refusal
from prepare_data.sources.text_file import TextFile


def corpus(
    source: str, encoding: str = "utf-8", separator: str | None = None, exclude: Sequence[str] = (),
    follow_links: bool = False,
) -> Corpus:  # fmt: skip
    """The text of a path, a glob, or - for standard input. Raises UserError, also while its pieces are read."""
    text = open_text(source, encoding, separator, exclude, follow_links)
    return Corpus(name_of(source) or "text", name_of_pipe(source) or readable(source), text.pieces, text.notes)


def open_text(
    source: str, encoding: str = "utf-8", separator: str | None = None, exclude: Sequence[str] = (),
    follow_links: bool = False,
) -> "TextFiles":  # fmt: skip
    """The files of a path, a glob, or - for standard input. Raises UserError, also while their pieces are read."""
    check_encoding(encoding)
    skipped = list[str]()
    if pipe := name_of_pipe(source):
        files = [TextFile(pipe, None, spooled(source))]
    else:
        listing = list_files(source, exclude, follow_links)
        skipped = listing.notes()
        if not listing.files:
            raise UserError(_nothing(source, skipped))
        single = os.path.isfile(source)
        files = [
            TextFile(readable(path), None if single else path.relative_to(listing.base).as_posix(), path)
            for path in listing.files
        ]
    return TextFiles(files, encoding, separator, skipped)


def exists(source: str) -> bool:
    """Whether a source names something that `corpus` can read or explain: a file, a folder, a pipe, a glob's match."""
    if name_of_pipe(source) or os.path.exists(source):
        return True
    listing = list_files(source)
    return bool(listing.files or listing.skipped)


def name_of(source: str) -> str | None:
    """The name for a dataset of this source: a file's name without extension, a folder's name, for a glob the folder
    that it searches. None where there is no name: standard input, and a shell's <(command)."""
    if source in STANDARD_INPUT or re.match(r"/dev/fd/|/proc/", source):
        return None
    path = Path(source)
    if os.path.isdir(source):
        name = path.resolve().name
    elif os.path.exists(source):
        name = Path(path.name.removesuffix(".gz")).stem
    else:
        name = next((parent.resolve().name for parent in path.parents if os.path.isdir(parent)), "")
    data = os.fsencode(name)
    try:
        return data.decode() or None
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _nothing(source: str, skipped: list[str]) -> str:
    if skipped:
        return "\n  ".join([f"{readable(source)}: contains no text files", *skipped])
    if os.path.isdir(source):
        return f"{readable(source)}: the folder contains no files; expected text files"
    try:
        os.stat(source)
    except PermissionError as error:
        return f"{readable(source)}: cannot be read ({error.strerror})"
    except OSError:
        pass
    return (
        f"{readable(source)}: no such file or folder, and no match for it as a glob; check the path from {Path.cwd()}"
    )


@dataclass
class TextFiles:
    """The files of a source, and what was found about them when they were read: notes, filled in by a whole pass."""

    files: list[TextFile]
    encoding: str
    separator: str | None
    skipped: list[str]
    notes: list[str] = field(default_factory=list)
    encodings: dict[str, Encoding] = field(default_factory=dict)
    """What a file was found to be in, by its name; with --encoding=auto, what it is read in."""

    def pieces(self) -> Iterator[Piece]:
        return ((piece, ends) for _, piece, ends in self.pieces_by_file())

    def pieces_by_file(self) -> Iterator[tuple[int, str, bool]]:
        """The pieces, each after the number of its file. Can be called repeatedly with the same result."""
        auto = self.encoding == "auto"
        odd: dict[str, dict[str, None]] = {}  # what is unusual, with the files where it is
        blank: list[str] = []
        for number, file in enumerate(self.files):
            with file.opened() as data:
                if kind_of(data.read(HEAD)):
                    raise UserError(refusal(self.files, self.encoding))
                if auto and file.name not in self.encodings:
                    found = detect(data)
                    if found is None:
                        raise UserError(refusal(self.files, self.encoding))
                    self.encodings[file.name] = found
                data.seek(0)
                encoding = self.encodings.get(file.name, Encoding(self.encoding))
                texts = self._checked(decode(data, encoding, lenient=auto), file, odd)
                is_blank = True
                try:
                    for piece, ends in documents(texts, self.separator):
                        is_blank = False
                        yield number, piece, ends
                except NotDecodable:
                    raise UserError(refusal(self.files, self.encoding)) from None
                if is_blank:
                    blank.append(file.name)
        skipped = [*self.skipped, *([f"skipped files of nothing but white space: {first_three(blank)}"] * bool(blank))]
        self.notes[:] = [*skipped, *self._readings(), *map(_odd, odd, odd.values())]

    def _checked(self, texts: Iterator[str], file: TextFile, odd: dict[str, dict[str, None]]) -> Iterator[str]:
        """Passes the texts on, and notes signs that --encoding names another encoding than the file's."""
        first = True
        for text in texts:
            if self.encoding in ("utf-8", "ascii") and "\x1b$B" in text:
                odd.setdefault(f"that look like iso2022_jp, but are read as {self.encoding}", {})[file.name] = None
            if self.encoding != "auto" and not text.isascii():
                if first and _is_utf8(text, self.encoding):
                    odd.setdefault(f"valid UTF-8, but read as {self.encoding}", {})[file.name] = None
                if codecs.lookup(self.encoding).name.startswith("iso8859") and re.search("[\x80-\x9f]", text):
                    odd.setdefault(f"with control characters when read as {self.encoding}", {})[file.name] = None
            first = False
            yield text

    def _readings(self) -> list[str]:
        """With --encoding=auto: how many files were read as what, and what is not complete."""
        if not self.encodings:
            return []
        by_name: dict[str, list[str]] = {}
        for name, found in self.encodings.items():
            by_name.setdefault(found.name, []).append(name)
        counts = [
            f"{name} {first_three(names)}" for name, names in sorted(by_name.items(), key=lambda pair: -len(pair[1]))
        ]
        lines = [f"files read by --encoding=auto as {', '.join(counts)}"]
        for name, found in self.encodings.items():
            if found.stray:
                lines.append(f"{name}: bytes that are not UTF-8 were read as cp1252: {found.stray:,}")
            if found.cut_short:
                lines.append(f"{name}: ends in the middle of a character, which was left out")
        return lines[:10] + [f"{len(lines) - 10:,} more such files"] * (len(lines) > 10)


def _odd(what: str, names: Collection[str]) -> str:
    return f"files {what} (try --encoding=auto): {first_three(names)}"


def _is_utf8(text: str, encoding: str) -> bool:
    """Whether the bytes of a text that was read in another encoding are UTF-8; it may end within a character."""
    if codecs.lookup(encoding).name.startswith("utf"):
        return False
    try:
        return bool(codecs.getincrementaldecoder("utf-8")().decode(text.encode(encoding)))
    except UnicodeError:
        return False
