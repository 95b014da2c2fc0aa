"""How other programs name and shape the tensors of a model: one table of entries for each layout, used both ways.

An entry joins tensors of theirs, in order, to one of ours, as its kind says. Reading order: the kinds, the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model import GPTConfig

Kind = Literal["rows", "transposed", "heads", "positions", "pairs"]


class Entry(NamedTuple):
    """One tensor of ours and those of theirs that make it.

    rows: concatenated along the first dimension. transposed: a matrix (in, out), as GPT-2's Conv1D. heads: the rows of
    queries, keys and values of each head stand together (GPT-NeoX). positions: two more rows at the beginning (OPT).
    pairs: of queries and keys the rows (i, i + D/2) of each head stand together (GGUF's llama and arcee).
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Kind = "rows"


def join(entry: Entry, given: Sequence[Tensor], config: GPTConfig) -> Tensor:
    """Our tensor of an entry from theirs."""
    if entry.kind == "transposed":
        return given[0].mT.contiguous()
    if entry.kind == "heads":
        H, D = config.n_head, config.head_size
        return given[0].unflatten(0, (H, 3, D)).transpose(0, 1).flatten(0, 2).contiguous()
    if entry.kind == "positions":
        return given[0][2:].contiguous()
    if entry.kind == "pairs":
        given = [_from_pairs(given[0], config), _from_pairs(given[1], config), *given[2:]]
    return torch.cat(list(given)) if len(given) > 1 else given[0]


def split(entry: Entry, ours: Tensor, config: GPTConfig) -> list[Tensor]:
    """Their tensors of an entry from ours: the inverse of join."""
    H, K, D = config.n_head, config.kv_heads, config.head_size
    if entry.kind == "transposed":
        return [ours.mT.contiguous()]
    if entry.kind == "heads":
        return [ours.unflatten(0, (3, H, D)).transpose(0, 1).flatten(0, 2).contiguous()]
    if entry.kind == "positions":
        return [torch.cat((ours.new_zeros(2, ours.shape[1]), ours))]
    if len(entry.theirs) == 1:
        return [ours]
    parts = [
        part.contiguous() for part in ours.split([H * D, K * D, K * D] if len(entry.theirs) == 3 else len(ours) // 2)
    ]
    if entry.kind == "pairs":
        parts[:2] = [_to_pairs(part, config) for part in parts[:2]]
    return parts


def _from_pairs(rows: Tensor, config: GPTConfig) -> Tensor:
    return rows.unflatten(0, (-1, config.head_size // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _to_pairs(rows: Tensor, config: GPTConfig) -> Tensor:
    return rows.unflatten(0, (-1, 2, config.head_size // 2)).transpose(1, 2).flatten(0, 2).contiguous()


# ---- The layouts -----------------------------------------------------------------------------------------------------


def llama(config: GPTConfig) -> Iterator[Entry]:
    """Hugging Face's Llama, Qwen2, Qwen3, Mistral, Arcee."""
    yield Entry("embed.weight", ("model.embed_tokens.weight",))
    for i in range(config.n_layer):
        own, layer = f"blocks.{i}", f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        yield Entry(f"{own}.attn_norm.weight", (f"{layer}.input_layernorm.weight",))
        for kind in ("weight", "bias"):
            yield Entry(f"{own}.attn.qkv.{kind}", tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv"))
            yield Entry(f"{own}.attn.proj.{kind}", (f"{attention}.o_proj.{kind}",))
            up = ("gate_proj", "up_proj") if config.mlp == "swiglu" else ("up_proj",)
            yield Entry(f"{own}.mlp.up.{kind}", tuple(f"{mlp}.{part}.{kind}" for part in up))
            yield Entry(f"{own}.mlp.down.{kind}", (f"{mlp}.down_proj.{kind}",))
        yield Entry(f"{own}.attn.q_norm.weight", (f"{attention}.q_norm.weight",))
        yield Entry(f"{own}.attn.k_norm.weight", (f"{attention}.k_norm.weight",))
        yield Entry(f"{own}.mlp_norm.weight", (f"{layer}.post_attention_layernorm.weight",))
    yield Entry("final_norm.weight", ("model.norm.weight",))
    yield Entry("head.weight", ("lm_head.weight",))


def gpt2(config: GPTConfig, linear: Kind = "transposed") -> Iterator[Entry]:
    """Hugging Face's GPT-2, whose linear layers are Conv1D; nanoGPT's with linear="rows"."""
    yield Entry("embed.weight", ("transformer.wte.weight",))
    yield Entry("position.weight", ("transformer.wpe.weight",))
    layers = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for i in range(config.n_layer):
        own, block = f"blocks.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            yield Entry(f"{own}.attn_norm.{kind}", (f"{block}.ln_1.{kind}",))
            yield Entry(f"{own}.mlp_norm.{kind}", (f"{block}.ln_2.{kind}",))
            for name, theirs in layers.items():
                yield Entry(
                    f"{own}.{name}.{kind}", (f"{block}.{theirs}.{kind}",), linear if kind == "weight" else "rows"
                )
    for kind in ("weight", "bias"):
        yield Entry(f"final_norm.{kind}", (f"transformer.ln_f.{kind}",))
    yield Entry("head.weight", ("lm_head.weight",))


def nanogpt(config: GPTConfig) -> Iterator[Entry]:
    return gpt2(config, "rows")


def neox(config: GPTConfig) -> Iterator[Entry]:
    """Hugging Face's GPT-NeoX."""
    yield Entry("embed.weight", ("gpt_neox.embed_in.weight",))
    layers = {"attn.proj": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    for i in range(config.n_layer):
        own, layer = f"blocks.{i}", f"gpt_neox.layers.{i}"
        for kind in ("weight", "bias"):
            yield Entry(f"{own}.attn_norm.{kind}", (f"{layer}.input_layernorm.{kind}",))
            yield Entry(f"{own}.mlp_norm.{kind}", (f"{layer}.post_attention_layernorm.{kind}",))
            yield Entry(f"{own}.attn.qkv.{kind}", (f"{layer}.attention.query_key_value.{kind}",), "heads")
            for name, theirs in layers.items():
                yield Entry(f"{own}.{name}.{kind}", (f"{layer}.{theirs}.{kind}",))
    for kind in ("weight", "bias"):
        yield Entry(f"final_norm.{kind}", (f"gpt_neox.final_layer_norm.{kind}",))
    yield Entry("head.weight", ("embed_out.weight",))


def opt(config: GPTConfig) -> Iterator[Entry]:
    """Hugging Face's OPT."""
    yield Entry("embed.weight", ("model.decoder.embed_tokens.weight",))
    yield Entry("position.weight", ("model.decoder.embed_positions.weight",), "positions")
    layers = {"attn.proj": "self_attn.out_proj", "mlp.up": "fc1", "mlp.down": "fc2"}
    for i in range(config.n_layer):
        own, layer = f"blocks.{i}", f"model.decoder.layers.{i}"
        for kind in ("weight", "bias"):
            yield Entry(f"{own}.attn_norm.{kind}", (f"{layer}.self_attn_layer_norm.{kind}",))
            yield Entry(f"{own}.mlp_norm.{kind}", (f"{layer}.final_layer_norm.{kind}",))
            yield Entry(f"{own}.attn.qkv.{kind}", tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"))
            for name, theirs in layers.items():
                yield Entry(f"{own}.{name}.{kind}", (f"{layer}.{theirs}.{kind}",))
    for kind in ("weight", "bias"):
        yield Entry(f"final_norm.{kind}", (f"model.decoder.final_layer_norm.{kind}",))
    yield Entry("head.weight", ("lm_head.weight",))


def gguf_llama(config: GPTConfig, kind: Kind = "pairs") -> Iterator[Entry]:
    """GGUF's architectures llama and arcee, and with kind="rows" qwen2 and qwen3."""
    yield Entry("embed.weight", ("token_embd.weight",))
    for i in range(config.n_layer):
        own, block = f"blocks.{i}", f"blk.{i}"
        yield Entry(f"{own}.attn_norm.weight", (f"{block}.attn_norm.weight",))
        for part in ("weight", "bias"):
            yield Entry(f"{own}.attn.qkv.{part}", tuple(f"{block}.attn_{name}.{part}" for name in "qkv"), kind)
            yield Entry(f"{own}.attn.proj.{part}", (f"{block}.attn_output.{part}",))
            up = ("ffn_gate", "ffn_up") if config.mlp == "swiglu" else ("ffn_up",)
            yield Entry(f"{own}.mlp.up.{part}", tuple(f"{block}.{name}.{part}" for name in up))
            yield Entry(f"{own}.mlp.down.{part}", (f"{block}.ffn_down.{part}",))
        yield Entry(f"{own}.attn.q_norm.weight", (f"{block}.attn_q_norm.weight",))
        yield Entry(f"{own}.attn.k_norm.weight", (f"{block}.attn_k_norm.weight",))
        yield Entry(f"{own}.mlp_norm.weight", (f"{block}.ffn_norm.weight",))
    yield Entry("final_norm.weight", ("output_norm.weight",))
    yield Entry("head.weight", ("output.weight",))


def gguf_qwen(config: GPTConfig) -> Iterator[Entry]:
    return gguf_llama(config, "rows")


def gguf_gpt2(config: GPTConfig) -> Iterator[Entry]:
    """GGUF's architecture gpt2."""
    yield Entry("embed.weight", ("token_embd.weight",))
    yield Entry("position.weight", ("position_embd.weight",))
    layers = {"attn_norm": "attn_norm", "attn.qkv": "attn_qkv", "attn.proj": "attn_output", "mlp_norm": "ffn_norm"}
    layers |= {"mlp.up": "ffn_up", "mlp.down": "ffn_down"}
    for kind in ("weight", "bias"):
        for i in range(config.n_layer):
            for name, theirs in layers.items():
                yield Entry(f"blocks.{i}.{name}.{kind}", (f"blk.{i}.{theirs}.{kind}",))
        yield Entry(f"final_norm.{kind}", (f"output_norm.{kind}",))
    yield Entry("head.weight", ("output.weight",))


Layout = Callable[[GPTConfig], Iterator[Entry]]
