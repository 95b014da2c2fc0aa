"""Our tokenizers as other programs read them: tokenizer.json and tokenizer_config.json of Hugging Face's libraries.

Byte pairs are stored as the bytes of every id, in the order of the merges; a tokenizer.json lists the merges
themselves, so `merges_of` derives them. An imported tokenizer is written as it came.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from common.imported_tokenizer import CHARACTER_OF, ImportedTokenizer, ids_around
from common.tokenizer import PATTERNS, CharTokenizer, Tokenizer
from interop.sources import bpe_definition

EOS = "<|endoftext|>"
# The split patterns for Oniguruma, which the tokenizers library takes: there `$` is the end of a line, and `{1,3}+`
# repeats; without possessive quantifiers the matches are the same. None: GPT-2's, built into the library.
SPLITS = {
    "gpt2": None,
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
    "gpt4o": PATTERNS["gpt4o"],
}


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json with the same ids; encoding a text with special tokens begins with EOS, as
    sample.py's prompts do. An imported tokenizer's own, unchanged."""
    if isinstance(tokenizer, ImportedTokenizer):
        return tokenizer.definition
    if isinstance(tokenizer, CharTokenizer):
        content = char_definition(tokenizer)
    else:
        vocab = vocabulary(tokenizer)
        special = [name for name, id in vocab.items() if not tokenizer.token_bytes[id]]
        pattern = SPLITS[tokenizer.pattern]
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        merges, unreachable = merges_of(tokenizer.token_bytes)
        characters = [[written(left), written(right)] for left, right in merges]
        before = None if pattern is None else [split]
        made = bpe_definition(vocab, characters, special, before, ignore_merges=bool(unreachable))
        content = json.loads(made)
    content["post_processor"] = starts_with(EOS, tokenizer.eos_id)
    return json.dumps(content, ensure_ascii=False)


def written(token: bytes) -> str:
    """A token as GPT-2's vocabulary writes it: one printable character a byte."""
    return "".join(map(CHARACTER_OF.__getitem__, token))


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Token → id of byte pairs, every id once; ids without text are <|endoftext|> and <|reserved_ID|>."""
    return {
        written(token) if token else EOS if id == tokenizer.eos_id else f"<|reserved_{id}|>": id
        for id, token in enumerate(tokenizer.token_bytes)
    }


def merges_of(tokens: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The merges in the order of their ranks, and the tokens that no merges make. tokens[id]: bytes, empty for none.

    The last merge that makes a token's own bytes into one token is the only one that ever makes it: as long as both
    ends of these bytes are ends of tokens, what happens between them does not depend on the text around.
    """
    ranks = {token: id for id, token in enumerate(tokens) if token}
    merges, unreachable = list[tuple[bytes, bytes]](), list[bytes]()
    for token in ranks:
        if len(token) == 1:
            continue
        parts = merge_to_two(token, ranks)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            unreachable.append(token)
    return merges, unreachable


def merge_to_two(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a token before its last merge; more than two where the merges end earlier."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right) for left, right in pairwise(parts)]
        known = [rank for rank in found if rank is not None]
        if not known:
            break
        at = found.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def char_definition(tokenizer: CharTokenizer) -> dict[str, Any]:
    """A tokenizer.json of one token a character. A character without an id is an error there too."""
    vocab = {char: id for id, char in enumerate(tokenizer.chars)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": tokenizer.eos_id, "content": EOS, **flags}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab | {EOS: tokenizer.eos_id}, "unk_token": "<|unknown|>"},
    }  # fmt: skip


def starts_with(token: str, id: int) -> dict[str, Any]:
    """The post-processor that begins every text with a token."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """The name of an id in the tokenizer.json."""
    if not isinstance(tokenizer, ImportedTokenizer):
        return EOS
    content = json.loads(tokenizer.definition)
    added = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    return added.get(id) or next(token for token, other in content["model"]["vocab"].items() if other == id)


def prepended_id(tokenizer: Tokenizer) -> int | None:
    """The id with which the written tokenizer begins a text, if any: for an imported one what its own file says."""
    if not isinstance(tokenizer, ImportedTokenizer):
        return tokenizer.eos_id
    before, after = ids_around(json.loads(tokenizer.definition))
    return before[0] if before and not after else None


def tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """tokenizer_config.json. There is no padding token: one that is EOS too would keep EOS out of a fine-tune's
    loss."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": token_name(tokenizer, tokenizer.start_id),
        "eos_token": token_name(tokenizer, tokenizer.eos_id),
        **({"chat_template": template} if template else {}),
    }
