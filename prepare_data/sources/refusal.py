"""The message about files that are not text, or not in the encoding that they were read in: which files, where in
them, what they probably are, how the text would read, and the option that helps.

All files of a folder are examined, so that one message is enough, and so that it names an encoding only if all files
read well in it.
"""

import codecs
import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from errors import quote
from prepare_data.sources.encodings import CHUNK, Encoding, NotDecodable, character_start, decode, detect
from prepare_data.sources.kinds import HEAD, advice_by_ending, kind_of
from prepare_data.sources.text_file import TextFile

SHOWN = 35  # characters of the text before and after the first byte that does not fit
MAX_PATTERNS = 10


@dataclass(frozen=True)
class _Finding:
    """problem: what is wrong; None if nothing is. found: the encoding; None if the file is not text in any.

    advice: what makes it text. shown: the text at that place, as it reads in `found`.
    """

    file: TextFile
    problem: str | None
    found: Encoding | None
    advice: str = ""
    shown: str = ""


def refusal(files: Sequence[TextFile], encoding: str) -> str:
    """The message about those of the files that cannot be read in `encoding`, which may be auto."""
    findings = [_examine(file, encoding) for file in files]
    wrong = [finding for finding in findings if finding.problem]
    binary = [finding for finding in wrong if finding.found is None]
    if binary:
        return _about_binary(binary, [finding for finding in findings if finding.found])
    lines = [f"{finding.file.name}: {finding.problem}{_reading(finding)}" for finding in wrong[:3]]
    if len(wrong) > 3:
        lines.append(f"and {len(wrong) - 3:,} more of {len(files):,} files")
    return "\n  ".join(lines) + "\n" + _encoding_advice(findings, wrong)


def _examine(file: TextFile, encoding: str) -> _Finding:
    with file.opened() as data:
        if kind := kind_of(data.read(HEAD)):
            return _Finding(file, f"is {kind[0]}, not plain text", None, kind[1])
        found = detect(data)
        offset = None
        if encoding != "auto" or found is None:
            data.seek(0)
            try:
                deque(decode(data, Encoding("utf-8" if encoding == "auto" else encoding), lenient=False), maxlen=0)
            except NotDecodable as error:
                offset = error.offset
        if offset is None:
            return _Finding(file, None, found or Encoding(encoding))
        if found is None:
            problem = f"is not text in any encoding: a binary file, or damaged at {_where(data, offset)}"
            return _Finding(file, problem, None, advice_by_ending(file.name))
        if found.cut_short and codecs.lookup(found.name) == codecs.lookup(encoding):
            return _Finding(file, f"ends in the middle of a character of {encoding}: it was cut short", found)
        return _Finding(file, f"not {encoding}: {_where(data, offset)}", found, shown=_excerpt(data, offset, found))


def _where(data: IO[bytes], offset: int) -> str:
    data.seek(0)
    line, left = 1, offset
    while left:
        block = data.read(min(CHUNK, left))
        if not block:
            break
        line += block.count(b"\n")
        left -= len(block)
    byte = data.read(1)
    return (f"byte 0x{byte[0]:02x}" if byte else "the end") + f" in line {line} (byte offset {offset})"


def _excerpt(data: IO[bytes], offset: int, found: Encoding) -> str:
    """The line around a byte, as it reads in an encoding."""
    if found.name.startswith(("utf-16", "utf-32", "iso2022")):  # these can only be read from the start
        offset = 0
    start = max(0, offset - 1000)
    data.seek(start)
    window = data.read(offset - start + 400)
    begin = (character_start(window, range(1, offset - start + 1)) or 0) if start else 0
    text, place = found.decode(window[begin:]), len(found.decode(window[begin : offset - start]))
    line = text.rfind("\n", 0, place) + 1
    around = text[max(line, place - SHOWN) : place + SHOWN].strip("\r\n").partition("\n")[0]
    return "".join(char if char.isprintable() else " " for char in around).strip()


def _reading(finding: _Finding) -> str:
    found = finding.found
    assert found
    if not finding.shown:
        return ""
    if found.stray:
        return f"; the rest is UTF-8; as cp1252 such bytes ({found.stray:,}) read:\n    {finding.shown}"
    return f"; probably {found.name}, in which it reads:\n    {finding.shown}"


def _encoding_advice(findings: list[_Finding], wrong: list[_Finding]) -> str:
    """The option with which every file reads well."""
    names = {finding.found.name for finding in findings if finding.found and not finding.found.ascii}
    unsafe = any(finding.found and (finding.found.stray or finding.found.cut_short) for finding in wrong)
    if unsafe:
        damaged = "Repair or copy the file again, or use" if len(findings) == 1 else "Use"
        return f"{damaged} --encoding=auto, which keeps what is readable and says what it did"
    if len(names) == 1:
        return f"Use --encoding={names.pop()}, or --encoding=auto, which decides for each file"
    return "Use --encoding=auto, which decides for each file"


def _about_binary(binary: list[_Finding], good: list[_Finding]) -> str:
    """What the files are, with the advice that makes them text, and the flags that leave them out of the folder."""
    lines = [
        f"{finding.file.name}: {finding.problem}" + (f"; {finding.advice}" if finding.advice else "")
        for finding in binary[:3]
    ]
    if len(binary) > 3:
        lines.append(f"and {len(binary) - 3:,} more of {len(binary) + len(good):,} files")
    if binary[0].file.inside is None:
        return "\n  ".join(lines) + ("" if binary[0].advice else "; expected plain text")
    endings = Counter(os.path.splitext(finding.file.name)[1] for finding in binary)
    text_endings = {os.path.splitext(finding.file.name)[1] for finding in good}
    flags: list[str] = []
    for finding in binary:
        ending = os.path.splitext(finding.file.name)[1]
        plain = ending[1:].isascii() and ending[1:].isalnum()
        use_ending = plain and endings[ending] > 1 and ending not in text_endings
        flag = f"--exclude={quote(f'*{ending}')}" if use_ending else finding.file.exclude
        if flag not in flags:
            flags.append(flag)
    more = f" … ({len(flags)} in all)" if len(flags) > MAX_PATTERNS else ""
    return "\n  ".join(lines) + f"\nLeave out what is not text: {' '.join(flags[:MAX_PATTERNS])}{more}"
