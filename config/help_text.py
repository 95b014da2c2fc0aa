"""The text of --help: usage, presets, and every option with its value and meaning, in the width of the terminal."""

import ast
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.option import Option, show

MIN_WIDTH, MAX_WIDTH, PLAIN_WIDTH = 46, 120, 100  # columns; the last where the output is no terminal
MAX_COLUMNS = 28, 13  # of names and values
MIN_TEXT = 40  # columns; where less is left, the text stands below
NO_BREAK = "\u00a0"  # a space at which textwrap does not wrap


def help_text(
    usage: str,
    presets: Mapping[str, Path],
    sections: Mapping[str, Sequence[Option]],
    values: Mapping[str, Any],
    taken: Sequence[str],
    width: int | None = None,
) -> str:
    """sections: title → options. values: the one shown for each option. taken: names of the presets they come from."""
    width = terminal_width() if width is None else width
    entries = {
        title: [[f"--{option.name}={option.usage()}", show(values[option.name])] for option in options]
        for title, options in sections.items()
    }
    cells = [entry for group in entries.values() for entry in group]
    columns = [
        min(max(map(len, texts)), most) for texts, most in zip(zip(*cells, strict=True), MAX_COLUMNS, strict=True)
    ]
    lines = [usage.strip(), "", "presets"]
    for name, path in presets.items():
        lines += _entry([name], columns, _first_paragraph(path), width)
    lines += ["", f"options, with {'the values of ' + ' and '.join(taken) if taken else 'their defaults'}"]
    for title, options in sections.items():
        lines += ["", title]
        for option, entry in zip(options, entries[title], strict=True):
            limits = option.limits().removeprefix("with ").replace(" ", NO_BREAK)
            meaning = f"{option.help} ({limits})" if limits else option.help
            lines += _entry(entry, columns, meaning, width)
    return "\n".join(lines)


def terminal_width() -> int:
    return min(max(shutil.get_terminal_size((PLAIN_WIDTH + 1, 24)).columns - 1, MIN_WIDTH), MAX_WIDTH)


def _entry(cells: Sequence[str], columns: Sequence[int], text: str, width: int) -> Iterator[str]:
    """Lines with cells in columns, then the wrapped text. A cell that is too wide ends its line."""
    line, start = "  ", 2
    for cell, column in zip(cells, columns, strict=False):
        line, start = line.ljust(start) + cell, start + column + 2
        if len(cell) > column:
            yield line
            line = ""
    if width - start < MIN_TEXT:
        if line.strip():
            yield line
        line, start = "", 6
    wrapped = textwrap.wrap(
        text, width, initial_indent=line.ljust(start), subsequent_indent=" " * start, break_on_hyphens=False
    )
    yield from (part.replace(NO_BREAK, " ") for part in wrapped or [line])


def _first_paragraph(preset: Path) -> str:
    try:
        return " ".join((ast.get_docstring(ast.parse(preset.read_bytes())) or "").partition("\n\n")[0].split())
    except (SyntaxError, ValueError, OSError):
        return "(unreadable)"
