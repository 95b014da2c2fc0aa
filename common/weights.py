"""Export and import of a model's weights (vocab_size rows, no padding); counts of parameters and FLOPs. No file I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.memory import attempt
from model import GPT, AttentionPath, GPTConfig
from parallel.processes import by_first
from parallel.sharding import first_row, is_sharded, local, whole

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
    check_shapes(model, {name: tensor.shape for name, tensor in tensors.items()})


def check_shapes(model: GPT, given: Mapping[str, Sequence[int]]) -> None:
    """check_weights, by name → shape."""
    own = shapes(model)
    if missing := sorted(own.keys() - given.keys()):
        raise ValueError(f"the weights lack {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(given.keys() - own.keys()):
        raise ValueError(f"the weights hold {extra[0]!r}, which this model does not have ({len(extra)} too many)")
    for name, expected in own.items():
        if tuple(expected) != tuple(given[name]):
            raise ValueError(f"{name!r} has the shape {tuple(given[name])}, this model has {tuple(expected)}")


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


@torch.no_grad()
def import_rows(model: GPT, read: Callable[[str, int, int], Tensor]) -> None:
    """Fills a sharded model's rows of each parameter, padding with zeros. read: name, first row and the row after the
    last one → these rows; it is called for each parameter, in order."""
    for name, parameter in model.named_parameters():
        rows, first = local(parameter), first_row(parameter)
        target = model.unpad(name, rows, first)
        target.copy_(read(name, first, first + len(target)))
        rows[len(target) :] = 0.0


def drawn_rows(model: GPT, seed: int) -> Callable[[str, int, int], Tensor]:
    """For import_rows: the initial weights of GPT(config, seed), of which one parameter at a time is in memory."""
    generator, sizes = torch.Generator().manual_seed(seed), {n: p.shape for n, p in model.named_parameters()}
    return lambda name, start, stop: model.initial_weight(name, sizes[name], generator)[start:stop]


@torch.no_grad()
def gathered(model: GPT, device: torch.device) -> GPT:
    """A whole copy of a sharded model in rank 0, and the model itself where it is not sharded or elsewhere. All
    processes have to call it. Raises OutOfMemory, in all of them, where rank 0 has no room for it."""
    if not is_sharded(model):
        return model
    copies = list[GPT]()
    by_first(lambda: copies.append(attempt(lambda: GPT(model.config, None, model.attention).to(device))))
    copy = copies[0] if copies else None
    for name, parameter in model.named_parameters():
        weight = whole(parameter.detach())
        if copy is not None:
            copy.get_parameter(name).copy_(weight)
    return (copy or model).train(model.training)


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
