"""Tokenizers of other programs: a tokenizer.json of Hugging Face's library `tokenizers`, which does the work.

`read_tokenizer_json` accepts what gives every id its own bytes: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM …) with
any split pattern, added and special tokens, end-of-sequence anywhere and missing bytes, and WordLevel of characters.
Others are refused with the reason. As everywhere in Sprout, `encode` reads the names of special tokens as text.
The file is data: patterns in it are compiled as regular expressions, nothing is executed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from common.option import show
from common.tokenizer import FORMAT, VERSION, Tokenizer
from errors import UserError
from files import TOKENIZER_SPARE, parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

NAME = "imported"
MAX_IDS = 2**20
PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
NORMALIZERS = {"NFC"}


class ImportedTokenizer(Tokenizer):
    """definition: the text of a tokenizer.json, which is validated. start_id: the id that begins a text, EOS unless the
    model has another one for it. chat_template: Jinja's text, which Sprout keeps for exports and never runs."""

    def __init__(
        self, definition: str, eos_id: int, start_id: int | None = None, chat_template: str | None = None
    ) -> None:
        content = read_tokenizer_json(definition)
        self.definition, self.chat_template = definition, chat_template
        self._backend, self._is_word_level = backend(definition), content["model"].get("type") == "WordLevel"
        super().__init__(NAME, "", token_bytes(content, self._backend), eos_id)
        self.start_id = eos_id if start_id is None else start_id
        for name, id in (("eos_id", self.eos_id), ("start_id", self.start_id)):
            if not 0 <= id < self.vocab_size:
                raise UserError(f"{name} is {id}, which is not one of the tokenizer's {self.vocab_size} ids")
        self.token_bytes[eos_id] = b""

    @cached_property
    def _characters(self) -> set[str]:
        """Of a WordLevel vocabulary, whose tokens are whole characters; else none."""
        tokens = (token.decode() for token in self.token_bytes) if self._is_word_level else ()
        return {token for token in tokens if len(token) == 1}

    @cached_property
    def _missing_bytes(self) -> set[int]:
        return set(range(256)) - {token[0] for token in self.token_bytes if len(token) == 1}

    def unknown(self, text: str) -> set[str]:
        """The characters of a text that have no ids; `encode` leaves them out where the library does."""
        if self._is_word_level:
            return set(text).difference(self._characters)
        return {char for char in set(text) if not self._missing_bytes.isdisjoint(char.encode())}

    def to_dict(self) -> dict[str, Any]:
        head = {"format": FORMAT, "version": VERSION, "name": self.name, "eos_id": self.eos_id}
        template = {"chat_template": self.chat_template}
        return head | {"start_id": self.start_id, "tokenizer_json": self.definition} | template

    def _encode_piece(self, text: str) -> np.ndarray:
        text.encode()  # raises UnicodeEncodeError on a lone surrogate, as tiktoken does
        if self._is_word_level and (unknown := sorted(self.unknown(text))):
            shown = ", ".join(map(repr, unknown[:10])) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise UserError(f"the tokenizer knows {len(self._characters)} characters, but not {shown}; leave them out")
        with _library():
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def from_dict(content: dict[str, Any]) -> ImportedTokenizer:
    """The tokenizer of `to_dict`'s value, validated. Raises UserError."""
    definition, eos_id, start_id = (content.get(name) for name in ("tokenizer_json", "eos_id", "start_id"))
    template = content.get("chat_template")
    if type(eos_id) is not int or type(start_id) is not int or not isinstance(definition, str):
        raise UserError("not a valid tokenizer: expected tokenizer_json, eos_id and start_id; copy the file again")
    if not isinstance(template, str | None):
        raise UserError(f"not a valid tokenizer: chat_template is {type(template).__name__}, expected text")
    return ImportedTokenizer(definition, eos_id, start_id, template)


def read_tokenizer_json(text: str) -> dict[str, Any]:
    """The content of a tokenizer.json that ImportedTokenizer can represent. Raises UserError with the reason."""
    try:
        content = parse_json(text.encode(), TOKENIZER_SPARE)
    except ValueError as error:
        raise UserError(f"tokenizer.json: not valid JSON ({str(error)[:200]})") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise UserError(
            "tokenizer.json: expected an object with a model and its vocab: an older or another kind of file"
        )
    kind, found = model.get("type", "BPE"), {part["type"] for part in parts(content.get("pre_tokenizer"))}
    if kind not in ("BPE", "WordLevel"):
        raise UserError(f"tokenizer.json: a {kind!r} tokenizer; Sprout takes byte-level BPE and WordLevel")
    if kind == "BPE" and ("ByteLevel" not in found or model.get("byte_fallback")):
        raise UserError(
            "tokenizer.json: BPE over characters (SentencePiece, as in Llama 2), whose tokens do not stand for bytes of"
            " the text one to one; Sprout takes byte-level BPE"
        )
    if kind == "WordLevel" and not found <= {"Split"}:
        raise UserError(
            "tokenizer.json: WordLevel of words, which loses what separates them; only characters are taken"
        )
    unknown = (found - PRE_TOKENIZERS) | ({part["type"] for part in parts(content.get("normalizer"))} - NORMALIZERS)
    if unknown:
        raise UserError(f"tokenizer.json: {sorted(unknown)[0]!r} changes the text in a way that Sprout does not follow")
    if any(part.get("add_prefix_space") for part in parts(content.get("pre_tokenizer"))):
        raise UserError("tokenizer.json: adds a space before every text (add_prefix_space), which is not supported")
    if affix := [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]:
        raise UserError(f"tokenizer.json: {affix[0]} writes characters that are not in the text; not supported")
    if model.get("dropout"):
        raise UserError("tokenizer.json: BPE dropout draws at random; set it to null")
    if kind == "BPE" and isinstance(model.get("merges"), list):
        _check_merges(model["vocab"], model["merges"])
    return content


