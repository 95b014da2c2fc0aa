"""What a training step costs on this machine, by shape: measured with two shapes, calculated for the others.

A pass over a token is taken to cost one constant per FLOP of its matrix products and another one per number that it
writes (norms, attention weights, logits); the optimizer's step one per FLOP of Muon and another one per weight. On a
GPU a pass has a constant per layer besides, however few its tokens are, and the optimizer's step has that in place of
the one per weight: kernels take a time to begin. Two shapes give these constants. The steps are real ones, with random
ids, recorded as CUDA graphs as training/step_graphs.py does it; their models are dropped.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from common.cuda_graphs import Recorder
from common.hardware import Hardware
from common.memory import attempt, is_out_of_memory, release_memory
from common.weights import count_parameters, flops_per_token
from model import GPT, AttentionPath, GPTConfig
from parallel.processes import world_size
from training.lora import add_adapters, narrow_frozen
from training.micro_batch import CPU_TOKENS, MEMORY_SHARE
from training.optim import Optimizer, clip_gradients, make_optimizer
from training.options import OptimizerOptions
from training.plan import Shape
from training.step_graphs import WARM_UP, obstacle

MEASURED_TOKENS = {"cpu": (1024,), "mps": (4096,), "cuda": (4096, 16_384)}  # of the passes that are timed
MEASURED_WIDTH = 512  # of the wider of the two measured models at most
TIMED_STEPS, TIMED_SECONDS = 8, 0.4  # of a model, whichever comes first, after at least one step
MAX_STEP_SECONDS = 0.5  # of the first model; if its step takes longer, there is no second one
# FLOPs that take as long as writing a number, or as an optimizer's step on a weight: two cores of a Xeon, bfloat16.
WRITTEN_FLOPS, WEIGHT_FLOPS = 2400.0, 9000.0
FORWARD_SHARE = 1 / 3  # of a pass
OPTIMIZER_FLOPS = 50.0  # of Muon's, that take as long on a GPU as its step on a weight: the weight is read and written
STATE_BYTES = 20  # per weight: the weight, its gradient, two moments, and temporary copies
NUMBERS_KEPT = 40  # per channel, layer and token, until the backward pass
CPU_MEMORY_SHARE = 0.7


class Counts(NamedTuple):
    """Of one shape: layers, with embedding and head as another one; weights, and those of the blocks; FLOPs and numbers
    written per token; FLOPs of Muon per step."""

    layers: int
    parameters: int
    block_parameters: int
    flops: int
    written: int
    muon_flops: int


class Seconds(NamedTuple):
    """Of forward and backward pass per token, of an optimizer step, and of a pass without tokens."""

    token: float
    update: float
    empty: float = 0.0

    def step(self, tokens: int) -> float:
        return self.empty + tokens * self.token + self.update


@dataclass
class StepCost:
    """The Cost of training/plan.py. config: the options of the model that no shape changes; saves: the share of a pass
    that compiled code saves; teachers: models that are evaluated beside it, uncompiled; graphs: steps are recorded
    where that is possible; lora_rank: of the adapters that are trained in place of the weights."""

    config: GPTConfig
    optimizer: OptimizerOptions
    hardware: Hardware
    attention: AttentionPath
    saves: float = 0.0
    teachers: Sequence[GPTConfig] = ()
    graphs: bool = True
    lora_rank: int | None = None
    pass_seconds: tuple[float, float] = (0.0, 0.0)  # per FLOP, per number written
    layer_seconds: float = 0.0  # per layer of a pass without tokens
    update_seconds: tuple[float, float] = (0.0, 0.0)  # per FLOP of Muon, per weight; on a GPU per layer, per the larger
    _counts: dict[Shape, Counts] = field(default_factory=dict)

    def parameters(self, shape: Shape) -> int:
        return self.counts(shape).parameters

    def block_parameters(self, shape: Shape) -> int:
        return self.counts(shape).block_parameters

    def step_seconds(self, shape: Shape, tokens: int) -> float:
        """Predicted seconds of a step of so many tokens, which are divided among the processes."""
        count, own = self.counts(shape), tokens / world_size()
        passes = (1 - self.saves) * self._pass(count, own)
        passes += sum(FORWARD_SHARE * self._pass(teacher, own) for teacher in self._teacher_counts)
        return passes + sum(
            seconds * work for seconds, work in zip(self.update_seconds, self._update(count), strict=True)
        )

    @cached_property
    def _teacher_counts(self) -> list[Counts]:
        return [self._count(teacher) for teacher in self.teachers]

    def _pass(self, count: Counts, tokens: float) -> float:
        """Seconds of forward and backward pass."""
        token = self.pass_seconds[0] * count.flops + self.pass_seconds[1] * count.written
        return tokens * token + count.layers * self.layer_seconds

    def _update(self, count: Counts) -> tuple[float, float]:
        """What update_seconds are multiplied with."""
        if self.hardware.device.type == "cuda":
            return count.layers, count.muon_flops + OPTIMIZER_FLOPS * count.parameters
        return count.muon_flops, count.parameters

    def memory_bytes(self, shape: Shape) -> int:
        """Roughly what training takes."""
        size = 4 if self.hardware.dtype == torch.float32 else 2
        tokens = CPU_TOKENS if self.hardware.device.type == "cpu" else shape.block_size
        activations = size * tokens * (NUMBERS_KEPT * shape.n_layer * shape.n_embd + 2 * self.config.vocab_size)
        return STATE_BYTES * self.parameters(shape) + activations

    def counts(self, shape: Shape) -> Counts:
        if shape not in self._counts:
            self._counts[shape] = self._count(self.with_shape(shape))
        return self._counts[shape]

    def _count(self, config: GPTConfig) -> Counts:
        with torch.device("meta"):
            model = GPT(config, seed=None)
        sides = [sorted(matrix.shape) for matrix in model.blocks.parameters() if matrix.dim() == 2]
        muon = self.optimizer.muon_steps * sum(4 * rows**2 * columns + 2 * rows**3 for rows, columns in sides)
        written = config.n_layer * (24 * config.n_embd + 3 * config.n_head * config.block_size)
        written += 3 * config.vocab_size
        is_muon = self.optimizer.optimizer == "muon"
        size = count_parameters(model), sum(weight.numel() for weight in model.blocks.parameters())
        return Counts(config.n_layer + 1, *size, flops_per_token(model), written, is_muon * muon)

    def with_shape(self, shape: Shape) -> GPTConfig:
        return replace(self.config, **shape._asdict())

    def measure(self, shapes: Sequence[Shape]) -> None:
        """Measures two models of few layers: with the smallest and with a large width of the shapes, or where these
        have one width, with different numbers of layers. On a machine so busy that the first one takes long, only
        that one."""
        first, second = shapes_to_measure(shapes)
        measured = [(self.counts(first), measure_shape(self, first))]
        if measured[0][1].step(MEASURED_TOKENS[self.hardware.device.type][-1]) < MAX_STEP_SECONDS:
            measured.append((self.counts(second), measure_shape(self, second)))
        self.pass_seconds = fit([(count.flops, count.written, took.token) for count, took in measured], WRITTEN_FLOPS)
        self.layer_seconds = max(took.empty / count.layers for count, took in measured)
        updates = [(*self._update(count), took.update) for count, took in measured]
        self.update_seconds = fit(updates, WEIGHT_FLOPS)
        release_memory()


def shapes_to_measure(shapes: Sequence[Shape]) -> tuple[Shape, Shape]:
    by_width = {shape.n_embd: shape for shape in shapes}
    small = by_width[min(by_width)]
    large = by_width[max((width for width in by_width if width <= MEASURED_WIDTH), default=small.n_embd)]
    if large.n_embd == small.n_embd:
        return small._replace(n_layer=1), small._replace(n_layer=3)
    return small._replace(n_layer=2), large._replace(n_layer=2)


def fit(points: Sequence[tuple[float, float, float]], ratio: float) -> tuple[float, float]:
    """x, y ≥ 0 with a · x + b · y = seconds for one or two points (a, b, seconds). With one point y is `ratio` times x.
    Where two points have no such x and y, one of these is 0 and the second point alone counts."""
    a, b, seconds = points[-1]
    if len(points) == 1:
        x = seconds / (a + ratio * b)
        return x, ratio * x
    first_a, first_b, first_seconds = points[0]
    determinant = first_a * b - a * first_b
    x, y = first_seconds * b - seconds * first_b, first_a * seconds - a * first_seconds
    if determinant and x / determinant >= 0 and y / determinant >= 0:
        return x / determinant, y / determinant
    is_steep = a * first_seconds < first_a * seconds  # the seconds grow faster than a
    return (seconds / a, 0.0) if is_steep else (0.0, seconds / b)


def measure_shape(cost: StepCost, shape: Shape) -> Seconds:
    """Medians of a few steps, the first ones (warm-up) left out. Raises UserError where memory runs out."""
    hardware = cost.hardware
    model = GPT(cost.with_shape(shape), 0, cost.attention)
    if cost.lora_rank is not None:
        add_adapters(model, cost.lora_rank, 1.0, seed=0)
        narrow_frozen(model, hardware.dtype)
    model.to(hardware.device).train()
    optimizer = make_optimizer(model, cost.optimizer, hardware.dtype, alone=True)  # rank 0 measures
    is_recorded = cost.graphs and obstacle(optimizer, hardware) is None
    recorder = Recorder(hardware.device) if is_recorded else None
    passes, update = list[tuple[int, float]](), 0.0
    for tokens in MEASURED_TOKENS[hardware.device.type]:
        rows = max(1, tokens // shape.block_size)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(cost.config.vocab_size, (rows, shape.block_size), generator=generator).to(hardware.device)

        def forward_and_backward(ids: Tensor = ids) -> None:
            with hardware.autocast():
                loss = model(ids, ids)
            loss.backward()
            clip_gradients(model.parameters(), 1.0)

        found = attempt(partial(time_step, forward_and_backward, optimizer, hardware, recorder))
        passes.append((ids.numel(), found[0]))
        update = found[1]
    (few, first), (many, last) = passes[0], passes[-1]
    if few == many:
        return Seconds(first / few, update)
    token = max(0.0, last - first) / (many - few)
    return Seconds(token, update, max(0.0, first - few * token))


def time_step(
    forward_and_backward: Callable[[], None], optimizer: Optimizer, hardware: Hardware, recorder: Recorder | None
) -> tuple[float, float]:
    """Median seconds of both passes and of the optimizer's step, recorded where there is a recorder."""
    run, update = forward_and_backward, optimizer.step
    if recorder is not None:
        with recorder.on_stream():
            for _ in range(WARM_UP):
                run()
                update()
                optimizer.zero_grad()
        try:
            run, update = recorder.record(run), recorder.record(update)
        except RuntimeError as error:  # training says it
            if is_out_of_memory(error):
                raise
            optimizer.abandon_step()
            recorder, run, update = None, forward_and_backward, optimizer.step
    seconds = list[tuple[float, float]]()
    while len(seconds) < 2 or (len(seconds) <= TIMED_STEPS and sum(map(sum, seconds[1:])) < TIMED_SECONDS):
        started = time.perf_counter()
        run()
        synchronize(hardware)
        passed = time.perf_counter()
        update()
        if recorder is None:
            optimizer.zero_grad()
        synchronize(hardware)
        seconds.append((passed - started, time.perf_counter() - passed))
    optimizer.zero_grad()
    first, second = zip(*seconds[1:], strict=True)
    return statistics.median(first), statistics.median(second)


def synchronize(hardware: Hardware) -> None:
    if hardware.device.type == "cuda":
        torch.cuda.synchronize(hardware.device)
    elif hardware.device.type == "mps":
        torch.mps.synchronize()


def free_bytes(hardware: Hardware) -> int | None:
    """Memory that a training may take; None where the system does not say."""
    if hardware.device.type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.mem_get_info(hardware.device)[0])
    try:
        return int(CPU_MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows
        return None
