"""OpenAI's completions API on one model: request JSON → Completion → pieces of text → response JSON. Knows no HTTP.

Read in this order: ServedModel, parse_request, generate_pieces, ResponseBuilder.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import secrets
import time
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from common.memory import OutOfMemory, attempt
from common.option import check_option, did_you_mean, options_of, show
from common.options import RunOptions
from common.tokenizer import Tokenizer
from errors import UserError
from generation.engine import LENGTH
from generation.novelty import fields as novelty_fields
from generation.options import SampleScriptOptions, SamplingOptions
from generation.sampling import log_probabilities
from generation.text import Piece, Token, prompt_ids, stream_texts
from model import GPT
from prepare_data.novelty import Novelty

SAMPLING_FIELDS = {  # field of the request → option that declares its type and range
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
OTHER_FIELDS = (
    "model", "prompt", "n", "best_of", "seed", "echo", "stream", "stream_options", "suffix", "logit_bias", "user",
    "novelty",
)  # fmt: skip
OPTIONS = {
    option.name: option
    for section in (SamplingOptions, SampleScriptOptions, RunOptions)
    for option in options_of(section)
}
DEFAULTS = {"max_new_tokens": 16, "temperature": 1.0}  # OpenAI's, where they differ from the options'

# Limits on the memory of one request, far above interactive use.
MAX_SAMPLES = 128  # prompts times n
MAX_TOKENS = 2**15  # of one sample
MAX_PROMPT_TOKENS = 2**20  # of all prompts, times n
MAX_LOGPROBS = 2**20  # tokens of the response times (1 + logprobs)
MAX_STOPS, MAX_STOP_LENGTH = 16, 200
END_NAME = "<|endoftext|>"


class RequestError(Exception):
    """An error response in OpenAI's format: HTTP status, message, name of the wrong field, code for programs."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def to_dict(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """The model with its API name, the sampling options of sample.py's flags, and a Unix time. novelty: what finds
    copied passages, or why there is none; None: it was not asked for."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    sampling: SamplingOptions
    created: int
    novelty: Novelty | str | None = None

    def to_dict(self, **page_defaults: Any) -> dict[str, Any]:
        """An entry of /v1/models, with the initial values and limits of the page's settings."""
        values = {name: getattr(self.sampling, option) for name, option in SAMPLING_FIELDS.items()}
        del values["logprobs"]
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
            "start": values | page_defaults,
            "limits": limits,
            "novelty": {"problem": self.novelty} if isinstance(self.novelty, str) else self.novelty and {},
        }


class Prompt(NamedTuple):
    """A prompt's text and ids; the first `prepended` ids (end-of-sequence) are not part of the text."""

    text: str
    ids: list[int]
    prepended: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """A checked request. Sample i continues prompts[i // n] with draw i % n, as in sample.py."""

    prompts: list[Prompt]
    n: int
    options: SamplingOptions
    seed: int
    echo: bool
    stream: bool
    include_usage: bool
    novelty: bool
    copied: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """With `novelty`, what a sample has copied, from its end on."""


# ---- parsing requests ------------------------------------------------------------------------------------------------


def parse_request(body: bytes, served: ServedModel) -> Completion:
    """Raises RequestError, which names what was found and what was expected."""
    fields = read_fields(body, [*SAMPLING_FIELDS, *OTHER_FIELDS], served)
    n = _checked("n", "num_samples", fields.get("n", 1))
    if fields.get("best_of", n) not in (1, n):
        raise RequestError(
            "best_of: generating more samples than are returned is not supported; remove it and increase n",
            param="best_of",
        )
    for name in ("suffix", "logit_bias"):
        if fields.get(name):
            raise RequestError(f"{name} is not supported by this server; remove it", param=name)
    if not isinstance(stream_options := fields.get("stream_options", {}), dict):
        raise RequestError('stream_options: expected an object such as {"include_usage": true}', param="stream_options")
    prompts = _read_prompts(fields.get("prompt", ""), served)
    completion = Completion(
        prompts=prompts,
        n=n,
        options=_read_options(fields, served.sampling),
        seed=_checked("seed", "seed", fields["seed"]) if "seed" in fields else secrets.randbelow(2**31),
        echo=flag(fields, "echo"),
        stream=flag(fields, "stream"),
        include_usage=flag(stream_options, "include_usage"),
        novelty=flag(fields, "novelty"),
    )
    if completion.novelty and not isinstance(served.novelty, Novelty):
        raise RequestError(served.novelty or "novelty: start sample.py --serve with --novelty", param="novelty")
    _check_size(completion, served)
    return completion


