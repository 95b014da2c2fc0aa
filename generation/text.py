"""Text around the engine: a model folder → model and tokenizer, prompt → ids, drawn ids → whole characters as they come, stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import open_model_folder
from common.option import section_from
from common.tokenizer import Tokenizer, tokenizer_from_dict
from errors import UserError
from generation.engine import STOP, Event, generate
from generation.options import SamplingOptions
from model import GPT, GPTConfig


class Token(NamedTuple):
    """A drawn id: its bytes as text, for display, where it begins in the sample's text (characters), and what its Event says of it."""

    id: int
    text: str
    start: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What a token adds to a sample: text whose characters are whole and in no stop string ("" while that is open), and the tokens that
    begin in it. The last piece of a sample has the reason of its end; what follows the beginning of a stop string is in none."""

    sample: int
    text: str
    tokens: tuple[Token, ...]
    reason: str | None


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer]:
    """The model of a model folder, in eval mode, with its tokenizer. Raises UserError.

    dtype: what the weights are converted to, once; a token reads them all, and autocast would leave casts between them. The tables of fixed
    positions stay in float32.
    """
    saved = open_model_folder(folder)
    try:
        tokenizer = tokenizer_from_dict(saved.tokenizer)
        config = section_from(GPTConfig, saved.config)
        if (config.vocab_size, config.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
            raise ValueError(
                f"the model has {config.vocab_size} ids with end-of-sequence {config.eos_id}, "
                f"its tokenizer {tokenizer.vocab_size} with {tokenizer.eos_id}: they do not belong together"
            )
        model = GPT(config, seed=None)
        model.import_state(saved.model_tensors())
    except ValueError as error:
        raise UserError(
            f"{folder}: {error}; copy the folder again from where it was written, or take another checkpoint"
        ) from error
    model.to(device).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str, prepend_eos: bool) -> list[int]:
    """Raises UserError where nothing is left to start from, or the tokenizer does not know a character."""
    ids = [tokenizer.eos_id] * prepend_eos + tokenizer.encode(prompt).tolist()
    if not ids:
        raise UserError(
            "an empty prompt with --prepend_eos=false leaves nothing to start from; give a --prompt, or leave the flag out"
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
    """Continues each prompt (ids) as a sample of its own, as engine.generate does; the prompts' own texts are not repeated."""
    texts = [_SampleText(tokenizer, options.stop) for _ in prompts]
    leaving = set[int]()
    for event in generate(model, prompts, options, seed, draws=draws, leaving=leaving):
        piece = texts[event.sample].add(event)
        if piece.reason is not None:
            leaving.add(event.sample)
        yield piece


class _SampleText:
    """Turns a sample's events into pieces; holds back what may yet become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.length = 0  # whole characters so far, held ones too
        self.held, self.tokens = "", list[Token]()

    def add(self, event: Event) -> Piece:
        data = b"" if event.token is None else self.tokenizer.token_bytes[event.token]
        if event.token is not None:
            self.tokens.append(
                Token(event.token, data.decode("utf-8", errors="replace"), self.length, event.logprob, event.top)
            )
        new = self.decoder.decode(data, final=event.token is None)
        self.length += len(new)
        self.held += new
        reason, cut = event.reason, first_stop(self.held, self.stop)
        if cut is not None:
            reason = STOP
        else:
            cut = len(self.held) - (open_stop(self.held, self.stop) if reason is None else 0)
        text, self.held = self.held[:cut], self.held[cut:]
        end = self.length - len(self.held)  # tokens that begin beyond this wait, or belong to a stop string
        tokens = [token for token in self.tokens if token.start < end or (not self.held and reason != STOP)]
        self.tokens = self.tokens[len(tokens) :]
        return Piece(event.sample, text, tuple(tokens), reason)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, reading from the left; of several that end there, the longest."""
    found = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    return min(found)[1] if found else None


def open_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
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
    seed: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[tuple[str, str]]:
    """(text with its prompt, reason of its end) of each sample. Training mode and torch's generators stay as they were."""
    keep_head = min(1, model.config.block_size - 1)
    options = SamplingOptions(max_new_tokens=max_new_tokens, temperature=temperature, keep_head=keep_head)
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
    return list(zip(texts, reasons, strict=True))
