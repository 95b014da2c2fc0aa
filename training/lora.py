"""--lora_rank: low-rank adapters (Hu et al. 2021) on the matrices of the blocks. The model's own weights are frozen: a
step makes neither gradients nor moments of them, and a checkpoint holds the adapters alone.

A matrix W becomes W + s · B·A, where A (r, in) is random and B (out, r) starts at 0, so that training begins with the
model as it was. checkpoint.py adds the product to W for everything that reads a model, and keeps W in RUN/base.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import Checkpoint
from common.weights import count_parameters, export_weights, trained_parameters
from errors import UserError
from model import GPT, MLP, Attention, Linear
from model_folder import LORA_A, LORA_B, Adapter, ModelFolder, save_base

# The scale is ALPHA / r, with the paper's 1 / r and 2 at rank 16: AdamW's first steps move all elements of B equally
# far, so that those of B·A then move as far at every rank, and a learning rate suits all of them.
ALPHA = 32.0


class AdaptedLinear(Linear):
    """x (…, in) → x Wᵀ + b + scale · (x Aᵀ) Bᵀ, (…, out). Takes over the weights of `layer`."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(self.scale * F.linear(x, self.lora_a), self.lora_b)


def add_adapters(model: GPT, rank: int, scale: float, seed: int) -> None:
    """Freezes the model and gives every matrix of its blocks an adapter, A drawn from the seed as in the paper's code:
    uniform up to 1 / √in. Raises UserError for a rank that saves nothing."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parents = [module for module in model.blocks.modules() if isinstance(module, (Attention, MLP))]
    children = [(parent, *child) for parent in parents for child in parent.named_children()]
    layers = [(parent, name, child) for parent, name, child in children if isinstance(child, nn.Linear)]
    sizes = [layer.weight.shape for _, _, layer in layers]
    largest = (sum(rows * columns for rows, columns in sizes) - 1) // sum(rows + columns for rows, columns in sizes)
    if rank > largest:
        advice = f"give --lora_rank={largest} or less, or" if largest else "to train this model,"
        raise UserError(
            f"--lora_rank={rank}: adapters of that rank have as many parameters as the matrices of this model; {advice}"
            " leave the flag out"
        )
    for parent, name, layer in layers:
        adapted = AdaptedLinear(layer, rank, scale)
        bound = 1 / math.sqrt(layer.in_features)
        with torch.no_grad():
            adapted.lora_a.copy_(torch.empty(adapted.lora_a.shape).uniform_(-bound, bound, generator=generator))
        setattr(parent, name, adapted)


def narrow_frozen(model: GPT, dtype: torch.dtype) -> None:
    """Keeps the frozen matrices under the adapters in the compute dtype of the run, to which autocast would convert
    them in every pass: the same numbers in half the memory. Such a model computes under autocast alone."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.weight.data = module.weight.data.to(dtype)


def adapt(model: GPT, source: Checkpoint | ModelFolder | None, rank: int | None, seed: int) -> None:
    """The adapters of a run whose model has its frozen weights: those of the checkpoint that is resumed, or new ones of
    `rank`; none where the run trains the weights. Raises UserError, ValueError where a checkpoint's do not fit."""
    if isinstance(source, Checkpoint):
        if source.model.adapter is not None:
            add_adapters(model, source.model.adapter.rank, source.model.adapter.scale, seed)
            import_adapters(model, source.model.own_tensors())
    elif rank is not None:
        add_adapters(model, rank, ALPHA / rank, seed)


@torch.no_grad()
def import_adapters(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where the tensors are not those of the model's adapters."""
    own = trained_parameters(model)
    if own.keys() != tensors.keys() or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise ValueError("its adapters are not those of this model")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def keep_base(model: GPT, run: Path, resumed: Checkpoint | None, initial: ModelFolder | None) -> Adapter | None:
    """What the checkpoints of the run say of its adapters, None where it has none. A new run gets its base. Raises
    UserError."""
    if resumed is not None:
        return resumed.model.adapter
    adapted = next((module for module in model.modules() if isinstance(module, AdaptedLinear)), None)
    if adapted is None:
        return None
    assert initial is not None
    frozen = {name: tensor for name, tensor in export_weights(model).items() if not name.endswith((LORA_A, LORA_B))}
    return Adapter(len(adapted.lora_a), adapted.scale, save_base(run, initial, frozen, model.config.to_dict()))


def describe(model: GPT) -> tuple[int, str]:
    """Parameters of the model, and the line about its adapters, "" where it has none."""
    adapters = {name: tensor for name, tensor in trained_parameters(model).items() if name.endswith((LORA_A, LORA_B))}
    count = sum(tensor.numel() for tensor in adapters.values())
    size = count_parameters(model) - count
    if not adapters:
        return size, ""
    rank = next(len(tensor) for name, tensor in adapters.items() if name.endswith(LORA_A))
    share = f"{count / size:.1%} as many as the model has"
    return size, f"adapters of rank {rank}: {count:,} parameters are trained, {share}; its own are kept as they are"
