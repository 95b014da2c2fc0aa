"""What training on many GPUs takes: traffic, time of a step, failures, days, money. Closed forms of plain numbers,
without torch and without files.

`estimate` puts them together: the mode and the micro-batch of cluster.py → `step_time` → `Estimate`. `traffic` counts
the bytes of the collectives, `ring_seconds` what they take, `exposed_seconds` what of that no computation hides. The
numbers of the rules are at the top. tests/test_cluster.py compares them with published runs, and with collectives
counted at 512 processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from common.devices import Gpu
from training.cluster import (
    FLOAT,
    HALF,
    NODE,
    Job,
    Mode,
    ModelSize,
    choose_mode,
    choose_rows,
    memory,
    shard_processes,
)

# ---- The rules as numbers --------------------------------------------------------------------------------------------

# Share of `sustained` (common/devices.py) that a step reaches, low and high, by the width from which on it holds.
# 768: 0.50 (Muon) and 0.57 (AdamW) measured here on an H200 with 124M parameters. Wider: MosaicML's table of 2023 has
# 0.59 (350M), 0.60 to 0.70 (1B), 0.62 to 0.73 (3B), 0.66 to 0.75 (7B); llm.c 0.72, torchtitan 0.56 with recomputation.
EFFICIENCY = {0: (0.15, 0.40), 512: (0.30, 0.50), 768: (0.48, 0.60), 1536: (0.52, 0.70), 3072: (0.55, 0.74)}
# Seconds of a layer's kernels in a micro-batch, however few its tokens are: recorded, compiled, launched by Python one
# by one. Measured here on an H200, with Muon's step: 0.5 to 1.1 ms and 4.6 to 6.6.
LAYER_SECONDS = (0.0005, 0.0012, 0.0025)
LINK_SHARE, NETWORK_SHARE = 0.8, 0.7  # of a data sheet's bandwidth that NCCL's large collectives reach
HOP_SECONDS = (2e-6, 8e-6)  # of a ring, within a node and between two
# A step waits for the slowest of its GPUs: share of its time for each doubling of the nodes, low, expected and high.
# torchtitan lost 0.6 % from 1 node to 16 for each, MosaicML's A100 from 4 to 16 0.7 (13B) and 1.4 (7B).
WAITING = (0.0, 0.006, 0.014)
OPTIMIZER_BYTES = 32  # of memory traffic for each parameter: gradient norm, AdamW
BUCKET_BYTES = 25 * 2**20  # of DDP's first and last all-reduce
INPUT_TOKENS = 2e7  # a second and process: half of what one core here reads from the page cache
WRITE_RATE, MAX_WRITE_RATE = 0.5e9, 20e9  # bytes/s: of a process, with crc32, fsync and reading back; of a file system
FAILURES = 4.7e-4  # a GPU and day: Llama 3, 419 unexpected interruptions of 16,384 GPUs in 54 days
RESTART_SECONDS = 600.0  # from a failure to the first step
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: of a run whose length is not given


# ---- Traffic ---------------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes that one GPU sends: all-gathers and reduce-scatters of a micro-batch, all-reduces of a step."""

    gathered: float
    scattered: float
    reduced: float

    def step(self, micro_batches: int) -> float:
        return micro_batches * (self.gathered + self.scattered) + self.reduced


def traffic(model: ModelSize, mode: Mode, processes: int, per_node: int = NODE) -> Traffic:
    """Rings: an all-gather or reduce-scatter of S bytes among p sends (p − 1)/p · S, an all-reduce twice that. Blocks
    are gathered for the forward pass and again for the backward pass, the other weights once."""
    parts = shard_processes(mode, processes, per_node)
    copies, share = processes // parts, (parts - 1) / parts
    blocks = model.n_layer * model.layer_parameters
    gathered, scattered = HALF * 2 * blocks + FLOAT * model.outer_parameters, FLOAT * model.parameters
    reduced = 2 * (copies - 1) / copies * FLOAT * model.parameters / parts
    return Traffic(share * gathered, share * scattered, reduced)


def ring_seconds(size: float, members: int, gpu: Gpu, per_node: int = NODE) -> float:
    """An all-gather or a reduce-scatter of so many bytes in all, among processes that fill node after node. Between
    nodes all adapters of a node carry a part of the ring."""
    if members == 1:
        return 0.0
    nodes = math.ceil(members / per_node)
    rate, between = LINK_SHARE * gpu.link, 0
    if nodes > 1:
        rate, between = min(rate, NETWORK_SHARE * gpu.network * min(per_node, members)), nodes
    hops = (members - 1 - between) * HOP_SECONDS[0] + between * HOP_SECONDS[1]
    return size * (members - 1) / members / (1e9 * rate) + max(0.0, hops)


