"""torch.compile of the training step: whether it pays, and its start.

On a GPU the whole model is compiled. On a CPU one block is, and its code serves all layers; the compiler is Inductor
with the shortcuts of common/inductor.py. What cannot be compiled runs eagerly, after a line that says why.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import model as model_file
from common.hardware import Choice, Hardware, triton_obstacle
from common.inductor import cache_folder, compiler_version, cpp_compiler, shorten_inductor, use_cache
from common.memory import OutOfMemory, attempt, is_out_of_memory
from common.weights import flops_per_token
from errors import UserError
from model import GPT, AttentionContext, Block, GPTConfig
from model_folder import LORA_A
from parallel.processes import world_size
from parallel.sharding import is_sharded
from training.data import MicroBatch
from training.metrics import log
from training.options import EvalOptions, TrainOptions
from training.state import TrainState

# On two cores of a Xeon with AMX (bench/NOTES.md): seconds until the first compiled step, with an empty cache and with
# a filled one, and the share of an eager step's time that compiled code saves. PyTorch has LayerNorm and GELU as one
# operation each; RMSNorm in float32, QK-norm, rotation and SwiGLU are many, which compiled code joins.
CPU_SECONDS, CPU_CACHED_SECONDS = 14.0, 5.0
CPU_SAVES = {torch.bfloat16: 0.3, torch.float32: 0.13}
CPU_SAVES_OF_FUSED = {torch.bfloat16: 0.1, torch.float32: 0.03}  # of models without any of these
SLOW_CPU_FLOPS = 1e10  # FLOP/s of an eager step; every CPU of today does more
# The same on an H200 with 16 cores, of a step recorded as CUDA graphs: 54 % of a model of 4 layers, 57 % of one of 12
# wide ones, after 14 and 21 s; PyTorch's own operations not recorded, 11 %. And what recorded steps take.
GPU_SECONDS, GPU_SAVES, GPU_SAVES_OF_FUSED = 30.0, 0.5, 0.1
GPU_FLOPS, GPU_LAYER_SECONDS = 6e13, 3e-4


def choose_compile(
    train: TrainOptions, evals: EvalOptions, model: GPT, batches: Sequence[MicroBatch], hardware: Hardware
) -> Choice:
    """Whether to compile the training step. auto: if that saves more of the run's time than it takes."""
    kind = hardware.device.type
    if evals.eval_only:
        return Choice(False, {})
    if train.compile != "auto":
        return Choice(train.compile, {})
    obstacle = find_obstacle(hardware)
    if kind == "cpu" and is_sharded(model):  # where the trial fails in one process, the others wait for it
        obstacle = "a sharded model on a CPU is compiled with --compile=true only"
    if obstacle is not None:
        return Choice(False, {"compile": obstacle})
    takes, saves = gain(model.config, hardware)
    if kind == "cpu" and (cache_folder(hardware.threads) / signature(model, batches[0], hardware)).exists():
        takes = CPU_CACHED_SECONDS
    saved = saves * expected_seconds(train, evals, model, batches, hardware)
    return Choice(saved > takes, {"compile": f"about {saved:,.0f} s saved against {takes:.0f} s of compiling"})


def find_obstacle(hardware: Hardware) -> str | None:
    """Why the step is not compiled unless asked for; None if it may be."""
    if hardware.device.type == "cuda":
        return triton_obstacle(hardware.device, (7, 0))
    return cpu_obstacle() if hardware.device.type == "cpu" else f"it was never tried on {hardware.device.type}"


def gain(config: GPTConfig, hardware: Hardware) -> tuple[float, float]:
    """Seconds that compiling takes, with an empty cache, and the share of an eager step's time that it saves."""
    many = config.norm == "rmsnorm" or config.qk_norm or config.positions == "rotary" or config.mlp == "swiglu"
    if hardware.device.type == "cpu":
        return CPU_SECONDS, (CPU_SAVES if many else CPU_SAVES_OF_FUSED)[hardware.dtype]
    return GPU_SECONDS, GPU_SAVES if many else GPU_SAVES_OF_FUSED


def cpu_obstacle() -> str | None:
    """Why a CPU's code is not compiled unless asked for; None if it may be."""
    if sys.platform != "linux":
        return f"compiled code was never tried on {sys.platform}; --compile=true tries it"
    if cpp_compiler() is None:
        return "there is no C++ compiler (g++), with which training would be faster"
    return None


def expected_seconds(
    train: TrainOptions, evals: EvalOptions, model: GPT, batches: Sequence[MicroBatch], hardware: Hardware
) -> float:
    """Rough duration of the run without torch.compile: the time budget; on a CPU the second of two measured
    micro-batches times their number, unless the run is short on any CPU. A run whose length is not known is taken to
    last ten times as long as its patience."""
    if train.budget_minutes is not None:
        return 60.0 * train.budget_minutes
    steps = train.max_steps
    if steps is None:
        steps = 10 * (train.patience or 1) * evals.eval_interval
    flops = flops_per_token(model) * train.tokens_per_step * steps / world_size()
    if hardware.device.type != "cpu":
        return flops / GPU_FLOPS + steps * (model.config.n_layer + 1) * GPU_LAYER_SECONDS
    at_most = flops / SLOW_CPU_FLOPS
    if at_most < CPU_CACHED_SECONDS:
        return at_most
    try:
        for _ in range(2):
            started = time.perf_counter()
            attempt(partial(run_micro_batch, model, batches[0], hardware))
            seconds = time.perf_counter() - started
    except OutOfMemory:  # the first step will find a micro-batch that fits
        model.zero_grad()
        return at_most
    return seconds * len(batches) * steps


