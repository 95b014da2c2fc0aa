"""What a training step costs on this machine, by shape: measured with two shapes, calculated for the others.

A pass over a token is taken to cost one constant per FLOP of its matrix products and another one per number that it
writes (norms, attention weights, logits); the optimizer's step one per FLOP of Muon and another one per weight. Two
shapes give these constants. The steps are real ones, with random ids; their models are dropped.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from common.hardware import Hardware
from common.memory import attempt
from common.weights import count_parameters, flops_per_token
from model import GPT, AttentionPath, GPTConfig
from training.micro_batch import CPU_TOKENS, MEMORY_SHARE
from training.optim import clip_gradients, make_optimizer
from training.options import OptimizerOptions
from training.plan import Shape

MEASURED_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 16_384}  # of the passes that are timed
MEASURED_WIDTH = 512  # of the wider of the two measured models at most
TIMED_STEPS, TIMED_SECONDS = 8, 0.5  # of a model, whichever comes first, after at least two steps
STATE_BYTES = 20  # per weight: the weight, its gradient, two moments, and temporary copies
NUMBERS_KEPT = 40  # per channel, layer and token, until the backward pass
CPU_MEMORY_SHARE = 0.7


class Counts(NamedTuple):
    """Of one shape: weights; FLOPs and numbers written per token; FLOPs of Muon per step."""

    parameters: int
    flops: int
    written: int
    muon_flops: int


@dataclass
class StepCost:
    """The Cost of training/plan.py. config: the options of the model that no shape changes; saves: the share of a pass
    that compiled code saves."""

    config: GPTConfig
    optimizer: OptimizerOptions
    hardware: Hardware
    attention: AttentionPath
    saves: float = 0.0
    pass_seconds: tuple[float, float] = (0.0, 0.0)  # per FLOP, per number written
    update_seconds: tuple[float, float] = (0.0, 0.0)  # per FLOP of Muon, per weight
    _counts: dict[Shape, Counts] = field(default_factory=dict)

    def parameters(self, shape: Shape) -> int:
        return self.counts(shape).parameters

    def step_seconds(self, shape: Shape, tokens: int) -> float:
        """Predicted seconds of a step of so many tokens."""
        count = self.counts(shape)
        token = self.pass_seconds[0] * count.flops + self.pass_seconds[1] * count.written
        update = self.update_seconds[0] * count.muon_flops + self.update_seconds[1] * count.parameters
        return (1 - self.saves) * tokens * token + update

    def memory_bytes(self, shape: Shape) -> int:
        """Roughly what training takes."""
        size = 4 if self.hardware.dtype == torch.float32 else 2
        tokens = CPU_TOKENS if self.hardware.device.type == "cpu" else shape.block_size
        activations = size * tokens * (NUMBERS_KEPT * shape.n_layer * shape.n_embd + 2 * self.config.vocab_size)
        return STATE_BYTES * self.parameters(shape) + activations

    def counts(self, shape: Shape) -> Counts:
        if shape not in self._counts:
            with torch.device("meta"):
                model = GPT(self.with_shape(shape), seed=None)
            sides = [sorted(matrix.shape) for matrix in model.blocks.parameters() if matrix.dim() == 2]
            muon = self.optimizer.muon_steps * sum(4 * rows**2 * columns + 2 * rows**3 for rows, columns in sides)
            written = shape.n_layer * (24 * shape.n_embd + 3 * shape.n_head * shape.block_size)
            written += 3 * self.config.vocab_size
            is_muon = self.optimizer.optimizer == "muon"
            self._counts[shape] = Counts(count_parameters(model), flops_per_token(model), written, is_muon * muon)
        return self._counts[shape]

    def with_shape(self, shape: Shape) -> GPTConfig:
        return replace(self.config, **shape._asdict())

    def measure(self, shapes: Sequence[Shape]) -> None:
        """Measures two models of few layers: with the smallest and with a large width of the shapes, or where these
        have one width, with different numbers of layers."""
        measured = [(self.counts(shape), measure_shape(self, shape)) for shape in shapes_to_measure(shapes)]
        self.pass_seconds = fit([(count.flops, count.written, seconds) for count, (seconds, _) in measured])
        self.update_seconds = fit([(count.muon_flops, count.parameters, seconds) for count, (_, seconds) in measured])


def shapes_to_measure(shapes: Sequence[Shape]) -> tuple[Shape, Shape]:
    by_width = {shape.n_embd: shape for shape in shapes}
    small = by_width[min(by_width)]
    large = by_width[max((width for width in by_width if width <= MEASURED_WIDTH), default=small.n_embd)]
    if large.n_embd == small.n_embd:
        return small._replace(n_layer=1), small._replace(n_layer=3)
    return small._replace(n_layer=2), large._replace(n_layer=2)


def fit(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """x, y ≥ 0 with a · x + b · y = seconds for both points (a, b, seconds); where there are none, x = 0, or y = 0, and
    the second point alone counts."""
    (a, b, seconds), (more_a, more_b, more_seconds) = points
    determinant = a * more_b - more_a * b
    x, y = seconds * more_b - more_seconds * b, a * more_seconds - more_a * seconds
    if determinant and x / determinant >= 0 and y / determinant >= 0:
        return x / determinant, y / determinant
    is_steeper = more_a * seconds < a * more_seconds  # than in proportion to a
    return (more_seconds / more_a, 0.0) if is_steeper else (0.0, more_seconds / more_b)


def measure_shape(cost: StepCost, shape: Shape) -> tuple[float, float]:
    """Measured seconds: of forward and backward pass per token, and of the optimizer's step. Raises UserError where
    memory runs out."""
    hardware = cost.hardware
    model = GPT(cost.with_shape(shape), 0, cost.attention).to(hardware.device).train()
    optimizer = make_optimizer(model, cost.optimizer, hardware.dtype)
    rows = max(1, MEASURED_TOKENS[hardware.device.type] // shape.block_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(cost.config.vocab_size, (rows, shape.block_size), generator=generator).to(hardware.device)
    passes, updates = list[float](), list[float]()

    def step() -> None:
        started = time.perf_counter()
        with hardware.autocast():
            loss = model(ids, ids)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        synchronize(hardware)
        passed = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(hardware)
        passes.append(passed - started)
        updates.append(time.perf_counter() - passed)

    while len(passes) < 3 or (len(passes) <= TIMED_STEPS and sum(passes[1:] + updates[1:]) < TIMED_SECONDS):
        attempt(step)
    return statistics.median(passes[1:]) / ids.numel(), statistics.median(updates[1:])


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
