"""Which file a passage of a dataset was read from: the one that still has the same text at the same place.

A dataset does not record the files of its documents, but a document begins where its file does, unless a separator cut
it. So no more than a few bytes of each file are read.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.signature import is_own
from errors import UserError
from prepare_data.sources.listing import list_files, readable
from prepare_data.sources.python_stdlib import source_files

MARK = b"\xef\xbb\xbf"  # byte order mark of UTF-8, which preparation removes


class Origins:
    """The files that a dataset was prepared from, if they are still there: none of a dataset that came from elsewhere,
    which may name any file of this machine. meta: that of the dataset."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self._known: dict[int, str | None] = {}  # document → file
        source = meta["source"] if is_own(meta) else {}
        self.whole = str(source.get("origin", "")) if meta.get("documents") == 1 else ""  # of all; "" if not known
        self._files = self._list(source, meta.get("options", {}))

    def file(self, document: int, byte: int, text: bytes) -> str | None:
        """The file of a document that has this text from this byte on; None where that is not known."""
        if document not in self._known:
            found = (name for name, path in self._files.items() if _holds(path, byte, text))
            self._known[document] = next(found, None)
        return self._known[document]

    @staticmethod
    def _list(source: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Path]:
        """Name for messages → path."""
        origin = str(source.get("origin", ""))
        if options.get("separator") or not origin:
            return {}
        try:
            if source.get("name") == "python_stdlib" and not os.path.exists(origin):
                folder = Path(sysconfig.get_paths()["stdlib"])
                return {path.relative_to(folder).as_posix(): path for path in source_files(folder)}
            files = list_files(origin, tuple(options.get("exclude", ())), bool(options.get("follow_links"))).files
            return {readable(path): path for path in files}
        except (OSError, UserError):
            return {}


def _holds(path: Path, byte: int, text: bytes) -> bool:
    try:
        with path.open("rb") as file:
            start = len(MARK) if file.read(len(MARK)) == MARK else 0
            file.seek(start + byte)
            return file.read(len(text)) == text
    except OSError:
        return False
