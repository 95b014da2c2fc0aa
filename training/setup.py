"""What happens before the first step: automatic choices, the dataset, the model, the loss scale. train.py calls these
in order.

`flags` are the names of the options that a user gave on the command line, `argv` is the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoint import Checkpoint
from common.cuda_graphs import Recorder
from common.hardware import Choice, Hardware, choose_attention, require_determinism
from common.memory import OutOfMemory, attempt, require_memory
from common.run_directory import RunLock, claim_run
from common.tokenizer import PUBLISHED, tokenizer_from_dict
from common.weights import (
    build_for_weights,
    check_header,
    count_parameters,
    drawn_rows,
    gathered,
    import_rows,
    import_weights,
    weight_count,
)
from errors import UserError, quote
from files import DamagedFile
from model import GPT, AttentionPath, GPTConfig
from model_folder import ModelFolder, remove_base
from parallel.processes import agree, by_first, gather, local_world_size, summed, world_size
from parallel.sharding import SHARDED, Layout, make_mesh, replicate, shard
from prepare_data import PrepareOptions
from prepare_data.resolve import Chooser, log_dataset, resolve_data
from prepare_data.shards import Dataset, open_dataset
from training.average import WeightAverage
from training.cluster import choose_parallel
from training.compilation import compile_model, compiler_name
from training.data import MicroBatch, TrainBatches
from training.divergence import following, read_rollbacks, write_rollbacks
from training.evaluation import Evaluation
from training.kept_text import KeptText
from training.lora import adapt, describe, keep_base, narrow_frozen
from training.metrics import log
from training.micro_batch import choose_micro_batch, divisor, own_rows
from training.optim import make_optimizer
from training.options import EvalOptions, OptimizerOptions, TrainOptions
from training.state import TrainState
from training.step_cost import free_bytes
from training.step_graphs import Gradients, StepGraphs, obstacle
from training.teachers import taught

TRAINED_BYTES = 12  # of a weight that is trained, its gradient and one moment, in float32: the least that a run takes
# Options on which the bits of a step depend, and which a resumed run may change; further ones are in `environment`.
ROUNDING, ON_CUDA = (
    ("dtype", "attention", "micro_batch_size", "activation_checkpointing"),
    ("cuda_graphs", "deterministic"),
)
MIN_CONTEXT = 16  # tokens; with a shorter context a model learns little but frequencies


def choose_auto(
    train: TrainOptions,
    model_config: GPTConfig,
    attention: Literal["auto"] | AttentionPath,
    hardware: Hardware,
    kept: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Resolves every `auto` but that of compile, which depends on the model → (values, reasons), both by option. kept:
    the reasons stored by a resumed run."""
    if train.deterministic:
        require_determinism()
    size = train.micro_batch_size
    if "micro_batch_size" in kept and size != "auto" and world_size() > 1:  # chosen for another number of processes
        size = divisor(own_rows(train.tokens_per_step // model_config.block_size, model_config.block_size), size)
    micro_batch = choose_micro_batch(size, train.tokens_per_step, model_config, hardware)
    path = choose_attention(attention, hardware.device, hardware.dtype, model_config.head_size)
    reasons = {
        **{name: reason for name, reason in kept.items() if name != "parallel"},
        **hardware.reasons,
        **micro_batch.reasons,
        **path.reasons,
    }
    device = str(hardware.device) if world_size() == 1 else hardware.device.type  # each process has its own
    values = {"device": device, "dtype": hardware.dtype_name, "threads": hardware.threads}
    values |= {"attention": path.value, "micro_batch_size": micro_batch.value}
    return values, reasons


def open_data(
    data: str, prepare: PrepareOptions, resumed: Checkpoint | None, with_tokenizer: ModelFolder | None, flags: set[str],
    choose: Chooser | None = None,
) -> Dataset:  # fmt: skip
    """The dataset that --data names, prepared first where it is text, with the options that `choose` returns for it.
    with_tokenizer: the model whose tokenizer is taken. A resumed run must have the same tokens. Raises UserError."""
    if resumed is None:
        tokenizer = tokenizer_from_dict(with_tokenizer.tokenizer) if with_tokenizer else None
        dataset = resolve_data(data, prepare, tokenizer, flags, choose)
        name, known = prepare.tokenizer, (*PUBLISHED, "bpe", "bytes", "char")
        if "tokenizer" in flags and name in known and name != dataset.tokenizer.name:
            raise UserError(
                f"--tokenizer={name}: {dataset.folder} was prepared with {dataset.tokenizer.name}; leave the flag out"
            )
        return dataset
    recorded = resumed.state["dataset"]
    if "data" not in flags and (Path(recorded["path"]) / "dataset.json").exists():
        dataset = open_dataset(Path(recorded["path"]))
        log_dataset(dataset)
    else:
        dataset = resolve_data(data, prepare, tokenizer_from_dict(resumed.tokenizer))
    if dataset.fingerprint != recorded["fingerprint"]:
        raise UserError(
            f"{dataset.folder} holds other tokens (fingerprint {dataset.fingerprint[:12]}) than this run was trained on"
            f" ({recorded['fingerprint'][:12]}): resuming needs the same data; "
            "for other data start a new run with --init_from"
        )
    return dataset


def check_size(
    dataset: Dataset, data: str, train: TrainOptions, block_size: int, argv: Sequence[str], has_weights: bool = False
) -> None:
    """Raises UserError where a split is too small, with the command of `argv` changed so that it works. has_weights:
    the context is that of weights that exist, which only --init_from may cut."""
    n_train, n_val = len(dataset.train), len(dataset.val)
    if n_train > block_size and n_val >= 2:
        return
    small = f"{data} is too small: {n_train:,} tokens to train on and {n_val:,} to evaluate on"
    usable = [size for size in range(MIN_CONTEXT, min(block_size, n_train)) if train.tokens_per_step % size == 0]
    if has_weights and n_val >= 2 and not (usable and any(arg.startswith("--init_from=") for arg in argv)):
        raise UserError(f"{small}, and the weights have a context of {block_size}: give more text than one context")
    if n_val < 2 or not usable:
        raise UserError(
            f"{small}. A model needs some thousand characters of text, one that writes readable text a million; "
            "to see what training looks like: python train.py"
        )
    command = " ".join(["python train.py", *map(quote, argv), f"--block_size={usable[-1]}"])
    raise UserError(f"{small}, for a context of {block_size}. Give more text, or shorten the context: {command}")


def make_batches(
    dataset: Dataset, kept: KeptText, train: TrainOptions, model_config: GPTConfig, seed: int, hardware: Hardware
) -> TrainBatches:
    """The micro-batches of the steps. Needs a number for micro_batch_size. Raises UserError where the train split is
    shorter than a window."""
    block_size, dropout = model_config.block_size, model_config.dropout > 0
    rows, size = train.tokens_per_step // block_size, int(train.micro_batch_size)
    other = kept.train, kept.share
    return TrainBatches(dataset.train, block_size, rows, size, seed, hardware.device, dropout, *other)


def choose_layout(
    train: TrainOptions, argv: Sequence[str], model_config: GPTConfig, optim: OptimizerOptions, hardware: Hardware
) -> Choice:
    """How the processes share the model. What a preset or the run before asks for is left out where there is one
    process; in argv it is an error. Raises UserError."""
    size, wanted = world_size(), train.parallel
    if size == 1:
        if f"--parallel={wanted}" in argv and wanted not in ("auto", "none"):
            command = " ".join(["torchrun --nproc-per-node=2 -- train.py", *map(quote, argv)])
            raise UserError(f"--parallel={wanted} needs several processes, one for each GPU: {command}")
        return Choice("none", {})
    if wanted == "none":
        raise UserError(f"--parallel=none, and torchrun has started {size} processes; use --parallel=auto")
    obstacle = f"--lora_rank={train.lora_rank}" if train.lora_rank is not None else None
    if hardware.dtype == torch.float16:
        obstacle = "the loss scale of --dtype=float16"
    if wanted in SHARDED and obstacle is not None:
        raise UserError(f"--parallel={wanted}: {obstacle} needs the whole model in each process; use --parallel=ddp")
    per_machine = {*gather(local_world_size())}
    if wanted == "hsdp" and (len(per_machine) > 1 or size % local_world_size()):
        raise UserError("--parallel=hsdp needs equally many processes on each machine; use --parallel=fsdp")
    if wanted != "auto":
        return Choice(wanted, {})
    if obstacle is not None:
        return Choice("ddp", {"parallel": f"{obstacle} needs the whole model in each process"})
    memory = free_bytes(hardware) or math.inf
    memory = agree(memory / (local_world_size() if hardware.device.type == "cpu" else 1))
    per_parameter = {"adamw": 16, "muon": 12, "sgd": 12}[optim.optimizer]  # weights, gradients and moments, in float32
    per_parameter += 4 * (optim.ema_half_life is not None)
    with torch.device("meta"):
        state = per_parameter * count_parameters(GPT(model_config, None))
    layout, reason = choose_parallel(state, memory, size, min(per_machine) if len(per_machine) == 1 else size)
    return Choice(layout, {"parallel": reason})


def build_model(
    model_config: GPTConfig,
    attention: Literal["auto"] | AttentionPath,
    seed: int,
    source: Checkpoint | ModelFolder | None,
    train: TrainOptions,
    layout: Layout,
    hardware: Hardware,
) -> GPT:
    """The model on the device, with weights drawn from the seed or those of `source`,
    and with the adapters of a run that has any; of a sharded one the rows of this process. Raises UserError."""
    assert attention != "auto"
    count = weight_count(model_config)
    if hardware.device.type == "cpu" and layout not in SHARDED:
        require_memory((TRAINED_BYTES if source is None else 4) * count, f"a model of {count:,} weights")
    try:
        if layout in SHARDED:
            model = build_sharded(model_config, attention, seed, source, layout, hardware)
        else:
            model = build_whole(model_config, attention, seed, source, train.lora_rank).to(hardware.device)
    except ValueError as error:
        assert source is not None
        raise UserError(f"{source.path}: {error}; its weights and its config do not belong together") from error
    model.sparse_ngrams, model.recompute_blocks = world_size() == 1, train.activation_checkpointing
    return model.train()


def build_whole(
    model_config: GPTConfig,
    attention: AttentionPath,
    seed: int,
    source: Checkpoint | ModelFolder | None,
    lora_rank: int | None = None,
) -> GPT:
    """On the CPU. Raises UserError, ValueError."""
    if source is None:
        return GPT(model_config, seed, attention)
    tensors = source.frozen_tensors() if isinstance(source, Checkpoint) else source.model_tensors()
    if "position.weight" in tensors:  # of a context that was cut
        tensors["position.weight"] = tensors["position.weight"][: model_config.block_size]
    model = build_for_weights(model_config, tensors, attention)
    import_weights(model, tensors, take=True)
    adapt(model, source, lora_rank, seed)
    return model


def build_sharded(
    model_config: GPTConfig,
    attention: AttentionPath,
    seed: int,
    source: Checkpoint | ModelFolder | None,
    layout: Layout,
    hardware: Hardware,
) -> GPT:
    """This process's rows, on the device: those of the same weights, without a whole model in memory where that is
    possible. Raises UserError, ValueError."""
    mesh = make_mesh(layout, hardware.device)
    adapted = source is not None and (source.model if isinstance(source, Checkpoint) else source).adapter is not None
    if adapted or (source is None and model_config.first_attention == "recent"):  # made of whole matrices
        model = build_whole(model_config, attention, seed, source)
        shard(model, mesh, hardware.device, hardware.dtype)
        return model
    read = None
    if source is not None:
        reader = source.reader("model") if isinstance(source, Checkpoint) else source.reader()
        sizes, read = {name: [*size] for name, (_, size) in reader.layout.items()}, reader.rows
        if "position.weight" in sizes:
            sizes["position.weight"][0] = min(model_config.block_size, sizes["position.weight"][0])
        check_header(model_config, sizes)
    with torch.device("meta"):
        model = GPT(model_config, None, attention)
    shard(model, mesh, hardware.device, hardware.dtype)
    import_rows(model, read or drawn_rows(model, seed))
    return model


def make_forward(
    state: TrainState, batch: MicroBatch, teachers: Sequence[ModelFolder], train: TrainOptions, hardware: Hardware
) -> Callable[..., Tensor]:
    """The loss as train.update calls it: that of the model, compiled for batches like `batch` where the state says so,
    in DDP where several processes have all of it, and of the comparison with teachers. Raises UserError."""
    forward = compile_model(state.model, state, batch, hardware)
    if state.layout == "ddp":
        forward = state.module = replicate(state.model, hardware.device)
    return taught(forward, teachers, train.teacher_share, state.model, hardware)


def make_step(
    gradients: Gradients, state: TrainState, train: TrainOptions, hardware: Hardware
) -> tuple[Gradients, Callable[[], object]]:
    """What train.update calls: `gradients`, and the optimizer's step; by CUDA graphs where that is possible."""
    gradients, reason = summed(gradients, state.blame), obstacle(state.optimizer, hardware)
    if train.cuda_graphs and reason is None:
        torch.cuda.reset_peak_memory_stats(hardware.device)  # of an earlier run of this process
        graphs = StepGraphs(gradients, state, hardware.device, Recorder(hardware.device))
        return graphs.gradients, graphs.step
    if train.cuda_graphs and hardware.device.type == "cuda":
        log(f"steps are not recorded as CUDA graphs: {reason}")
    optimizer: Any = state.optimizer  # as torch's: it has the interface
    return gradients, partial(state.scaler.step, optimizer)


def announce(
    model: GPT, layout: Layout, hardware: Hardware, values: Mapping[str, Any], reasons: Mapping[str, str], why: bool
) -> None:
    """Prints the size of the model and the automatic choices, with their reasons if `why`."""
    size = model.config
    parameters, adapters = describe(model)
    print(
        f"model: {parameters:,} parameters, {size.n_layer} layers, {size.n_embd} channels, context {size.block_size}"
        + f"\n{adapters}" * bool(adapters)
    )
    compiled = "compiled" if values["compile"] else "not compiled"
    if not why:
        compiled += f": {reasons['compile']}" if "compile" in reasons else ""
        compiled += " (--verbose=true: why)"
    together = f"{world_size()} processes, {layout}: " if world_size() > 1 else ""
    size, path = values["micro_batch_size"], values["attention"]
    print(f"{together}{hardware.describe()}, micro-batch {size}, attention: {path}, {compiled}")
    for name, reason in reasons.items() if why else ():
        print(f"  {name}: {reason}")


def print_evaluation(source: Checkpoint | ModelFolder | None, result: Evaluation | None) -> int:
    """Prints the result of --eval_only, which has a source and is never stopped. Returns the exit code."""
    assert source is not None
    assert result is not None
    print(f"{source.path}: whole val split: {result.describe()}")
    return 0


def make_scaler(hardware: Hardware) -> torch.amp.GradScaler:
    """The loss scale that keeps float16 gradients from underflow; disabled for other dtypes."""
    return torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)


def open_run(
    name: str | None, default_name: str, source: Checkpoint | ModelFolder | None, stack: ExitStack,
    asked: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """The run directory: that of a resumed run, which is locked already, or a new one, locked in `stack`: `name`, else
    runs/DEFAULT_NAME-N. asked: see claim_run. Raises UserError."""
    if isinstance(source, Checkpoint):
        assert name is not None
        return Path(name)
    if source is not None:
        print(f"weights and tokenizer from {source.path}")

    def claim() -> Path:
        run = claim_run(name, default_name, asked=asked)
        stack.enter_context(RunLock(run))
        remove_base(run)
        return run

    run = by_first(claim)
    print(f"run: {run}; Ctrl-C stops it and saves")
    return run


def make_state(
    model: GPT, options: OptimizerOptions, rows: int, run: Path, resumed: Checkpoint | None,
    initial: ModelFolder | None, layout: Layout, compiles: bool, hardware: Hardware, values: Mapping[str, Any],
) -> TrainState:  # fmt: skip
    """The state of a new run, or the one that is resumed. rows: windows per step. values: the options, resolved. Raises
    UserError."""
    optimizer, scaler = make_optimizer(model, options, hardware.dtype), make_scaler(hardware)
    compiler = compiler_name(hardware) if compiles else "none"
    average = None if options.ema_half_life is None else WeightAverage(model, options.ema_half_life)
    adapter = by_first(partial(keep_base, model, run, resumed, initial))
    narrow_frozen(model, hardware.dtype)
    rounding = {name: values[name] for name in ROUNDING + ON_CUDA * (hardware.device.type == "cuda")}
    others = average, adapter, layout, rounding
    state = TrainState(model, optimizer, scaler, rows, initial is not None, compiler, *others)
    if resumed is not None:
        state.restore(resumed, hardware)
        state.new_rollbacks = new_rollbacks(run, state)
        state.progress.rollbacks += state.new_rollbacks
    optimizer.allocate()
    return state


def new_rollbacks(run: Path, state: TrainState) -> list[dict[str, Any]]:
    """The rollbacks that have led back to the checkpoint of a resumed run, which does not know them yet."""
    known = state.progress.rollbacks

    def read() -> list[dict[str, Any]]:
        found = read_rollbacks(run)
        new = following(found, len(known), state.step)
        if found != [*known, *new]:  # the run goes on from elsewhere: they are no part of its course
            with suppress(OSError):
                write_rollbacks(run, known)
        return new

    try:
        return by_first(read)
    except DamagedFile as error:
        log(f"the rollbacks of this run are not known: {error}")
        return []


def make_sampler(
    sample_texts: Callable[..., list[tuple[str, str]]], model: GPT, evals: EvalOptions, hardware: Hardware
) -> Callable[[int, int], list[tuple[str, str]]]:
    """A function (number of samples, seed) → (text, reason of its end) of each, by the options; no samples where their
    length is 0, or where memory does not suffice for one. Rank 0 draws them, from a whole copy of a sharded model.
    sample_texts: generation.text's, which lacks the model; tokenizer and prompt are bound."""
    settings: dict[str, Any] = {"max_new_tokens": evals.sample_tokens, "temperature": evals.sample_temperature}
    settings |= {"top_p": evals.sample_top_p, "autocast": hardware.autocast}

    def sample(count: int, seed: int) -> list[tuple[str, str]]:
        count = count if evals.sample_tokens > 0 else 0
        try:
            whole = gathered(model, hardware.device) if count else model
            draw = partial(sample_texts, whole, num_samples=count, seed=seed, **settings)
            return by_first(partial(attempt, draw))
        except OutOfMemory as error:
            log(f"no samples: {error}")
            return []

    return sample
