"""A model of another program → a model folder of ours. `import_model` is the whole way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.memory import require_memory
from common.option import show
from common.weights import count_parameters, without_memory
from errors import UserError
from files import json_bytes
from interop import classes
from interop.layouts import Entry, join
from interop.sources import FLOATS, IGNORED, Source
from model import GPTConfig
from model_folder import write_model_folder

MEMORY_MARGIN = 2**28  # bytes: a tensor at a time in its other form, and Python


def import_model(source: Source, out: Path, block_size: int | None = None) -> GPTConfig:
    """Writes the model folder `out`, which must not exist. block_size: a shorter context than the model's own. Raises
    UserError, and then leaves nothing behind."""
    config = classes.to_config(source.options, source.tokenizer.vocab_size, source.tokenizer.eos_id)
    if block_size is not None:
        if not 1 <= block_size <= config.block_size:
            context = f"the model's context is {config.block_size}"
            raise UserError(f"--block_size={block_size}: {context}; expected 1 to {config.block_size}")
        config = replace(config, block_size=block_size)
    try:
        json_bytes(source.facts)
    except (ValueError, TypeError, RecursionError) as error:
        where = "the metadata of the model (config.json, generation_config.json, a GGUF's fields)"
        raise UserError(f"{where} cannot be kept: {str(error)[:200]}; copy its files again") from None
    require_memory(source.bytes + MEMORY_MARGIN, "the import")
    tensors = read_tensors(source, config)
    write_model_folder(out, tensors, config.to_dict(), source.tokenizer.to_dict(), {"source": source.facts})
    return config


def read_tensors(source: Source, config: GPTConfig) -> dict[str, Tensor]:
    """Our tensors by name, in the dtypes of the file. Raises UserError where theirs are not those of the config."""
    try:
        if config.n_layer > len(source.names):
            raise ValueError(f"n_layer={config.n_layer}: {len(source.names)} tensors are too few for the layers")
        model = without_memory(config)
    except ValueError as error:
        raise UserError(f"config.json and the weights do not belong together: {error}") from None
    expected = {name: tuple(model.unpad(name, parameter).shape) for name, parameter in model.named_parameters()}
    used, found = set[str](), dict[str, Tensor]()
    entries = {entry.ours: entry for entry in source.layout(config)}
    for name, shape in expected.items():
        theirs = [actual_name(part, source.names) for part in entries[name].theirs]
        missing = [part for part, actual in zip(entries[name].theirs, theirs, strict=True) if actual is None]
        if missing and name.endswith("bias"):
            found[name] = torch.zeros(shape)  # their class has no bias there
            continue
        if missing:
            raise UserError(f"the weights lack {missing[0]!r}, which a {source.kind} of this config has")
        used |= {part for part in theirs if part is not None}
        found[name] = read_entry(entries[name], [part for part in theirs if part], source, config, shape)
    refuse_extra(source, used, entries.values(), config, found)
    return found


def actual_name(name: str, names: set[str]) -> str | None:
    """The name in a file, which may lack the first part (the prefix of the model without its head)."""
    short = name.partition(".")[2]
    return name if name in names else short if short in names else None


def read_entry(entry: Entry, names: list[str], source: Source, config: GPTConfig, shape: tuple[int, ...]) -> Tensor:
    """Our tensor of an entry, with the rows of the vocabulary and the positions that the model has. Raises
    UserError."""
    given = [read_floats(source, name) for name in names]
    try:
        joined = join(entry, given, config)
    except (RuntimeError, IndexError):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise UserError(f"{names[0]!r}: the shapes {shapes} do not fit the config") from None
    rows = len(joined) if joined.ndim else 0
    if entry.ours in ("embed.weight", "head.weight", "position.weight") and rows >= shape[0]:
        joined = joined[: shape[0]].clone()
    elif entry.ours in ("embed.weight", "head.weight"):
        raise UserError(f"{names[0]!r} has {rows} rows, and the tokenizer {shape[0]} ids: they do not belong together")
    if tuple(joined.shape) != shape:
        raise UserError(f"{names[0]!r} becomes {tuple(joined.shape)}, and the config says {shape}")
    return joined.contiguous()


def read_floats(source: Source, name: str) -> Tensor:
    """Their tensor, float64 as float32. Raises UserError where it is of another kind, or holds NaN or infinity."""
    tensor = source.read(name)
    if tensor.dtype not in FLOATS:
        raise UserError(f"{name!r} is {tensor.dtype}, expected float32, float16 or bfloat16: quantized?")
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name!r} holds NaN or infinity; copy the file again from its source")
    return tensor


def refuse_extra(
    source: Source, used: set[str], entries: Iterable[Entry], config: GPTConfig, found: Mapping[str, Tensor]
) -> None:
    """Raises UserError where tensors are left over, which a model of this config does not use."""
    extra = {name for name in source.names - used if not IGNORED.fullmatch(name)}
    head = next((name for entry in entries if entry.ours == "head.weight" for name in entry.theirs), "")
    if config.tie_embeddings and head in extra:  # a copy of the embedding
        rows = read_floats(source, head)
        if not rows.ndim or not torch.equal(rows[: config.vocab_size], found["embed.weight"]):
            raise UserError(f"{head!r} differs from the embedding, and the config ties the two (tie_word_embeddings)")
        extra.remove(head)
    zeros = {name for name in extra if name.endswith("bias") and not read_floats(source, name).any()}
    if extra := extra - zeros:
        name = show(repr(sorted(extra)[0]))
        raise UserError(f"the weights hold {name}, which model.py does not use here ({len(extra)} too many)")


def describe(config: GPTConfig) -> str:
    """One line: parameters, layers, width, context, vocabulary."""
    count = count_parameters(without_memory(config))
    return (
        f"{count:,} parameters, {config.n_layer} layers, {config.n_embd} channels, context {config.block_size:,},"
        f" {config.vocab_size:,} ids, end-of-sequence {config.eos_id}"
    )
