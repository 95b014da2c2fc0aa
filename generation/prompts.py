"""What sample.py reads and prints: prompts from an option, a file or JSON lines; samples as text or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.tokenizer import Tokenizer
from errors import UserError
from generation.options import SampleScriptOptions
from generation.text import Piece, Token, prompt_ids


class Prompt(NamedTuple):
    """A text to go on with. `where` and `id`, any JSON value, are its line's in a file of prompts, else empty and None."""

    text: str
    where: str = ""
    id: Any = None


def read_prompts(script: SampleScriptOptions) -> list[Prompt]:
    """The prompts that the options name; "" is a new document. Raises UserError."""
    if script.prompts is not None:
        return parse_prompts(_read(script.prompts, "prompts"), f"--prompts={script.prompts}")
    return [Prompt(script.prompt or "" if script.prompt_file is None else _read(script.prompt_file, "prompt_file"))]


def _read(path: str, option: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
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


def parse_prompts(text: str, where: str) -> list[Prompt]:
    """Lines of JSON: a string, or an object with "prompt" and perhaps "id"; empty lines do not count. Raises UserError."""
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{where}, line {number}: not JSON ({error}); expected a line like {{"prompt": "Once"}} or "Once"'
            ) from None
        given = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(given, str) or (isinstance(value, dict) and (unknown := value.keys() - {"prompt", "id"})):
            found = f"unknown {sorted(unknown)[0]!r}" if isinstance(given, str) else "no text"
            raise UserError(
                f'{where}, line {number}: {found}; expected a string, or an object with "prompt" and, if you like, "id"'
            )
        prompts.append(Prompt(given, f"{where}, line {number}: ", value.get("id") if isinstance(value, dict) else None))
    if not prompts:
        raise UserError(f'{where}: there is no prompt in it; expected lines like {{"prompt": "Once"}}')
    return prompts


def encode_prompts(tokenizer: Tokenizer, prompts: Iterable[Prompt], prepend_eos: bool) -> list[list[int]]:
    """Raises UserError where the tokenizer does not know a character, or nothing is left to start from."""
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(prompt_ids(tokenizer, prompt.text, prepend_eos))
        except UserError as error:
            raise UserError(f"{prompt.where}{error}") from None
    return encoded


def ends_in_a_lone_space(tokenizer: Tokenizer, prompt: str) -> bool:
    """Whether the last token is a space that would begin the next word's token, had the prompt not ended there. What follows is then
    a word without its space, which models see seldom, so they go on badly."""
    if not prompt.endswith(" ") or prompt.endswith("  "):
        return False
    return any(data.startswith(b" ") and data[1:].isalpha() for data in tokenizer.token_bytes)


def print_texts(pieces: Iterable[Piece], prompts: list[str]) -> int:
    """Prints the samples, each behind its prompt (one for each sample), in their order: the first one that has not ended live, later ones
    when their turn comes → tokens in all."""
    shown = 0
    waiting = list(prompts)  # text not yet printed
    tokens, reasons = [0] * len(prompts), [""] * len(prompts)
    for piece in pieces:
        waiting[piece.sample] += piece.text
        tokens[piece.sample] += len(piece.tokens)
        reasons[piece.sample] = piece.reason or ""
        while shown < len(prompts):
            print(waiting[shown], end="", flush=True)
            waiting[shown] = ""
            if not reasons[shown]:
                break
            print(flush=True)
            print(f"sample {shown + 1}: {reasons[shown]}, {tokens[shown]} tokens", file=sys.stderr, flush=True)
            if shown + 1 < len(prompts):
                print("---", flush=True)
            shown += 1
    return sum(tokens)


def print_jsonl(
    pieces: Iterable[Piece], prompts: list[Prompt], num_samples: int, tokenizer: Tokenizer, *, logprobs: bool
) -> int:
    """Prints each sample as a line of JSON as soon as it and all before it have ended → tokens in all.

    The samples of a prompt follow each other. ids, logprobs and top_logprobs are those of the tokens that begin in the text.
    """
    tokens = 0
    for sample, (text, drawn, reason) in enumerate(_whole_samples(pieces)):
        prompt = prompts[sample // num_samples]
        line = {"id": prompt.id} if prompt.id is not None else {}
        line |= {"prompt": prompt.text, "sample": sample % num_samples, "text": text, "finish_reason": reason}
        line["ids"] = [token.id for token in drawn]
        if logprobs:
            line["logprobs"] = [token.logprob for token in drawn]
            line["top_logprobs"] = [[_alternative(tokenizer, *pair) for pair in token.top] for token in drawn]
        print(json.dumps(line, ensure_ascii=False), flush=True)
        tokens += len(drawn)
    return tokens


def _alternative(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"id": token, "text": tokenizer.decode([token]), "logprob": logprob}


def _whole_samples(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[Token], str]]:
    """Text, tokens and reason of each sample, in the order of samples."""
    texts, tokens, ended = dict[int, str](), dict[int, list[Token]](), dict[int, str]()
    shown = 0
    for piece in pieces:
        texts[piece.sample] = texts.get(piece.sample, "") + piece.text
        tokens.setdefault(piece.sample, []).extend(piece.tokens)
        if piece.reason is not None:
            ended[piece.sample] = piece.reason
        while shown in ended:
            yield texts.pop(shown), tokens.pop(shown), ended.pop(shown)
            shown += 1
