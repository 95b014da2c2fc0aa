"""The options of a training run, apart from the model's, the optimizer's and the data preparation's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from common.option import fixed

if TYPE_CHECKING:
    from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True)
class TrainOptions:
    data: str = "python_stdlib"
    """A dataset's name or folder, a text file or folder (prepared on the way), or a corpus: python_stdlib,
    shakespeare."""
    resume: str | None = None
    """Run directory to go on with, exactly where its last checkpoint stands."""
    init_from: str | None = fixed(None)
    """Run, checkpoint or model folder whose weights and tokenizer a new run starts from."""
    max_steps: Annotated[int, Ge(0)] = 2000
    """Optimizer updates in all."""
    budget_minutes: Annotated[float, Gt(0)] | None = None
    """Train about this long: max_steps then follows from the measured speed (stored in config.json)."""
    tokens_per_step: Annotated[int, Ge(1)] = fixed(8192)
    """Tokens of one update, over all machines; a multiple of block_size."""
    micro_batch_size: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Rows of block_size tokens that go through the model at once; the rest of an update is accumulated."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of each target's probability spread over the vocabulary; it raises the training loss that is shown, not
    the val loss."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model; auto: on CUDA only, since on a CPU it costs more than it brings."""
    deterministic: bool = False
    """Bit-exact repetition on a GPU, at some cost in speed; a CPU always repeats."""

    def problems(self) -> list[str]:
        return [f"--{name}= is empty" for name in ("data", "resume", "init_from") if getattr(self, name) == ""]


@dataclass(frozen=True)
class EvalOptions:
    eval_interval: Annotated[int, Ge(1)] = 250
    """Steps between evaluations on the val split."""
    eval_tokens: Annotated[int, Ge(2)] | None = None
    """Evaluate on the first N tokens of the val split (the whole of it once more at the end); none: always the
    whole."""
    eval_only: bool = False
    """Evaluate the weights of --resume or --init_from on the whole val split, print the result, train nothing."""
    save_interval: Annotated[int, Ge(1)] | None = None
    """Steps between checkpoints; none: at every evaluation. A new best is always saved."""
    sample_prompt: str = ""
    """What the sample shown at every evaluation starts with; empty: a new document."""
    sample_tokens: Annotated[int, Ge(0)] = 100
    """Length of these samples at most; 0: none are written."""
    sample_temperature: Annotated[float, Ge(0)] = 0.8
    """Temperature of these samples."""
    sample_seed: Annotated[int, Ge(0)] = 1337
    """Seed of these samples."""
    final_samples: Annotated[int, Ge(0)] = 3
    """Samples written when the training ends."""


@dataclass(frozen=True)
class LoggingOptions:
    log_interval: Annotated[int, Ge(1)] = 10
    """Steps between lines on the console and in metrics.jsonl."""
    wandb: Literal["online", "offline"] | None = None
    """Log to Weights & Biases too; none: metrics.jsonl alone."""
    wandb_project: str = "sprout"
    """Project name at Weights & Biases."""
