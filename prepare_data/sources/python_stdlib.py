"""The Python sources of the running interpreter's standard library: real text on every machine, nothing to download.

One document a file. Tests, the tables of the encodings, help topics and installed packages stay out: they teach nothing.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from prepare_data.sources import Corpus, Piece, documents

LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def corpus(separator: str | None = None) -> Corpus:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = source_files(folder)
    if not paths:
        raise UserError(
            f"{folder}: this Python came without the sources of its standard library; train on a text of yours: --data=FILE_OR_FOLDER"
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
        notes[:] = [f"{skipped} files of the standard library are not UTF-8 and stay out"] if skipped else []

    version = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    return Corpus("python_stdlib", version, pieces, notes)


def source_files(folder: Path) -> list[Path]:
    found = []
    for parent, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in LEFT_OUT]
        # _sysconfigdata… describes one machine's build
        found += [
            Path(parent, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
