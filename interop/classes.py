"""Which options of ours a class of model elsewhere has: their config → GPTConfig, and back.

What a config asks for and model.py does not do is refused by name. `read` and the table READERS serve transformers'
config.json, to which gguf_source.py translates GGUF's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from common.option import section_from
from errors import UserError
from interop import layouts
from model import GPTConfig

Config = Mapping[str, Any]


class Class(NamedTuple):
    """A class of transformers: how its config.json is read, and the names of its tensors."""

    read: Callable[[Config], dict[str, Any]]
    layout: layouts.Layout


def read_config(config: Config, name: str) -> dict[str, Any]:
    """GPTConfig's options, without the vocabulary, of a config.json of the class `name`. Raises UserError."""
    try:
        return CLASSES[name].read(config)
    except KeyError as error:
        raise UserError(f"config.json of {name}: it lacks {error.args[0]!r}; copy the file again") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"config.json of {name}: a value of a wrong type or range ({error}); copy the file again"
        ) from None


def class_of(config: Config) -> str:
    """The name of the class that a config.json asks for. Raises UserError where model.py does not cover it."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else MODEL_TYPES.get(str(config.get("model_type")))
    if name in CLASSES:
        return name
    found = name or f"model_type {config.get('model_type')!r}"
    why = NOT_COVERED.get(str(config.get("model_type")), "model.py does not have what it needs")
    raise UserError(f"a model of the class {found}: {why}. Covered: {', '.join(CLASSES)}")


def expect(config: Config, key: str, *allowed: Any, default: Any = None) -> None:
    """Raises UserError where the config has another value than those that model.py computes."""
    if (value := config.get(key, default)) not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise UserError(f"config.json: {key} is {value!r}, and model.py computes {expected} only")


# ---- Readers ---------------------------------------------------------------------------------------------------------


def _rope(config: Config, head_size: int, default_share: float = 1.0) -> dict[str, Any]:
    """The options of the rotation: rope_parameters of transformers 5, or rope_theta and rope_scaling before it."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10_000.0
    kind = given.get("rope_type") or given.get("type") or "default"
    found = {"positions": "rotary", "rope_theta": float(theta)}
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    share = default_share if share is None else share
    if share != 1:
        found["rotary_dim"] = int(head_size * share)
    if kind == "llama3":
        if (given["low_freq_factor"], given["high_freq_factor"]) != (1, 4):
            raise UserError("config.json: rope scaling with other low_freq_factor, high_freq_factor than 1 and 4")
        original = given.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        return found | {"rope_factor": float(given["factor"]), "rope_original_context": original}
    if kind != "default":
        raise UserError(f"config.json: rope_type {kind!r}; model.py computes 'default' and 'llama3' only")
    return found


def _window(config: Config, is_on: bool) -> int | None:
    """The sliding window, which all layers have or none."""
    kinds = set(config.get("layer_types") or [])
    if kinds and not is_on:
        is_on = "sliding_attention" in kinds
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"config.json: layers with {' and '.join(sorted(kinds))}; model.py has one kind for all layers")
    return config.get("sliding_window") if is_on and "full_attention" not in kinds else None


def _llama_like(config: Config, *, n_kv_head: int | None, head_dim: int | None, mlp: str) -> dict[str, Any]:
    """n_kv_head, head_dim: the class's defaults, where the config leaves them out."""
    n_head, n_embd = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or head_dim or n_embd // n_head
    expect(config, "hidden_act", *(("silu", "swish") if mlp == "swiglu" else ("relu2",)), default=None)
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": n_head,
        "n_kv_head": config.get("num_key_value_heads") or n_kv_head or n_head,
        "n_embd": n_embd,
        "head_dim": None if head_dim * n_head == n_embd else head_dim,
        "n_hidden": config["intermediate_size"],
        "block_size": config["max_position_embeddings"],
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "mlp": mlp,
        "bias": False,
        "tie_embeddings": config.get("tie_word_embeddings", False),
    } | _rope(config, head_dim)


def read_llama(config: Config) -> dict[str, Any]:
    found = _llama_like(config, n_kv_head=None, head_dim=None, mlp="swiglu")
    return found | {"bias": bool(config.get("attention_bias") or config.get("mlp_bias"))}


