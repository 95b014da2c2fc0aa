"""Opens a GGUF file (llama.cpp, Ollama) by the package gguf: its fields as a transformers config, its tokenizer, its
tensors, dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.imported_tokenizer import ImportedTokenizer, read_tokenizer_json
from common.tokenizer import PATTERNS
from errors import UserError
from files import DamagedFile
from interop import classes, layouts
from interop.sources import Source, bpe_definition, make_tokenizer
from model import scaled_frequencies

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", layouts.gguf_llama),
    "qwen2": ("Qwen2ForCausalLM", layouts.gguf_qwen),
    "qwen3": ("Qwen3ForCausalLM", layouts.gguf_qwen),
    "arcee": ("ArceeForCausalLM", layouts.gguf_llama),
    "gpt2": ("GPT2LMHeadModel", layouts.gguf_gpt2),
}
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _splits(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]


# tokenizer.ggml.pre → the pre-tokenizers before the bytes, None for GPT-2's pattern; and further arguments of
# bpe_definition
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]] | None, dict[str, Any]]] = {
    "gpt-2": (None, {}),
    "default": (None, {}),
    "smollm": ([{"type": "Digits", "individual_digits": True}], {"use_regex": True}),
    "llama-bpe": (_splits(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}{{1,3}}|{_REST}"), {"ignore_merges": True}),
    "qwen2": (_splits(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}|{_REST}"), {"normalizer": {"type": "NFC"}}),
    "gpt-4o": (_splits(PATTERNS["gpt4o"]), {}),
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def open_gguf(path: Path, eos: str | None) -> Source:
    """The model in a GGUF file. Raises UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError("importing GGUF needs the package gguf: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, TypeError, OverflowError) as error:
        raise DamagedFile(
            path, f"the gguf package does not read it ({str(error)[:200]}); it may be incomplete"
        ) from None
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path}: a GGUF of the architecture {architecture!r}; covered are {known}")
    name, layout = ARCHITECTURES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = as_transformers(fields, architecture, tensors)
    options = classes.read_config(config, name)

    def read(wanted: str) -> Tensor:
        return dequantized(tensors[wanted], path)

    if "rope_freqs.weight" in tensors:
        original = fields.get(f"{architecture}.rope.scaling.original_context_length", 8192)
        options |= rope_scaling(read("rope_freqs.weight"), options["rope_theta"], original)
    facts = {"class": name, "gguf": {key: value for key, value in fields.items() if key.startswith("general.")}}
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    notes = (
        [] if set(kinds) <= {"F32", "F16", "BF16"} else [f"dequantized from {', '.join(kinds)}: near the original only"]
    )
    size = 4 * sum(int(np.prod(tensor.shape)) for tensor in reader.tensors)
    names = set(tensors) - {"rope_freqs.weight"}
    return Source(
        f"GGUF {architecture}", options, layout, names, read, size, tokenizer_of(fields, path, eos), facts, notes
    )


