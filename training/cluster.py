"""Training on many GPUs, as rules: which of --parallel's modes, who holds what, and what a GPU's memory must hold. Pure
functions of plain numbers, without torch and without files.

`choose_parallel` → `memory` → `choose_rows` (a micro-batch that fits), `largest` (a model that fits). The numbers of
the rules are at the top, those of the devices in common/devices.py. cluster_cost.py goes on with time, failures and
money, cluster_lines.py shows the result; config/cluster.py takes the sizes from the options of a run.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

from common.devices import Gpu

Mode = Literal["none", "ddp", "fsdp", "hsdp"]

# ---- The rules as numbers --------------------------------------------------------------------------------------------

NODE = 8  # GPUs
MAX_GPUS = 100_000
DDP_SHARE = 0.6  # of a device: up to which weights, gradients and moments are held by each; the rest is for activations
FLOAT, HALF = 4, 2  # bytes: weights, gradients, moments and checkpoints; matrices in products, activations
MAX_TOKENS = 65_536  # of a micro-batch, as in training/micro_batch.py
MAX_LOGITS = 2**28  # at a time, as in model.py
RESERVE_GIB, PROCESS_GIB, RESERVE_SHARE = 1.0, 1.0, 0.05  # context and workspaces; NCCL; fragmentation


# ---- What is known ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """rows: of the embedding in memory. layer_parameters: of one block; outer_parameters: all others. head_parameters:
    of the product with the head. attention_channels: H · D. kept: bytes for each token and layer that the backward pass
    needs. muon_flops: of a step."""

    n_layer: int
    n_embd: int
    block_size: int
    rows: int
    layer_parameters: int
    outer_parameters: int
    head_parameters: int
    attention_channels: int
    kept: int
    muon_flops: float = 0.0

    @property
    def parameters(self) -> int:
        return self.n_layer * self.layer_parameters + self.outer_parameters

    @property
    def layer_flops(self) -> int:
        """Of one block for a token: 6 for each weight, 12 · T · H · D for attention, masked scores included."""
        return 6 * self.layer_parameters + 12 * self.block_size * self.attention_channels

    @property
    def flops_per_token(self) -> int:
        return self.n_layer * self.layer_flops + 6 * self.head_parameters

    def scaled(self, width: int) -> ModelSize:
        """The same shape with another width, and layers in proportion to it."""
        ratio = width / self.n_embd
        return replace(
            self,
            n_layer=max(1, round(self.n_layer * ratio)),
            n_embd=width,
            layer_parameters=round(self.layer_parameters * ratio**2),
            outer_parameters=round(self.outer_parameters * ratio),
            head_parameters=round(self.head_parameters * ratio),
            attention_channels=round(self.attention_channels * ratio),
            kept=round(self.kept * ratio),
        )


@dataclass(frozen=True)
class Job:
    """How a model is trained. tokens: of the run, None where no length is given. parallel: None for what the rule says.
    micro_batch: rows, None for those that fit. moments: bytes for each parameter of the blocks, and of the others.
    average: an EMA of the weights is kept."""

    tokens_per_step: int
    tokens: int | None = None
    parallel: Mode | None = None
    micro_batch: int | None = None
    activation_checkpointing: bool = False
    moments: tuple[int, int] = (2 * FLOAT, 2 * FLOAT)
    average: bool = False

    def moment_bytes(self, model: ModelSize) -> int:
        blocks, others = self.moments
        return blocks * model.n_layer * model.layer_parameters + others * model.outer_parameters

    def state_bytes(self, model: ModelSize) -> int:
        """Weights, gradients, moments and the averaged weights."""
        return (2 + self.average) * FLOAT * model.parameters + self.moment_bytes(model)

    def checkpoint_bytes(self, model: ModelSize) -> int:
        return (1 + self.average) * FLOAT * model.parameters + self.moment_bytes(model)


# ---- Who holds what --------------------------------------------------------------------------------------------------


def choose_parallel(state_bytes: float, device_bytes: float, processes: int, per_node: int = NODE) -> tuple[Mode, str]:
    """What --parallel=auto means, and why. state_bytes: weights, gradients and moments. processes: of all nodes."""
    if processes == 1:
        return "none", "one process"
    takes, limit = f"weights, gradients and moments take {show_size(state_bytes)}", DDP_SHARE * device_bytes
    if state_bytes <= limit:
        return "ddp", f"{takes}, {state_bytes / device_bytes:.0%} of a GPU: each holds them all"
    most = f"more than {DDP_SHARE:.0%} of a GPU"
    if processes > per_node and processes % per_node == 0 and state_bytes <= per_node * limit:
        return "hsdp", f"{takes}, {most}: each node of {per_node} holds them once"
    return "fsdp", f"{takes}, {most}: held once by all {processes:,}"


def shard_processes(mode: Mode, processes: int, per_node: int = NODE) -> int:
    """Among how many processes one copy of the weights is divided."""
    return {"fsdp": processes, "hsdp": math.gcd(per_node, processes)}.get(mode, 1)


def show_size(size: float) -> str:
    unit, name = (2**20, "MiB") if size < 2**30 / 10 else (2**30, "GiB")
    return f"{size / unit:.3g} {name}" if size < 999 * unit else f"{size / unit:,.0f} {name}"


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory(model: ModelSize, job: Job, mode: Mode, processes: int, rows: int, device_bytes: float) -> dict[str, float]:
    """Bytes on one GPU by part, with a micro-batch of so many rows."""
    parts, tokens = shard_processes(mode, processes), rows * model.block_size
    share = model.parameters / parts
    found = {"weights": FLOAT * share, "gradients": FLOAT * share, "moments": job.moment_bytes(model) / parts}
    if job.average:
        found["averaged weights"] = FLOAT * share
    found["16-bit copies"] = HALF * float(model.parameters)
    if mode in ("fsdp", "hsdp"):  # the outer ones stay gathered, in float32; of the blocks this one, and the next twice
        found["16-bit copies"] = HALF * float(model.head_parameters + min(3, model.n_layer) * model.layer_parameters)
        found["gathered weights"] = FLOAT * float(model.outer_parameters)
        reduced = max(2 * FLOAT * model.outer_parameters, (HALF + FLOAT) * model.layer_parameters)  # and a copy of them
        found["reduced gradients"] = float(reduced)
    found["activations"] = float(tokens * model.n_layer * model.kept)
    if job.activation_checkpointing:
        found["activations"] = float(tokens * (FLOAT * model.n_layer * model.n_embd + model.kept))
    found["logits"] = HALF * min(tokens * model.rows, MAX_LOGITS) + FLOAT * (tokens + model.rows) * float(model.n_embd)
    reserve = RESERVE_GIB + PROCESS_GIB * (processes > 1)
    return found | {"reserve": reserve * 2**30 + RESERVE_SHARE * device_bytes}


def divisors(number: int, most: int) -> list[int]:
    """The divisors of a number up to `most`, the largest first."""
    return [size for size in range(max(1, min(number, most)), 0, -1) if number % size == 0]


def choose_rows(model: ModelSize, job: Job, mode: Mode, processes: int, rows: int, device_bytes: float) -> int:
    """The largest useful micro-batch that divides the rows of a process and fits; 1 where none fits."""
    if job.micro_batch is not None:
        return math.gcd(job.micro_batch, rows)
    sizes = divisors(rows, max(1, MAX_TOKENS // model.block_size))

    def fits(size: int) -> bool:
        return sum(memory(model, job, mode, processes, size, device_bytes).values()) <= device_bytes

    return next(filter(fits, sizes), 1)


def largest(model: ModelSize, job: Job, gpu: Gpu, processes: int, head: int = 64) -> ModelSize:
    """The largest model of this shape that fits with one row at a time: widths are multiples of a head's size."""

    def fits(heads: int) -> bool:
        size = model.scaled(head * heads)
        mode = choose_mode(size, job, gpu, processes)[0]
        return sum(memory(size, job, mode, processes, 1, gpu.memory_bytes).values()) <= gpu.memory_bytes

    high = next(heads for heads in (2**power for power in itertools.count()) if not fits(heads))
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return model.scaled(head * low)


def choose_mode(model: ModelSize, job: Job, gpu: Gpu, processes: int) -> tuple[Mode, str]:
    """The mode of a job, and why."""
    if processes > 1 and job.parallel not in (None, "none"):
        return job.parallel, "as given"
    return choose_parallel(job.state_bytes(model), gpu.memory_bytes, processes)
