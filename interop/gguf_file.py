"""Writes a model as GGUF, the file of llama.cpp and Ollama, by the package gguf; and the Modelfile beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.imported_tokenizer import ImportedTokenizer, parts
from common.tokenizer import CharTokenizer, Tokenizer
from errors import UserError
from interop.gguf_source import ARCHITECTURES, CONTROL, NORMAL, PRE_TOKENIZERS, USER_DEFINED
from interop.layouts import split
from interop.sources import bpe_definition
from interop.tokenizer_files import EOS, merges_of, prepended_id, vocabulary, written
from model import GPTConfig, scaled_frequencies

DTYPES = ("f32", "f16", "q8_0")
MAX_CONTEXT = 8192  # Ollama reserves memory for all of it
UNUSED = 5  # tokenizer.ggml.token_type of ids without text that nothing names
OWN_PATTERNS = {"gpt2": "gpt-2", "gpt4": "llama-bpe", "gpt4o": "gpt-4o"}
OPTIONS = {  # class → what llama.cpp's architecture lacks of it: text → whether a model has it
    "GPT2LMHeadModel": lambda c: {f"mlp={c.mlp} (llama.cpp computes the tanh form of GELU)": c.mlp != "gelu"},
    "LlamaForCausalLM": lambda c: {},
    "Qwen2ForCausalLM": lambda c: {"sliding_window": c.sliding_window, "rope_factor": c.rope_factor},
    "Qwen3ForCausalLM": lambda c: {"sliding_window": c.sliding_window, "rope_factor": c.rope_factor},
    "ArceeForCausalLM": lambda c: {"bias=true with mlp=relu2": c.bias or c.has_qkv_bias},
}  # fmt: skip


def import_gguf() -> Any:
    """The package. Raises UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the package gguf: pip install gguf") from None
    return gguf


def architecture_of(name: str, config: GPTConfig) -> str:
    """The architecture of llama.cpp for a class of transformers. Raises UserError where it has none, or lacks an
    option."""
    known = {named: architecture for architecture, (named, _) in ARCHITECTURES.items()}
    if name not in known:
        listed = ", ".join(ARCHITECTURES)
        raise UserError(f"--to=gguf: a model of the class {name}; covered are {listed}. --to=hf writes this one")
    if lacks := [option for option, has in OPTIONS[name](config).items() if has]:
        raise UserError(f"--to=gguf: {lacks[0]}, which llama.cpp's {known[name]} lacks; --to=hf writes this model")
    return known[name]


# ---- The tokenizer ---------------------------------------------------------------------------------------------------


def tokenizer_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """pre, tokens, types, merges of byte-level BPE. Raises UserError where llama.cpp cannot have these ids."""
    if isinstance(tokenizer, ImportedTokenizer):
        fields = imported_fields(tokenizer)
    elif isinstance(tokenizer, CharTokenizer):
        if others := [char for char in tokenizer.chars if ord(char) > 127]:
            raise UserError(
                f"--to=gguf: characters outside ASCII ({''.join(others[:10])!r}) are several bytes, and llama.cpp has"
                " no tokenizer of characters; --to=hf writes this model; one with --tokenizer=bpe or bytes fits"
            )
        tokens = [*(written(char.encode()) for char in tokenizer.chars), EOS]
        fields = {"pre": "gpt-2", "tokens": tokens, "merges": [], "types": [*[NORMAL] * len(tokenizer.chars), CONTROL]}
    else:
        vocab = vocabulary(tokenizer)
        merges, _ = merges_of(tokenizer.token_bytes)
        types = [NORMAL if token else UNUSED for token in tokenizer.token_bytes]
        types[tokenizer.eos_id] = CONTROL
        fields = {
            "pre": OWN_PATTERNS[tokenizer.pattern], "tokens": list(vocab), "types": types,
            "merges": [f"{written(left)} {written(right)}" for left, right in merges],
        }  # fmt: skip
    # llama.cpp refuses an empty list; a merge of a special token is never done
    end = fields["tokens"][tokenizer.eos_id]
    return fields | {"merges": fields["merges"] or [f"{end} {end}"]}


