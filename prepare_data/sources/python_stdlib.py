"""The source files of the running interpreter's standard library: a corpus that every machine has, without a download.

One document per file. Tests, encoding tables, help topics and installed packages are excluded.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from prepare_data.sources import Corpus, Piece, documents

EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def corpus(separator: str | None = None) -> Corpus:
    """Files that are not UTF-8 are skipped, with a note. Raises UserError if Python was installed without sources."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = source_files(folder)
    if not paths:
        raise UserError(
            f"{folder}: this Python was installed without the source files of its standard library;"
            " use your own text: --data=FILE_OR_FOLDER"
        )
    notes: list[str] = []

    def pieces() -> Iterator[Piece]:
        skipped = 0
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                skipped += 1
                continue
            yield from documents([text], separator)
        notes[:] = [f"skipped {skipped} files of the standard library that are not UTF-8"] if skipped else []

    version = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    return Corpus("python_stdlib", version, pieces, notes)


def source_files(folder: Path) -> list[Path]:
    """The .py files below a folder, sorted by path, without EXCLUDED folders."""
    found = []
    for parent, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in EXCLUDED]
        # _sysconfigdata… differs between machines
        found += [
            Path(parent, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
