"""The options of sample.py: what to sample from, how it is shown, how tokens are drawn, and the local server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

if TYPE_CHECKING:
    from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True)
class SampleScriptOptions:
    checkpoint: str = "best"
    """Which checkpoint of the run: best (lowest val loss), latest, or step-N."""
    prompt: str | None = None
    """Text to go on with; none: a new document."""
    prompt_file: str | None = None
    """File that holds the prompt (UTF-8); - for standard input."""
    prompts: str | None = None
    """File of many prompts in JSON lines, each a string or {"prompt": "…", "id": …}; - for standard input."""
    quantize: Literal["int8"] | None = None
    """int8: the matrices in eight bits, on CPUs: large models write 1.9 times as fast (124M, two cores), small ones slower."""
    num_samples: Annotated[int, Ge(1)] = 1
    """Samples to draw of each prompt, side by side in one batch."""
    output: Literal["text", "jsonl"] = "text"
    """How samples are printed: as text, or one JSON object a line with token ids, log-probabilities and the reason of the end."""
    interactive: bool = False
    """Write together with the model: it goes on with each line that you type; /help there lists the commands."""
    inspect: str | None = None
    """Write a page (HTML) that shows how the model reads the prompt: attention maps, scores step by step, the next token; no samples."""

    def problems(self) -> list[str]:
        found = []
        given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(self, name) is not None]
        if len(given) > 1:
            found.append(f"{' and '.join(f'--{name}' for name in given)} all give the prompt: use one of them")
        if self.interactive and (self.prompts is not None or "-" in (self.prompt_file, self.prompts)):
            found.append("--interactive reads from the keyboard: give it --prompt or --prompt_file=FILE at most")
        if self.interactive and (self.num_samples > 1 or self.output != "text"):
            found.append("--interactive shows one sample as text: leave --num_samples and --output out")
        if self.inspect is not None and (
            self.prompts is not None or self.interactive or self.num_samples > 1 or self.output != "text"
        ):
            found.append(
                "--inspect shows one prompt and draws no samples: give it --prompt or --prompt_file, and leave --prompts, "
                "--interactive, --num_samples and --output out"
            )
        return found


@dataclass(frozen=True)
class SamplingOptions:
    """In the order in which they are applied (after Hugging Face's): what may be drawn, then how a sample ends."""

    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Divide the logits of all tokens in the prompt and the text by this (multiply negative ones); above 1: fewer repetitions."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that were generated before."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time it was generated before."""
    temperature: Annotated[float, Ge(0)] = 0.8
    """Sharpness of the draws: 0 always takes the likeliest token, 1 draws as the model believes, more is wilder."""
    top_k: Annotated[int, Ge(1)] | None = None
    """Draw from the k likeliest tokens only."""
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Draw from the smallest set of tokens that holds this share of the probability (nucleus sampling)."""
    min_p: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Draw from tokens that are at least this share as likely as the likeliest one."""
    max_new_tokens: Annotated[int, Ge(0)] = 500
    """Length of a sample at most, in tokens."""
    min_new_tokens: Annotated[int, Ge(0)] = 0
    """Draw no end-of-sequence before a sample has this many tokens."""
    stop: tuple[str, ...] = ()
    r"""End a sample before this text (\n is a line break); may be given several times."""
    stop_at_eos: bool = True
    """End a sample when the end-of-sequence id is drawn."""
    prepend_eos: bool = True
    """Start with the end-of-sequence id, which is how every document started in training."""
    keep_head: Annotated[int, Ge(0)] = 1
    """Ids at the start that stay visible when a text outgrows block_size; of the rest the newer half stays."""
    logprobs: Annotated[int, Interval(ge=0, le=100)] | None = None
    """Report each token's log-probability before all filters, and those of this many likeliest tokens (--output=jsonl)."""

    def problems(self) -> list[str]:
        found = []
        if self.min_new_tokens > self.max_new_tokens:
            found.append(f"--min_new_tokens={self.min_new_tokens} is more than --max_new_tokens={self.max_new_tokens}")
        if "" in self.stop:
            found.append("--stop= is empty; leave it out, or give a text")
        return found
