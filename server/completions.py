"""OpenAI's completions on this model: a request's JSON → a checked Completion → pieces of text → the answer's JSON. Knows no HTTP.

Read in this order: Served, read_request (what may be asked), write (what the model does for it), Answer (what is said).
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import secrets
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch

from common.option import check_option, did_you_mean, options_of, show
from common.options import RunOptions
from common.tokenizer import Tokenizer
from errors import UserError
from generation.engine import LENGTH
from generation.options import SampleScriptOptions, SamplingOptions
from generation.sampling import log_probabilities
from generation.text import Piece, Token, prompt_ids, stream_texts
from model import GPT

SAMPLING = {  # a field of the request → the option that declares it
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    **{
        name: name
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
    },
    "stop": "stop",
    "logprobs": "logprobs",
}
OTHERS = ("model", "prompt", "n", "best_of", "seed", "echo", "stream", "stream_options", "suffix", "logit_bias", "user")
OPTIONS = {
    option.name: option
    for section in (SamplingOptions, SampleScriptOptions, RunOptions)
    for option in options_of(section)
}
DEFAULTS = {"max_new_tokens": 16, "temperature": 1.0}  # where OpenAI's differ from those of the options

# What one request may take of memory; each is far beyond what a person asks for.
MAX_SAMPLES = 128  # prompts times n
MAX_TOKENS = 2**15  # of one sample
MAX_PROMPT_TOKENS = 2**20  # of all prompts, times n
MAX_REPORTED = 2**20  # tokens of the answer, each counted once and once more for each of its alternatives
MAX_STOPS, MAX_STOP_LENGTH = 16, 200
END_NAME = "<|endoftext|>"


class Refused(Exception):
    """A request that is answered by an error, in OpenAI's words: status, message, the field that is wrong, a code for programs."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def to_dict(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Served:
    """The one model, the name it goes by, and how sample.py's flags would draw from it; `created` is a Unix time."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    sampling: SamplingOptions
    created: int

    def to_dict(self, **start: Any) -> dict[str, Any]:
        """An entry of /v1/models, with what the page needs: the values to start from (`start` among them) and the limits."""
        values = {
            name: getattr(self.sampling, option) for name, option in SAMPLING.items() if name != "logprobs"
        } | start
        limits = {
            "max_tokens": MAX_TOKENS,
            "block_size": self.model.config.block_size,
            "vocab_size": self.tokenizer.vocab_size,
        }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "sprout",
            "start": values,
            "limits": limits,
        }


class Prompt(NamedTuple):
    """What a sample goes on with: its text, its ids, and how many of these stand before the text (a prepended end-of-sequence)."""

    text: str
    ids: list[int]
    before: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """A checked request. Sample i is that of prompts[i // n], drawn with index i % n, as sample.py would draw it."""

    prompts: list[Prompt]
    n: int
    options: SamplingOptions
    seed: int
    echo: bool
    stream: bool
    include_usage: bool


# ---- what may be asked -----------------------------------------------------------------------------------------------


def read_request(body: bytes, served: Served) -> Completion:
    """Raises Refused with what was found and what was expected."""
    fields = _read_object(body)
    if unknown := sorted(fields.keys() - SAMPLING.keys() - set(OTHERS)):
        name, known = unknown[0], [*SAMPLING, *OTHERS]
        raise Refused(
            f"unknown field {show(repr(name))}{did_you_mean(name, known)}; there are {', '.join(known)}", param=name
        )
    fields = {name: value for name, value in fields.items() if value is not None}  # null is as good as absent
    if (name := fields.get("model", served.name)) != served.name:
        message = f"model = {show(repr(name))}: this server has one model, {served.name!r}; use that name, or leave the field out"
        raise Refused(message, param="model", status=404, code="model_not_found")
    n = _checked("n", "num_samples", fields.get("n", 1))
    if fields.get("best_of", n) not in (1, n):
        raise Refused(
            "best_of: choosing among more samples than are returned is not supported; leave it out, and raise n",
            param="best_of",
        )
    for name in ("suffix", "logit_bias"):
        if fields.get(name):
            raise Refused(f"{name} is not supported by this server; leave it out", param=name)
    if not isinstance(stream_options := fields.get("stream_options", {}), dict):
        raise Refused('stream_options: expected an object such as {"include_usage": true}', param="stream_options")
    prompts = _read_prompts(fields.get("prompt", ""), served)
    completion = Completion(
        prompts=prompts,
        n=n,
        options=_read_options(fields, served.sampling),
        seed=_checked("seed", "seed", fields["seed"]) if "seed" in fields else secrets.randbelow(2**31),
        echo=_flag(fields, "echo"),
        stream=_flag(fields, "stream"),
        include_usage=_flag(stream_options, "include_usage"),
    )
    _check_size(completion, served)
    return completion


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode(), parse_constant=int)  # int refuses NaN and Infinity
    except UnicodeDecodeError as error:
        raise Refused(f"the body is not UTF-8: byte {body[error.start]:#04x} at offset {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not valid JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise Refused('the body is no JSON object; expected one like {"prompt": "Once", "max_tokens": 100}')
    return value


def _checked(name: str, option: str, value: object) -> Any:
    """The value of a field, by the rule of the option that declares it."""
    try:
        return check_option(OPTIONS, option, value)
    except UserError as error:
        raise Refused(str(error).replace(option, name, 1), param=name) from None


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise Refused(f"{name} = {show(repr(value))}: expected true or false", param=name)
    return bool(value)


def _read_options(fields: dict[str, Any], sampling: SamplingOptions) -> SamplingOptions:
    """How to draw: OpenAI's defaults, with sample.py's flags for what a request cannot say (the end-of-sequence, the window's head)."""
    flags = {name: getattr(sampling, name) for name in ("prepend_eos", "stop_at_eos", "keep_head")}
    stop = fields.get("stop")
    fields = fields | {"stop": [stop]} if isinstance(stop, str) else fields
    asked = {option: _checked(name, option, fields[name]) for name, option in SAMPLING.items() if name in fields}
    options = SamplingOptions(**(DEFAULTS | flags | asked))
    if len(options.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in options.stop):
        raise Refused(f"stop: expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters", param="stop")
    if options.max_new_tokens > MAX_TOKENS:
        raise Refused(f"max_tokens = {options.max_new_tokens}: expected at most {MAX_TOKENS}", param="max_tokens")
    if options.min_new_tokens > options.max_new_tokens:
        message = (
            f"min_tokens = {options.min_new_tokens}: expected at most max_tokens, which is {options.max_new_tokens}"
        )
        raise Refused(message, param="min_tokens")
    return options


def _read_prompts(value: Any, served: Served) -> list[Prompt]:
    """A text, ids, or a list of either."""
    single = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    given = [value] if single else value
    if not isinstance(given, list) or not given:
        raise Refused(
            f"prompt = {show(repr(value))}: expected a text, a list of token ids, or a list of these", param="prompt"
        )
    if len(given) > MAX_SAMPLES:
        raise Refused(f"prompt: {len(given)} prompts, expected at most {MAX_SAMPLES}", param="prompt")
    return [_read_prompt(prompt, "prompt" if single else f"prompt[{i}]", served) for i, prompt in enumerate(given)]


def _read_prompt(value: Any, where: str, served: Served) -> Prompt:
    vocab_size = served.tokenizer.vocab_size
    try:
        if isinstance(value, str):
            return Prompt(
                value,
                prompt_ids(served.tokenizer, value, served.sampling.prepend_eos),
                int(served.sampling.prepend_eos),
            )
    except UserError as error:
        raise Refused(f"{where}: {error}", param="prompt") from None
    if not isinstance(value, list) or not value:
        raise Refused(
            f"{where} = {show(repr(value))}: expected a text, or a list of at least one token id", param="prompt"
        )
    for i, token in enumerate(value):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise Refused(
                f"{where}[{i}] = {show(repr(token))}: expected a token id, 0 to {vocab_size - 1}", param="prompt"
            )
    return Prompt(served.tokenizer.decode(value), value, 0)


def _check_size(asked: Completion, served: Served) -> None:
    """Raises Refused where the request would take too much memory."""
    samples, ids = asked.n * len(asked.prompts), asked.n * sum(len(prompt.ids) for prompt in asked.prompts)
    if samples > MAX_SAMPLES:
        raise Refused(f"n = {asked.n}: {samples} samples of all prompts, expected at most {MAX_SAMPLES}", param="n")
    if ids > MAX_PROMPT_TOKENS:
        raise Refused(f"prompt: {ids} tokens in all, times n; expected at most {MAX_PROMPT_TOKENS}", param="prompt")
    alternatives, block_size = asked.options.logprobs, served.model.config.block_size
    longest = max(len(prompt.ids) for prompt in asked.prompts)
    if asked.echo and alternatives is not None and longest > block_size:
        message = f"prompt: {longest} tokens; with echo and logprobs expected at most {block_size}, which the model sees at once"
        raise Refused(message, param="prompt")
    reported = (samples * asked.options.max_new_tokens + ids * asked.echo) * (1 + (alternatives or 0))
    if reported > MAX_REPORTED:
        message = f"max_tokens: {samples} samples of {asked.options.max_new_tokens} tokens with their alternatives are {reported} entries"
        raise Refused(f"{message}, expected at most {MAX_REPORTED}; ask for fewer at once", param="max_tokens")


# ---- what the model does ---------------------------------------------------------------------------------------------


def write(served: Served, asked: Completion) -> Generator[Piece]:
    """The pieces of all samples as they come. With echo a sample's first piece is its prompt. Raises UserError."""
    if asked.echo:
        for i, prompt in enumerate(asked.prompts):
            tokens = () if asked.options.logprobs is None else prompt_tokens(served, prompt, asked.options.logprobs)
            yield from (Piece(i * asked.n + draw, prompt.text, tokens, None) for draw in range(asked.n))
    ids = [prompt.ids for prompt in asked.prompts for _ in range(asked.n)]
    draws = [*range(asked.n)] * len(asked.prompts)
    yield from stream_texts(served.model, served.tokenizer, ids, asked.options, asked.seed, draws=draws)


@torch.inference_mode()
def prompt_tokens(served: Served, prompt: Prompt, alternatives: int) -> tuple[Token, ...]:
    """The tokens of a prompt's text, each with its log-probability after those before it (None: nothing is before it)."""
    ids = torch.tensor([prompt.ids], device=served.model.embed.weight.device)
    scored: Sequence[tuple[float | None, tuple[tuple[int, float], ...]]] = [(None, ())]
    if len(prompt.ids) > 1:
        logits = served.model(ids)[0, :-1]
        if not logits.isfinite().all():
            raise UserError(
                "the model computes NaN or infinity instead of probabilities; take another checkpoint, or --dtype=float32"
            )
        scored = [(None, ()), *log_probabilities(logits, prompt.ids[1:], alternatives)]
    decoder, start, tokens = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0, list[Token]()
    for token, (logprob, top) in list(zip(prompt.ids, scored, strict=True))[prompt.before :]:
        data = served.tokenizer.token_bytes[token]
        tokens.append(Token(token, data.decode("utf-8", errors="replace"), start, logprob, top))
        start += len(decoder.decode(data))
    return tuple(tokens)


# ---- what is said ----------------------------------------------------------------------------------------------------


class Answer:
    """Shapes pieces into OpenAI's JSON: `chunks` as they come for a stream, `whole` once for all of them."""

    def __init__(self, served: Served, asked: Completion) -> None:
        self.served, self.asked = served, asked
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self.head["seed"] = asked.seed  # ours: what to ask with for the same samples again
        self.generated = 0
        self.echoed = set[int]()

    def chunks(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """One for each sample that got something, what it got at once put together."""
        usage = {"usage": None} if self.asked.include_usage else {}
        return [self.head | {"choices": [choice]} | usage for choice in self._choices(pieces)]

    def last_chunks(self) -> list[dict[str, Any]]:
        return [self.head | {"choices": [], "usage": self._usage()}] if self.asked.include_usage else []

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return self.head | {"choices": self._choices(pieces), "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        read = sum(len(prompt.ids) for prompt in self.asked.prompts)
        return {"prompt_tokens": read, "completion_tokens": self.generated, "total_tokens": read + self.generated}

    def _choices(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        by_sample: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_sample.setdefault(piece.sample, []).append(piece)
        return [self._choice(sample, by_sample[sample]) for sample in sorted(by_sample)]

    def _choice(self, sample: int, pieces: list[Piece]) -> dict[str, Any]:
        tokens = list[tuple[Token, int]]()  # with its offset
        prompt = self.asked.prompts[sample // self.asked.n]
        for piece in pieces:
            is_prompt = self.asked.echo and sample not in self.echoed
            if is_prompt:
                self.echoed.add(sample)
            else:
                self.generated += len(piece.tokens)
            before = len(prompt.text) if self.asked.echo and not is_prompt else 0
            tokens += [(token, before + token.start) for token in piece.tokens]
        reason = pieces[-1].reason
        return {
            "index": sample,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": None if self.asked.options.logprobs is None else self._logprobs(tokens),
            "finish_reason": None if reason is None else "length" if reason == LENGTH else "stop",
            "stop_reason": reason,  # ours, in words
        }

    def _logprobs(self, tokens: Sequence[tuple[Token, int]]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._name(token.id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [self._alternatives(token) for token, _ in tokens],
            "text_offset": [offset for _, offset in tokens],
        }

    def _alternatives(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the drawn one; None for the first of a prompt."""
        if token.logprob is None:
            return None
        return {self._name(id): logprob for id, logprob in (*token.top, (token.id, token.logprob))}

    def _name(self, id: int) -> str:
        r"""A token as text; as OpenAI's bytes:\xe4 where it is only a part of a character."""
        data = self.served.tokenizer.token_bytes[id]
        if id == self.served.tokenizer.eos_id:
            return END_NAME
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
