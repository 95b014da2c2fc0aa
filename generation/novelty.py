"""sample.py --novelty: which dataset a model's samples are compared with, and how the result is printed or stored.

On a terminal a sample is printed when it is complete, with what is copied underlined. A pipe or a file gets the samples
as they are without --novelty, JSON Lines two more fields. What was found is told on standard error. Knows no model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from common.signature import own_texts
from common.tokenizer import Tokenizer
from errors import UserError
from generation.options import SampleScriptOptions
from generation.prompts import Prompt, complete_samples, print_jsonl, print_texts
from generation.text import Piece
from model_folder import TOKENIZER
from prepare_data.novelty import Copied, Novelty
from prepare_data.resolve import training_text
from terminal import print_marked, progress_bar

MAX_LISTED = 5  # passages of one sample
MAX_QUOTED = 70  # characters of a passage in a list


def open_novelty(
    model_folder: Path, state: Mapping[str, Any], data: str | None, script: SampleScriptOptions
) -> Novelty | None:
    """What finds copied passages of a model's samples; None without --novelty. state: of its checkpoint, {} without
    one. data: --data, if it was given. Raises UserError."""
    if not script.novelty:
        return None
    recorded = next(iter(own_texts(state)), {})
    with redirect_stdout(sys.stderr):  # standard output is for the samples
        try:
            dataset = training_text(data, recorded, model_folder / TOKENIZER)
        except UserError as error:
            raise UserError(f"--novelty: {error}") from None
    start = state.get("options", {}).get("init_from")
    if data is None and start:
        log(f"note: the text of {start}, where the weights began, is not searched; --data=PATH names it")
    with redirect_stdout(sys.stderr):
        return Novelty(dataset, script.novelty_words)


def open_for_page(
    model_folder: Path, state: Mapping[str, Any], data: str | None, script: SampleScriptOptions
) -> Novelty | str | None:
    """The same for a page, which is served without a dataset too, and then says why."""
    try:
        return open_novelty(model_folder, state, data, script)
    except UserError as error:
        if data is not None:
            raise
        log(f"note: {error}")
        return str(error)


def print_checked_texts(
    pieces: Iterable[Piece], prompts: list[str], novelty: Novelty, max_tokens: int
) -> tuple[int, list[Copied]]:
    """print_texts, with what each sample has copied. Returns the number of tokens, and what was found."""
    if not sys.stdout.isatty():
        texts = [""] * len(prompts)
        tokens = print_texts(_collected(pieces, texts), prompts)
        found = novelty.check(list(zip(prompts, texts, strict=True)))
        for number, copied in enumerate(found, 1):
            log(f"sample {number}: {describe(copied, novelty)}")
    else:
        tokens, found = 0, []
        with progress_bar("generating", len(prompts) * max_tokens, leave=False, unit=" tokens") as bar:
            for prompt, (text, drawn, reason) in zip(prompts, complete_samples(_counted(pieces, bar)), strict=True):
                found += novelty.check([(prompt, text)])
                bar.clear()
                if tokens:
                    print("---")
                tokens += len(drawn)
                print(prompt, end="", flush=True)
                print_marked(text, [(passage.start, passage.end) for passage, *_ in found[-1].passages])
                print(flush=True)
                log(f"sample {len(found)}: {reason}, {len(drawn)} tokens; {describe(found[-1], novelty)}")
    return tokens, found


def print_checked_jsonl(
    pieces: Iterable[Piece],
    prompts: list[Prompt],
    num_samples: int,
    tokenizer: Tokenizer,
    novelty: Novelty,
    *,
    logprobs: bool,
) -> tuple[int, list[Copied]]:
    """print_jsonl with the fields of `fields`. Returns the number of tokens, and what was found."""
    found = list[Copied]()

    def more(prompt: str, text: str) -> dict[str, Any]:
        found.extend(novelty.check([(prompt, text)]))
        return fields(found[-1], novelty)

    return print_jsonl(pieces, prompts, num_samples, tokenizer, logprobs=logprobs, more=more), found


def log(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _collected(pieces: Iterable[Piece], texts: list[str]) -> Iterator[Piece]:
    """The pieces, whose texts are added up by sample."""
    for piece in pieces:
        texts[piece.sample] += piece.text
        yield piece


def _counted(pieces: Iterable[Piece], bar: Any) -> Iterator[Piece]:
    """The pieces, whose tokens are counted in a progress bar."""
    for piece in pieces:
        bar.update(len(piece.tokens))
        yield piece


def describe(copied: Copied, novelty: Novelty) -> str:
    """How much of a sample is copied, in a line, and its longest passages, each in another line."""
    lines = [f"{copied.share:.1%} of {copied.characters:,} characters copied"]
    ranked = sorted(copied.passages, key=lambda found: -found.passage.words)
    for found in ranked[:MAX_LISTED]:
        lines.append(f"  {found.passage.words} words: {quoted(found.text)}, {novelty.describe(found)}")
    if len(ranked) > MAX_LISTED:
        lines.append(f"  and {len(ranked) - MAX_LISTED} shorter passages")
    return "\n".join(lines)


def summary(found: Sequence[Copied], novelty: Novelty) -> list[str]:
    """What all samples have copied, beside pieces of the val split of their length, and the longest passage."""
    characters = sum(copied.characters for copied in found)
    if not characters:
        return []
    share = sum(copied.copied for copied in found) / characters
    held_out = novelty.yardstick(characters // len(found))
    lines = [
        f"copied from the training text, in passages of {novelty.min_words} words or more: {share:.1%};"
        f" of the val split {held_out.share:.1%} ({held_out.pieces} pieces of its text as long as the samples)"
    ]
    longest = max(
        (copied.longest for copied in found if copied.longest), key=lambda one: one.passage.words, default=None
    )
    if longest:
        words, (before, after) = longest.passage.words, (longest.source.before, longest.source.after)
        lines.append(
            f"the longest passage has {words} words (of the val split {held_out.longest}):"
            f" {novelty.describe(longest)}:\n  …{one_line(before)}[[{one_line(longest.text)}]]{one_line(after)}…"
        )
    return lines


def quoted(text: str) -> str:
    """A passage in quotation marks, on one line, its middle left out if it is long."""
    line = one_line(text)
    half = MAX_QUOTED // 2
    return f'"{line}"' if len(line) <= MAX_QUOTED else f'"{line[:half]} … {line[-half:]}"'


def one_line(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\n", "⏎")


def fields(copied: Copied, novelty: Novelty) -> dict[str, Any]:
    """The fields of a sample in JSON: the share, and the passages by their characters in its text."""
    passages = [
        {
            "start": found.passage.start,
            "end": found.passage.end,
            "words": found.passage.words,
            "source": novelty.describe(found),
            "before": found.source.before,
            "after": found.source.after,
        }
        for found in copied.passages
    ]
    return {"copied": round(copied.share, 4), "passages": passages}