def as_transformers(fields: Mapping[str, Any], architecture: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's fields under transformers' names. Raises UserError for a scaled rotation that model.py does not do."""

    def own(key: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{key}", default)

    if (scaling := own("rope.scaling.type", "none")) not in ("none", "linear") or own("rope.scaling.factor", 1) != 1:
        raise UserError(f"GGUF: rope.scaling.type {scaling!r}, which model.py does not compute")
    heads, width = own("attention.head_count"), own("embedding_length")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(own(key), list):
            raise UserError(f"GGUF: {key} differs from layer to layer, and model.py has one for all")
    has_bias = any(name.endswith("attn_q.bias") for name in tensors)
    has_mlp_bias = any(name.endswith(("ffn_up.bias", "ffn_down.bias")) for name in tensors)
    config = {"num_hidden_layers": own("block_count"), "num_attention_heads": heads, "hidden_size": width}
    config |= {"num_key_value_heads": own("attention.head_count_kv", heads), "head_dim": own("attention.key_length")}
    config |= {"intermediate_size": own("feed_forward_length"), "max_position_embeddings": own("context_length")}
    config |= {"rms_norm_eps": own("attention.layer_norm_rms_epsilon"), "rope_theta": own("rope.freq_base", 10_000.0)}
    config |= {"hidden_act": "relu2" if architecture == "arcee" else "silu"}
    config |= {
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": has_bias,
        "mlp_bias": has_mlp_bias,
    }
    if architecture == "gpt2":
        config |= {
            "n_layer": own("block_count"),
            "n_head": heads,
            "n_embd": width,
            "n_positions": own("context_length"),
        }
        config |= {"n_inner": own("feed_forward_length"), "layer_norm_epsilon": own("attention.layer_norm_epsilon")}
    missing = [key for key in ("num_hidden_layers", "num_attention_heads", "hidden_size") if config[key] is None]
    if missing:
        raise UserError(f"GGUF: the file does not give {missing[0]}; it is incomplete")
    shares = own("rope.dimension_count"), config["head_dim"] or width // heads
    if architecture != "gpt2" and shares[0] not in (None, shares[1]):
        config["partial_rotary_factor"] = shares[0] / shares[1]
    return {key: value for key, value in config.items() if value is not None}


def rope_scaling(divisors: Tensor, theta: float, original: int) -> dict[str, Any]:
    """The options for rope_freqs.weight: GGUF has Llama 3.1's scaling as the divisors of the frequencies, (D/2,).
    original: the context before it was extended, where the file says it. Raises UserError for another scaling."""
    factor = float(divisors.max())
    frequencies = theta ** (torch.arange(len(divisors)) * (-1.0 / len(divisors)))
    between = (divisors > 1.0001) & (divisors < 0.9999 * factor)
    if between.any():
        kept = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        original = round(float(((1 + 3 * kept) * 2 * torch.pi / frequencies[between]).median()))
    expected = frequencies / scaled_frequencies(frequencies, factor, original)
    if not torch.allclose(expected, divisors, rtol=1e-3):
        raise UserError("GGUF: rope_freqs.weight is another scaling of the rotation than Llama 3.1's")
    return {"rope_factor": factor, "rope_original_context": original}


def dequantized(tensor: Any, path: Path) -> Tensor:
    """A tensor in its own precision, float32 where it was quantized. Raises UserError."""
    import gguf

    kind, shape = tensor.tensor_type.name, [int(size) for size in reversed(tensor.shape)]
    try:
        if kind in ("F32", "F16"):
            values = np.array(tensor.data)  # a copy: the file stays as it is
        else:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, KeyError, ValueError) as error:
        raise UserError(f"{path}: {tensor.name!r} is {kind}, which the gguf package does not read ({error})") from None
    made = torch.from_numpy(values).reshape(shape)
    return made.to(torch.bfloat16) if kind == "BF16" else made


def tokenizer_of(fields: Mapping[str, Any], path: Path, eos: str | None) -> ImportedTokenizer:
    """The tokenizer in the fields. Raises UserError."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges")
    if kind != "gpt2" or not isinstance(tokens, list) or not isinstance(merges, list):
        raise UserError(
            f"{path}: a tokenizer of the kind {kind!r}; covered is byte-level BPE (gpt2). SentencePiece (llama), as in"
            " Llama 2, is not"
        )
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{path}: the split pattern {pre!r} is not known; known are {', '.join(PRE_TOKENIZERS)}")
    before, settings = PRE_TOKENIZERS[pre]
    settings = dict(settings)
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    vocab = {token: id for id, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges if all(part in vocab for part in merge.split(" "))]
    pairs = [pair for pair in pairs if len(pair) == 2 and "".join(pair) in vocab]
    definition = bpe_definition(vocab, pairs, special, before, added=added, **settings)
    named = [eos, fields.get("tokenizer.ggml.eos_token_id")]
    made = make_tokenizer(definition, read_tokenizer_json(definition), named, fields.get("tokenizer.chat_template"))
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token") and isinstance(bos, int):
        return ImportedTokenizer(definition, made.eos_id, bos, made.chat_template)
    return made
