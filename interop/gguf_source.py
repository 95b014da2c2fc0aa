"""Opens a GGUF file (llama.cpp, Ollama) by the package gguf: its fields as a transformers config, its tokenizer, its
tensors, dequantized.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.imported_tokenizer import ImportedTokenizer, read_tokenizer_json
from common.option import show
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
STRING, ARRAY = 8, 9  # kinds of values
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the others
MAX_ENTRIES, MAX_VALUES = 2**14, 2**21  # tensors or fields; values in all arrays together
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def open_gguf(path: Path, eos: str | None) -> Source:
    """The model in a GGUF file. Raises UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError("importing GGUF needs the package gguf: pip install gguf") from None
    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, OSError, TypeError, ArithmeticError, RuntimeError, struct.error) as error:
        why = " ".join(str(error)[:200].split())
        raise DamagedFile(path, f"the gguf package does not read it ({why}); it may be incomplete") from None
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path}: a GGUF of the architecture {show(repr(architecture))}; covered are {known}")
    name, layout = ARCHITECTURES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with classes.values_of(f"{path}: the fields of {architecture}"):
        config = as_transformers(fields, architecture, tensors)
    options = classes.read_config(config, name)

    def read(wanted: str) -> Tensor:
        return dequantized(tensors[wanted], path)

    if "rope_freqs.weight" in tensors:
        original = fields.get(f"{architecture}.rope.scaling.original_context_length", 8192)
        with classes.values_of(f"{path}: rope_freqs.weight"):
            options |= rope_scaling(read("rope_freqs.weight"), options["rope_theta"], original)
    facts = {"class": name, "gguf": {key: value for key, value in fields.items() if key.startswith("general.")}}
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    notes = (
        [] if set(kinds) <= {"F32", "F16", "BF16"} else [f"dequantized from {', '.join(kinds)}: near the original only"]
    )
    size = 4 * sum(tensor.n_elements for tensor in reader.tensors)
    names = set(tensors) - {"rope_freqs.weight"}
    return Source(
        f"GGUF {architecture}", options, layout, names, read, size, tokenizer_of(fields, path, eos), facts, notes
    )


def check_header(path: Path) -> None:
    """Walks over the fields. Raises ValueError, KeyError or struct.error where they do not end inside the file: the
    package would go on for as many steps as a count says, and take memory for each."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        version, n_tensors, n_fields = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3, little-endian")
        if max(n_tensors, n_fields) > MAX_ENTRIES:
            raise ValueError(f"{n_tensors} tensors and {n_fields} fields")
        at, values = 24, 0
        for _ in range(n_fields):
            at = _end_of(data, at, STRING)
            (kind,) = struct.unpack_from("<I", data, at)
            values += struct.unpack_from("<Q", data, at + 8)[0] if kind == ARRAY else 1
            if values > MAX_VALUES:
                raise ValueError(f"{values} values in its fields")
            at = _end_of(data, at + 4, kind)


def _end_of(data: mmap.mmap, at: int, kind: int) -> int:
    """Where a value ends."""
    if kind == STRING:
        end = at + 8 + struct.unpack_from("<Q", data, at)[0]
    elif kind == ARRAY:
        of, count = struct.unpack_from("<IQ", data, at)
        end = at + 12
        if of == ARRAY:
            raise ValueError("an array of arrays")
        for _ in range(count if of == STRING else 0):
            end = _end_of(data, end, STRING)
        end += 0 if of == STRING else count * SIZES[of]
    else:
        end = at + SIZES[kind]
    if end > len(data):
        raise ValueError("its fields go on after its end")
    return end


def as_transformers(fields: Mapping[str, Any], architecture: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's fields under transformers' names. Raises UserError for a scaled rotation that model.py does not do."""

    def own(key: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{key}", default)

    if (scaling := own("rope.scaling.type", "none")) not in ("none", "linear") or own("rope.scaling.factor", 1) != 1:
        raise UserError(f"GGUF: rope.scaling.type {show(repr(scaling))}, which model.py does not compute")
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
        made = torch.from_numpy(values).reshape(shape)
    except (NotImplementedError, LookupError, ValueError, TypeError, RuntimeError) as error:
        name = show(repr(tensor.name))
        raise UserError(f"{path}: {name} is {kind}, which the gguf package does not read ({error})") from None
    return made.to(torch.bfloat16) if kind == "BF16" else made


def tokenizer_of(fields: Mapping[str, Any], path: Path, eos: str | None) -> ImportedTokenizer:
    """The tokenizer in the fields. Raises UserError."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    tokens, merges = fields.get("tokenizer.ggml.tokens", []), fields.get("tokenizer.ggml.merges", [])
    if kind != "gpt2":
        raise UserError(
            f"{path}: a tokenizer of the kind {show(repr(kind))}; covered is byte-level BPE (gpt2). SentencePiece"
            " (llama), as in Llama 2, is not"
        )
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: the split pattern {show(repr(pre))} is not known; known are {', '.join(PRE_TOKENIZERS)}"
        )
    before, settings = PRE_TOKENIZERS[pre]
    settings = dict(settings)
    lists = [tokens, merges, fields.get("tokenizer.ggml.token_type", tokens)]
    is_whole = all(isinstance(value, list) for value in lists) and len(lists[2]) == len(tokens)
    if not is_whole or not all(isinstance(text, str) for text in [*tokens, *merges]):
        raise DamagedFile(path, "tokenizer.ggml.tokens, merges and token_type are not lists that belong together")
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    vocab = {token: id for id, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges if all(part in vocab for part in merge.split(" "))]
    pairs = [pair for pair in pairs if len(pair) == 2 and "".join(pair) in vocab]
    definition = bpe_definition(vocab, pairs, special, before, added=added, **settings)
    named = [eos, fields.get("tokenizer.ggml.eos_token_id")]
    template = fields.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    made = make_tokenizer(definition, read_tokenizer_json(definition), named, template)
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token") and type(bos) is int:
        return ImportedTokenizer(definition, made.eos_id, bos, made.chat_template)
    return made