def compile_model(model: GPT, state: TrainState, batch: MicroBatch, hardware: Hardware) -> Callable[..., Tensor]:
    """The model as the training step calls it, compiled where state.compiler says so.

    On a GPU the first step compiles; code for any number of rows would be slower, so a reduced micro-batch compiles
    again. On a CPU this compiles the block for micro-batches like `batch`, and prints what it does. Whatever goes wrong
    there, but a lack of memory, is printed, the model runs eagerly, and state.compiler is "none"."""
    if state.compiler == "none":
        return model
    if hardware.device.type != "cpu":
        if world_size() == 1:
            return torch.compile(model, dynamic=False)
        use_compiled(model)
        return model
    if cpp_compiler() is None:
        log("not compiled: there is no C++ compiler (g++)")
        state.compiler = "none"
        return model
    folder = cache_folder(hardware.threads)
    known = folder / signature(model, batch, hardware)
    seconds = CPU_CACHED_SECONDS if known.exists() else CPU_SECONDS
    log(f"compiling a block of the model, which takes about {seconds:.0f} s; its code is kept in {folder}")
    started, error = time.perf_counter(), None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as other:  # loaded code outlives its file
        for place in (folder, Path(other)):
            error = _compile_block(model, batch, hardware, place)
            if error is None:
                break
            if is_sharded(model):  # no other process would join in another trial
                raise UserError(f"the model could not be compiled ({error}); give --compile=false")
            log(f"the cache {place} could not be used: {error}")
    if error is not None:
        log("not compiled: training goes on without; --compile=false leaves the trial out")
        state.compiler = "none"
        return model
    log(f"compiled in {time.perf_counter() - started:.1f} s")
    state.compiler = compiler_name(hardware)
    return model


def _compile_block(model: GPT, batch: MicroBatch, hardware: Hardware, folder: Path) -> str | None:
    """Compiles, with the folder as cache. Returns what went wrong in one line, with the model as it was and without
    the cache, which may be damaged; else None. Raises only errors of memory."""
    try:
        use_cache(folder)
        shorten_inductor()
        torch.compiler.reset()
        use_compiled(model)
        run_micro_batch(model, batch, hardware)
        (folder / signature(model, batch, hardware)).touch()
    except (RuntimeError, OSError, AssertionError) as error:  # torch wraps others in RuntimeError
        for module in (model, *model.blocks):
            module.__dict__.pop("run_block", None)
            module.__dict__.pop("forward", None)
        model.zero_grad()
        if is_out_of_memory(error):
            raise
        if world_size() == 1:  # others may be using it
            shutil.rmtree(folder, ignore_errors=True)
        cause = getattr(error, "inner_exception", error)  # of a BackendCompilerFailed
        return f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
    return None


def use_compiled(model: GPT) -> None:
    """Makes forward passes with gradients call compiled blocks; one function serves all of them. Those of a sharded
    model have hooks, which gather their weights, around what is compiled."""
    if not is_sharded(model):
        model.run_block = partial(_with_gradient, torch.compile(_run_block, fullgraph=True, dynamic=False))
        return
    compiled = torch.compile(Block.forward, fullgraph=True, dynamic=False)
    for block in model.blocks:
        block.forward = partial(_in_training, compiled, block)


def _run_block(block: Block, x: Tensor, context: AttentionContext) -> Tensor:
    return block(x, context)


def _in_training(run: Callable[..., Tensor], block: nn.Module, x: Tensor, context: AttentionContext) -> Tensor:
    return (
        _with_gradient(run, block, x, context)
        if torch.is_grad_enabled()
        else Block.forward(cast("Block", block), x, context)
    )


def _with_gradient(run: Callable[..., Tensor], block: nn.Module, x: Tensor, context: AttentionContext) -> Tensor:
    """`run` with an x that has a gradient: that of the first block has none where embeddings are frozen, and its code
    would have to be compiled besides."""
    return run(block, x if x.requires_grad else x.detach().requires_grad_(), context)


def run_micro_batch(model: GPT, batch: MicroBatch, hardware: Hardware) -> None:
    """Forward and backward pass; the gradients are dropped."""
    x, y, dropout_seed = batch
    if dropout_seed is not None:
        torch.manual_seed(dropout_seed)
    with hardware.autocast():
        loss = model(x, y, reduction="sum")
    loss.backward()
    model.zero_grad()


def compiler_name(hardware: Hardware) -> str:
    """What compiles the training step: the bits of a run depend on it."""
    return f"inductor, {compiler_version()}" if hardware.device.type == "cpu" else "inductor"


def signature(model: GPT, batch: MicroBatch, hardware: Hardware) -> str:
    """Name of the file that says that the cache holds the code of this block."""
    source = hashlib.sha256(Path(model_file.__file__).read_bytes()).hexdigest()
    facts: list[object] = [model.config, model.attention, hardware.dtype, batch.x.shape, source]
    facts += [parameter.shape for name, parameter in model.blocks[0].named_parameters() if name.endswith(LORA_A)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32] + ".compiled"
