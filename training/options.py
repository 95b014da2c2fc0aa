"""The options of training, optimizer, evaluation and logging. This file imports no torch, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal

from common.devices import GPUS, find_gpu
from common.option import did_you_mean, escaped, fixed, path
from training.cluster import MAX_GPUS

if TYPE_CHECKING:
    from annotated_types import Ge, Gt, Interval

DEFAULT_GPU, MAX_ROWS = "h100", 20  # of --gpus
TRACKERS = ("wandb", "tensorboard", "trackio")
"""Options that send the records elsewhere, too: trackers.py. config.json does not hand them on."""


@dataclass(frozen=True)
class TrainOptions:
    plan: bool = False
    """Print the plan for --data, which chooses all options that are not given, and stop. With gpus of a preset too."""
    gpus: str | None = None
    """With plan: also print what the run would take on so many GPUs: memory, time, failures, money. 64, or several for
    a table: 1,8,64,512. none: nothing of it."""
    gpu: str | None = None
    """With gpus: their kind: h100, h200, b200, a100, a100-40gb, l40s, rtx4090, mi300x. none: h100."""
    try_: Annotated[int, Interval(ge=2, le=32)] | None = None
    """Try so many settings of the plan in short runs on this very text, in half of --budget_minutes, and train the best
    one for the rest of them: learning rate, size, regularization. none: the plan alone."""
    resume: str | None = path(None)
    """Run directory to resume from its last checkpoint (bitwise exact on a CPU). auto: begin the run of --run, or go on
    with it where it has a checkpoint, so that one command does both."""
    from_: str | None = None
    """With resume: the checkpoint to go on from, best (by val loss) or step-N; those of later steps are set
    aside. none: the last one. A run that has diverged goes back by itself; this is for other rates."""
    init_from: str | None = fixed(None, path=True)
    """Run, checkpoint or model folder with the initial weights and the tokenizer of a new run."""
    keep_share: Annotated[float, Interval(ge=0, le=0.9)] | None = fixed(None)
    """With init_from: share of the windows that come from the text of those weights, so that it is not forgotten.
    none: a quarter, where that text is still there; 0: nothing but the new text."""
    lora_rank: Annotated[int, Interval(ge=1, le=65_536)] | None = fixed(None)
    """With init_from: train low-rank adapters of this rank on the matrices of the blocks, and keep the weights as they
    are. Takes less memory and disk, for models that are large for the machine: 8 to 64. none: train the weights."""
    teacher: tuple[str, ...] = path(())
    """Run, checkpoint or model folder to learn from, beside the text: its probabilities of the next token are a part of
    the targets (knowledge distillation), and its tokenizer is taken. May be repeated: the mean of them."""
    teacher_share: Annotated[float, Interval(gt=0, le=1)] = fixed(0.7)
    """That part. The logged train loss includes it, the val loss does not."""
    teachers: Annotated[int, Interval(ge=0, le=100)] = 0
    """Train so many models first, one after another, and then one that learns from them all, and from those of teacher.
    They share budget_minutes: the last one has twice as much as each of the others."""
    max_steps: Annotated[int, Interval(ge=0, le=10**9)] | None = 2000
    """Number of optimizer steps; none: as many as --patience allows (schedule wsd, constant or inverse_sqrt)."""
    budget_minutes: Annotated[float, Interval(gt=0, le=1_000_000)] | None = None
    """Train for about this long, a resumed run for so much longer: sets max_steps from the measured speed (stored in
    config.json)."""
    patience: Annotated[int, Interval(ge=1, le=10**6)] | None = None
    """Evaluations in a row without a clearly better val loss that end the run; with wsd they begin its decay, after
    which it ends. Better: by more than the standard error of the difference. none: the val loss ends no run."""
    tokens_per_step: Annotated[int, Interval(ge=1, le=2**30)] = fixed(8192)
    """Tokens per optimizer step; a multiple of block_size."""
    micro_batch_size: Annotated[int, Interval(ge=1, le=2**20)] | Literal["auto"] = "auto"
    """Sequences of block_size tokens per forward pass; gradients accumulate over tokens_per_step. auto: what fits."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of each target's probability spread over the vocabulary; raises the logged loss, not the val loss."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the training step; auto: on CUDA and on Linux's CPUs, if it saves more time than it takes."""
    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """How processes that torchrun has started share a model: each has all of it (ddp), its rows of every parameter
    (fsdp), or its rows of the model that its machine has (hsdp). auto: ddp where that fits into the devices' memory."""
    parallel_timeout: Annotated[float, Interval(ge=1, le=1_000_000)] = 600.0
    """Seconds for which a process waits for another one in a step, before the run ends with an error."""
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass, which computes the block again: less memory, a third
    more time."""
    cuda_graphs: bool = True
    """On CUDA, record a step of one micro-batch, and let the GPU repeat it without Python."""
    deterministic: bool = False
    """Bitwise reproducible training on a GPU, slower; a CPU always is."""

    def problems(self) -> list[str]:
        found = [f"--{name}= is empty" for name in ("resume", "init_from") if getattr(self, name) == ""]
        found += self._cluster_problems()
        if self.lora_rank is not None and self.init_from is None and self.resume is None:
            found.append(
                f"lora_rank={self.lora_rank} adapts the weights of a model that exists: add --init_from=MODEL, a run or"
                " a model folder"
            )
        return found

    def _cluster_problems(self) -> list[str]:
        found = []
        if self.gpus is not None and not read_gpus(self.gpus):
            found.append(
                f"gpus={self.gpus}: expected a number of GPUs from 1 to {MAX_GPUS:,}, or up to {MAX_ROWS} of them with"
                " commas, such as --gpus=64 or --gpus=1,8,64,512"
            )
        elif self.gpus is not None and not self.plan:
            found.append(f"gpus={self.gpus} only tells what such a run would take: add --plan, or leave --gpus out")
        elif self.gpus is not None and self.try_ is not None:
            found.append(f"gpus={self.gpus} is for one run, and try={self.try_} for several: leave one of them out")
        if self.gpu is not None and find_gpu(self.gpu) is None:
            known = f"this version knows {', '.join(GPUS)}"
            found.append(f"gpu={self.gpu[:60]}: no such GPU{did_you_mean(self.gpu, GPUS)}; {known}")
        elif self.gpu is not None and self.gpus is None:
            found.append(f"gpu={self.gpu} is the kind of --gpus: add --gpus=8 --plan, or leave --gpu out")
        return found


def read_gpus(text: str) -> list[int]:
    """The numbers of --gpus, without repetitions; none where the text is wrong."""
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        return []
    return numbers if len(numbers) <= MAX_ROWS and all(1 <= number <= MAX_GPUS for number in numbers) else []


@dataclass(frozen=True)
class OptimizerOptions:
    optimizer: Literal["adamw", "muon", "sgd"] = fixed("adamw")
    """adamw (fused), muon (for the matrices of the blocks, AdamW for the rest), or sgd with momentum."""
    learning_rate: Annotated[float, Ge(0)] = 1e-3
    """Peak learning rate."""
    muon_learning_rate: Annotated[float, Ge(0)] | None = None
    """Peak learning rate of Muon's matrices, on AdamW's scale; none: learning_rate. The schedule scales both."""
    muon_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """Muon: EMA decay of the momentum."""
    muon_steps: Annotated[int, Interval(ge=1, le=100)] = 5
    """Muon: Newton–Schulz iterations. 3 are cheaper and cost no loss in the small models measured."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """After warm-up: decay to min_learning_rate; wsd: constant, then linear decay; inverse_sqrt: the 2017 paper's."""
    warmup_steps: Annotated[int, Interval(ge=0, le=10**9)] = 100
    """Steps of linear warm-up from 0."""
    decay_steps: Annotated[int, Interval(ge=1, le=10**9)] | None = None
    """wsd: number of final steps in which it decays; none: a fifth of max_steps."""
    min_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Final learning rate of cosine, linear and wsd."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled weight decay of matrices and embeddings (SGD: L2 penalty); biases and norms have none."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """AdamW: EMA decay of the first moment (β1)."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """AdamW: EMA decay of the second moment (β2)."""
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW: added to the denominator (ε)."""
    ema_half_life: Annotated[float, Interval(gt=0, le=1)] | None = fixed(None)
    """Evaluate, save and sample an exponential moving average of the weights; its half-life as a share of the steps
    done (0.1: about the last tenth); none: the weights themselves."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """SGD: momentum."""
    grad_clip: Annotated[float, Gt(0)] | None = 1.0
    """Maximum gradient norm; none: no clipping."""

    @property
    def muon_scale(self) -> float:
        """Muon's learning rate as a multiple of `learning_rate`, which the schedule gives."""
        return 1.0 if self.muon_learning_rate is None else self.muon_learning_rate / self.learning_rate

    def problems(self) -> list[str]:
        found = []
        if self.min_learning_rate > self.learning_rate:
            found.append(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        if self.muon_learning_rate is not None and self.learning_rate == 0:
            found.append(
                f"muon_learning_rate={self.muon_learning_rate} needs a learning_rate above 0: it is a multiple of it"
            )
        return found


@dataclass(frozen=True)
class EvalOptions:
    eval_interval: Annotated[int, Interval(ge=1, le=10**9)] = 250
    """Steps between evaluations on the val split."""
    eval_tokens: Annotated[int, Interval(ge=2, le=10**12)] | None = None
    """Evaluate on the first N tokens of the val split, and at the end on all of it; none: always on all of it."""
    final_eval: bool = True
    """Evaluate on the whole val split after the last step, where eval_tokens leaves some of it out."""
    eval_only: bool = False
    """Evaluate the weights of --resume or --init_from on the whole val split and exit."""
    save_interval: Annotated[int, Interval(ge=1, le=10**9)] | None = None
    """Steps between checkpoints; none: at every evaluation. A new best val loss is always saved."""
    save_minutes: Annotated[float, Interval(gt=0, le=1_000_000)] | None = 15.0
    """Minutes after which a checkpoint is written where none has been meanwhile; none: never because of the time."""
    keep_interval: Annotated[int, Interval(ge=1, le=10**9)] | None = None
    """Steps between checkpoints that are never removed (milestones); none: only the newest two, the best one, and
    up to two that a diverged run could go back to."""
    async_save: bool = True
    """Write checkpoints while the training goes on, from a copy, where memory has room for one."""
    sample_prompt: str | None = escaped(None)
    r"""Prompt of the samples shown during training; \n, \t and \\ are escapes. Empty: a new document. none: a new
    document, or, where the text has fewer than twenty documents, words from its val split."""
    sample_tokens: Annotated[int, Interval(ge=0, le=10**6)] = 100
    """Maximum length of these samples in tokens; 0: no samples."""
    sample_temperature: Annotated[float, Ge(0)] = 0.8
    """Temperature of these samples."""
    sample_top_p: Annotated[float, Interval(gt=0, le=1)] | None = 0.95
    """Top-p of these samples: drawn from the smallest set of tokens whose total probability reaches this."""
    sample_seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1337
    """Seed of these samples."""
    final_samples: Annotated[int, Interval(ge=0, le=1000)] = 3
    """Number of samples at the end of training."""

    def leaves_out(self, n_val: int) -> bool:
        """Whether evaluations leave out some of the val split of n_val tokens, which is then scored at the end."""
        return self.final_eval and self.eval_tokens is not None and self.eval_tokens < n_val


@dataclass(frozen=True)
class LoggingOptions:
    log_interval: Annotated[int, Interval(ge=1, le=10**9)] = 10
    """Steps between log lines on the console and in metrics.jsonl."""
    wandb: Literal["online", "offline"] | None = None
    """Also log to Weights & Biases; none: metrics.jsonl only."""
    wandb_project: str = "sprout"
    """Project name at Weights & Biases."""
    tensorboard: bool = False
    """Also write event files for TensorBoard, with the samples, in RUN/tensorboard; `tensorboard --logdir=runs` shows
    those of all runs."""
    trackio: bool = False
    """Also log to trackio, on this machine alone, in the folder of all its projects (TRACKIO_DIR); `trackio show` opens
    them in a browser."""
    trackio_project: str = "sprout"
    """Project name in trackio."""
    verbose: bool = False
    """Print the reason of every automatic choice, which config.json always has."""

    @property
    def trackers(self) -> dict[str, str | bool]:
        """The options that ask for another program, by name, which is also that of its package."""
        return {name: getattr(self, name) for name in TRACKERS if getattr(self, name)}

    def problems(self) -> list[str]:
        return [missing_package(name) for name in self.trackers if not find_spec(name)]


def missing_package(name: str) -> str:
    """The message where the package of a tracker is not installed."""
    return f"--{name} needs the {name} package: pip install {name}"
