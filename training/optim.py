"""Optimizers (AdamW, Muon, SGD), their parameter groups, learning rate schedules, and their state in a checkpoint.

Knows neither data nor the training loop. Reading order: the schedule, Optimizer, checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from common.memory import OutOfMemory, attempt
from errors import UserError
from model import GPT
from parallel.orthogonalizing import Divided
from parallel.processes import world_size
from parallel.sharding import first_row, local, whole
from training.muon import muon
from training.options import OptimizerOptions


@dataclass(frozen=True)
class Plan:
    """Length of a run in steps, and the number of final steps in which wsd decays. max_steps: None while the length is
    not known, before which nothing decays."""

    max_steps: int | None
    decay_steps: int

    @property
    def end(self) -> float:
        """max_steps, or infinity."""
        return math.inf if self.max_steps is None else self.max_steps

    @property
    def decay_start(self) -> float:
        """The first step of wsd's decay."""
        return self.end - self.decay_steps


def make_plan(max_steps: int | None, options: OptimizerOptions) -> Plan:
    """The plan for a number of steps; decay and warm-up do not overlap."""
    if max_steps is None:
        return Plan(None, options.decay_steps or 1)
    decay = options.decay_steps if options.decay_steps is not None else max_steps // 5
    return Plan(max_steps, max(1, min(decay, max_steps - options.warmup_steps)))


def learning_rate(step: int, plan: Plan, options: OptimizerOptions) -> float:
    """The learning rate of step number `step` (from 0). Warm-up is linear and reaches the peak at warmup_steps.

    inverse_sqrt: peak · √(warmup / (step + 1)) after warm-up (Vaswani et al. 2017, 5.3). wsd: Hu et al. 2024 (MiniCPM),
    with linear decay.
    """
    peak, low, warmup = options.learning_rate, options.min_learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    if options.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    if options.schedule == "wsd":
        return low + (peak - low) * min(1.0, max(0, plan.end - step) / plan.decay_steps)
    done = min(1.0, (step - warmup) / max(1, plan.end - warmup))
    if options.schedule == "linear":
        return peak + (low - peak) * done
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2


class Optimizer:
    """AdamW, Muon or SGD by parameter group, with torch.optim's interface and its functional implementations.

    torch.optim's classes import torch's compiler when constructed, which takes as long as importing torch
    (bench/NOTES.md). A group is {"kind", "params", "lr", "scale", …}; the other entries are arguments of its update
    function. "scale" is its learning rate as a multiple of the schedule's. `state`: parameter → name → tensor.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._done = 0  # groups that a failed step has updated

    @torch.no_grad()
    def allocate(self) -> None:
        """Makes what is missing of the state. step does it too; done early, what fits beside it can be measured."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state, rows = self.state.setdefault(parameter, {}), local(parameter)
                for name in MOMENTS[group["kind"]]:
                    if name not in state:
                        state[name] = torch.zeros_like(rows)
                for name in COUNTERS.get(group["kind"], ()):
                    if name not in state:
                        shape = rows.shape[:1] if name == "last_step" else ()
                        state[name] = torch.zeros(shape, dtype=torch.float32, device=parameter.device)

    def reset(self) -> None:
        """The state before the first step."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Updates the weights. A group is updated as a whole: its update function allocates first, then writes. Where
        memory runs out in between, another call goes on with the groups that are left, with the same gradients."""
        self.allocate()
        for group in self.param_groups[self._done :]:
            kind, parameters = group["kind"], group["params"]
            settings = {name: value for name, value in group.items() if name not in ("kind", "params", "scale")}
            gradients = [local(parameter.grad) for parameter in parameters]
            if kind != "adamw_rows":
                gradients = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]
            buffers = [[self.state[parameter][name] for parameter in parameters] for name in MOMENTS[kind]]
            if kind == "adamw":
                buffers.append([])  # max_exp_avg_sqs, which only amsgrad uses
            for name in COUNTERS.get(kind, ()):
                buffers.append([self.state[parameter][name] for parameter in parameters])
            UPDATES[kind]([local(parameter) for parameter in parameters], gradients, *buffers, **settings)
            self._done += 1
        self._done = 0

    def abandon_step(self) -> None:
        """Another call of `step` begins with the first group, also where memory ran out in the last one."""
        self._done = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()


