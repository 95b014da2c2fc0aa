"""One file of the user's text: its bytes, unpacked if they are a gzip file, and its names."""

import glob
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from errors import UserError, quote


@dataclass(frozen=True)
class TextFile:
    name: str
    """For messages."""
    inside: str | None
    """Its path in the folder that was named, with slashes; None if the file itself was named."""
    source: Path | IO[bytes]
    """Where it is, or an open file that can be rewound."""

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The bytes from the start. Raises UserError if they cannot be read, also for errors in the body."""
        try:
            with self.source.open("rb") if isinstance(self.source, Path) else nullcontext(self.source) as file:
                file.seek(0)
                is_gzip = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                if is_gzip:
                    with gzip.GzipFile(fileobj=file) as unpacked:
                        yield unpacked  # type: ignore[misc]
                else:
                    yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{self.name}: damaged gzip file ({error}); download it again, or decompress it first{self.or_exclude}"
            ) from None
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror or error}){self.or_exclude}") from None

    @property
    def or_exclude(self) -> str:
        return f"; or leave it out: {self.exclude}" if self.inside else ""

    @property
    def exclude(self) -> str:
        """The flag that leaves this file out, as typed in a shell. Bytes that are not UTF-8 match as `?`."""
        assert self.inside
        if self.inside.isascii() or self.inside.encode(errors="replace").decode() == self.inside:
            return f"--exclude={quote(self.inside)}"
        pattern = "".join("?" if "\ud800" <= char <= "\udfff" else glob.escape(char) for char in self.inside)
        return f"--exclude={quote(pattern)}"
