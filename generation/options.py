"""The options of sample.py: what to sample from, and how tokens are drawn."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class SampleScriptOptions:
    checkpoint: str = "best"
    """Which checkpoint of the run: best (lowest val loss), latest, or step-N."""
    prompt: str | None = None
    """Text to go on with; none: a new document."""
    prompt_file: str | None = None
    """File that holds the prompt (UTF-8); - for standard input."""
    num_samples: Annotated[int, "1 <= x"] = 1
    """Samples to draw, side by side in one batch."""

    def problems(self) -> list[str]:
        if self.prompt is not None and self.prompt_file is not None:
            return ["--prompt and --prompt_file both give the prompt: use one of them"]
        return []


@dataclass(frozen=True)
class SamplingOptions:
    max_new_tokens: Annotated[int, "0 <= x"] = 500
    """Length of a sample at most, in tokens; it ends earlier at an end-of-sequence."""
    temperature: Annotated[float, "0 <= x"] = 0.8
    """Sharpness of the draws: 0 always takes the likeliest token, 1 draws as the model believes, more is wilder."""
    top_k: Annotated[int, "1 <= x"] | None = None
    """Draw from the k likeliest tokens only."""
    top_p: Annotated[float, "0 < x <= 1"] | None = None
    """Draw from the smallest set of tokens that holds this share of the probability (nucleus sampling)."""
    prepend_eos: bool = True
    """Start with the end-of-sequence id, which is how every document started in training."""
    stop_at_eos: bool = True
    """End a sample when the end-of-sequence id is drawn."""
    keep_head: Annotated[int, "0 <= x"] = 1
    """Ids at the start that stay visible when a text outgrows block_size; of the rest the newer half stays."""
