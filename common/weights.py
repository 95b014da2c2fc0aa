"""Export and import of a model's weights (vocab_size rows, no padding); counts of parameters and FLOPs. No file I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from model import GPT, AttentionPath, GPTConfig

MAX_TABLE_BYTES = 2**31  # of a stored model's position table: 2M positions of 128 channels, 16M of 16


def export_weights(model: GPT) -> dict[str, Tensor]:
    """The weights by name, without the rows that pad the vocabulary: what checkpoints hold."""
    return {name: model.unpad(name, tensor.detach()) for name, tensor in model.named_parameters()}


def trained_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """Those that training changes, by name: all, or the adapters alone (training/lora.py)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_for_weights(config: GPTConfig, tensors: Mapping[str, Tensor], attention: AttentionPath = "sdpa") -> GPT:
    """A model without initial weights, for tensors that fit. Raises ValueError, before it takes memory or time for a
    config that belongs to other weights."""
    check_weights(meta_model(config, len(tensors)), tensors)
    return GPT(config, None, attention)


def meta_model(config: GPTConfig, n_tensors: int) -> GPT:
    """A model without memory, which has the names and shapes of its parameters, for weights of so many tensors. Raises
    ValueError for a config that belongs to other weights, or whose table of positions would be too large."""
    if config.n_layer > n_tensors:
        raise ValueError(f"n_layer={config.n_layer}: the weights have {n_tensors} tensors, too few for the layers")
    table_width = {"rotary": 2 * config.rotated_size, "sinusoidal": config.n_embd}.get(config.positions, 0)
    try:
        with torch.device("meta"):
            model = GPT(replace(config, block_size=1) if table_width else config, seed=None)
    except RuntimeError as error:  # more bytes than 64 bits count
        raise ValueError(f"the sizes of its config are impossible ({str(error)[:200]})") from error
    table_bytes = 4 * config.block_size * table_width
    if table_bytes > MAX_TABLE_BYTES:
        size = f"{table_bytes / 2**30:.0f} GiB (maximum {MAX_TABLE_BYTES / 2**30:.0f})"
        raise ValueError(f"block_size={config.block_size}: its table of positions takes {size}")
    return model


def check_weights(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names a tensor that does not fit the model."""
    own = shapes(model)
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"the weights lack {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(tensors.keys() - own.keys()):
        raise ValueError(f"the weights hold {extra[0]!r}, which this model does not have ({len(extra)} too many)")
    for name, expected in own.items():
        if tuple(expected) != (given := tuple(tensors[name].shape)):
            raise ValueError(f"{name!r} has the shape {given}, this model has {tuple(expected)}")


@torch.no_grad()
def import_weights(model: GPT, tensors: Mapping[str, Tensor], *, take: bool = False) -> None:
    """Copies exported weights into the model, padding with zeros. Raises ValueError that names a tensor that does not
    fit.

    take: the model takes over the tensors that need no padding, instead of copies; for those that were read for it.
    """
    check_weights(model, tensors)
    for name, parameter in model.named_parameters():
        target = model.unpad(name, parameter)
        if take and target.shape == parameter.shape:
            parameter.data = tensors[name].to(parameter.device, parameter.dtype)
            continue
        target.copy_(tensors[name])
        if target.shape != parameter.shape:
            parameter[len(target) :] = 0.0


def count_parameters(model: GPT) -> int:
    """Number of parameters, without the rows that pad the vocabulary."""
    return sum(shape.numel() for shape in shapes(model).values())


def shapes(model: GPT) -> dict[str, torch.Size]:
    """Of the weights by name, without the rows that pad the vocabulary; also of a sharded model."""
    V = model.config.vocab_size
    padded = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {
        name: torch.Size((V, *shape[1:])) if name in ("embed.weight", "head.weight") else shape
        for name, shape in padded.items()
    }


def flops_per_token(model: GPT) -> int:
    """FLOPs of forward and backward pass per token at full context: 6 per weight of every matrix (Kaplan et al. 2020),
    4 of those that have no gradient, and 12 · L · T · H · D for attention, masked scores included (Chowdhery et al.
    2022, B)."""
    c, head = model.config, model.embed if model.head is None else model.head
    weights = [(parameter.numel(), parameter.requires_grad) for parameter in model.blocks.parameters()]
    weights.append((c.vocab_size * c.n_embd, head.weight.requires_grad))
    products = sum((6 if is_trained else 4) * count for count, is_trained in weights)
    return products + 12 * c.n_layer * c.block_size * c.n_head * c.head_size