def imported_fields(tokenizer: ImportedTokenizer) -> dict[str, Any]:
    """The same of an imported tokenizer, whose split pattern llama.cpp must know. Raises UserError."""
    content = json.loads(tokenizer.definition)
    model, own = content["model"], pre_tokenizer_key(content)
    if model.get("type", "BPE") != "BPE":
        raise UserError("--to=gguf: a WordLevel tokenizer, which llama.cpp does not have; --to=hf writes this model")
    pre = next((name for name, key in known_keys().items() if key == own), None)
    if pre is None:
        raise UserError(
            f"--to=gguf: the tokenizer's split pattern is none of those that llama.cpp knows under the names"
            f" {', '.join(PRE_TOKENIZERS)}; --to=hf writes this model"
        )
    tokens, types = [f"<|reserved_{id}|>" for id in range(tokenizer.vocab_size)], [UNUSED] * tokenizer.vocab_size
    for token, id in model["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    for token in content.get("added_tokens") or []:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    types[tokenizer.eos_id] = CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return {"pre": pre, "tokens": tokens, "types": types, "merges": merges}


def pre_tokenizer_key(content: Mapping[str, Any]) -> list[Any]:
    """What of a tokenizer.json determines how it splits a text, in a form that can be compared."""
    names = {"Split": ("pattern", "behavior", "invert"), "Digits": ("individual_digits",), "ByteLevel": ("use_regex",)}
    found: list[Any] = [part["type"] for part in parts(content.get("normalizer"))]
    for part in parts(content.get("pre_tokenizer")):
        found.append([part["type"], *(part.get(name, True) for name in names.get(part["type"], sorted(part)))])
    return [*found, bool(content["model"].get("ignore_merges"))]


def known_keys() -> dict[str, list[Any]]:
    """pre_tokenizer_key of every split pattern that llama.cpp knows by name."""
    return {
        name: pre_tokenizer_key(json.loads(bpe_definition({}, [], [], before, **settings)))
        for name, (before, settings) in PRE_TOKENIZERS.items()
    }


# ---- The file --------------------------------------------------------------------------------------------------------


def rounded(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor of ours as the file has it, in float32: vectors and positions are not rounded, matrices to the dtype."""
    kind = file_type(name, tensor, dtype)
    if kind == "f16":
        return tensor.to(torch.float16).float()
    if kind == "q8_0":
        quants, q8_0 = import_gguf().quants, import_gguf().GGMLQuantizationType.Q8_0
        return torch.from_numpy(quants.dequantize(quants.quantize(tensor.float().numpy(), q8_0), q8_0))
    return tensor.float()


def file_type(name: str, tensor: Tensor, dtype: str) -> str:
    if tensor.ndim == 1 or name == "position.weight" or dtype == "f32":
        return "f32"
    return "q8_0" if dtype == "q8_0" and tensor.shape[-1] % 32 == 0 else "f16"


def their_tensors(config: GPTConfig, architecture: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor)."""
    for entry in ARCHITECTURES[architecture][1](config):
        if entry.ours in tensors:
            yield from zip(entry.theirs, split(entry, tensors[entry.ours], config), strict=True)


def write_gguf(
    path: Path, name: str, architecture: str, config: GPTConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer,
    dtype: str,
) -> None:  # fmt: skip
    """tensors: ours, in the form of the class, float32 and rounded as `rounded` does. Raises UserError, OSError."""
    gguf = import_gguf()
    types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
    types["q8_0"] = gguf.LlamaFileType.MOSTLY_Q8_0
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(types[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, architecture, config)
    add_tokenizer(writer, tokenizer)
    if config.rope_factor is not None:
        frequencies = config.rope_theta ** (torch.arange(0, config.head_size, 2) * (-1.0 / config.head_size))
        scaled = scaled_frequencies(frequencies, config.rope_factor, config.rope_original_context)
        writer.add_tensor("rope_freqs.weight", (frequencies / scaled).numpy())
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_context)
    ours = {theirs: entry.ours for entry in ARCHITECTURES[architecture][1](config) for theirs in entry.theirs}
    for theirs, tensor in their_tensors(config, architecture, tensors):
        kind, values = file_type(ours[theirs], tensor, dtype), tensor.contiguous().numpy()
        if kind == "q8_0":
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(theirs, values.astype(np.float16) if kind == "f16" else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: Any, architecture: str, config: GPTConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden_size)
    writer.add_head_count(config.n_head)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    fields = tokenizer_fields(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    writer.add_token_merges(fields["merges"])
    writer.add_bos_token_id(tokenizer.start_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(prepended_id(tokenizer) is not None)
    if template := getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(template)


def modelfile(file: str, config: GPTConfig, chat_template: bool) -> str:
    """Ollama's recipe: `ollama create NAME -f Modelfile`. A base model gets the prompt as it is."""
    context = min(config.block_size, MAX_CONTEXT)
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {context}", "PARAMETER temperature 0.8"]
    lines += ["PARAMETER top_p 0.95"]
    if not chat_template:  # Ollama takes the file's own
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"
