"""Text around the engine: loads a model folder, encodes prompts, decodes drawn ids incrementally, finds stop strings.

Knows neither prompt files nor output formats. Read in this order: Token, Piece, load_model, stream_texts.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from common.memory import OutOfMemory, attempt
from common.stored_models import open_checked
from common.tokenizer import Tokenizer, tokenizer_from_dict
from common.weights import build_for_weights, import_weights
from errors import UserError
from generation.cuda_graphs import drop_kept
from generation.engine import STOP, Event, end_programs, generate
from generation.options import SamplingOptions
from model import GPT


class Token(NamedTuple):
    """A drawn id, its bytes as text for display, its character offset, and the log-probabilities of its Event."""

    id: int
    text: str
    start: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What one drawn token adds to a sample's text.

    text: complete UTF-8 characters outside any stop string; "" while a character or a stop string is pending.
    tokens: those that start in `text`; at its end also an end-of-sequence that ended the sample and has no text.
    reason: why the sample ended, on its last piece, else None.
    """

    sample: int
    text: str
    tokens: tuple[Token, ...]
    reason: str | None


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer]:
    """Loads a model folder → model in eval mode, tokenizer. Raises UserError.

    dtype: the weights are converted once, since decoding reads all of them for every token and autocast would cast them
    each time. Buffers (fixed position tables) stay in float32.
    """
    try:
        return attempt(partial(_load_model, folder, device, dtype))
    except OutOfMemory:
        raise OutOfMemory(f"{folder}: the weights need more memory than is free; {end_programs(device)}") from None


def _load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    saved, config = open_checked(folder, check_weights=False)  # model_tensors checks them
    try:
        tokenizer = tokenizer_from_dict(saved.tokenizer)
        if (config.vocab_size, config.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
            raise ValueError(
                f"the model has {config.vocab_size} ids with end-of-sequence {config.eos_id}, "
                f"its tokenizer {tokenizer.vocab_size} with {tokenizer.eos_id}: expected the same numbers"
            )
        tensors = saved.model_tensors()
        model = build_for_weights(config, tensors)
        import_weights(model, tensors, take=True)
    except ValueError as error:
        raise UserError(
            f"{folder}: {error}; copy the folder again from its source, or use another checkpoint"
        ) from error
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(device)
    return model.to(device).eval(), tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str, prepend_eos: bool) -> list[int]:
    """Raises UserError if there are no ids to start from, or a character is not in the vocabulary."""
    ids = [tokenizer.start_id] * prepend_eos + tokenizer.encode(prompt).tolist()
    if not ids:
        raise UserError(
            "an empty prompt with --prepend_eos=false leaves no token to start from; give a --prompt or remove the flag"
        )
    return ids


def stream_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    seed: int,
    *,
    draws: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """Yields the text of engine.generate's samples, one per prompt (ids), piece by piece and without the prompts."""
    decoders = [_SampleDecoder(tokenizer, options.stop) for _ in prompts]
    finished = set[int]()
    for event in generate(model, prompts, options, seed, draws=draws, stopped=finished):
        piece = decoders[event.sample].add(event)
        if piece.reason is not None:
            finished.add(event.sample)
        yield piece


class _SampleDecoder:
    """Decodes one sample's events to pieces; holds back text that may turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.length = 0  # complete characters so far, including those held back
        self.held, self.tokens = "", list[Token]()

    def add(self, event: Event) -> Piece:
        ends = event.reason is not None
        data = b"" if event.token is None else self.tokenizer.token_bytes[event.token]
        new = self.decoder.decode(data, final=ends)
        if event.token is not None:
            start = self.length + len(new) * ends  # an end-of-sequence comes after a character that is incomplete
            text = data.decode("utf-8", errors="replace")
            self.tokens.append(Token(event.token, text, start, event.logprob, event.top))
        self.length += len(new)
        self.held += new
        reason, cut = event.reason, find_stop(self.held, self.stop)
        if cut is not None:
            reason = STOP
        else:
            cut = len(self.held) - (pending_stop_length(self.held, self.stop) if reason is None else 0)
        text, self.held = self.held[:cut], self.held[cut:]
        end = self.length - len(self.held)  # tokens that start after this are held back, or part of a stop string
        tokens = [token for token in self.tokens if token.start < end or (not self.held and reason != STOP)]
        self.tokens = self.tokens[len(tokens) :]
        return Piece(event.sample, text, tuple(tokens), reason)


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Start of the stop string that ends first; of several that end at the same place, the longest."""
    matches = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    return min(matches)[1] if matches else None


def pending_stop_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of the text that is a proper prefix of a stop string."""
    return max(
        (n for string in stop for n in range(1, min(len(string) - 1, len(text)) + 1) if text.endswith(string[:n])),
        default=0,
    )


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None = None,
    seed: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[tuple[str, str]]:
    """Returns (prompt and text, reason for the end) per sample. Training mode and torch's RNG state are unchanged, and
    no recordings are kept: a training run needs their memory."""
    keep_head = min(1, model.config.block_size - 1)
    options = SamplingOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, keep_head=keep_head)
    ids = prompt_ids(tokenizer, prompt, options.prepend_eos)
    texts, reasons = [prompt] * num_samples, [""] * num_samples
    was_training = model.training
    model.eval()
    try:
        with autocast():
            for piece in stream_texts(model, tokenizer, [ids] * num_samples, options, seed):
                texts[piece.sample] += piece.text
                reasons[piece.sample] = piece.reason or ""
    finally:
        model.train(was_training)
        drop_kept()
    return list(zip(texts, reasons, strict=True))
