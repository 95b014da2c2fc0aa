"""Takes what the formulas of training/cluster.py need from the options of a run, and prints what it would cost on the
GPUs of --gpus. Reads no data: a vocabulary that only the text would tell is taken from the options."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

import config
from common.devices import GPUS, find_gpu
from common.weights import count_parameters, flops_per_token
from config.start import Start, read_start
from errors import UserError, quote
from model import GPT, GPTConfig
from prepare_data import PrepareOptions
from training.cluster import FLOAT, Job, ModelSize
from training.cluster_cost import estimate
from training.cluster_lines import describe_cluster
from training.options import DEFAULT_GPU, OptimizerOptions, TrainOptions, read_gpus

VOCABULARIES = {"gpt2": 50_257, "r50k_base": 50_257, "p50k_base": 50_281, "cl100k_base": 100_277, "o200k_base": 200_019,
                "bytes": 257, "char": 66}  # fmt: skip
"""By the option tokenizer. char: tinyshakespeare's 65 characters and EOS."""


def plan_preset(argv: Sequence[str]) -> int:
    """--plan of a preset: for the GPUs of --gpus alone, without its data. Returns the exit code. Raises UserError."""
    with ExitStack() as stack:
        return print_cluster(read_start(argv, stack))


def print_cluster(start: Start, vocab_size: int | None = None) -> int:
    """Prints the estimate for --gpus, where it is given. vocab_size: None where there is no text, and the options tell.
    Returns the exit code. Raises UserError."""
    train = start.options.section(TrainOptions)
    if train.gpus is None:
        return 0
    refuse_unknown(start)
    optimizer, job = start.options.section(OptimizerOptions), job_of(start.options)
    shape = replace(start.options.section(GPTConfig), vocab_size=vocab_size or vocabulary(start), eos_id=0)
    model = model_size(shape, optimizer)
    if job.tokens_per_step % model.block_size:
        raise UserError(
            f"tokens_per_step={job.tokens_per_step} is not a multiple of block_size={model.block_size}; use"
            f" --tokens_per_step={max(1, job.tokens_per_step // model.block_size) * model.block_size}"
        )
    name = find_gpu(train.gpu or DEFAULT_GPU)
    assert name is not None, "checked by TrainOptions"
    found = [estimate(model, job, GPUS[name], gpus) for gpus in read_gpus(train.gpus)]
    kind = name if train.gpu is not None else f"{name} (assumed; --gpu names another)"
    print("\n".join(describe_cluster(found, kind, job)))
    tokenizer = start.options.section(PrepareOptions).tokenizer
    if (
        vocab_size is None
        and start.with_tokenizer is None
        and tokenizer not in VOCABULARIES.keys() - {"char"} | {"bpe"}
    ):
        print(
            f"  --tokenizer={quote(tokenizer)}: the text would tell its number of ids; {shape.vocab_size:,} are assumed"
        )
    if train.teachers:
        print(f"  --teachers={train.teachers}: this is the first of {train.teachers + 1} models, one after another")
    return 0


def refuse_unknown(start: Start) -> None:
    """Raises UserError on what the formulas do not know."""
    train = start.options.section(TrainOptions)
    if train.lora_rank is not None:
        raise UserError(f"--gpus={train.gpus} does not know adapters; leave --lora_rank={train.lora_rank} out")
    if train.teacher:
        raise UserError(f"--gpus={train.gpus} does not know teachers; leave --teacher out")


def model_size(c: GPTConfig, optimizer: OptimizerOptions) -> ModelSize:
    """The sizes of a model, and of its optimizer."""
    with torch.device("meta"):
        model = GPT(c, seed=None)
    layer = sum(weight.numel() for weight in model.blocks[0].parameters())
    sides = [sorted(weight.shape) for weight in model.blocks.parameters() if weight.dim() == 2]
    muon = optimizer.muon_steps * sum(4 * rows**2 * columns + 2 * rows**3 for rows, columns in sides)
    found = ModelSize(
        c.n_layer, c.n_embd, c.block_size, c.padded_vocab_size, layer,
        count_parameters(model) - c.n_layer * layer, c.vocab_size * c.n_embd, c.n_head * c.head_size, kept_bytes(c),
        muon * (optimizer.optimizer == "muon"),
    )  # fmt: skip
    assert found.flops_per_token == flops_per_token(model)
    return found


def kept_bytes(c: GPTConfig) -> int:
    """Bytes for each token and layer that the backward pass needs, under autocast to 16 bits: the residual stream twice
    in float32; in 16 bits the norms' outputs, queries, keys, values, attention's output, the MLP's two or three widths.
    Of an H200's 12.9 and 13.6 GiB (124M, 32,768 tokens; README, "On a GPU") it tells 12.9 and 13.5."""
    queries, keys = c.n_head * c.head_size, c.kv_heads * c.head_size
    attention = 2 * (queries + keys) + c.qk_norm * (queries + keys)
    mlp = (3 if c.mlp == "swiglu" else 2) * c.hidden_size
    return 2 * 4 * c.n_embd + 2 * (2 * c.n_embd + attention + mlp)


def vocabulary(start: Start) -> int:
    """Number of token ids by the options alone."""
    if start.with_tokenizer is not None:
        return int(start.with_tokenizer.config["vocab_size"])
    prepare = start.options.section(PrepareOptions)
    return VOCABULARIES.get(prepare.tokenizer, prepare.vocab_size)


def job_of(options: config.Options) -> Job:
    """How the options train. A time budget is no length: its steps depend on the machine."""
    train, optimizer = options.section(TrainOptions), options.section(OptimizerOptions)
    is_timed = train.budget_minutes is not None or train.max_steps is None
    moments = {"adamw": (2 * FLOAT, 2 * FLOAT), "muon": (FLOAT, 2 * FLOAT), "sgd": (FLOAT, FLOAT)}[optimizer.optimizer]
    return Job(
        train.tokens_per_step,
        None if is_timed or not train.max_steps else train.max_steps * train.tokens_per_step,
        None if train.parallel == "auto" else train.parallel,
        train.micro_batch_size if isinstance(train.micro_batch_size, int) else None,
        train.activation_checkpointing,
        moments,
        optimizer.ema_half_life is not None,
    )
