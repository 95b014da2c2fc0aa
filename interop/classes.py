"""Which options of ours a class of model elsewhere has: their config → GPTConfig, and back.

What a config asks for and model.py does not do is refused by name. `read` and the table READERS serve transformers'
config.json, to which gguf_source.py translates GGUF's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from common.option import section_from, show
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
    with values_of(f"config.json of {name}"):
        return CLASSES[name].read(config)


@contextmanager
def values_of(where: str) -> Iterator[None]:
    """Makes UserError of what values raise that are missing, of a wrong type or out of range. where: what has them."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{where}: it lacks {show(repr(error.args[0]))}; copy the file again") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError, RuntimeError) as error:
        why = " ".join(str(error)[:200].split())
        raise UserError(f"{where}: a value of a wrong type or range ({why}); copy the file again") from None


def class_of(config: Config) -> str:
    """The name of the class that a config.json asks for. Raises UserError where model.py does not cover it."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else MODEL_TYPES.get(str(config.get("model_type")))
    if isinstance(name, str) and name in CLASSES:
        return name
    found = show(name) if name else f"model_type {show(repr(config.get('model_type')))}"
    why = NOT_COVERED.get(str(config.get("model_type")), "model.py does not have what it needs")
    raise UserError(f"a model of the class {found}: {why}. Covered: {', '.join(CLASSES)}")


def expect(config: Config, key: str, *allowed: Any, default: Any = None) -> None:
    """Raises UserError where the config has another value than those that model.py computes."""
    if (value := config.get(key, default)) not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise UserError(f"config.json: {key} is {show(repr(value))}, and model.py computes {expected} only")


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
        raise UserError(f"config.json: rope_type {show(repr(kind))}; model.py computes 'default' and 'llama3' only")
    return found


def _window(config: Config, is_on: bool) -> int | None:
    """The sliding window, which all layers have or none."""
    kinds = set(config.get("layer_types") or [])
    if kinds and not is_on:
        is_on = "sliding_attention" in kinds
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        listed = show(" and ".join(sorted(map(str, kinds))))
        raise UserError(f"config.json: layers with {listed}; model.py has one kind for all layers")
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


GELUS = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu": "relu",
    "relu2": "relu2",
}  # fmt: skip


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


# ---- Writers ---------------------------------------------------------------------------------------------------------

PRESETS = (
    "quickstart, modern_124m and qwen3_char_cpu (Qwen3), gpt2_124m and shakespeare_char (GPT-2), vaswani2017 (OPT)"
)
HF_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu", "relu2": "relu2"}


def to_transformers(config: GPTConfig) -> tuple[str, dict[str, Any]]:
    """The class of transformers that computes what a model of these options does, and its config.json without dtype and
    special ids. Raises UserError that names the options which no class has."""
    name, problems = choose_class(config)
    problems = {
        f"max_ngram={config.max_ngram}: no class has a table of n-grams; the preset qwen3_char_cpu does without": (
            config.max_ngram > 1
        ),
        "document_mask=true: other programs would show a document those before it": config.document_mask,
    } | problems
    if found := [problem for problem, exists in problems.items() if exists]:
        listed = "".join(f"\n  {problem}" for problem in found)
        raise UserError(f"this model does not fit a class of transformers:{listed}\nPresets that export: {PRESETS}")
    kind = next(kind for kind, named in MODEL_TYPES.items() if named == name)
    head = {"architectures": [name], "model_type": kind, "vocab_size": config.vocab_size}
    # a scaled embedding is written as it is after scaling, and then it is not the head's
    head |= {"tie_word_embeddings": config.tie_embeddings and not config.scale_embeddings}
    return name, head | {"use_cache": True} | WRITERS[name](config)


def choose_class(c: GPTConfig) -> tuple[str, dict[str, bool]]:
    """The nearest class, and what it lacks: the option → whether this model has it."""
    if c.norm == "rmsnorm":
        problems = {
            f"positions={c.positions} with norm=rmsnorm; with rotary it exports": c.positions != "rotary",
            "norm_position=post with norm=rmsnorm": c.norm_position == "post",
            "parallel_residual=true with norm=rmsnorm": c.parallel_residual,
            f"rotary_dim={c.rotary_dim} with norm=rmsnorm": c.rotated_size != c.head_size,
            f"mlp={c.mlp} with norm=rmsnorm; swiglu and relu2 export": c.mlp not in ("swiglu", "relu2"),
        }
        windowed, biased = c.sliding_window is not None, c.bias or c.has_qkv_bias
        if c.mlp == "relu2":
            lacks = {"qk_norm=true with mlp=relu2": c.qk_norm, "sliding_window with mlp=relu2": windowed}
            return "ArceeForCausalLM", problems | lacks
        if c.qk_norm:
            kind = "bias" if c.bias else "qkv_bias"
            return "Qwen3ForCausalLM", problems | {f"{kind}=true with qk_norm=true": biased}
        if windowed and not biased:
            return "MistralForCausalLM", problems
        if not c.bias and c.has_qkv_bias:
            return "Qwen2ForCausalLM", problems
        return "LlamaForCausalLM", problems | {"sliding_window with bias=true": windowed}
    problems = {
        f"n_kv_head={c.n_kv_head} with norm=layernorm": c.kv_heads != c.n_head,
        f"head_dim={c.head_dim} with norm=layernorm": c.head_size * c.n_head != c.n_embd,
        "qk_norm=true with norm=layernorm": c.qk_norm,
        "sliding_window with norm=layernorm": c.sliding_window is not None,
        "mlp=swiglu with norm=layernorm": c.mlp == "swiglu",
    }
    if c.positions == "rotary":
        return "GPTNeoXForCausalLM", problems | {"norm_position=post with positions=rotary": c.norm_position == "post"}
    problems |= {f"parallel_residual=true with positions={c.positions}": c.parallel_residual}
    if c.norm_position == "pre" and c.mlp in ("gelu", "gelu_exact"):
        return "GPT2LMHeadModel", problems
    return "OPTForCausalLM", problems | {f"norm_eps={c.norm_eps:g} (OPT has 1e-05 only)": c.norm_eps != 1e-5}


def _rope_parameters(c: GPTConfig) -> dict[str, Any]:
    found = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_factor is not None:
        found |= {"rope_type": "llama3", "factor": c.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        found |= {"original_max_position_embeddings": c.rope_original_context}
    return found


def write_llama(c: GPTConfig) -> dict[str, Any]:
    """What Llama, Mistral, Qwen2, Qwen3 and Arcee have in common. Older versions read rope_theta and rope_scaling."""
    rope = _rope_parameters(c)
    scaling = None if c.rope_factor is None else {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "num_hidden_layers": c.n_layer, "hidden_size": c.n_embd, "intermediate_size": c.hidden_size,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.kv_heads, "head_dim": c.head_size,
        "hidden_act": "relu2" if c.mlp == "relu2" else "silu", "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "rope_scaling": scaling, "rope_parameters": rope,
        "attention_dropout": 0.0,
    }  # fmt: skip


def write_llama_biases(c: GPTConfig) -> dict[str, Any]:
    """Biases of all layers or of none; those that ours lacks are written as zeros."""
    return write_llama(c) | dict.fromkeys(("attention_bias", "mlp_bias"), c.bias or c.has_qkv_bias)


def write_qwen(c: GPTConfig) -> dict[str, Any]:
    """Qwen2, Qwen3."""
    kind = "full_attention" if c.sliding_window is None else "sliding_attention"
    window = {"use_sliding_window": c.sliding_window is not None, "sliding_window": c.sliding_window}
    return write_llama(c) | window | {"max_window_layers": 0, "layer_types": [kind] * c.n_layer}


def write_mistral(c: GPTConfig) -> dict[str, Any]:
    return write_llama(c) | {"sliding_window": c.sliding_window}


def write_gpt2(c: GPTConfig) -> dict[str, Any]:
    return {
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.hidden_size,
        "n_positions": c.block_size, "n_ctx": c.block_size, "layer_norm_epsilon": c.norm_eps,
        "activation_function": HF_ACTIVATIONS[c.mlp], "scale_attn_weights": True,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip


def write_neox(c: GPTConfig) -> dict[str, Any]:
    share = c.rotated_size / c.head_size
    while int(c.head_size * share) < c.rotated_size:  # transformers rounds the product down
        share += 1e-9
    rope = _rope_parameters(c) | {"partial_rotary_factor": share}
    return {
        "num_hidden_layers": c.n_layer, "hidden_size": c.n_embd, "intermediate_size": c.hidden_size,
        "num_attention_heads": c.n_head, "hidden_act": HF_ACTIVATIONS[c.mlp], "max_position_embeddings": c.block_size,
        "layer_norm_eps": c.norm_eps, "use_parallel_residual": c.parallel_residual, "attention_bias": True,
        "rotary_emb_base": c.rope_theta, "rotary_pct": share, "rope_parameters": rope,
        "attention_dropout": 0.0, "hidden_dropout": 0.0,
    }  # fmt: skip


def write_opt(c: GPTConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": c.n_layer, "hidden_size": c.n_embd, "word_embed_proj_dim": c.n_embd,
        "ffn_dim": c.hidden_size, "num_attention_heads": c.n_head, "max_position_embeddings": c.block_size,
        "do_layer_norm_before": c.norm_position == "pre", "activation_function": HF_ACTIVATIONS[c.mlp],
        "enable_bias": True, "layer_norm_elementwise_affine": True, "dropout": 0.0, "attention_dropout": 0.0,
        "layerdrop": 0.0, "pad_token_id": None,
    }  # fmt: skip


WRITERS: dict[str, Callable[[GPTConfig], dict[str, Any]]] = {
    "GPT2LMHeadModel": write_gpt2, "LlamaForCausalLM": write_llama_biases, "MistralForCausalLM": write_mistral,
    "Qwen2ForCausalLM": write_qwen, "Qwen3ForCausalLM": write_qwen, "ArceeForCausalLM": write_llama_biases,
    "GPTNeoXForCausalLM": write_neox, "OPTForCausalLM": write_opt,
}  # fmt: skip