def finish_step(step: Callable[[], object]) -> None:
    """Calls `step`, an optimizer's. Where memory runs out, the weights may be updated in part, so the gradients stay,
    and it is called once more to go on. Raises UserError where that fails too: a smaller micro-batch would not help."""
    for _ in range(2 if world_size() == 1 else 1):  # others do not repeat it
        with suppress(OutOfMemory):
            attempt(step)
            return
    raise UserError(
        "out of memory in the optimizer's step, which a smaller micro-batch does not change; end other programs that "
        "use the device and resume the run, or train a smaller model (--n_layer, --n_embd)"
    )


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales the gradients so that their common norm is at most max_norm → the norm before. Sparse ones stay sparse."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad._values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    norm = whole(nn.utils.get_total_norm(gradients))
    if max_norm is not None:
        torch._foreach_mul_([local(gradient) for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def adamw_rows(
    tables: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    last_steps: list[Tensor], steps: list[Tensor], *, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """AdamW for tables of which a step reads few rows: touches only the rows (R, C) that have a gradient.

    Gradients are sparse, or dense, and then rows of zeros have none. A row's moments and weights decay by
    the steps since its last gradient, last_steps (R,). In those steps AdamW would have moved the row on, by momentum;
    here it moves as far at once, on the guess that its next gradient is as many steps away: the sum of a geometric
    series. With a gradient in every step this is AdamW. (LazyAdam and torch.optim.SparseAdam let the moments rest.)
    """
    lists = (tables, gradients, exp_avgs, exp_avg_sqs, last_steps, steps)
    for table, gradient, exp_avg, exp_avg_sq, last_step, step in zip(*lists, strict=True):
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
        else:
            rows = gradient.any(dim=1).nonzero()[:, 0]
            values = gradient.index_select(0, rows)
        number = step + 1
        waited = (number - last_step.index_select(0, rows))[:, None]  # steps
        average = exp_avg.index_select(0, rows).mul_(beta1**waited).add_(values, alpha=1 - beta1)
        square = exp_avg_sq.index_select(0, rows).mul_(beta2**waited).addcmul_(values, values, value=1 - beta2)
        ratio = beta1 / math.sqrt(beta2)  # of a move to the one before it, once the gradients stop
        moves = (1 - ratio**waited) / (1 - ratio) if ratio < 1 else waited
        first, second = 1 - beta1 ** float(number), 1 - beta2 ** float(number)
        moved = table.index_select(0, rows).mul_((1 - lr * weight_decay) ** waited)
        moved.addcdiv_(average * moves, (square / second).sqrt_().add_(eps), value=-lr / first)
        for tensor, part in ((exp_avg, average), (exp_avg_sq, square), (table, moved)):
            tensor.index_copy_(0, rows, part)
        last_step.index_fill_(0, rows, float(number))
        step += 1


UPDATES: dict[str, Callable[..., None]] = {
    "adamw": partial(adamw, fused=True, amsgrad=False, maximize=False),
    "muon": muon,
    "adamw_rows": adamw_rows,
    "sgd": partial(sgd, dampening=0.0, nesterov=False, maximize=False, foreach=True),  # which allocates first
}
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw_rows": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum",),
    "sgd": ("momentum_buffer",),
}  # names as in torch.optim
COUNTERS = {"adamw": ("step",), "adamw_rows": ("last_step", "step")}


def make_optimizer(
    model: GPT, options: OptimizerOptions, dtype: torch.dtype = torch.float32, alone: bool = False
) -> Optimizer:
    """The optimizer over the parameters that are trained. Those with two dimensions or more have weight decay, the
    others none.

    dtype: the run's compute dtype; Muon orthogonalizes in bfloat16 if it is that, else in float32. alone: other
    processes do not take part.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    is_muon, in_blocks = options.optimizer == "muon", {id(p) for p in model.blocks.parameters()}
    matrices = [p for p in parameters if is_muon and p.dim() == 2 and id(p) in in_blocks]
    in_muon = {id(matrix) for matrix in matrices}
    tables = [] if model.ngrams is None or options.optimizer == "sgd" else [model.ngrams.weight]
    tables = [table for table in tables if table.requires_grad]
    others = [p for p in parameters if id(p) not in in_muon and all(p is not table for table in tables)]
    common: dict[str, Any] = {"lr": options.learning_rate, "scale": 1.0}
    if options.optimizer == "sgd":
        common |= {"kind": "sgd", "momentum": options.momentum}
    else:
        common |= {"kind": "adamw", "beta1": options.beta1, "beta2": options.beta2, "eps": options.adam_eps}
    groups = [
        {**common, "params": [p for p in others if p.dim() >= 2], "weight_decay": options.weight_decay},
        {**common, "params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if tables:
        groups.append({**common, "kind": "adamw_rows", "params": tables, "weight_decay": options.weight_decay})
    if matrices:
        group = {
            "kind": "muon",
            "params": matrices,
            "lr": options.learning_rate,
            "scale": options.muon_scale,
            "weight_decay": options.weight_decay,
            "momentum": options.muon_momentum,
            "steps": options.muon_steps,
            "dtype": torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
            "divided": Divided(matrices, alone),
        }
        groups.insert(0, group)
    return Optimizer([group for group in groups if group["params"]])


def optimizer_tensors(optimizer: Optimizer, model: GPT) -> dict[str, torch.Tensor]:
    """The optimizer's state for a checkpoint: `parameter name/state name` → tensor, without vocabulary padding; of a
    sharded model this process's rows."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = model.unpad(name, value, first_row(parameter)) if value.dim() else value
    return tensors


@torch.no_grad()
def load_optimizer_tensors(optimizer: Optimizer, model: GPT, tensors: dict[str, torch.Tensor]) -> None:
    """Restores the state of optimizer_tensors, and empties `tensors`, so that no second copy of it is in memory. Raises
    ValueError if it does not fit the model."""
    parameters = dict(model.named_parameters())
    for full_name in list(tensors):
        tensor = tensors.pop(full_name)
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise ValueError(f"the optimizer's state names {name!r}, which this model does not have")
        parameter = parameters[name]
        if tensor.dim() == 0:  # AdamW's step counter, on the parameter's device as fused AdamW requires
            optimizer.state.setdefault(parameter, {})[key] = tensor.to(parameter.device).clone()
            continue
        value = torch.zeros_like(local(parameter)[:, 0] if key == "last_step" else local(parameter))
        target = model.unpad(name, value, first_row(parameter))
        if target.shape != tensor.shape:
            raise ValueError(
                f"the optimizer's {full_name!r} has the shape {tuple(tensor.shape)}, expected {tuple(target.shape)}"
            )
        target.copy_(tensor)
        optimizer.state.setdefault(parameter, {})[key] = value
    for parameter in [p for group in optimizer.param_groups if group["kind"] == "adamw_rows" for p in group["params"]]:
        state = optimizer.state.get(parameter, {})
        if "step" in state:  # older checkpoints have no last_step: AdamW moved every row in every step
            state.setdefault("last_step", state["step"].expand(len(local(parameter))).clone())
