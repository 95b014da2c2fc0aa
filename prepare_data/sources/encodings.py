"""Which encoding the bytes of a file are in. Knows nothing of folders or documents.

The order: a byte order mark, UTF-8, UTF-16 and UTF-32 without a mark (they have NUL bytes), UTF-8 with a few other
bytes in it, and then the older encodings that can decode the whole file without control characters. Among those
charset-normalizer is right on other scripts, where only one alphabet makes words. In the Latin alphabet it takes
cp1252 for cp1250 in half of the texts, because both give letters; there the letters of the languages that an encoding
is used for decide (`_latin_fit`), and cp1252 where they do not tell. bench/NOTES.md has the measurement.
"""

import codecs
import encodings.aliases
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO

from common.option import did_you_mean, show
from errors import UserError

CHUNK = 1 << 20  # bytes read at a time
SAMPLE = 1 << 14  # bytes of lines with non-ASCII characters that decide
MARKS = {  # UTF-32 first: its mark begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
NOT_FOR_TEXT = {"idna", "punycode", "utf-7", "unicode-escape", "raw-unicode-escape", "charmap", "undefined"}

# The letters outside ASCII of languages, by the encodings that are used for them.
WESTERN = "àâæçéèêëîïôœùûüÿ äöüß áéíñóúü àèéìîíòóù áâãàçéêíóôõúü åäöé æøåéò ëïéèöüáóêç áéíóúýðþæö àçèéíïòóúü äõöüšž"
CENTRAL = "áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž ąćęłńóśźż áéíóöőúüű ăâîşţșț čćđšž äöüß"
BALTIC = "ąčęėįšųūž āčēģīķļņšūžōŗ äõöüšž"
LATIN = {  # of equal ones the first is chosen
    "cp1252": WESTERN,
    "iso8859-15": WESTERN,
    "cp1250": CENTRAL,
    "iso8859-2": CENTRAL,
    "mac-roman": WESTERN,
    "cp850": WESTERN,
    "cp852": CENTRAL,
    "mac-latin2": CENTRAL,
    "cp1254": "çğıöşüâîûi̇",
    "cp1257": BALTIC,
    "iso8859-13": BALTIC,
}
CYRILLIC = ("cp1251", "koi8-r", "koi8-u", "cp866", "iso8859-5", "mac-cyrillic")
OTHER_SCRIPTS = (
    *CYRILLIC,
    *("cp1253", "iso8859-7", "cp1255", "iso8859-8", "cp1256", "iso8859-6", "cp874", "cp1258"),
)
MULTIBYTE = {  # with the first bytes of frequent characters: symbols, kana, Hangul, the first level of ideographs
    "gb18030": {*range(0xA1, 0xA4), *range(0xB0, 0xD8)},
    "cp950": {*range(0xA1, 0xC7)},
    "cp932": {*range(0x81, 0x84), *range(0x88, 0x98)},
    "euc_jp": {*range(0xA1, 0xA6), *range(0xB0, 0xD0)},
    "cp949": {*range(0xA1, 0xA4), *range(0xB0, 0xC9)},
}
EUC = ("gb18030", "euc_jp", "cp949")  # frequent characters have second bytes from 0xA1 on
PUNCTUATION = set("“”‘’‚„–—…«»‹›•€§©®°¿¡ªº™·\xa0\xad")
WITHIN_WORDS = set("’‘–—·\xa0\xad")
CERTAIN = 0.9  # from this fit on, a Latin reading needs no second opinion
UNLIKELY = 0.4  # below it, the file is no text


@dataclass(frozen=True)
class Encoding:
    """What `detect` found. name: for Python. ascii: only ASCII characters, so nearly every encoding reads it.

    stray: the number of bytes that are not UTF-8 in a file that is UTF-8 otherwise. cut_short: the file ends in the
    middle of a character.
    """

    name: str
    ascii: bool = False
    stray: int = 0
    cut_short: bool = False

    def decode(self, data: bytes) -> str:
        """Part of a text for people to read: what does not decode is left out."""
        if self.stray:
            return data.decode(self.name, "surrogateescape").translate(STRAY)
        return data.decode(self.name, "ignore")


class NotDecodable(Exception):
    """The bytes at `offset` are not text in the encoding."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def check_encoding(name: str) -> None:
    """Raises UserError unless the name is `auto` or that of a text encoding."""
    if problem := encoding_problem(name):
        raise UserError(problem)


def encoding_problem(name: str) -> str | None:
    """What is wrong with a name that is neither `auto` nor that of a text encoding."""
    if name == "auto":
        return None
    try:
        " ".encode(name)
        refused = len(name) > 40 or codecs.lookup(name).name.replace("_", "-") in NOT_FOR_TEXT
    except (LookupError, UnicodeError, ValueError):
        refused = True
    if not refused:
        return None
    text_encodings = {
        alias
        for alias, codec in encodings.aliases.aliases.items()
        if not codec.endswith("_codec") and codec not in ("rot_13", "utf_7") and alias != name
    }
    hint = did_you_mean(name, text_encodings)
    return (
        f"--encoding={show(name)}: not a text encoding of Python{hint}; try utf-8, cp1252, gb18030, utf-16, or auto,"
        " which decides for each file"
    )


def decode(file: IO[bytes], encoding: Encoding, lenient: bool) -> Iterator[str]:
    """The text of a file in chunks, without a byte order mark. Raises NotDecodable.

    lenient: stray bytes in UTF-8 are read as cp1252, and a last character that is incomplete is left out.
    """
    name = encoding.name
    decoder = codecs.getincrementaldecoder(name)("surrogateescape" if encoding.stray else "strict")
    position = 0  # byte offset of the next chunk
    while True:
        data = file.read(CHUNK)
        buffered = len(decoder.getstate()[0])  # bytes of a character that began in the previous chunk
        try:
            text = decoder.decode(data, final=not data and not lenient)
        except UnicodeDecodeError as error:
            raise NotDecodable(position - buffered + error.start) from None
        except UnicodeError:  # a missing byte order mark
            raise NotDecodable(0) from None
        if "\0" in text:
            raise NotDecodable(position + max(0, data.find(b"\0")))
        if encoding.stray:
            text = text.translate(STRAY)
        if position == 0:
            text = text.removeprefix("\ufeff")
        if text:
            yield text
        if not data:
            return
        position += len(data)


STRAY = {0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(128, 256)}


def detect(file: IO[bytes]) -> Encoding | None:
    """The likeliest encoding of a file that can be rewound; None if no text encoding fits."""
    found = _detect(file)
    if found and found.name.startswith(("utf", *MULTIBYTE)):
        return replace(found, cut_short=_is_cut_short(file, found))
    return found


def _detect(file: IO[bytes]) -> Encoding | None:
    file.seek(0)
    head = file.read(4)
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return Encoding(name) if _decodes(file, name, lambda text: "\0" not in text) else None
    characters, stray, nul, ascii_only = _as_utf8(file)
    if nul:
        return _first_wide(file)
    if not stray:
        if ascii_only and _is_iso2022_jp(file):
            return Encoding("iso2022_jp")
        return Encoding("utf-8", ascii=ascii_only)
    if characters >= 2 * stray:
        return Encoding("utf-8", stray=stray)
    older = _older(file)
    return Encoding(older) if older else None


def _is_cut_short(file: IO[bytes], found: Encoding) -> bool:
    """Whether the end of the file is in the middle of a character."""
    decoder = codecs.getincrementaldecoder(found.name)("ignore")
    for data in _chunks(file):
        decoder.decode(data)
    return bool(decoder.getstate()[0])


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while data := file.read(CHUNK):
        yield data


def _as_utf8(file: IO[bytes]) -> tuple[int, int, bool, bool]:
    """Non-ASCII characters of a file read as UTF-8, bytes that are not UTF-8, whether NUL occurs, whether all is ASCII.

    The file may end within a character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    characters = size = used = 0
    for data in _chunks(file):
        if b"\0" in data:
            return characters, 0, True, False
        text = decoder.decode(data)
        size += len(data)
        used += len(text.encode())
        characters += len(text) - len(text.encode("ascii", "ignore"))
    pending = decoder.getstate()[0]
    stray = size - used - len(pending)
    if not characters and len(pending) == 1 and pending >= b"\xdf":
        stray += 1  # "caf\xe9": a last ß…ô of cp1252 is likelier than a text cut within its only special character
    return characters, stray, False, size == used and not characters


def _is_iso2022_jp(file: IO[bytes]) -> bool:
    escapes = any(b"\x1b$" in data for data in _chunks(file))
    return escapes and _decodes(file, "iso2022_jp", lambda text: True)


def _first_wide(file: IO[bytes]) -> Encoding | None:
    """UTF-16 or UTF-32 without a byte order mark: assigned characters only, and spaces or ends of lines among them."""

    def is_text(text: str) -> bool:
        unusual = any(unicodedata.category(char) in ("Cn", "Co", "Cs") or char == "\0" for char in set(text))
        spaces = sum(text.count(char) for char in " \n、。，\u3000")
        return not unusual and not _has_controls(text) and 200 * spaces >= len(text) > 0

    return next((Encoding(name) for name in WIDE if _decodes(file, name, is_text)), None)


def _decodes(file: IO[bytes], name: str, accept: Callable[[str], bool]) -> bool:
    """Whether a file decodes, up to its end or to an incomplete last character, and all its chunks are accepted."""
    decoder = codecs.getincrementaldecoder(name)("strict")
    try:
        return all(accept(decoder.decode(data)) for data in _chunks(file))
    except UnicodeError:
        return False


def _has_controls(text: str) -> bool:
    """Whether a text holds control characters that text files do not have."""
    return any(("\x80" <= char <= "\x9f") or char in "\0\1\2\3\4\5\6\x0e\x0f\x10\x11\x12\x13\x14" for char in set(text))


def _older(file: IO[bytes]) -> str | None:
    """The likeliest of the encodings from before Unicode; None if none fits."""
    used: set[int] = set()
    for data in _chunks(file):
        used |= set(data)
    possible = [name for name in (*LATIN, *OTHER_SCRIPTS) if _single_byte_fits(bytes(used), name)]
    possible += [name for name in MULTIBYTE if _decodes(file, name, lambda text: not _has_controls(text))]
    sample = _sample(file)
    fits = {name: _latin_fit(sample.decode(name, "replace"), LATIN[name].split()) for name in possible if name in LATIN}
    best = max(fits, key=lambda name: fits[name], default=None)
    if best and fits[best] >= CERTAIN:
        return best
    odd = {name: oddity for name in possible if name not in LATIN and (oddity := _oddity(sample, name)) is not None}
    if odd:
        return min(odd, key=lambda name: odd[name])
    return best if best and fits[best] >= UNLIKELY else None


def _single_byte_fits(used: bytes, name: str) -> bool:
    """Whether an encoding knows all these bytes, and none is a control or private character in it."""
    try:
        text = used.decode(name)
    except UnicodeDecodeError:
        return False
    return not _has_controls(text) and not any(unicodedata.category(char) == "Co" for char in text)


def _sample(file: IO[bytes]) -> bytes:
    """Lines with non-ASCII characters, about SAMPLE bytes, from the beginning and from further parts of the file."""
    parts: list[bytes] = []
    size = 0
    for data in _chunks(file):
        taken = 0
        lines = data.replace(b"\r", b"\n").split(b"\n")
        for line in lines[1 if parts else 0 :]:  # after the first chunk, one may begin in mid-character
            if not line.isascii():
                if len(line) > SAMPLE // 4:
                    line = line[: character_start(line, range(SAMPLE // 4, 0, -1)) or SAMPLE // 4]
                parts.append(line)
                taken += len(line)
            if taken >= SAMPLE // 4 and len(data) == CHUNK:
                break
        size += taken
        if size >= SAMPLE:
            break
    return b"\n".join(parts)


def character_start(data: bytes, places: range) -> int | None:
    """The first of these positions where a character begins in every encoding but UTF-16 and UTF-32: a byte below 0x30,
    such as a space or the end of a line, is a whole character in all of them."""
    return next((place for place in places if data[place - 1] < 0x30), None)


def _latin_fit(text: str, languages: list[str]) -> float:
    """The fraction of non-ASCII characters that are letters of one language, or punctuation where it may stand."""
    letters: dict[str, int] = {}
    fitting = total = 0
    for before, char, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if char.isascii():
            continue
        total += 1
        if char in PUNCTUATION:
            fitting += char in WITHIN_WORDS or not (before.isalpha() and after.isalpha())
        elif char.isalpha() and not (char.isupper() and before.islower()):
            letters[char.lower()] = letters.get(char.lower(), 0) + 1
    best = max(sum(count for letter, count in letters.items() if letter in language) for language in languages)
    return (best + fitting) / total if total else 0.0


def _oddity(sample: bytes, name: str) -> float | None:
    """How unlike a text bytes read in an encoding: 0 to about 1, None for unlike any. charset-normalizer's measures of
    disorder and of likeness to a language, and the fraction of non-ASCII characters that are unusual where they are:
    symbols beside letters; capitals after small letters, since KOI8 and Windows have them the other way round; rare
    characters of a multibyte encoding. A Japanese text without kana is odd altogether."""
    import charset_normalizer

    text = sample.decode(name, "ignore")
    python_name = codecs.lookup(name).name.replace("-", "_")
    match = charset_normalizer.from_bytes(text.encode(name), threshold=0.5, cp_isolation=[python_name]).best()
    if match is None:
        return None
    common, kana = MULTIBYTE.get(name), 0
    odd = total = 0.0
    for before, char, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if char.isascii():
            continue
        total += 1
        kana += "\u3041" <= char <= "\u30fe"
        if common:
            data = char.encode(name)
            odd += len(data) != 2 or data[0] not in common or (name in EUC and data[1] < 0xA1)
        elif unicodedata.category(char)[0] in "SNP" and char not in PUNCTUATION:
            odd += before.isalpha() or after.isalpha()
        elif char.isupper():
            odd += 1 if before.islower() else 0.1 if name in CYRILLIC else 0
    if name in ("cp932", "euc_jp") and kana < total / 10:
        odd = total
    return match.chaos - match.coherence / 10 + odd / max(1, total)
