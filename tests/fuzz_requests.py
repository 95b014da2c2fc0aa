"""Requests to the server, prompts in JSON Lines and texts for the tokenizer."""

from __future__ import annotations

import random

from common.tokenizer import bytes_tokenizer, char_tokenizer, train_bpe
from generation.options import SamplingOptions
from generation.prompts import encode_prompts, parse_prompts
from model import GPT, GPTConfig
from server.completions import RequestError, ServedModel, parse_request
from server.tokenization import detokenize, tokenize
from tests.fuzz_values import VALUES, Tries, as_json, edit, edit_bytes

REQUEST = {
    "model": "model", "prompt": "Once", "max_tokens": 5, "temperature": 1.0, "top_p": 0.9,
    "top_k": 5, "min_p": 0.1, "n": 2,
    "stop": ["x", "y"], "logprobs": 2, "seed": 1, "echo": True, "stream": False,
    "stream_options": {"include_usage": True},
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "user": "me",
}  # fmt: skip
PROMPTS = ("Once", ["a", "b"], [1, 2, 3], [[1, 2], [3]], "", [], "é" * 50, [2**40], ["a", 1], [[]], "\ud800")


def run(examples: int, seed: int) -> list[str]:
    """Six of ten are requests for completions, two for the tokenizer, two are files of prompts."""
    rng, tries = random.Random(seed), Tries(RequestError)
    tokenizers = [bytes_tokenizer(), char_tokenizer("Once ab"), train_bpe(["the moon and the cat"], 260, "gpt4o")]
    served = []
    for tokenizer in tokenizers:
        shape = GPTConfig(
            n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
        )
        served.append(ServedModel("model", GPT(shape, seed=0), tokenizer, SamplingOptions(), 0))
    for number in range(examples):
        one, kind = rng.choice(served), number % 10
        if kind < 6:
            fields = {name: value for name, value in REQUEST.items() if rng.random() < 0.5} | {
                "prompt": rng.choice(PROMPTS)
            }
            body = _body(fields, rng)
            tries.attempt(lambda: parse_request(body, one), body)  # noqa: B023
        elif kind < 8:
            ids = {"tokens": [1, 2, rng.choice((3, 2**33, -1))]}
            fields = rng.choice(({"prompt": rng.choice(PROMPTS), "add_special_tokens": True}, ids))
            body = _body(fields, rng)
            tries.attempt(lambda: rng.choice((tokenize, detokenize))(body, one), body)  # noqa: B023
        else:
            lines = [as_json(rng.choice((rng.choice(VALUES), {"prompt": rng.choice(VALUES), "id": rng.choice(VALUES)})))
                     for _ in range(rng.randint(1, 3))]  # fmt: skip
            text = b"\n".join(edit_bytes(line, rng) if rng.random() < 0.2 else line for line in lines).decode(
                "utf-8", "replace"
            )
            tries.attempt(lambda: encode_prompts(one.tokenizer, parse_prompts(text, "prompts"), True), text)  # noqa: B023
    return tries.problems


def _body(fields: object, rng: random.Random) -> bytes:
    body = as_json(edit(fields, rng) if rng.random() < 0.8 else fields)
    return edit_bytes(body, rng) if rng.random() < 0.1 else body
