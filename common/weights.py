"""Export and import of a model's weights (vocab_size rows, no padding); counts of parameters and FLOPs; whether a
config is the one of some weights, by their shapes alone. No file I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.memory import attempt
from model import GPT, AttentionPath, GPTConfig
from parallel.processes import by_first
from parallel.sharding import first_row, is_sharded, local, whole

Shapes = Mapping[str, Sequence[int]]
LAYER = re.compile(r"blocks\.(0|[1-9][0-9]{0,3})\.(.+)")  # a tensor of a block: its layer, its name there
OPTIONS = {  # the beginning of a tensor's name → the options that its shape, or its being there, depends on
    "embed": "n_embd, vocab_size", "ngrams": "max_ngram, ngram_rows, n_embd",
    "position": "positions, block_size, n_embd", "head": "tie_embeddings, n_embd, vocab_size",
    "final_norm": "norm, norm_position, bias, n_embd", "attn_norm": "norm, bias, n_embd",
    "mlp_norm": "norm, bias, n_embd", "attn.qkv.bias": "bias, qkv_bias, n_head, n_kv_head, head_dim",
    "attn.qkv": "n_head, n_kv_head, head_dim, n_embd", "attn.proj": "bias, n_head, head_dim, n_embd",
    "attn.": "qk_norm, head_dim, n_head", "mlp": "mlp, bias, n_hidden, n_embd",
}  # fmt: skip

# ---- A config and the shapes of weights ------------------------------------------------------------------------------


def check_header(config: GPTConfig, given: Shapes) -> None:
    """Raises ValueError that names options and a tensor where the shapes of stored weights are not those of a model of
    this config. Builds a model of one layer alone, without memory."""
    layers = dict[int, dict[str, Sequence[int]]]()
    others = dict[str, Sequence[int]]()
    for name, shape in given.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
        else:
            others[name] = shape
    if len(layers) != config.n_layer or max(layers) != config.n_layer - 1:
        raise ValueError(f"n_layer={config.n_layer}: the weights have {len(layers)} layers")
    expected = shapes(without_memory(replace(config, n_layer=1)))
    block = {name.removeprefix("blocks.0."): shape for name, shape in expected.items() if name.startswith("blocks.")}
    _compare({name: shape for name, shape in expected.items() if not name.startswith("blocks.")}, others)
    for layer, found in sorted(layers.items()):
        _compare(block, found, f"blocks.{layer}.")


def without_memory(config: GPTConfig) -> GPT:
    """A model on the meta device, without a table of positions. Raises ValueError for sizes that nothing can have."""
    try:
        with torch.device("meta"):
            return GPT(replace(config, block_size=1) if config.table_bytes else config, seed=None)
    except RuntimeError as error:  # more bytes than 64 bits count
        raise ValueError(f"the sizes of its config are impossible ({str(error)[:200]})") from error


def _compare(expected: Shapes, given: Shapes, prefix: str = "") -> None:
    """Raises ValueError where names or shapes differ."""
    if missing := sorted(expected.keys() - given.keys()):
        what = f"the weights lack {prefix + missing[0]!r} ({len(missing)} missing)"
        raise ValueError(f"{_options_of(missing[0])}: {what}")
    if extra := sorted(given.keys() - expected.keys()):
        what = f"the weights hold {prefix + extra[0]!r}, which this model does not have ({len(extra)} too many)"
        raise ValueError(f"{_options_of(extra[0])}: {what}")
    for name, shape in expected.items():
        if tuple(shape) != tuple(given[name]):
            what = f"{prefix + name!r} has the shape {tuple(given[name])}, this model has {tuple(shape)}"
            raise ValueError(f"{_options_of(name)}: {what}")


def _options_of(name: str) -> str:
    return next((options for start, options in OPTIONS.items() if name.startswith(start)), "the options")


# ---- Export and import -----------------------------------------------------------------------------------------------


def export_weights(model: GPT) -> dict[str, Tensor]:
    """The weights by name, without the rows that pad the vocabulary: what checkpoints hold."""
    return {name: model.unpad(name, tensor.detach()) for name, tensor in model.named_parameters()}


def trained_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """Those that training changes, by name: all, or the adapters alone (training/lora.py)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_for_weights(config: GPTConfig, tensors: Mapping[str, Tensor], attention: AttentionPath = "sdpa") -> GPT:
    """A model without initial weights, for tensors that fit. Raises ValueError, before it takes memory or time for a
    config that belongs to other weights."""
    check_header(config, {name: tensor.shape for name, tensor in tensors.items()})
    return GPT(config, None, attention)


def check_weights(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names a tensor that does not fit the model."""
    _compare(shapes(model), {name: tensor.shape for name, tensor in tensors.items()})


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


def weight_count(config: GPTConfig) -> int:
    """Weights of a model, but for those of norms and biases. Builds no model."""
    c = config
    rows = c.vocab_size * (1 if c.tie_embeddings else 2)
    rows += c.block_size * (c.positions == "learned") + c.ngram_rows * (c.max_ngram > 1)
    return c.matrix_weights + rows * c.n_embd


def flops_per_token(model: GPT) -> int:
    """FLOPs of forward and backward pass per token at full context: 6 per weight of every matrix (Kaplan et al. 2020),
    4 of those that have no gradient, and 12 · L · T · H · D for attention, masked scores included (Chowdhery et al.
    2022, B)."""
    c, head = model.config, model.embed if model.head is None else model.head
    weights = [(parameter.numel(), parameter.requires_grad) for parameter in model.blocks.parameters()]
    weights.append((c.vocab_size * c.n_embd, head.weight.requires_grad))
    products = sum((6 if is_trained else 4) * count for count, is_trained in weights)
    return products + 12 * c.n_layer * c.block_size * c.n_head * c.head_size
