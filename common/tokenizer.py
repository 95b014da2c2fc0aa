"""Text ↔ token ids. Every tokenizer has an end-of-sequence id (EOS), which `encode` never returns.

`Tokenizer` wraps tiktoken: the published encodings, `bpe` (trained with rustbpe) and `bytes` (256 single bytes).
`CharTokenizer` has one id per character of a corpus. imported_tokenizer.py has the tokenizers of other programs. All
are stored whole as JSON (`to_dict`) and validated when read (`tokenizer_from_dict`). Split patterns of these are stored
by name, so that nothing in a file is compiled or executed.
Knows neither datasets nor models. Reading order: patterns and cutting, the two classes, the constructors.
"""

import base64
import binascii
import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

from common.download import DownloadFailed, download
from errors import UserError
from files import MAX_TOKENIZER, TOKENIZER_SPARE, DamagedFile, read_json

# How text is split before byte pairs are merged: the exact patterns of the published encodings.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "gpt4o": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}
# rustbpe's regex engine has no possessive quantifiers; here they affect speed only, not the matches (tested).
TRAINING_PATTERNS = {"gpt2": PATTERNS["gpt2"].replace(r"\s++$|", "").replace("++", "+"), "gpt4o": PATTERNS["gpt4o"]}

ADDRESS = "https://openaipublic.blob.core.windows.net/"
PUBLISHED = {  # name: (pattern, {address: sha256})
    "gpt2": (
        "gpt2",
        {
            ADDRESS
            + "gpt-2/encodings/main/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            ADDRESS
            + "gpt-2/encodings/main/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        },
    ),
    "r50k_base": (
        "gpt2",
        {ADDRESS + "encodings/r50k_base.tiktoken": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"},
    ),
    "p50k_base": (
        "gpt2",
        {ADDRESS + "encodings/p50k_base.tiktoken": "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"},
    ),
    "cl100k_base": (
        "gpt4",
        {
            ADDRESS
            + "encodings/cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
        },
    ),
    "o200k_base": (
        "gpt4o",
        {ADDRESS + "encodings/o200k_base.tiktoken": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"},
    ),
}

PIECE = 1 << 19  # characters tokenized at a time: the regex engine fails on 2^20 whitespace characters in a row
SAFE_CUT = re.compile(r"(?<=[^\W_])(?=\s)")  # in no pattern does a token continue from a letter or digit to whitespace
FORMAT = "sprout-tokenizer"
VERSION = 1


def cut_point(text: str, limit: int) -> int:
    """Where to cut a text longer than `limit` characters: at the last safe position before it, else at `limit`."""
    start = max(limit - 65_536, limit // 2)
    positions = [match.start() for match in SAFE_CUT.finditer(text, start, limit + 1)]
    return positions[-1] if positions else limit


def cut_pieces(text: str, limit: int = PIECE) -> Iterator[str]:
    while len(text) > limit:
        cut = cut_point(text, limit)
        yield text[:cut]
        text = text[cut:]
    yield text


class Tokenizer:
    """Byte-level BPE. `tokens[id]`: the bytes of an id; None for ids without text, such as EOS."""

    def __init__(self, name: str, pattern: str, tokens: list[bytes | None], eos_id: int) -> None:
        self.name = name
        self.pattern = pattern
        self.vocab_size = len(tokens)
        self.eos_id = self.start_id = eos_id  # start_id begins a text
        self.token_bytes = [token or b"" for token in tokens]

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int64 (n,), never EOS. Raises UserError on a lone surrogate."""
        try:
            parts = [self._encode_piece(piece) for piece in cut_pieces(text)]
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at character {error.start}"
            raise UserError(
                f"the text is not valid Unicode: {found} is a lone surrogate; remove it, or decode the text again"
            ) from None
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def unknown(self, text: str) -> set[str]:
        """The characters of a text that have no ids: none here, where bytes have ids."""
        return set()

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[np.ndarray]:
        """`encode` of each text, on several threads (tiktoken releases the GIL)."""
        threads = num_threads or os.cpu_count() or 1
        size = max(1, len(texts) // (4 * threads))  # several texts per job: a job costs as much as a short text
        jobs = [texts[i : i + size] for i in range(0, len(texts), size)]
        if threads == 1 or len(jobs) < 2:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(chain.from_iterable(pool.map(lambda job: [self.encode(text) for text in job], jobs)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; invalid UTF-8 becomes U+FFFD, EOS is skipped."""
        return b"".join([self.token_bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        tokens = [base64.b64encode(token).decode() if token else None for token in self.token_bytes]
        head = {"format": FORMAT, "version": VERSION, "name": self.name}
        return head | {"pattern": self.pattern, "eos_id": self.eos_id, "tokens": tokens}

    @cached_property
    def content_hash(self) -> str:
        """sha256 of everything that determines the ids; the name is left out."""
        content = {key: value for key, value in self.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        ranks = {token: i for i, token in enumerate(self.token_bytes) if token}
        special = {"<|endoftext|>": self.eos_id}  # required by tiktoken, never encoded
        return tiktoken.Encoding(
            self.name, pat_str=PATTERNS[self.pattern], mergeable_ranks=ranks, special_tokens=special
        )

    def _encode_piece(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)


class CharTokenizer(Tokenizer):
    """One id per character: 0 … n−1 in code point order, EOS is n (nanoGPT's ids)."""

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = "".join(sorted(set(chars)))
        super().__init__("char", "", [*(char.encode() for char in self.chars), None], len(self.chars))
        points = np.array([ord(char) for char in self.chars], dtype=np.int64)
        self._table = np.full(points.max(initial=0) + 2, -1, dtype=np.int64)  # code point → id; the last entry: unknown
        self._table[points] = np.arange(len(points))

    def _encode_piece(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        if len(ids) and ids.min() < 0:
            unknown = sorted({chr(point) for point in points[ids < 0]})
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            shown = ", ".join(repr(char) for char in unknown[:10]) + more
            advice = "leave them out, or train a new model with --tokenizer=bpe or bytes, which know every character"
            raise UserError(f"the char tokenizer knows {len(self.chars)} characters, but not {shown}; {advice}")
        return ids

    def unknown(self, text: str) -> set[str]:
        return set(text).difference(self.chars)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "name": "char", "eos_id": self.eos_id, "chars": self.chars}


def describe_unknown(counts: Mapping[str, int]) -> str:
    """How many characters a tokenizer lacks, and which are the most frequent. counts: of each."""
    chars = sorted(counts, key=counts.__getitem__, reverse=True)
    shown = " ".join(map(repr, chars[:8])) + " …" * (len(chars) > 8)
    total = sum(counts.values())
    return f"{total:,} character{'s' * (total != 1)} that the tokenizer does not know ({shown})"


def bytes_tokenizer() -> Tokenizer:
    return Tokenizer("bytes", "gpt2", [*(bytes([i]) for i in range(256)), None], 256)


def char_tokenizer(chars: Iterable[str]) -> CharTokenizer:
    return CharTokenizer(chars)


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str) -> Tokenizer:
    """BPE trained on `texts`. `vocab_size` includes EOS, the last id; there are fewer ids if no pairs are left."""
    import rustbpe

    if vocab_size < 257:
        raise UserError(
            f"vocab_size={vocab_size} is too small for bpe: 256 bytes and end-of-sequence need at least 257"
        )
    trainer = rustbpe.Tokenizer()
    pieces = chain.from_iterable(cut_pieces(text) for text in texts)
    trainer.train_from_iterator(pieces, vocab_size=vocab_size - 1, buffer_size=64, pattern=TRAINING_PATTERNS[pattern])
    # Two merges may give the same token; the lower rank keeps it.
    tokens = dict.fromkeys(
        bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
    )
    return Tokenizer("bpe", pattern, [*tokens, None], len(tokens))


def bytes_per_token(texts: Sequence[str], sizes: Sequence[int], pattern: str) -> dict[int, float]:
    """Bytes of `texts` per token of a BPE trained on them, by its size. Merges are learned one after another, so the
    first ones of a large vocabulary are a smaller one."""
    largest = train_bpe(texts, max(sizes), pattern)
    n_bytes, found = sum(len(text.encode()) for text in texts), dict[int, float]()
    for size in sizes:
        tokens = largest.token_bytes[: min(size, largest.vocab_size) - 1]
        tokenizer = Tokenizer("bpe", pattern, [*tokens, None], len(tokens))
        found[size] = n_bytes / max(1, sum(map(len, tokenizer.encode_batch(list(texts)))))
    return found


def published_tokenizer(name: str) -> Tokenizer:
    """A published encoding. Its files are downloaded into tiktoken's cache here, because tiktoken sets no timeout."""
    pattern, files = PUBLISHED[name]
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if cache == "":
        raise UserError("TIKTOKEN_CACHE_DIR is empty, which turns tiktoken's cache off; unset it, or name a folder")
    folder = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    paths = {address: folder / hashlib.sha1(address.encode()).hexdigest() for address in files}
    for address, path in paths.items():
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == files[address]:
            continue
        try:
            download(address, path, files[address])
        except DownloadFailed as error:
            missing = "".join(f"\n  {address}\n    as {path}" for address, path in paths.items())
            raise UserError(
                "use a tokenizer that needs no download (--tokenizer=bpe, bytes or char), or save these files from"
                f" another machine: the encoding {name!r} could not be downloaded ({error}){missing}\n"
                "TIKTOKEN_CACHE_DIR may name another folder than the one shown"
            ) from None
    made = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()
    special: dict[str, int] = made["special_tokens"]
    tokens: list[bytes | None] = [None] * (max(*made["mergeable_ranks"].values(), *special.values()) + 1)
    for token, rank in made["mergeable_ranks"].items():
        tokens[rank] = token
    return Tokenizer(name, pattern, tokens, special["<|endoftext|>"])


def tokenizer_from_dict(content: Any) -> Tokenizer:
    """The tokenizer described by `to_dict`'s value, fully validated: the file may be foreign. Raises UserError."""

    def expect(condition: bool, rule: str) -> None:
        if not condition:
            raise UserError(f"not a valid tokenizer: {rule}; copy the file again from its source")

    expect(
        isinstance(content, dict) and content.get("format") == FORMAT, f'expected an object with "format": "{FORMAT}"'
    )
    expect(
        content.get("version") == VERSION,
        f"expected version {VERSION}, found {content.get('version')!r}; a newer Sprout may read it",
    )
    name, eos_id = content.get("name"), content.get("eos_id")
    if name == "imported":
        from common.imported_tokenizer import from_dict  # which imports this module

        return from_dict(content)
    expect(name in ("bpe", "bytes", "char", *PUBLISHED), f"unknown name {name!r}")
    expect(type(eos_id) is int, f"eos_id is {eos_id!r}, expected an integer")
    if name == "char":
        chars = content.get("chars")
        expect(isinstance(chars, str), f"chars is {type(chars).__name__}, expected text")
        expect(not any("\ud800" <= char <= "\udfff" for char in chars), "chars holds a lone surrogate")
        expect(list(chars) == sorted(set(chars)), "chars must be sorted and unique")
        expect(eos_id == len(chars), f"eos_id is {eos_id}, expected {len(chars)}")
        return CharTokenizer(chars)
    pattern, encoded = content.get("pattern"), content.get("tokens")
    expect(
        isinstance(pattern, str) and pattern in PATTERNS,
        f"unknown split pattern {pattern!r}, expected one of {', '.join(PATTERNS)}",
    )
    expect(
        isinstance(encoded, list) and all(token is None or isinstance(token, str) for token in encoded),
        "tokens is not a list of text",
    )
    expect(
        0 <= eos_id < len(encoded) and encoded[eos_id] is None,
        f"eos_id is {eos_id}, which is not one of the {len(encoded)} ids without text",
    )
    try:
        decode = partial(binascii.a2b_base64, strict_mode=True)  # several times faster than base64.b64decode
        tokens = [None if token is None else decode(token) for token in encoded]
    except (binascii.Error, ValueError):
        expect(False, "tokens holds text that is not base64")
    known = [token for token in tokens if token is not None]
    expect(
        name in PUBLISHED or (len(known) == len(tokens) - 1 and eos_id == len(known)),
        "ids are not contiguous with EOS as the last",
    )
    expect(b"" not in known and len(set(known)) == len(known), "a token is empty or duplicate")
    expect(set(known[:256]) == {bytes([i]) for i in range(256)}, "the first 256 tokens are not the single bytes")
    return Tokenizer(name, pattern, tokens, eos_id)


def named_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that needs no corpus: bytes, a published encoding or a file. Raises UserError."""
    if name == "bytes":
        return bytes_tokenizer()
    if name in PUBLISHED:
        return published_tokenizer(name)
    if Path(name).is_file():
        return load_tokenizer(Path(name))
    near = difflib.get_close_matches(name, ["bpe", "bytes", "char", *PUBLISHED], n=1)
    names = f"bpe, bytes, char, {', '.join(PUBLISHED)}, or the path of a sprout_tokenizer.json or dataset.json"
    raise UserError(
        f"--tokenizer={name}: no such tokenizer or file"
        + (f"; did you mean {near[0]}? Expected" if near else "; expected")
        + f" {names}"
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a sprout_tokenizer.json or a dataset.json."""
    try:
        content = read_json(path.resolve(), MAX_TOKENIZER, TOKENIZER_SPARE)
    except DamagedFile as error:
        raise UserError(
            f"--tokenizer={path}: cannot be read as JSON ({error.problem}); expected a sprout_tokenizer.json or a"
            " dataset.json"
        ) from None
    if "model" in content and "format" not in content:
        raise UserError(
            f"--tokenizer={path}: of another program; `python -m interop import` of its model makes a folder with a"
            " sprout_tokenizer.json, which this option takes"
        )
    try:
        return tokenizer_from_dict(content.get("tokenizer", content))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
