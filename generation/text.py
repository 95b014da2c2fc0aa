"""Text around the engine: a model folder → model and tokenizer, prompt → ids, drawn ids → whole characters as they come."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import open_model_folder
from errors import UserError
from generation.engine import generate
from generation.options import SamplingOptions
from model import GPT, GPTConfig
from prepare_data.tokenizer import Tokenizer, tokenizer_from_dict


class Piece(NamedTuple):
    """What one token adds to the text of a sample ("" while a character is not complete); the last one has the reason of its end."""

    sample: int
    text: str
    reason: str | None


def load_model(folder: Path, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model of a model folder, in eval mode, with its tokenizer. Raises UserError."""
    saved = open_model_folder(folder)
    try:
        tokenizer = tokenizer_from_dict(saved.tokenizer)
        config = GPTConfig.from_dict(saved.config)
        if (config.vocab_size, config.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
            raise ValueError(
                f"the model has {config.vocab_size} ids with end-of-sequence {config.eos_id}, "
                f"its tokenizer {tokenizer.vocab_size} with {tokenizer.eos_id}: they do not belong together"
            )
        model = GPT(config, seed=None)
        model.import_state(saved.model_tensors())
    except ValueError as error:
        raise UserError(f"{folder}: {error}; copy the folder again from where it was written, or take another checkpoint") from error
    return model.to(device).eval(), tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str, prepend_eos: bool) -> list[int]:
    """Raises UserError where nothing is left to start from, or the tokenizer does not know a character."""
    ids = [tokenizer.eos_id] * prepend_eos + tokenizer.encode(prompt).tolist()
    if not ids:
        raise UserError("an empty prompt with --prepend_eos=false leaves nothing to start from; give a --prompt, or leave the flag out")
    return ids


def stream_texts(
    model: GPT, tokenizer: Tokenizer, prompt: str, options: SamplingOptions, *, num_samples: int, seed: int
) -> Iterator[Piece]:
    """Continues the prompt num_samples times; one piece a token, whole characters only. The prompt's own text is not repeated."""
    make_decoder = codecs.getincrementaldecoder("utf-8")
    decoders = [make_decoder(errors="replace") for _ in range(num_samples)]
    prompts = [prompt_ids(tokenizer, prompt, options.prepend_eos)] * num_samples
    for sample, token, reason in generate(model, prompts, options, seed):
        data = b"" if token is None else tokenizer.token_bytes[token]
        yield Piece(sample, decoders[sample].decode(data, final=token is None), reason)


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
    texts, reasons = [prompt] * num_samples, [""] * num_samples
    was_training = model.training
    model.eval()
    try:
        with autocast():
            for sample, text, reason in stream_texts(model, tokenizer, prompt, options, num_samples=num_samples, seed=seed):
                texts[sample] += text
                reasons[sample] = reason or ""
    finally:
        model.train(was_training)
    return list(zip(texts, reasons, strict=True))
