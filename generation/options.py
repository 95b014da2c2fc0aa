"""Options of sample.py: checkpoint, prompts and output (SampleScriptOptions), sampling (SamplingOptions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from common.option import escaped, path

if TYPE_CHECKING:
    from annotated_types import Ge, Interval


@dataclass(frozen=True)
class SampleScriptOptions:
    checkpoint: str = "best"
    """Which checkpoint of the run: best (lowest val loss), latest, or step-N."""
    prompt: str | None = escaped(None)
    r"""Prompt text to continue; without one, a new document is started. \n, \t and \\ are escapes; --prompt_file
    takes a text as it is."""
    prompt_file: str | None = path(None)
    """Read the prompt from this file (UTF-8); - for standard input."""
    prompts: str | None = path(None)
    """Read many prompts from this JSON Lines file, each a string or {"prompt": "…", "id": …}; - for standard input."""
    quantize: Literal["int8"] | None = None
    """int8: 8-bit weights, on CPUs only; a 124M model generates 1.9 times as fast on two cores, small ones slower."""
    num_samples: Annotated[int, Interval(ge=1, le=100_000)] = 1
    """Samples per prompt, generated in one batch."""
    output: Literal["text", "jsonl", "csv"] = "text"
    """Print samples as text, or as one JSON object per line with token ids, log-probabilities and finish reason. With
    --score: a table, a JSON object per token with its nats, or the table as csv."""
    interactive: bool = False
    """Interactive session: the model continues each line that you type; /help lists its commands."""
    novelty: bool = False
    """Mark what stands word for word in the training text; say how much that is, and how much of the val split does."""
    novelty_words: Annotated[int, Interval(ge=1, le=1000)] = 6
    """Shortest passage that --novelty marks, in words."""
    inspect: str | None = path(None)
    """Write an HTML page with the attention maps, scores and next-token probabilities of the prompt; no samples."""
    score: tuple[str, ...] = path(())
    """Score texts instead of sampling: bits per byte and nats a token of a file, of each file of a folder or a quoted
    glob, or of standard input (-); with --separator of each document. May be given several times."""
    score_end: bool = True
    """Count the end-of-sequence token after each scored document, as the val loss does; false suits excerpts."""
    eval_stride: Annotated[int, Interval(ge=1, le=2**24)] | None = None
    """How many tokens the window of --score moves on, at most block_size (none: that, as in the val loss). A smaller
    stride sees each token with at least block_size - stride tokens of context; its time is block_size / stride fold."""

    def problems(self) -> list[str]:
        found = []
        given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(self, name) is not None]
        if len(given) > 1:
            found.append(f"{' and '.join(f'--{name}' for name in given)} each set the prompt: use one of them")
        if self.interactive and (self.prompts is not None or "-" in (self.prompt_file, self.prompts)):
            found.append("--interactive reads from the keyboard: use --prompt or --prompt_file=FILE with it, at most")
        if self.interactive and (self.num_samples > 1 or self.output != "text"):
            found.append("--interactive shows one sample as text: remove --num_samples and --output")
        if self.inspect is not None and (
            self.prompts is not None
            or self.interactive
            or self.num_samples > 1
            or self.output != "text"
            or self.novelty
        ):
            found.append(
                "--inspect shows one prompt and draws no samples: use --prompt or --prompt_file, and remove --prompts, "
                "--interactive, --num_samples, --output and --novelty"
            )
        if "" in self.score:
            found.append("--score= is empty; give a file, a folder, a glob in quotes, or - for standard input")
        if self.output == "csv" and not self.score:
            found.append("--output=csv is the table of --score: add --score=FILE, or use --output=jsonl for samples")
        return found


@dataclass(frozen=True)
class SamplingOptions:
    """Filters in the order of application (as in Hugging Face), then the rules for the end and the context."""

    repetition_penalty: Annotated[float, Interval(ge=0.01, le=100)] = 1.0
    """Divide positive logits of tokens in prompt or text by this, multiply negative ones; > 1: less repetition."""
    presence_penalty: Annotated[float, Interval(ge=-1000, le=1000)] = 0.0
    """Subtract this from the logit of each token that was generated before."""
    frequency_penalty: Annotated[float, Interval(ge=-1000, le=1000)] = 0.0
    """Subtract this from a token's logit once for each time it was generated before."""
    temperature: Annotated[float, Ge(0)] = 0.8
    """Divide the logits by this: 0 always takes the likeliest token, 1 leaves them as they are, more is more random."""
    top_k: Annotated[int, Interval(ge=1, le=2**24)] | None = None
    """Sample from the k likeliest tokens only."""
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Sample from the smallest set of tokens whose total probability reaches this (nucleus sampling)."""
    min_p: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Sample only tokens whose probability is at least this fraction of the highest one."""
    max_new_tokens: Annotated[int, Interval(ge=0, le=10**9)] = 500
    """Maximum length of a sample, in tokens."""
    min_new_tokens: Annotated[int, Interval(ge=0, le=10**9)] = 0
    """Never draw end-of-sequence before a sample has this many tokens."""
    stop: tuple[str, ...] = escaped(())
    r"""Stop string: end a sample just before this text; \n, \t and \\ are escapes. May be given several times."""
    stop_at_eos: bool = True
    """End a sample when the end-of-sequence token is drawn."""
    prepend_eos: bool = True
    """Prepend the end-of-sequence token to the prompt: in training it came before every document."""
    keep_head: Annotated[int, Interval(ge=0, le=2**24)] = 1
    """First tokens that stay visible (attention sink) beyond block_size; of the others, the newer half."""
    logprobs: Annotated[int, Interval(ge=0, le=100)] | None = None
    """Report each token's unfiltered log-probability, and those of this many likeliest tokens (--output=jsonl)."""

    def problems(self) -> list[str]:
        found = []
        if self.min_new_tokens > self.max_new_tokens:
            found.append(f"--min_new_tokens={self.min_new_tokens} is more than --max_new_tokens={self.max_new_tokens}")
        if "" in self.stop:
            found.append("--stop= is empty; remove it, or give a text")
        return found
