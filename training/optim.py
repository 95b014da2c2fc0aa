"""Which optimizer updates the weights, and how large a step it takes when."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from common.option import fixed
from model import GPT
from training.muon import muon

if TYPE_CHECKING:
    from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True)
class OptimizerOptions:
    optimizer: Literal["adamw", "muon", "sgd"] = fixed("adamw")
    """AdamW (fused where torch can); Muon for the matrices inside the blocks and AdamW for the rest; or SGD with
    momentum."""
    learning_rate: Annotated[float, Ge(0)] = 1e-3
    """Peak step size."""
    muon_learning_rate: Annotated[float, Ge(0)] | None = None
    """Peak step size of Muon's matrices, in AdamW's unit; none: learning_rate. The schedule scales both alike."""
    muon_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """Muon's memory of the gradient."""
    muon_steps: Annotated[int, Ge(1)] = 5
    """Newton–Schulz steps that orthogonalise an update; 3 cost less and lost nothing in the small models measured."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """After the warm-up: cosine or linear to the minimum; wsd: stay, then decay linearly; the 2017 paper's; stay."""
    warmup_steps: Annotated[int, Ge(0)] = 100
    """Steps over which the learning rate rises from 0."""
    decay_steps: Annotated[int, Ge(1)] | None = None
    """Last steps, in which wsd decays; none: a fifth of max_steps."""
    min_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Where cosine, linear and wsd end."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decay of matrices (embeddings included); biases and norms are not decayed."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """AdamW's memory of the gradient."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """AdamW's memory of the squared gradient."""
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's guard against division by 0."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """SGD's memory of the gradient."""
    grad_clip: Annotated[float, Gt(0)] | None = 1.0
    """Gradients are scaled down to this norm; none: never."""

    @property
    def muon_scale(self) -> float:
        """Muon's learning rate as a multiple of the other parameters', which schedules speak of."""
        return 1.0 if self.muon_learning_rate is None else self.muon_learning_rate / self.learning_rate

    def problems(self) -> list[str]:
        found = []
        if self.min_learning_rate > self.learning_rate:
            found.append(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        if self.muon_learning_rate is not None and self.learning_rate == 0:
            found.append(
                f"muon_learning_rate={self.muon_learning_rate} needs a learning_rate above 0, whose schedule it follows"
            )
        return found


@dataclass(frozen=True)
class Plan:
    """How long a run is, and how many of its last steps wsd decays in."""

    max_steps: int
    decay_steps: int


def planned(max_steps: int, options: OptimizerOptions) -> Plan:
    """The plan for a number of steps; the decay takes at most what the warm-up leaves."""
    decay = options.decay_steps if options.decay_steps is not None else max_steps // 5
    return Plan(max_steps, max(1, min(decay, max_steps - options.warmup_steps)))


def learning_rate(step: int, plan: Plan, options: OptimizerOptions) -> float:
    """The learning rate of the update number `step` (from 0). Warm-up is linear and reaches the peak at warmup_steps.

    inverse_sqrt falls with 1/√step from the end of the warm-up on (Vaswani et al. 2017, 5.3, with the peak as the
    unit); wsd: Hu et al. 2024 (MiniCPM), with a linear decay.
    """
    peak, low, warmup = options.learning_rate, options.min_learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    if options.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    if options.schedule == "wsd":
        return low + (peak - low) * min(1.0, max(0, plan.max_steps - step) / plan.decay_steps)
    done = min(1.0, (step - warmup) / max(1, plan.max_steps - warmup))
    if options.schedule == "linear":
        return peak + (low - peak) * done
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2


class Optimizer:
    """AdamW, Muon or SGD, by group, with the interface of torch.optim's classes and its functions inside.

    Those classes import torch's compiler when they are made, which took as long as importing torch itself
    (bench/NOTES.md). A group is {"kind", "params", "lr", "scale", …}, the rest being what its function takes; "scale"
    is its learning rate as a multiple of the schedule's. `state` holds tensors by parameter and name.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            kind, parameters = group["kind"], group["params"]
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS[kind]}
                    if kind == "adamw":
                        self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            settings = {name: value for name, value in group.items() if name not in ("kind", "params", "scale")}
            gradients = [parameter.grad for parameter in parameters]
            memories: list[list[Tensor]] = [
                [self.state[parameter][name] for parameter in parameters] for name in MOMENTS[kind]
            ]
            if (
                kind == "adamw"
            ):  # its function wants an empty list for the largest second moments, which amsgrad would keep
                memories += [[], [self.state[parameter]["step"] for parameter in parameters]]
            UPDATES[kind](parameters, gradients, *memories, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()


UPDATES: dict[str, Callable[..., None]] = {
    "adamw": partial(adamw, fused=True, amsgrad=False, maximize=False),
    "muon": muon,
    "sgd": partial(sgd, dampening=0.0, nesterov=False, maximize=False),
}
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum",),
    "sgd": ("momentum_buffer",),
}  # as torch.optim calls them


def make_optimizer(model: GPT, options: OptimizerOptions, dtype: torch.dtype = torch.float32) -> Optimizer:
    """The optimizer over the model's parameters; those with two dimensions or more decay, the rest do not.

    dtype: what the device multiplies fastest.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if options.optimizer == "muon" else []
    taken = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    common: dict[str, Any] = {"lr": options.learning_rate, "scale": 1.0}
    if options.optimizer == "sgd":
        common |= {"kind": "sgd", "momentum": options.momentum}
    else:
        common |= {"kind": "adamw", "beta1": options.beta1, "beta2": options.beta2, "eps": options.adam_eps}
    groups = [
        {**common, "params": [p for p in others if p.dim() >= 2], "weight_decay": options.weight_decay},
        {**common, "params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if matrices:
        orthogonalization = {
            "steps": options.muon_steps,
            "dtype": torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        }
        rates = {"lr": options.learning_rate, "scale": options.muon_scale, "weight_decay": options.weight_decay}
        groups.insert(
            0, {"kind": "muon", "params": matrices, "momentum": options.muon_momentum, **rates, **orthogonalization}
        )
    return Optimizer([group for group in groups if group["params"]])


def optimizer_tensors(optimizer: Optimizer, model: GPT) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter name/state name` → tensor, for the checkpoint; vocabulary padding is left
    out."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = model.unpad(name, value) if value.dim() else value
    return tensors


@torch.no_grad()
def load_optimizer_tensors(optimizer: Optimizer, model: GPT, tensors: dict[str, torch.Tensor]) -> None:
    """Puts optimizer_tensors back. Raises ValueError where they are not this model's."""
    own = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in own:
            raise ValueError(f"the optimizer's state names {name!r}, which this model does not have")
        parameter = own[name]
        if tensor.dim() == 0:  # a step counter: fused AdamW keeps it beside the parameter
            optimizer.state.setdefault(parameter, {})[key] = tensor.to(parameter.device).clone()
            continue
        value = torch.zeros_like(parameter)
        target = model.unpad(name, value)
        if target.shape != tensor.shape:
            raise ValueError(
                f"the optimizer's {full_name!r} has the shape {tuple(tensor.shape)}, expected {tuple(target.shape)}"
            )
        target.copy_(tensor)
        optimizer.state.setdefault(parameter, {})[key] = value