def read_arcee(config: Config) -> dict[str, Any]:
    found = _llama_like({"hidden_act": "relu2", **config}, n_kv_head=None, head_dim=None, mlp="relu2")
    return found | {"bias": bool(config.get("attention_bias") or config.get("mlp_bias"))}


def read_mistral(config: Config) -> dict[str, Any]:
    found = _llama_like(config, n_kv_head=8, head_dim=None, mlp="swiglu")
    return found | {"sliding_window": _window(config, True)}


def read_qwen2(config: Config) -> dict[str, Any]:
    found = _llama_like(config, n_kv_head=32, head_dim=None, mlp="swiglu")
    return found | {"qkv_bias": True, "sliding_window": _window(config, bool(config.get("use_sliding_window")))}


def read_qwen3(config: Config) -> dict[str, Any]:
    found = _llama_like(config, n_kv_head=32, head_dim=128, mlp="swiglu")
    window = _window(config, bool(config.get("use_sliding_window")))
    return found | {"qk_norm": True, "bias": bool(config.get("attention_bias")), "sliding_window": window}


GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu": "relu"}


def read_gpt2(config: Config) -> dict[str, Any]:
    activation = config.get("activation_function", "gelu_new")
    expect({"activation_function": activation}, "activation_function", *GELUS)
    for key, value in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
        expect(config, key, value, default=value)
    return {
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_embd": config["n_embd"],
        "n_hidden": config.get("n_inner"),
        "block_size": config.get("n_positions") or config["n_ctx"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "mlp": GELUS[activation],
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def read_neox(config: Config) -> dict[str, Any]:
    n_head, n_embd, activation = config["num_attention_heads"], config["hidden_size"], config.get("hidden_act", "gelu")
    expect({"hidden_act": activation}, "hidden_act", *GELUS)
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": n_head,
        "n_embd": n_embd,
        "n_hidden": config["intermediate_size"],
        "block_size": config["max_position_embeddings"],
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "mlp": GELUS[activation],
        "parallel_residual": config.get("use_parallel_residual", True),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    } | _rope(config, n_embd // n_head, 0.25)


def read_opt(config: Config) -> dict[str, Any]:
    expect(config, "word_embed_proj_dim", config["hidden_size"], default=config["hidden_size"])
    for key in ("enable_bias", "layer_norm_elementwise_affine"):
        expect(config, key, True, default=True)
    activation = config.get("activation_function", "relu")
    expect({"activation_function": activation}, "activation_function", *GELUS)
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "n_hidden": config["ffn_dim"],
        "block_size": config["max_position_embeddings"],
        "norm_position": "pre" if config.get("do_layer_norm_before", True) else "post",
        "mlp": GELUS[activation],
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


CLASSES = {
    "GPT2LMHeadModel": Class(read_gpt2, layouts.gpt2),
    "LlamaForCausalLM": Class(read_llama, layouts.llama),
    "MistralForCausalLM": Class(read_mistral, layouts.llama),
    "Qwen2ForCausalLM": Class(read_qwen2, layouts.llama),
    "Qwen3ForCausalLM": Class(read_qwen3, layouts.llama),
    "ArceeForCausalLM": Class(read_arcee, layouts.llama),
    "GPTNeoXForCausalLM": Class(read_neox, layouts.neox),
    "OPTForCausalLM": Class(read_opt, layouts.opt),
}
MODEL_TYPES = {  # where config.json names no class
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "arcee": "ArceeForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM",
}  # fmt: skip
NOT_COVERED = {
    "gemma": "it scales embeddings and adds 1 to the norms' weights",
    "gemma2": "it caps logits and has norms after the sublayers, too",
    "gemma3_text": "it has norms after the sublayers and two kinds of attention layers",
    "phi3": "it joins its projections in another way",
    "smollm3": "some of its layers have no rotation",
    "mixtral": "it is a mixture of experts",
    "nanochat": "it caps logits and has norms without weights",
}


def to_config(options: Mapping[str, Any], vocab_size: int, eos_id: int) -> GPTConfig:
    """The options of a class with the vocabulary. Raises UserError where they contradict each other."""
    try:
        return section_from(GPTConfig, {**options, "vocab_size": vocab_size, "eos_id": eos_id})
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None