def read_fields(body: bytes, known: Sequence[str], served: ServedModel) -> dict[str, Any]:
    """The fields of a request but for those that are null, which means absent. Raises RequestError for unknown ones and
    for another model."""
    fields = _read_object(body)
    if unknown := sorted(fields.keys() - set(known)):
        name = unknown[0]
        raise RequestError(
            f"unknown field {show(repr(name))}{did_you_mean(name, known)}; known fields are {', '.join(known)}",
            param=name,
        )
    fields = {name: value for name, value in fields.items() if value is not None}
    if (name := fields.get("model", served.name)) != served.name:
        message = (
            f"model = {show(repr(name))}: this server has one model, {served.name!r}; use that or remove the field"
        )
        raise RequestError(message, param="model", status=404, code="model_not_found")
    return fields


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode(), parse_constant=int)  # int() raises on NaN and Infinity
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {body[error.start]:#04x} at offset {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise RequestError('the body is not a JSON object; expected one like {"prompt": "Once", "max_tokens": 100}')
    return value


def _checked(name: str, option: str, value: object) -> Any:
    """The value of a field, checked against the option that declares it."""
    try:
        return check_option(OPTIONS, option, value)
    except UserError as error:
        raise RequestError(str(error).replace(option, name, 1), param=name) from None


def flag(fields: dict[str, Any], name: str, default: bool = False) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} = {show(repr(value))}: expected true or false", param=name)
    return bool(value)


def _read_options(fields: dict[str, Any], sampling: SamplingOptions) -> SamplingOptions:
    """OpenAI's defaults, with sample.py's flags for options that are not fields of a request."""
    flags = {name: getattr(sampling, name) for name in ("prepend_eos", "stop_at_eos", "keep_head")}
    stop = fields.get("stop")
    fields = fields | {"stop": [stop]} if isinstance(stop, str) else fields
    given = {option: _checked(name, option, fields[name]) for name, option in SAMPLING_FIELDS.items() if name in fields}
    options = SamplingOptions(**(DEFAULTS | flags | given))
    if len(options.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in options.stop):
        raise RequestError(
            f"stop: expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters", param="stop"
        )
    if options.max_new_tokens > MAX_TOKENS:
        raise RequestError(f"max_tokens = {options.max_new_tokens}: expected at most {MAX_TOKENS}", param="max_tokens")
    if options.min_new_tokens > options.max_new_tokens:
        message = (
            f"min_tokens = {options.min_new_tokens}: expected at most max_tokens, which is {options.max_new_tokens}"
        )
        raise RequestError(message, param="min_tokens")
    return options


def _read_prompts(value: Any, served: ServedModel) -> list[Prompt]:
    """The value is a text, a list of ids, or a list of these."""
    single = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    prompts = [value] if single else value
    if not isinstance(prompts, list) or not prompts:
        raise RequestError(
            f"prompt = {show(repr(value))}: expected a text, a list of token ids, or a list of these", param="prompt"
        )
    if len(prompts) > MAX_SAMPLES:
        raise RequestError(f"prompt: {len(prompts)} prompts, expected at most {MAX_SAMPLES}", param="prompt")
    return [_read_prompt(prompt, "prompt" if single else f"prompt[{i}]", served) for i, prompt in enumerate(prompts)]


