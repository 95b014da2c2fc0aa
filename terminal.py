"""What goes to a terminal: control characters become symbols there, and progress bars.

Samples, prompts, the text of a dataset and the names of files may hold characters that a terminal obeys. run_script in
errors.py makes the output of every script pass here. Files and pipes get it unchanged. Imports nothing of the project.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any


@cache
def _symbols(encoding: str) -> dict[int, str]:
    """Code point → how it is shown, for all that a terminal obeys but line breaks and tabs."""
    shown = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}  # U+2400 …: ␀, ␁, …
    shown[0x7F] = "\u2421"  # ␡
    try:
        "".join(shown.values()).encode(encoding)
    except UnicodeEncodeError:
        shown = {code: f"\\x{code:02x}" for code in shown}
    shown |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}  # C1; 9b begins a control sequence, as ESC [ does
    # Embeddings, overrides and isolates, which reorder the text around them (Unicode Standard Annex 9).
    return shown | {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str, encoding: str = "utf-8") -> str:
    r"""The text with control characters as symbols: ESC as ␛, or \x1b where the encoding lacks ␛. \n, \t and \r\n are
    kept."""
    return "\r\n".join(part.translate(_symbols(encoding)) for part in text.split("\r\n"))


@contextmanager
def symbols_on_terminals() -> Iterator[None]:
    """Inside it, what is written to sys.stdout and sys.stderr is made visible if they are terminals; also after it
    where an exception leaves it, since its traceback is printed at the end of the process."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    streams = [stream for stream in streams if not stream.closed and stream.isatty()]
    for stream in streams:
        stream.write = _VisibleWrite(stream)  # type: ignore[method-assign]
    yield
    for stream in streams:
        vars(stream).pop("write", None)


class _VisibleWrite:
    r"""Replaces the `write` of a stream. A \r at the end waits for the next call: tokens may separate \r from \n."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream, self.held = stream, ""

    def __call__(self, text: str) -> int:
        whole = self.held + text
        self.held = "\r" * whole.endswith("\r")
        io.TextIOWrapper.write(self.stream, visible(whole.removesuffix("\r"), self.stream.encoding))
        return len(text)


class Unchanged:
    """A stream whose writes bypass symbols_on_terminals, for libraries that move the cursor or use colors."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return type(self._stream).write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_bar(description: str, total: int | None = None, *, leave: bool = True, unit: str = "B") -> Any:
    """tqdm's bar of bytes, or of another unit, on standard error, if that is a terminal."""
    from tqdm import tqdm

    description = visible(description, sys.stderr.encoding or "utf-8")
    bar = partial(tqdm, unit=unit, unit_scale=True, file=Unchanged(sys.stderr), disable=not sys.stderr.isatty())
    return bar(desc=description, total=total, leave=leave)


def print_marked(text: str, spans: Iterable[tuple[int, int]]) -> None:
    """Prints a text to standard output, a terminal, with its characters in `spans` (start, end) underlined; in double
    brackets where the terminal has no styles. The spans are in order and may overlap."""
    stream, at = sys.stdout, 0
    mark, end = _styles()
    stream.flush()
    out = Unchanged(stream)
    for start, stop in [*spans, (len(text), len(text))]:
        out.write(visible(text[at : max(at, start)], stream.encoding))
        for line in re.split(r"(\n+)", text[max(at, start) : stop]):
            shown = visible(line, stream.encoding)
            out.write(f"{mark}{shown}{end}" if line.strip("\n") else shown)
        at = max(at, stop)
    stream.flush()


def _styles() -> tuple[str, str]:
    """What begins and ends a mark on this terminal."""
    if os.environ.get("TERM") == "dumb" or (os.name == "nt" and "WT_SESSION" not in os.environ):
        return "[[", "]]"  # older consoles of Windows show the codes
    return "\x1b[4m" if os.environ.get("NO_COLOR") else "\x1b[4;36m", "\x1b[0m"  # underlined, and cyan
