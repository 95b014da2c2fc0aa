"""The options of training, evaluation and logging. Those of model, optimizer and data are in their modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from common.option import fixed

if TYPE_CHECKING:
    from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True)
class TrainOptions:
    data: str = "python_stdlib"
    """Dataset name or folder, text file or folder (prepared first), or a corpus: python_stdlib, shakespeare."""
    resume: str | None = None
    """Run directory to resume from its last checkpoint (bitwise exact on a CPU)."""
    init_from: str | None = fixed(None)
    """Run, checkpoint or model folder with the initial weights and the tokenizer of a new run."""
    max_steps: Annotated[int, Ge(0)] = 2000
    """Number of optimizer steps."""
    budget_minutes: Annotated[float, Gt(0)] | None = None
    """Train for about this long: sets max_steps from the measured speed (stored in config.json)."""
    tokens_per_step: Annotated[int, Ge(1)] = fixed(8192)
    """Tokens per optimizer step; a multiple of block_size."""
    micro_batch_size: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Sequences of block_size tokens per forward pass; gradients accumulate over tokens_per_step. auto: what fits."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of each target's probability spread over the vocabulary; raises the logged loss, not the val loss."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model; auto: on CUDA, if it saves more time than it takes."""
    deterministic: bool = False
    """Bitwise reproducible training on a GPU, slower; a CPU always is."""

    def problems(self) -> list[str]:
        return [f"--{name}= is empty" for name in ("data", "resume", "init_from") if getattr(self, name) == ""]


@dataclass(frozen=True)
class EvalOptions:
    eval_interval: Annotated[int, Ge(1)] = 250
    """Steps between evaluations on the val split."""
    eval_tokens: Annotated[int, Ge(2)] | None = None
    """Evaluate on the first N tokens of the val split, and once at the end on all of it; none: always on all of it."""
    eval_only: bool = False
    """Evaluate the weights of --resume or --init_from on the whole val split and exit."""
    save_interval: Annotated[int, Ge(1)] | None = None
    """Steps between checkpoints; none: at every evaluation. A new best val loss is always saved."""
    sample_prompt: str = ""
    """Prompt of the sample shown at every evaluation; empty: a new document."""
    sample_tokens: Annotated[int, Ge(0)] = 100
    """Maximum length of these samples in tokens; 0: no samples."""
    sample_temperature: Annotated[float, Ge(0)] = 0.8
    """Temperature of these samples."""
    sample_seed: Annotated[int, Ge(0)] = 1337
    """Seed of these samples."""
    final_samples: Annotated[int, Ge(0)] = 3
    """Number of samples at the end of training."""


@dataclass(frozen=True)
class LoggingOptions:
    log_interval: Annotated[int, Ge(1)] = 10
    """Steps between log lines on the console and in metrics.jsonl."""
    wandb: Literal["online", "offline"] | None = None
    """Also log to Weights & Biases; none: metrics.jsonl only."""
    wandb_project: str = "sprout"
    """Project name at Weights & Biases."""