def _check_merges(vocab: dict[str, Any], merges: list[Any]) -> None:
    """Raises UserError where a merge does not join two tokens to a third one: the library may panic."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(merge, str) and merge.startswith("#version"):
            continue
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise UserError(f"tokenizer.json: the merge {show(repr(merge))} is not a pair of tokens: damaged")
        if missing := [token for token in (*pair, "".join(pair)) if token not in vocab]:
            raise UserError(f"tokenizer.json: {show(repr(missing[0]))} of a merge is not in the vocabulary: damaged")


def parts(component: Any) -> Iterator[dict[str, Any]]:
    """The members of a pre-tokenizer, normalizer or post-processor, those of sequences one by one."""
    if component is None:
        return
    if not isinstance(component, dict) or not isinstance(component.get("type"), str):
        raise UserError("tokenizer.json: a pre-tokenizer or normalizer without a type: damaged")
    if component["type"] == "Sequence":
        lists = [value for value in component.values() if isinstance(value, list)]
        for part in lists[0] if lists else []:
            yield from parts(part)
    else:
        yield component


def backend(definition: str) -> "Backend":
    """The library's tokenizer, which reads the names of special tokens as text. Raises UserError."""
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise UserError("this model's tokenizer needs the package tokenizers: pip install tokenizers") from None
    with _library():
        made = Backend.from_str(definition)
    made.encode_special_tokens = True
    made.post_processor = None  # adds ids: ids_around
    made.no_truncation()
    made.no_padding()
    return made


@contextmanager
def _library() -> Iterator[None]:
    """Makes UserError of all that the library raises: plain exceptions, and a panic, which is a BaseException."""
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, ValueError) and type(error).__name__ != "PanicException":
            raise
        why = " ".join(str(error)[:200].split())
        raise UserError(f"tokenizer.json: the tokenizers library does not read it ({why})") from None


def ids_around(content: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The ids that the post-processor of a tokenizer.json writes before and after a text. Read, not tried: the library
    panics where a token is not defined. Raises UserError."""
    before, after = list[int](), list[int]()
    try:
        for part in parts(content.get("post_processor")):
            if part["type"] == "TemplateProcessing":
                pieces, tokens = part["single"], part["special_tokens"]
                [place] = [i for i, piece in enumerate(pieces) if "Sequence" in piece]
                names = [
                    [piece["SpecialToken"]["id"] for piece in side] for side in (pieces[:place], pieces[place + 1 :])
                ]
                first, last = ([id for name in side for id in tokens[name]["ids"]] for side in names)
                before, after = first + before, after + last
            elif part["type"] in ("BertProcessing", "RobertaProcessing"):
                before, after = [part["cls"][1], *before], [*after, part["sep"][1]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError("tokenizer.json: a post_processor that does not say which tokens it adds: damaged") from None
    return before, after


def token_bytes(content: dict[str, Any], made: "Backend") -> list[bytes | None]:
    """The bytes of every id; None for special tokens and for ids that do not exist. Raises UserError."""
    vocab = made.get_vocab(with_added_tokens=True)
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= MAX_IDS:
        raise UserError(f"tokenizer.json: its largest id is {size - 1}, expected 0 to {MAX_IDS - 1}")
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    is_words, found = content["model"].get("type") == "WordLevel", list[bytes | None]([None] * size)
    for token, id in vocab.items():
        if token in added:
            found[id] = None if added[token].get("special") else token.encode()
        elif is_words:
            found[id] = token.encode()
        elif (data := [BYTE_OF.get(char) for char in token]) and None not in data:
            found[id] = bytes(data)  # type: ignore[arg-type]
        else:
            raise UserError(f"tokenizer.json: the token {token!r} (id {id}) is not made of bytes as GPT-2 writes them")
    return found


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it is printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


CHARACTER_OF = _byte_characters()
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}