def _read_prompt(value: Any, where: str, served: ServedModel) -> Prompt:
    prepend_eos = served.sampling.prepend_eos
    try:
        if isinstance(value, str) and value.startswith(END_NAME):
            value = encode_text(served.tokenizer, value)  # a second one is not added
        if isinstance(value, str):
            return Prompt(value, prompt_ids(served.tokenizer, value, prepend_eos), int(prepend_eos))
    except UserError as error:
        raise RequestError(f"{where}: {error}", param="prompt") from None
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"{where} = {show(repr(value))}: expected a text, or a list of at least one token id", param="prompt"
        )
    check_ids(value, where, "prompt", served.tokenizer.vocab_size)
    return Prompt(served.tokenizer.decode(value), value, 0)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text. END_NAME at its start is the end-of-sequence token: so /detokenize writes it. Further on it is
    text, as in training, so that no text can end a document. Raises UserError."""
    ids = tokenizer.encode(text.removeprefix(END_NAME)).tolist()
    return [tokenizer.eos_id] * text.startswith(END_NAME) + ids


def check_ids(ids: list[Any], where: str, param: str, vocab_size: int) -> None:
    """Raises RequestError for what is no token id."""
    for i, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            message = f"{where}[{i}] = {show(repr(token))}: expected a token id, 0 to {vocab_size - 1}"
            raise RequestError(message, param=param)


def _check_size(request: Completion, served: ServedModel) -> None:
    """Raises RequestError if the request would need too much memory."""
    n, options = request.n, request.options
    samples, ids = n * len(request.prompts), n * sum(len(prompt.ids) for prompt in request.prompts)
    if samples > MAX_SAMPLES:
        raise RequestError(f"n = {n}: {samples} samples of all prompts, expected at most {MAX_SAMPLES}", param="n")
    if ids > MAX_PROMPT_TOKENS:
        raise RequestError(
            f"prompt: {ids} tokens in total, times n; expected at most {MAX_PROMPT_TOKENS}", param="prompt"
        )
    block_size = served.model.config.block_size
    longest = max(len(prompt.ids) for prompt in request.prompts)
    if request.echo and options.logprobs is not None and longest > block_size:
        message = f"prompt: {longest} tokens; with echo and logprobs expected at most {block_size}, the context length"
        raise RequestError(message, param="prompt")
    entries = (samples * options.max_new_tokens + ids * request.echo) * (1 + (options.logprobs or 0))
    if entries > MAX_LOGPROBS:
        message = (
            f"max_tokens: {samples} samples of {options.max_new_tokens} tokens with logprobs are {entries} entries"
        )
        raise RequestError(f"{message}, expected at most {MAX_LOGPROBS}; send smaller requests", param="max_tokens")


# ---- generation ------------------------------------------------------------------------------------------------------


def generate_pieces(served: ServedModel, request: Completion) -> Generator[Piece]:
    """Yields the pieces of all samples; with echo a sample's first piece is its prompt. Raises UserError."""
    if request.echo:
        for i, prompt in enumerate(request.prompts):
            top = request.options.logprobs
            try:
                tokens = () if top is None else attempt(partial(prompt_tokens, served, prompt, top))
            except OutOfMemory:
                message = "the log-probabilities of this prompt need more memory than is free: send a shorter one"
                raise RequestError(f"{message}, or leave out echo", status=503) from None
            yield from (Piece(i * request.n + draw, prompt.text, tokens, None) for draw in range(request.n))
    ids = [prompt.ids for prompt in request.prompts for _ in range(request.n)]
    draws = [*range(request.n)] * len(request.prompts)
    texts = [""] * len(ids)
    for piece in stream_texts(served.model, served.tokenizer, ids, request.options, request.seed, draws=draws):
        texts[piece.sample] += piece.text
        if piece.reason is not None and request.novelty and isinstance(served.novelty, Novelty):
            given = request.prompts[piece.sample // request.n].text
            [copied] = served.novelty.check([(given, texts[piece.sample])])
            held_out = {"held_out": round(served.novelty.yardstick(copied.characters).share, 4)}
            request.copied[piece.sample] = novelty_fields(copied, served.novelty) | held_out
        yield piece


@torch.inference_mode()
def prompt_tokens(served: ServedModel, prompt: Prompt, top: int) -> tuple[Token, ...]:
    """The tokens of a prompt's text with their log-probabilities; that of the very first id is None."""
    ids = torch.tensor([prompt.ids], device=served.model.embed.weight.device)  # (1, T)
    scored: Sequence[tuple[float | None, tuple[tuple[int, float], ...]]] = [(None, ())]
    if len(prompt.ids) > 1:
        logits = served.model(ids)[0, :-1]
        if not logits.isfinite().all():
            raise UserError(
                "the model computes NaN or infinity instead of probabilities; try another checkpoint or --dtype=float32"
            )
        scored = [(None, ()), *log_probabilities(logits, prompt.ids[1:], top)]
    decoder, start, tokens = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0, list[Token]()
    for token, (logprob, likeliest) in list(zip(prompt.ids, scored, strict=True))[prompt.prepended :]:
        data = served.tokenizer.token_bytes[token]
        tokens.append(Token(token, data.decode("utf-8", errors="replace"), start, logprob, likeliest))
        start += len(decoder.decode(data))
    return tuple(tokens)


# ---- responses -------------------------------------------------------------------------------------------------------


class ResponseBuilder:
    """Turns pieces into OpenAI's JSON: `chunks` for each batch of a stream, or one `response` for all of them."""

    def __init__(self, served: ServedModel, request: Completion) -> None:
        self.served, self.request = served, request
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self.head["seed"] = request.seed  # an extension: with this seed a request returns the same samples
        self.generated = 0
        self.echoed = set[int]()  # samples whose prompt was sent

    def chunks(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """One chunk per sample, with all its pieces of this batch."""
        usage = {"usage": None} if self.request.include_usage else {}
        return [self.head | {"choices": [choice]} | usage for choice in self._choices(pieces)]

    def last_chunks(self) -> list[dict[str, Any]]:
        return [self.head | {"choices": [], "usage": self._usage()}] if self.request.include_usage else []

    def response(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return self.head | {"choices": self._choices(pieces), "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.request.prompts)
        return {"prompt_tokens": prompt, "completion_tokens": self.generated, "total_tokens": prompt + self.generated}

    def _choices(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        by_sample: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_sample.setdefault(piece.sample, []).append(piece)
        return [self._choice(sample, by_sample[sample]) for sample in sorted(by_sample)]

    def _choice(self, sample: int, pieces: list[Piece]) -> dict[str, Any]:
        tokens = list[tuple[Token, int]]()  # with their offsets in the echoed and generated text
        prompt = self.request.prompts[sample // self.request.n]
        for piece in pieces:
            is_prompt = self.request.echo and sample not in self.echoed
            if is_prompt:
                self.echoed.add(sample)
            else:
                self.generated += len(piece.tokens)
            offset = len(prompt.text) if self.request.echo and not is_prompt else 0
            tokens += [(token, offset + token.start) for token in piece.tokens]
        reason = pieces[-1].reason
        return {
            "index": sample,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": None if self.request.options.logprobs is None else self._logprobs(tokens),
            "finish_reason": None if reason is None else "length" if reason == LENGTH else "stop",
            "stop_reason": reason,  # an extension: the reason in words
            **({} if reason is None else self.request.copied.get(sample, {})),  # another one
        }

    def _logprobs(self, tokens: Sequence[tuple[Token, int]]) -> dict[str, list[Any]]:
        return {
            "tokens": [token_name(self.served.tokenizer, token.id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [self._top_logprobs(token) for token, _ in tokens],
            "text_offset": [offset for _, offset in tokens],
        }

    def _top_logprobs(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the drawn one; None for the first id of a prompt."""
        if token.logprob is None:
            return None
        named = (*token.top, (token.id, token.logprob))
        return {token_name(self.served.tokenizer, id): logprob for id, logprob in named}


def token_name(tokenizer: Tokenizer, id: int) -> str:
    r"""A token as text, or as bytes:\xe4 (OpenAI's notation) if it is an incomplete character."""
    if id == tokenizer.eos_id:
        return END_NAME
    data = tokenizer.token_bytes[id]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
