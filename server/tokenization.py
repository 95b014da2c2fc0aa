"""vLLM's tokenizer endpoints: the tokenizer of the served model for programs that have no copy of it. Knows no HTTP."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from common.option import show
from errors import UserError
from server.completions import (
    END_NAME,
    RequestError,
    ServedModel,
    check_ids,
    encode_text,
    flag,
    read_fields,
    token_name,
)


def tokenize(body: bytes, served: ServedModel) -> dict[str, Any]:
    """The response of POST /tokenize: the ids that /v1/completions reads for the same prompt; without the token that
    it adds at the start if `add_special_tokens` is false. Raises RequestError."""
    fields = read_fields(body, ("model", "prompt", "add_special_tokens", "return_token_strs"), served)
    prompt, tokenizer = fields.get("prompt"), served.tokenizer
    if not isinstance(prompt, str):
        raise RequestError(f"prompt = {show(repr(prompt))}: expected a text", param="prompt")
    try:
        ids = encode_text(tokenizer, prompt)
    except UserError as error:
        raise RequestError(f"prompt: {error}", param="prompt") from None
    adds_start = flag(fields, "add_special_tokens", default=True) and served.sampling.prepend_eos
    if adds_start and not prompt.startswith(END_NAME):
        ids = [tokenizer.start_id, *ids]
    names = [token_name(tokenizer, id) for id in ids] if flag(fields, "return_token_strs") else None
    return {
        "count": len(ids),
        "max_model_len": served.model.config.block_size,
        "tokens": ids,
        "token_strs": names,
    }


def detokenize(body: bytes, served: ServedModel) -> dict[str, Any]:
    """The response of POST /detokenize: the text, with the names of end-of-sequence tokens. Raises RequestError."""
    fields = read_fields(body, ("model", "tokens"), served)
    ids, tokenizer = fields.get("tokens"), served.tokenizer
    if not isinstance(ids, list):
        raise RequestError(f"tokens = {show(repr(ids))}: expected a list of token ids", param="tokens")
    check_ids(ids, "tokens", "tokens", tokenizer.vocab_size)
    parts = groupby(ids, key=lambda id: id == tokenizer.eos_id)
    return {"prompt": "".join(END_NAME * len(list(run)) if ends else tokenizer.decode(run) for ends, run in parts)}


def tokenizer_info(served: ServedModel) -> dict[str, Any]:
    """The response of GET /tokenizer_info: what a tokenizer_config.json would say."""
    return {
        "tokenizer_class": type(served.tokenizer).__name__,
        "name": served.tokenizer.name,
        "vocab_size": served.tokenizer.vocab_size,
        "model_max_length": served.model.config.block_size,
        "add_bos_token": served.sampling.prepend_eos,
        "bos_token": END_NAME,
        "eos_token": END_NAME,
        "pad_token": None,
    }