def all_reduce_seconds(size: float, members: int, gpu: Gpu, per_node: int = NODE) -> float:
    """Bytes of a ring, latency of a tree between the nodes."""
    nodes = math.ceil(members / per_node)
    latency = (min(members, per_node) - 1) * HOP_SECONDS[0] + math.log2(nodes) * HOP_SECONDS[1]
    bytes_alone = ring_seconds(size, members, gpu, per_node) - ring_seconds(0.0, members, gpu, per_node)
    return 2 * (bytes_alone + latency)


def rail_seconds(size: float, nodes: int, gpu: Gpu) -> float:
    """An all-reduce between the GPUs of the same place in each node, of all places at once."""
    rate = 1e9 * NETWORK_SHARE * gpu.network
    return 2 * ((nodes - 1) / nodes * size / rate + math.log2(nodes) * HOP_SECONDS[1])


# ---- Time ------------------------------------------------------------------------------------------------------------


class StepTime(NamedTuple):
    """Seconds: compute (launches: what of it is only the least time of the kernels), communication that nothing hides,
    the optimizer, and input that nothing hides."""

    compute: float
    launches: float
    communication: float
    optimizer: float
    input: float

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.optimizer + self.input

    @property
    def bound(self) -> str:
        """What takes most of it."""
        compute = "kernel launches" if self.launches > self.compute / 2 else "compute"
        names = {compute: self.compute, "communication": self.communication, "optimizer": self.optimizer}
        return max((names | {"input": self.input}).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Speed:
    """efficiency: share of the sustained FLOP/s. layer_seconds and waiting: of the tables."""

    efficiency: float
    layer_seconds: float = LAYER_SECONDS[1]
    waiting: float = WAITING[1]


def speeds(width: int) -> list[Speed]:
    """Fast, expected, slow."""
    low, high = EFFICIENCY[max(least for least in EFFICIENCY if least <= width)]
    return [Speed(*numbers) for numbers in zip((high, (low + high) / 2, low), LAYER_SECONDS, WAITING, strict=True)]


def step_time(
    model: ModelSize, job: Job, gpu: Gpu, mode: Mode, processes: int, rows: int, micro_batches: int, speed: Speed
) -> StepTime:
    """Of a step of so many micro-batches of so many rows on each GPU."""
    blocks = model.n_layer * model.layer_flops / model.flops_per_token
    repeated = 1 + job.activation_checkpointing * blocks / 3  # their forward passes
    rate, tokens = gpu.flops * gpu.sustained * speed.efficiency, rows * model.block_size
    products = tokens * model.flops_per_token * repeated / rate
    compute = max(products, model.n_layer * speed.layer_seconds)
    forward = compute * model.layer_flops / model.flops_per_token / 3 / repeated  # of one block
    exposed = exposed_seconds(model, gpu, mode, processes, micro_batches, compute, forward)
    parts, nodes = shard_processes(mode, processes), math.ceil(processes / NODE)
    optimizer = OPTIMIZER_BYTES * model.parameters / parts / (1e9 * gpu.bandwidth)
    optimizer += muon_seconds(model, gpu, mode, processes, rate)
    passes = micro_batches * compute
    waiting = speed.waiting * math.log2(nodes) * passes
    reading = micro_batches * tokens / INPUT_TOKENS
    return StepTime(
        passes, micro_batches * (compute - products), exposed + waiting, optimizer, max(0.0, reading - passes)
    )


def muon_seconds(model: ModelSize, gpu: Gpu, mode: Mode, processes: int, rate: float) -> float:
    """The orthogonalizations, each in one process (parallel/orthogonalizing.py), and the exchange of their results."""
    if not model.muon_flops:
        return 0.0
    matrices, sent = 4 * model.n_layer, HALF * model.n_layer * model.layer_parameters
    parts = shard_processes(mode, processes)
    if mode in ("fsdp", "hsdp"):
        exchange = 2 * ring_seconds(sent / parts, parts, gpu)
    else:
        exchange = ring_seconds(sent, processes, gpu)
    return model.muon_flops / min(processes, matrices) / rate + exchange


def exposed_seconds(
    model: ModelSize, gpu: Gpu, mode: Mode, processes: int, micro_batches: int, compute: float, forward: float
) -> float:
    """Communication of a step that no computation hides. compute: seconds of a micro-batch; forward: of one block."""
    if mode in ("none", "ddp"):
        bucket = min(model.parameters, max(BUCKET_BYTES / FLOAT, model.outer_parameters))  # of the embedding: the last
        whole, last = (all_reduce_seconds(FLOAT * size, processes, gpu) for size in (model.parameters, bucket))
        return 0.0 if processes == 1 else max(last, whole - 2 / 3 * compute)
    parts = shard_processes(mode, processes)
    gather = ring_seconds(HALF * model.layer_parameters, parts, gpu)
    scatter, outer = (
        ring_seconds(FLOAT * size, parts, gpu) for size in (model.layer_parameters, model.outer_parameters)
    )
    first_and_last = outer + gather + scatter + outer
    others = (model.n_layer - 1) * (max(0.0, gather - forward) + max(0.0, gather + scatter - 2 * forward))
    exposed = micro_batches * (first_and_last + others)
    if mode == "hsdp" and (nodes := processes // parts) > 1:
        whole, last = (rail_seconds(FLOAT * n / parts, nodes, gpu) for n in (model.parameters, model.outer_parameters))
        exposed += max(last, whole - 2 / 3 * compute)
    return exposed


# ---- Failures --------------------------------------------------------------------------------------------------------


def save_interval(save_seconds: float, mean_seconds: float) -> float:
    """Seconds between checkpoints that lose least, √(2 · save · mean time between failures) (Young 1974)."""
    return math.sqrt(2 * save_seconds * mean_seconds)


def writing_seconds(model: ModelSize, job: Job, mode: Mode, processes: int) -> float:
    """Of a checkpoint, which each process writes its shard of."""
    rate = min(MAX_WRITE_RATE, WRITE_RATE * shard_processes(mode, processes))
    return job.checkpoint_bytes(model) / rate


# ---- All of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """job: with the tokens_per_step that the GPUs divide. times: fast, expected, slow."""

    model: ModelSize
    job: Job
    gpu: Gpu
    gpus: int
    mode: Mode
    reason: str
    rows: int
    micro_batches: int
    memory: dict[str, float]
    times: tuple[StepTime, StepTime, StepTime]

    @property
    def used_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.used_bytes <= self.gpu.memory_bytes

    def with_job(self, job: Job) -> Estimate:
        """The same GPUs with another job."""
        return estimate(self.model, job, self.gpu, self.gpus)

    @property
    def sent_bytes(self) -> float:
        """By each GPU in a step."""
        return traffic(self.model, self.mode, self.gpus).step(self.micro_batches)

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Of a step: fast, expected, slow."""
        fast, expected, slow = (time.total for time in self.times)
        return fast, expected, slow

    @property
    def tokens_per_second(self) -> float:
        return self.job.tokens_per_step / self.seconds[1]

    @property
    def utilization(self) -> float:
        """Model FLOP utilization: of the data sheet's FLOP/s, without repeated ones."""
        return self.tokens_per_second * self.model.flops_per_token / self.gpus / self.gpu.flops

    @property
    def tokens(self) -> int:
        """Of the run, or of one of TOKENS_PER_PARAMETER where no length is given."""
        return self.job.tokens or TOKENS_PER_PARAMETER * self.model.parameters

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.job.tokens_per_step)

    @property
    def save_seconds(self) -> float:
        return writing_seconds(self.model, self.job, self.mode, self.gpus)

    @property
    def mean_seconds(self) -> float:
        """Between two failures."""
        return 86_400 / FAILURES / self.gpus

    @property
    def interval_seconds(self) -> float:
        return save_interval(self.save_seconds, self.mean_seconds)

    @property
    def interval_steps(self) -> int:
        """The same in steps, two digits of it."""
        return max(1, int(float(f"{self.interval_seconds / self.seconds[1]:.2g}")))

    @property
    def lost_share(self) -> float:
        """Of the time: saving, repeating what a failure lost, and starting again."""
        interval = self.interval_seconds
        return self.save_seconds / interval + (interval / 2 + RESTART_SECONDS) / self.mean_seconds

    @property
    def run_seconds(self) -> tuple[float, float, float]:
        """Fast, expected, slow, with what is lost by failures."""
        fast, expected, slow = (self.steps * seconds * (1 + self.lost_share) for seconds in self.seconds)
        return fast, expected, slow

    @property
    def failures(self) -> float:
        """Expected in the run."""
        return self.run_seconds[1] / self.mean_seconds

    @property
    def dollars(self) -> tuple[float, float]:
        """Low and high: the fast run at the low price, the slow one at the high price."""
        hours = [seconds / 3600 * self.gpus for seconds in self.run_seconds]
        return hours[0] * self.gpu.price[0], hours[2] * self.gpu.price[1]


def fitting_step(tokens_per_step: int, block_size: int, gpus: int) -> int:
    """The tokens of a step, or the next larger number whose rows the GPUs divide."""
    return gpus * block_size * math.ceil(tokens_per_step / (gpus * block_size))


def estimate(model: ModelSize, job: Job, gpu: Gpu, gpus: int, own: Sequence[Speed] | None = None) -> Estimate:
    """Everything for so many GPUs. own: fast, expected and slow speed, else those of the tables."""
    job = replace(job, tokens_per_step=fitting_step(job.tokens_per_step, model.block_size, gpus))
    mode, reason = choose_mode(model, job, gpu, gpus)
    all_rows = job.tokens_per_step // model.block_size // gpus
    rows = choose_rows(model, job, mode, gpus, all_rows, gpu.memory_bytes)
    used = memory(model, job, mode, gpus, rows, gpu.memory_bytes)
    fast, expected, slow = (
        step_time(model, job, gpu, mode, gpus, rows, all_rows // rows, speed) for speed in own or speeds(model.n_embd)
    )
    return Estimate(model, job, gpu, gpus, mode, reason, rows, all_rows // rows, used, (fast, expected, slow))
