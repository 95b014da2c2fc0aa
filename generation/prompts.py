"""Input and output of sample.py: prompts from an option, a file or JSON Lines; samples as text or JSON Lines.

Knows no model: it encodes prompts and takes the pieces that text.stream_texts yields.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from common.tokenizer import Tokenizer
from errors import UserError
from generation.options import SampleScriptOptions
from generation.text import Piece, Token, prompt_ids

MAX_BYTES = 2**28  # of a file of prompts
MAX_SAMPLES = 1_000_000  # of one command: their texts are kept until all are printed


class Prompt(NamedTuple):
    """`source` (file and line, for messages) and `id` (any JSON value) are set for a prompt of --prompts."""

    text: str
    source: str = ""
    id: Any = None


def read_prompts(script: SampleScriptOptions) -> list[Prompt]:
    """Reads the prompts that the options give; "" starts a new document. Raises UserError."""
    if script.prompts is not None:
        prompts = parse_prompts(_read(script.prompts, "prompts"), f"--prompts={script.prompts}")
        if len(prompts) * script.num_samples > MAX_SAMPLES:
            raise UserError(
                f"--num_samples={script.num_samples} of {len(prompts):,} prompts are more than {MAX_SAMPLES:,} samples;"
                " give fewer, or several commands with other seeds"
            )
        return prompts
    return [Prompt(script.prompt or "" if script.prompt_file is None else _read(script.prompt_file, "prompt_file"))]


def _read(path: str, option: str) -> str:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"--{option}={path} is larger than {MAX_BYTES:,} bytes; give prompts in several files")
        return data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise UserError(
            f"--{option}={path} cannot be read: {error.strerror}; give a text file, or - for standard input"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--{option}={path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; "
            "convert it first, for example: iconv -f GB18030 -t UTF-8"
        ) from None


def parse_prompts(text: str, source: str) -> list[Prompt]:
    """Parses JSON Lines: strings, or objects with "prompt" and optionally "id". Skips empty lines. Raises UserError."""
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{source}, line {number}: not JSON ({error}); expected a line like {{"prompt": "Once"}} or "Once"'
            ) from None
        record = value if isinstance(value, dict) else {"prompt": value}
        prompt, unknown = record.get("prompt"), sorted(record.keys() - {"prompt", "id"})
        if not isinstance(prompt, str) or unknown:
            found = f"unknown key {unknown[0]!r}" if isinstance(prompt, str) else "no prompt text"
            raise UserError(
                f'{source}, line {number}: {found}; expected a string, or an object with "prompt" and optionally "id"'
            )
        prompts.append(Prompt(prompt, f"{source}, line {number}: ", record.get("id")))
    if not prompts:
        raise UserError(f'{source}: the file has no prompts; expected lines like {{"prompt": "Once"}}')
    return prompts


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def encode_prompts(tokenizer: Tokenizer, prompts: Iterable[Prompt], prepend_eos: bool) -> list[list[int]]:
    """Raises UserError, naming the prompt's line, if a character is not in the vocabulary or a prompt has no ids."""
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(prompt_ids(tokenizer, prompt.text, prepend_eos))
        except UserError as error:
            raise UserError(f"{prompt.source}{error}") from None
    return encoded


def has_trailing_space(tokenizer: Tokenizer, prompt: str) -> bool:
    """Whether the prompt ends in one space and the vocabulary has words with a leading space.

    The model must then continue with a word without its space, which is rare in training data, so samples get worse.
    """
    if not prompt.endswith(" ") or prompt.endswith("  "):
        return False
    return any(data.startswith(b" ") and data[1:].isalpha() for data in tokenizer.token_bytes)


def print_texts(pieces: Iterable[Piece], prompts: list[str]) -> int:
    """Prints each sample after its prompt (prompts[i] is that of sample i) and returns the number of tokens.

    Samples are printed in order: the first unfinished one as it is generated, the text of later ones once all before
    them have ended.
    """
    current = 0  # the sample that is printed
    unprinted = list(prompts)  # text of each sample
    tokens, reasons = [0] * len(prompts), [""] * len(prompts)
    for piece in pieces:
        unprinted[piece.sample] += piece.text
        tokens[piece.sample] += len(piece.tokens)
        reasons[piece.sample] = piece.reason or ""
        while current < len(prompts):
            print(unprinted[current], end="", flush=True)
            unprinted[current] = ""
            if not reasons[current]:
                break
            print(flush=True)
            print(f"sample {current + 1}: {reasons[current]}, {tokens[current]} tokens", file=sys.stderr, flush=True)
            if current + 1 < len(prompts):
                print("---", flush=True)
            current += 1
    return sum(tokens)


def print_jsonl(
    pieces: Iterable[Piece],
    prompts: list[Prompt],
    num_samples: int,
    tokenizer: Tokenizer,
    *,
    logprobs: bool,
    more: Callable[[str, str], dict[str, Any]] = lambda prompt, text: {},
) -> int:
    """Prints each sample as a JSON line once it and all before it have ended, and returns the number of tokens.

    Sample i belongs to prompts[i // num_samples]. ids, logprobs and top_logprobs are of tokens that start in the text,
    and of an end-of-sequence that ended it.
    more: (prompt, text) → further fields.
    """
    tokens = 0
    for sample, (text, drawn, reason) in enumerate(complete_samples(pieces)):
        prompt = prompts[sample // num_samples]
        line = {"id": prompt.id} if prompt.id is not None else {}
        line |= {"prompt": prompt.text, "sample": sample % num_samples, "text": text, "finish_reason": reason}
        line["ids"] = [token.id for token in drawn]
        if logprobs:
            line["logprobs"] = [token.logprob for token in drawn]
            line["top_logprobs"] = [[_top_logprob(tokenizer, *pair) for pair in token.top] for token in drawn]
        line |= more(prompt.text, text)
        print(json.dumps(line, ensure_ascii=False), flush=True)
        tokens += len(drawn)
    return tokens


def _top_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"id": token, "text": tokenizer.decode([token]), "logprob": logprob}


def complete_samples(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[Token], str]]:
    """Yields text, tokens and reason of each sample, in the order of samples."""
    texts, tokens, reasons = dict[int, str](), dict[int, list[Token]](), dict[int, str]()
    current = 0
    for piece in pieces:
        texts[piece.sample] = texts.get(piece.sample, "") + piece.text
        tokens.setdefault(piece.sample, []).extend(piece.tokens)
        if piece.reason is not None:
            reasons[piece.sample] = piece.reason
        while current in reasons:
            yield texts.pop(current), tokens.pop(current), reasons.pop(current)
            current += 1
