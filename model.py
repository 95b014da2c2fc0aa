"""The Transformer in one file: options, layers, language model, key/value cache, attention and its Triton kernels.

Reading order: GPTConfig (the options) → norms, positions, dropout → Attention, MLP, Block → GPT (forward pass and loss,
prefill and decode step) → the loss in chunks → KVCache → attention (its two paths, then the fused kernels).
The file imports nothing of the project. It works on ids and tensors; text, files and schedules are handled elsewhere.

Dimension letters: B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head size, F width of the
MLP, V vocabulary, R rows and S slots of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    import triton.language as tl
    from annotated_types import Interval

IGNORED_TARGET = -100  # targets with this id count neither in the loss nor in its divisor


@dataclass(frozen=True)
class GPTConfig:
    """Architecture; the defaults are GPT-2 124M. Raises ValueError that names the options that do not fit together."""

    FREE_ON_RESUME: ClassVar = {"dropout"}  # a resumed run may change these alone; the weights depend on the others
    MIN_TABLE_BYTES: ClassVar = 2**25  # that a table of positions may take in any model: 131,072 of 64 channels

    n_layer: Annotated[int, Interval(ge=1, le=512)] = 12
    """Number of blocks."""
    n_head: Annotated[int, Interval(ge=1, le=1024)] = 12
    """Query heads per block; divides n_embd."""
    n_kv_head: Annotated[int, Interval(ge=1, le=1024)] | None = None
    """Key/value heads per block (grouped-query attention), divides n_head; none: as many as n_head."""
    n_embd: Annotated[int, Interval(ge=1, le=65_536)] = 768
    """Channels: the width of the residual stream."""
    head_dim: Annotated[int, Interval(ge=1, le=65_536)] | None = None
    """Channels of a head; none: n_embd / n_head."""
    block_size: Annotated[int, Interval(ge=1, le=2**24)] = 1024
    """Context length in tokens: the longest sequence that the model takes."""
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """Position encoding: a learned table, fixed sine waves, or rotated queries and keys (RoPE)."""
    rope_theta: Annotated[float, Interval(ge=1, le=1e12)] = 10_000.0
    """Base of the rotary wavelengths; larger for longer contexts."""
    rope_factor: Annotated[float, Interval(ge=1, le=1e6)] | None = None
    """Llama 3.1's scaling of rotary wavelengths: those beyond rope_original_context are so many times longer. none: no
    scaling."""
    rope_original_context: Annotated[int, Interval(ge=1, le=2**24)] = 8192
    """With rope_factor: the context, in tokens, of the model before it was extended."""
    rotary_dim: Annotated[int, Interval(ge=2, le=65_536)] | None = None
    """Channels of a head that are rotated, the first ones (GPT-NeoX); none: all."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization: LayerNorm, or RMSNorm (no mean, no bias)."""
    norm_eps: Annotated[float, Interval(gt=0, le=1)] = 1e-5
    """Added to the variance before the square root."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalize the input of a sublayer (GPT-2 and later), or its sum with the residual (the 2017 paper)."""
    parallel_residual: bool = False
    """Attention and MLP of a block both read its input, and their outputs are added together (GPT-NeoX)."""
    mlp: Literal["gelu", "gelu_exact", "relu", "relu2", "swiglu"] = "gelu"
    """Nonlinearity of the MLP: GELU (tanh form, or exact), ReLU, squared ReLU, or SiLU-gated."""
    n_hidden: Annotated[int, Interval(ge=1, le=2**20)] | None = None
    """Width of the MLP; none: 4 * n_embd, for swiglu 8/3 * n_embd rounded up to a multiple of 64."""
    qk_norm: bool = False
    """RMSNorm with learned scales on every head's queries and keys, before the rotation."""
    first_attention: Literal["random", "recent"] = "random"
    """Where untrained heads look: anywhere, or (recent; positions=rotary) one, two or three tokens back, in turn."""
    bias: bool = True
    """Biases in the linear layers and in LayerNorm."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values, where they differ from the other layers' (Qwen2: they alone have them). none:
    as bias."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head too."""
    scale_embeddings: bool = False
    """Multiply token embeddings by the square root of n_embd (the 2017 paper)."""
    max_ngram: Annotated[int, Interval(ge=1, le=64)] = 1
    """Add to a token's embedding those of the n-grams that end with it, n = 2 to this, from a hashed table; 1: none."""
    ngram_rows: Annotated[int, Interval(ge=1, le=2**31 - 1)] = 16_384
    """Rows of the n-gram table; n-grams with the same hash share a row."""
    sliding_window: Annotated[int, Interval(ge=1, le=2**31 - 1)] | None = None
    """Each token attends to this many tokens, itself and those before it; none: to the whole context."""
    document_mask: bool = False
    """Tokens attend to their own document only, and positions restart at 0 where a document starts."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the outputs of the embedding and the residual branches; attention weights are never dropped."""
    vocab_size: Annotated[int, Interval(ge=1, le=2**24)] = field(default=50_257, metadata={"derived": True})
    """Number of token ids; comes from the tokenizer, so it is not an option."""
    eos_id: Annotated[int, Interval(ge=0, lt=2**24)] | None = field(default=50_256, metadata={"derived": True})
    """The end-of-sequence id; it starts the document that follows it. The document mask needs it."""

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def rotated_size(self) -> int:
        """Channels of a head that are rotated."""
        return self.rotary_dim or self.head_size

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_size(self) -> int:
        if self.n_hidden is not None:
            return self.n_hidden
        return 64 * math.ceil(8 * self.n_embd / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def table_bytes(self) -> int:
        """Of the table of fixed positions, sine waves or rotations, in float32; 0 where positions are learned."""
        width = {"sinusoidal": self.n_embd, "rotary": self.rotated_size}.get(self.positions, 0)
        return 4 * self.block_size * width

    @property
    def matrix_weights(self) -> int:
        """Weights of the matrices of all blocks."""
        attention = (2 * self.n_head + 2 * self.kv_heads) * self.head_size
        return self.n_layer * self.n_embd * (attention + (3 if self.mlp == "swiglu" else 2) * self.hidden_size)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory: a large vocabulary is padded to a multiple of 128, for the speed of GPUs."""
        return 128 * math.ceil(self.vocab_size / 128) if self.vocab_size > 1024 else self.vocab_size

    def problems(self) -> list[str]:
        """The violated rules that involve several options, one line each."""
        head, eos = f"head_dim={self.head_dim}", self.eos_id
        if self.head_dim is None:
            head = f"n_embd={self.n_embd} / n_head={self.n_head} is {self.head_size}"
        sinusoidal, rotary = self.positions == "sinusoidal", self.positions == "rotary"
        partly, recent = self.rotary_dim is not None, self.first_attention == "recent"
        max_table = max(self.MIN_TABLE_BYTES, 2 * self.matrix_weights)  # no weight has the length of such a table
        violated = {
            f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}": not self.head_dim
            and self.n_embd % self.n_head,
            f"n_head={self.n_head} is not divisible by n_kv_head={self.kv_heads}": self.n_head % self.kv_heads,
            f"positions=rotary needs an even head size ({head})": rotary and not partly and self.head_size % 2,
            f"rotary_dim={self.rotary_dim} is odd, or above the head size ({head})": partly
            and (self.rotated_size % 2 or self.rotated_size > self.head_size),
            "rope_factor and rotary_dim need positions=rotary": (partly or self.rope_factor is not None) and not rotary,
            f"positions=sinusoidal needs an even n_embd, not {self.n_embd}": sinusoidal and self.n_embd % 2,
            "first_attention=recent needs positions=rotary, without rotary_dim": recent and (partly or not rotary),
            "parallel_residual=true needs norm_position=pre": self.parallel_residual and self.norm_position == "post",
            "document_mask=true needs a tokenizer with an end-of-sequence id": self.document_mask and eos is None,
            f"eos_id={eos} lies outside the vocabulary of {self.vocab_size}": not 0 <= (eos or 0) < self.vocab_size,
            f"block_size={self.block_size} is too long for so small a model: its table of positions would take"
            f" {self.table_bytes / 1e6:,.0f} MB, at most {max_table / 1e6:,.0f} MB are allowed": self.table_bytes
            > max_table,
        }
        return [rule for rule, is_violated in violated.items() if is_violated]

    def __post_init__(self) -> None:
        if min(self.n_embd, self.n_head, self.kv_heads, self.n_layer, self.block_size, self.vocab_size) < 1:
            raise ValueError("n_layer, n_head, n_kv_head, n_embd, block_size and vocab_size must be at least 1")
        if found := self.problems():
            raise ValueError("; ".join(found))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- Norms, positions, dropout ---------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear that leaves initialization to GPT.init_weights."""

    def reset_parameters(self) -> None: ...


def embedding(rows: int, channels: int) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.empty(rows, channels), freeze=False)


class RMSNorm(nn.Module):
    """x (…, D) / rms(x) · weight over the last dimension (Zhang and Sennrich 2019), computed in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        return (F.rms_norm(wide, wide.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x, converted to float32 if its dtype is narrower."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Dropout(nn.Module):
    """Zeroes each input with probability p in training, and scales the others by 1 / (1 − p). On a CPU from 16 random
    bits, since a float per input costs more: p is rounded to a multiple of 1/65536 there, unless it is near 0 or 1."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        if x.device.type != "cpu" or not 1 / 512 <= self.p <= 511 / 512:
            return F.dropout(x, self.p)
        dropped = round(65_536 * self.p)
        bits = opaque_random_bits(x) if torch.compiler.is_compiling() else random_bits(x)
        return x * (bits >= dropped - 32_768) * (65_536 / (65_536 - dropped))


def random_bits(x: Tensor) -> Tensor:
    """int16 of the shape of x, uniform, from torch's generator of CPUs."""
    # random_(-2**63, None) fills all 64 bits; random_() leaves the sign bit at 0, a bias of every fourth number
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return draws[: x.numel()].view(x.shape)


# Opaque to torch.compile, which would trace neither view nor generator. In eager mode operators are not called: the
# first call of one imports torch's compiler, which takes as long as importing torch.
opaque_random_bits = torch.library.custom_op(
    "sprout::random_bits", random_bits, mutates_args=(), tags=[torch.Tag.nondeterministic_seeded]
)
opaque_random_bits.register_fake(lambda x: torch.empty(x.shape, dtype=torch.int16))


def sinusoidal_table(length: int, channels: int) -> Tensor:
    """(length, channels): sin(t / 10000^(2i/C)) in even channels, cosines in odd ones (Vaswani et al. 2017, 3.5)."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000.0) / channels))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).view(length, channels)


def rotary_table(
    length: int, head_size: int, theta: float, factor: float | None = None, original_context: int = 1
) -> Tensor:
    """(length, 2, D/2): cosines and sines of the angles t · theta^(−2i/D) (Su et al. 2021), with a factor scaled as in
    Llama 3.1 for contexts longer than the original one."""
    frequencies = theta ** (torch.arange(0, head_size, 2) * (-1.0 / head_size))
    if factor is not None:
        frequencies = scaled_frequencies(frequencies, factor, original_context)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def scaled_frequencies(frequencies: Tensor, factor: float, original_context: int) -> Tensor:
    """Frequencies (D/2,) in radians a token: those that turn less than once in the original context are divided by the
    factor, those that turn four times or more are kept, and in between the kept share grows linearly (Hugging Face's
    rope_type "llama3", with its usual low_freq_factor 1 and high_freq_factor 4)."""
    turns = original_context * frequencies / (2 * math.pi)
    kept = ((turns - 1) / 3).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (B, T, heads, D), rows of rotary_table (T, 2, D/2) or (B, T, 2, D/2) → x in its dtype, with the pairs
    (x[i], x[i + D/2]) of every head rotated: the layout of Llama and Qwen checkpoints. Of a table for fewer channels
    the others are not rotated."""
    if 2 * table.shape[-1] < x.shape[-1]:
        rotated, others = x.tensor_split((2 * table.shape[-1],), dim=-1)
        return torch.cat((rotate(rotated, table), others), dim=-1)
    cos, sin = table[..., None, 0, :], table[..., None, 1, :]
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)  # halves: torch.compile cannot vectorize x.roll on a CPU
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-2).to(x.dtype)


# ---- The block -------------------------------------------------------------------------------------------------------


class AttentionContext(NamedTuple):
    """What the attention of all layers shares in one forward pass."""

    path: AttentionPath
    rotation: Tensor | None = None  # rows of rotary_table for the positions, (T, 2, D/2) or (B, T, 2, D/2)
    first_visible: Tensor | None = None  # (B, T) int32, nondecreasing: query t attends to keys first_visible[t] … t
    mask: Tensor | None = None  # dense_mask(first_visible) on the sdpa path; in a decode step KVCache.mask
    cache: KVCache | None = None  # in a prefill or a decode step
    rows: Tensor | None = None  # (B,) int64, in a prefill: the rows of the cache to write


class Attention(nn.Module):
    """Projection to queries, keys and values; QK-norm and rotation; attention; output projection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_size = layer, config.n_head, config.kv_heads, config.head_size
        self.qkv = Linear(config.n_embd, (self.heads + 2 * self.kv_heads) * self.head_size, config.has_qkv_bias)
        self.proj = Linear(self.heads * self.head_size, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        out = attention(*self.queries_keys_values(x, context.rotation), context, self.layer)  # (B, T, H, D)
        return self.proj(out.flatten(2))

    def queries_keys_values(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) → q (B, T, H, D), k and v (B, T, K, D), with QK-norm and rotation; views of one projection."""
        (B, T, _), H, K = x.shape, self.heads, self.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * K, self.head_size)
        if rotation is None and self.q_norm is None:  # split: slices would have zero-padded gradients
            q, k, v = qkv.split_with_sizes((H, K, K), dim=2)
        else:
            qk, v = qkv.split_with_sizes((H + K, K), dim=2)
            q, k = self.normalize_and_rotate(qk, rotation).split_with_sizes((H, K), dim=2)
        return q, k, v

    def normalize_and_rotate(self, qk: Tensor, rotation: Tensor | None) -> Tensor:
        """QK-norm and rotation of queries and keys together, (B, T, H + K, D): one elementwise pass if compiled."""
        if self.q_norm is None or self.k_norm is None:
            return qk if rotation is None else rotate(qk, rotation)
        is_query = torch.arange(qk.shape[2], device=qk.device)[:, None] < self.heads
        wide = widened(qk)
        inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.q_norm.eps)
        scaled = wide * inverse_rms * torch.where(is_query, self.q_norm.weight, self.k_norm.weight)
        return (scaled if rotation is None else rotate(scaled, rotation)).to(qk.dtype)


class MLP(nn.Module):
    """Two linear layers around a nonlinearity. For swiglu, `up` holds the gate's rows first, then the values'."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind, width = config.mlp, config.hidden_size
        self.up = Linear(config.n_embd, 2 * width if config.mlp == "swiglu" else width, bias=config.bias)
        self.down = Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)  # (B, T, F), for swiglu (B, T, 2F)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        if self.kind in ("gelu", "gelu_exact"):
            return self.down(F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none"))
        x = F.relu(x)
        return self.down(x.square() if self.kind == "relu2" else x)


class Block(nn.Module):
    """Attention, then an MLP, each on a residual branch."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.post_norm, self.parallel = config.norm_position == "post", config.parallel_residual
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        if self.post_norm:
            x = self.attn_norm(x + self.dropout(self.attn(x, context)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        if self.parallel:
            return x + self.dropout(self.attn(self.attn_norm(x), context)) + self.dropout(self.mlp(self.mlp_norm(x)))
        x = x + self.dropout(self.attn(self.attn_norm(x), context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# ---- The language model ----------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A decoder-only Transformer over token ids. seed: for the initial weights, drawn on the CPU, so equal on every
    device; None leaves them unset, to be loaded. attention: the path, from choose_attention in common/hardware.py."""

    run_block: Callable[..., Tensor] = staticmethod(Block.__call__)  # block, x, context → x; compiled in training
    recompute_blocks = False  # in the backward pass, which then needs their inputs alone (activation checkpointing)
    sparse_ngrams = True  # on a CPU the n-gram table has sparse gradients; not where processes add theirs up
    table: Tensor | None  # fixed positions: (block_size, C) sine waves or (block_size, 2, D/2) rotations

    def __init__(self, config: GPTConfig, seed: int | None = 0, attention: AttentionPath = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.eos_id = -1 if config.eos_id is None else config.eos_id
        V, C = config.padded_vocab_size, config.n_embd
        self.embed = embedding(V, C)
        self.ngrams = embedding(config.ngram_rows, C) if config.max_ngram > 1 else None
        self.position = embedding(config.block_size, C) if config.positions == "learned" else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.head = None if config.tie_embeddings else Linear(C, V, bias=False)
        with torch.device("cpu"):  # on the meta device these operations import torch's compiler, which takes a second
            table = sinusoidal_table(config.block_size, C) if config.positions == "sinusoidal" else None
            if config.positions == "rotary":
                scaling = config.rope_factor, config.rope_original_context
                table = rotary_table(config.block_size, config.rotated_size, config.rope_theta, *scaling)
        self.register_buffer("table", table, persistent=False)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws the weights, in the order of named_parameters: matrices and embeddings from a normal distribution of
        standard deviation 0.02, at the end of a residual branch (attn.proj, mlp.down) 0.02 / √(2 · n_layer), which
        bounds the sum of the branches. Norms start at 1; biases, n-grams and the rows that pad the vocabulary at 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_weight(name, parameter.shape, generator))
        if self.config.first_attention == "recent":
            self._attend_to_recent(generator)

    def initial_weight(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The next weight that init_weights draws, on the CPU; first_attention=recent changes some of them later."""
        if name.endswith("bias") or name.startswith("ngrams"):
            return torch.zeros(shape, device="cpu")
        if "norm" in name:
            return torch.ones(shape, device="cpu")
        is_branch = name.endswith(("attn.proj.weight", "mlp.down.weight"))
        std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_branch else 0.02
        weight = torch.empty(shape, device="cpu").normal_(std=std, generator=generator)
        weight[len(self.unpad(name, weight)) :] = 0.0
        return weight

    def _attend_to_recent(self, generator: torch.Generator) -> None:
        """Adds the same random signs u to all embeddings, and to the weights of queries and keys what makes of u
        constant vectors of RMS 2, in the faster half of the rotations: one for all keys, and for the query heads that
        one rotated back by 1, 2, 3, 1, … positions. So a head's scores are highest for the token that many back,
        whatever the tokens are, until training changes that."""
        c = self.config
        u = torch.randint(0, 2, (c.n_embd,), generator=generator) * 2.0 - 1.0
        self.unpad("embed.weight", self.embed.weight).add_(0.02 * u).mul_(math.sqrt(0.5))  # standard deviation 0.02
        back = 1 + torch.arange(c.n_head) % 3
        cos, sin = rotary_table(4, c.head_size, c.rope_theta)[back].unbind(dim=1)  # (H, D/2)
        fast = torch.arange(c.head_size // 2) < c.head_size / 4
        queries = torch.cat((cos * fast, -sin * fast), dim=1)  # (H, D)
        key = torch.cat((fast, torch.zeros_like(fast))).expand(c.kv_heads, -1)  # (K, D)
        constant = torch.cat((queries, key)).flatten()[:, None]  # ((H + K) · D, 1)
        for block in self.blocks:
            block.get_parameter("attn.qkv.weight")[: len(constant)] += constant * u * (4 * math.sqrt(2) / c.n_embd)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean", label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """ids (B, T) int64, T ≤ block_size → logits (B, T, V), or with targets (B, T), the next ids, the loss in nats.
        Targets of IGNORED_TARGET do not count; "mean" divides by the number of the others, "none" returns (B, T)."""
        hidden = self._hidden(ids, *self._sequence_context(ids))
        if targets is None:
            return self._logits(hidden)
        kind, V, smoothing = hidden.device.type, self.config.vocab_size, label_smoothing
        hidden, flat = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        if not torch.is_grad_enabled():
            rows = max(1, EVAL_CHUNK_LOGITS // V)
            chunks = zip(hidden.split(rows), flat.split(rows), strict=True)
            losses = torch.cat([self._losses(*chunk, reduction="none", label_smoothing=smoothing) for chunk in chunks])
            if reduction == "none":
                return losses.view_as(targets)
            return losses.sum() if reduction == "sum" else losses.sum() / (flat != IGNORED_TARGET).sum()
        if reduction == "none" or flat.numel() * V < MIN_CHUNKED_LOGITS or kind not in CHUNK_LOGITS:
            loss = self._losses(hidden, flat, reduction, smoothing)
            return loss.view_as(targets) if reduction == "none" else loss
        weight = self.embed.weight if self.head is None else self.head.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        inputs = hidden, weight, flat, V, dtype, smoothing, self.attention == "triton", weight.requires_grad
        total = opaque_loss(*inputs)[0] if torch.compiler.is_compiling() else ChunkedCrossEntropy.apply(*inputs)
        return total if reduction == "sum" else total / (flat != IGNORED_TARGET).sum()

    def _losses(self, hidden: Tensor, targets: Tensor, reduction: str, label_smoothing: float) -> Tensor:
        """hidden (N, C), targets (N,) → PyTorch's loss over all logits at once: (N,) for "none", else a scalar."""
        logits = widened(self._logits(hidden))
        return F.cross_entropy(
            logits, targets, ignore_index=IGNORED_TARGET, reduction=reduction, label_smoothing=label_smoothing
        )

    def _sequence_context(self, ids: Tensor, **fields: Any) -> tuple[Tensor | slice, AttentionContext]:
        """ids (B, T) → positions, as _hidden takes them, and the attention context with further fields."""
        positions: Tensor | slice = slice(0, ids.shape[1])
        if self.config.document_mask:
            positions = torch.arange(ids.shape[1], device=ids.device) - self.document_starts(ids)  # (B, T)
        first = self.first_visible(ids)
        mask = dense_mask(first) if self.attention == "sdpa" else None
        return positions, AttentionContext(self.attention, self._rotation(positions), first, mask, **fields)

    def _rotation(self, positions: Tensor | slice) -> Tensor | None:
        return self.table[positions] if self.table is not None and self.config.positions == "rotary" else None

    def _hidden(
        self, ids: Tensor, positions: Tensor | slice, context: AttentionContext, before: Tensor | None = None
    ) -> Tensor:
        """ids (B, T), positions (B, T) or a slice for all rows, the ids before (B, max_ngram − 1), if any → hidden
        states after the final norm (B, T, C)."""
        x = self.embed(ids)  # (B, T, C)
        if self.ngrams is not None:
            rows, is_sparse = self._ngram_rows(ids, positions, before), self.sparse_ngrams and ids.device.type == "cpu"
            x = x + F.embedding(rows, self.ngrams.weight, sparse=is_sparse).sum(dim=-2)  # few rows have a gradient
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.n_embd)
        if self.position is not None:
            x = x + self.position.weight[positions]
        elif self.table is not None and self.config.positions == "sinusoidal":
            x = x + self.table[positions].to(x.dtype)
        x = self.dropout(x)
        for block in self.blocks:
            if not torch.is_grad_enabled():
                x = block(x, context)
            elif self.recompute_blocks:
                x = checkpoint(self.run_block, block, x, context, use_reentrant=False)
            else:
                x = self.run_block(block, x, context)
        return self.final_norm(x)

    def _ngram_rows(self, ids: Tensor, positions: Tensor | slice, before: Tensor | None) -> Tensor:
        """Arguments as in _hidden → (B, T, max_ngram − 1): table rows of the 2-, 3-, … grams that end with each token
        (hash n-gram embeddings: Pagnoni et al. 2024, Byte Latent Transformer, 3.2.1)."""
        T, context_size = ids.shape[1], self.config.max_ngram - 1
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=ids.device)
        history = F.pad(ids, (context_size, 0)) if before is None else torch.cat((before, ids), dim=1)
        hashes = [ids + 1]  # 0 stands for the tokens before the start of the document
        for back in range(1, context_size + 1):
            earlier = (history[:, context_size - back : context_size - back + T] + 1) * (positions >= back)
            hashes.append((hashes[-1] * 1_000_003 + earlier) % (2**31 - 1))
        return torch.stack(hashes[1:], dim=-1) % self.config.ngram_rows

    def _logits(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…, V), without the padding of the vocabulary."""
        logits = F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
        return logits if logits.shape[-1] == self.config.vocab_size else logits[..., : self.config.vocab_size]

    def document_starts(self, ids: Tensor) -> Tensor:
        """ids (B, T) → (B, T) int64: where each token's document starts. An EOS is the first token of a document."""
        steps = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(ids.eq(self.eos_id), steps, 0).cummax(dim=1).values

    def first_visible(self, ids: Tensor) -> Tensor | None:
        """ids (B, T) → (B, T) int32, the first position that each token attends to; None if that is 0 for all."""
        if not self.config.document_mask and self.config.sliding_window is None:
            return None
        first = self.document_starts(ids) if self.config.document_mask else torch.zeros_like(ids)
        if self.config.sliding_window is not None:
            steps = torch.arange(ids.shape[1], device=ids.device)
            first = torch.maximum(first, steps - (self.config.sliding_window - 1))  # (B, T)
        return first.to(torch.int32)

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Sequence[int], cache: KVCache, rows: Sequence[int]) -> None:
        """Reads prompts into rows of the cache, replacing what the rows held. The next decode step returns logits.
        ids (B, T) int64: prompts, padded on the right with any id, to which no token attends; lengths: of the B
        prompts, each 0 … T; rows: of the cache."""
        index = cache.restart(rows, lengths)  # (B,)
        if ids.shape[1] == 0:
            return
        self._hidden(ids, *self._sequence_context(ids, cache=cache, rows=index))
        if cache.ids is not None:
            cache.ids[index, : ids.shape[1]] = ids
        if cache.starts is not None:
            last = (cache.lengths[index] - 1).clamp(min=0)
            cache.starts[index] = self.document_starts(ids).gather(1, last[:, None])[:, 0]

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (R,) int64, the next token of every row of the cache → logits (R, V). ValueError if a row is full."""
        cache.extend()
        return self.decode_step(ids, cache, cache.longest, cache.equal_lengths)

    @torch.inference_mode()
    def decode_step(self, ids: Tensor, cache: KVCache, span: int, equal_lengths: bool = False) -> Tensor:
        """The part of `decode` that a CUDA graph can replay. span: slots of the cache that are read, at least those of
        the longest row and its new token. equal_lengths: all rows have one length; the new slot is span − 1."""
        c = self.config
        if cache.starts is not None:
            cache.starts.copy_(torch.where(ids.eq(self.eos_id), cache.lengths, cache.starts))
        aligned = equal_lengths and not c.document_mask
        positions = slice(span - 1, span) if aligned else cache.positions()  # (R, 1)
        sees_all = aligned and (c.sliding_window is None or c.sliding_window >= span)
        mask = None if sees_all else cache.mask(span, c.sliding_window)
        cache.prepare_append(span, equal_lengths)
        context = AttentionContext(self.attention, self._rotation(positions), mask=mask, cache=cache)
        hidden = self._hidden(ids[:, None], positions, context, cache.newest_ids(c.max_ngram - 1))
        cache.advance(ids)
        return self._logits(hidden[:, 0])

    def unpad(self, name: str, tensor: Tensor, first_row: int = 0) -> Tensor:
        """A tensor shaped like the parameter `name` (weights, moments), or rows of it from first_row on, without the
        rows that pad the vocabulary."""
        if name not in ("embed.weight", "head.weight"):
            return tensor
        return tensor[: max(0, self.config.vocab_size - first_row)]


# ---- The loss in chunks ----------------------------------------------------------------------------------------------
# In training the forward pass computes the gradients too, softmax − one-hot, chunk by chunk in place of the logits, so
# no tensor of N × V numbers exists: for 65,536 tokens of GPT-2's vocabulary that is 13 GB in float32, several times.
# (Liger's FusedLinearCrossEntropy does the same. F.linear_cross_entropy, torch 2.13, is six times slower on a CPU than
# the plain loss.)

# Logits in a chunk, by device: a CPU's stay near its caches; a GPU needs some thousand rows for its products, and takes
# 0.5 GiB in 16 bits. MPS was never tried: it trains without chunks. Evaluation, without gradients, takes at most 0.25
# GiB in float32 at a time on every device; smaller chunks are slower on a CPU.
CHUNK_LOGITS, EVAL_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**28}, 2**26
MIN_CHUNK_ROWS, MIN_CHUNKED_LOGITS = 256, 2**22  # fewer logits than the last are one chunk


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype, label_smoothing: float,
    kernel: bool, trains_head: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden (N, C), head weight (≥ V, C), targets (N,) int64 → the sum of the counted targets' losses in nats, and its
    gradients by hidden and weight, in their dtypes. dtype: of the products; softmax is in float32 or wider. kernel:
    whether Triton runs here. Without trains_head the gradient by the weight is empty."""
    N, kind = len(targets), hidden.device.type
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight) if trains_head else weight.new_empty(0)
    with torch.autocast(kind, enabled=False):
        # with the rows that pad the vocabulary, rows of logits are aligned as GPUs need it
        narrow_hidden, narrow_weight = hidden.to(dtype), (weight[:vocab_size] if kind == "cpu" else weight).to(dtype)
        d_head = d_weight[: len(narrow_weight)]
        total = widened(hidden.new_zeros(()))
        chunk = max(MIN_CHUNK_ROWS, CHUNK_LOGITS[kind] // vocab_size)
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            logits = narrow_hidden[rows] @ narrow_weight.mT  # (chunk, ≥ V)
            replace = loss_kernel if kernel else replace_logits
            loss, d_logits = replace(logits, targets[rows], vocab_size, label_smoothing)
            total += loss
            d_hidden[rows] = d_logits @ narrow_weight
            if trains_head and dtype == weight.dtype:
                d_head.addmm_(d_logits.mT, narrow_hidden[rows])
            elif trains_head:
                d_head += d_logits.mT @ narrow_hidden[rows]
            del logits, d_logits  # before the next chunk's are allocated
    return total, d_hidden, d_weight


def replace_logits(logits: Tensor, targets: Tensor, vocab_size: int, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """logits (n, ≥ V), overwritten if float32, targets (n,) → the sum of the losses, and its gradient by the logits."""
    dtype, counted = logits.dtype, (targets != IGNORED_TARGET)[:, None]
    target = targets[:, None].clamp(min=0)
    logits = widened(logits)
    logits[:, vocab_size:] = -torch.inf
    target_logits = logits.gather(1, target)
    if label_smoothing:
        target_logits = target_logits.lerp(logits[:, :vocab_size].mean(dim=1, keepdim=True), label_smoothing)
    distances = logits.amax(dim=1, keepdim=True) - target_logits
    probabilities = torch.softmax(logits, dim=1, out=logits)
    # −log p of the target from the largest p, which cannot underflow
    loss = ((distances - probabilities.amax(dim=1, keepdim=True).log()) * counted).sum()
    if label_smoothing:
        probabilities[:, :vocab_size] -= label_smoothing / vocab_size
    if logits.device.type != "cpu" or not counted.all():  # a GPU would have to be waited for
        probabilities *= counted
    return loss, probabilities.scatter_add_(1, target, (label_smoothing - 1) * counted.to(logits.dtype)).to(dtype)


def loss_kernel(logits: Tensor, targets: Tensor, vocab_size: int, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """replace_logits by one kernel, always in place."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    sizes = vocab_size, logits.shape[1]
    with torch.cuda.device_of(logits):
        _jitted(_loss_kernel)[len(logits),](logits, targets, losses, *sizes, label_smoothing, BLOCK=4096, num_warps=8)
    return losses.sum(), logits


def _loss_kernel(logits_ptr, targets_ptr, losses_ptr, V, stride, smoothing, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row of `stride` logits, of which V count: running maximum m_i and sum of exponentials l_i in one
    pass (as in the attention kernels below), then the gradient in place of the logits, read again from the L2 cache.
    The target's logit is read before the first reduction, which all warps pass before any of them writes."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    target_logit = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    m_i, l_i, sum_of_logits = -float("inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        s = tl.load(logits_ptr + start + columns, mask=start + columns < stride, other=0.0).to(tl.float32)
        s = tl.where(start + columns < V, 1.4426950408889634 * s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 0))
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(s - m_new), 0)
        m_i = m_new
        sum_of_logits += tl.sum(tl.where(start + columns < V, s, 0.0), 0)
    lse = m_i + tl.log2(l_i)
    target_logit += smoothing * (0.6931471805599453 * sum_of_logits / V - target_logit)
    is_counted = target >= 0
    tl.store(losses_ptr + row, tl.where(is_counted, 0.6931471805599453 * lse - target_logit, 0.0))
    for start in range(0, stride, BLOCK):
        s = tl.load(logits_ptr + start + columns, mask=start + columns < stride, other=0.0).to(tl.float32)
        p = tl.exp2(1.4426950408889634 * s - lse)
        d = p - smoothing / V - tl.where(start + columns == target, 1 - smoothing, 0.0)
        d = tl.where(is_counted & (start + columns < V), d, 0.0)
        tl.store(logits_ptr + start + columns, d, mask=start + columns < stride)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of chunked_loss, with its arguments."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        total, *gradients = chunked_loss(*inputs)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled_gradients(ctx, grad)


def _scaled_gradients(ctx: Any, grad: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    return d_hidden * grad, d_weight * grad if d_weight.numel() else None, *[None] * 6


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


# The same for compiled code, opaque to torch.compile, which does not break at it.
opaque_loss = torch.library.custom_op("sprout::loss", chunked_loss, mutates_args=())
opaque_loss.register_fake(
    lambda hidden, weight, targets, V, dtype, smoothing, kernel, trains_head=True: (
        widened(hidden.new_empty(())),
        torch.empty_like(hidden),
        torch.empty_like(weight) if trains_head else weight.new_empty(0),
    )
)
opaque_loss.register_autograd(_scaled_gradients, setup_context=_save_gradients)


# ---- The cache -------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens read so far, for sequences of different lengths, in memory allocated once. Decode
    steps read and write its first R rows: all at first, fewer after `narrow`.

    memory (2 · n_layer, R, K, S, D): the keys of every layer, then the values of every layer; token t is in slot t.
    lengths (R,) int64: tokens in each row, on the device; host_lengths: the same as Python ints, known without waiting
    for the device. growing (R,) int64 and host_growing: 1, or 0 for idle rows, whose length stays 0. starts (R,) int64,
    with a document mask: where each row's document starts. ids (R, S) int64: with n-grams."""

    def __init__(
        self, config: GPTConfig, rows: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        S, self.n_layer, self.capacity = config.block_size, config.n_layer, config.block_size
        shape = (2 * config.n_layer, rows, config.kv_heads, S, config.head_size)
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(rows, S, dtype=torch.int64, device=device) if config.max_ngram > 1 else None
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.starts, self.growing = torch.zeros_like(self.lengths) if config.document_mask else None, self.lengths + 1
        self.host_lengths, self.host_growing = [0] * rows, [1] * rows
        self.rows, self.slots = torch.arange(rows, device=device), torch.arange(S + -S % 16, device=device)

    @property
    def longest(self) -> int:
        return max(self.host_lengths)

    @property
    def equal_lengths(self) -> bool:
        return min(self.host_lengths) == max(self.host_lengths)

    def restart(self, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Sets the lengths of rows that are about to be rewritten → the rows as a tensor, (len(rows),) int64."""
        index, new_lengths = (torch.tensor(x, dtype=torch.int64, device=self.memory.device) for x in (rows, lengths))
        self.lengths[index] = new_lengths
        if self.starts is not None:
            self.starts[index] = 0
        for row, length in zip(rows, lengths, strict=True):
            self.host_lengths[row] = length
        return index

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores a prompt's k, v (B, T, K, D) in slots 0 … T − 1 of rows (B,)."""
        for slots, new in ((self.memory[layer], k), (self.memory[layer + self.n_layer], v)):
            slots[:, :, : k.shape[1]].index_copy_(0, rows, new.transpose(1, 2).to(slots.dtype))

    def extend(self) -> None:
        """Adds 1 to the host's lengths; `advance` does so on the device. Raises ValueError if a row is full."""
        if self.longest >= self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and is full; prefill the row again with fewer")
        self.host_lengths = [n + more for n, more in zip(self.host_lengths, self.host_growing, strict=True)]

    def prepare_append(self, span: int, equal_lengths: bool) -> None:
        """Makes the views that `append` uses in one decode step, for all layers at once."""
        self.visible = self.memory.narrow(3, 0, span).unbind()  # 2 · n_layer of (R, K, span, D)
        self.last_slots = self.memory.narrow(3, span - 1, 1).transpose(2, 3).unbind() if equal_lengths else None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (R, 1, K, D) of one new token per row → all keys and values of the layer, (R, K, span, D)."""
        keys, values = self.visible[layer], self.visible[layer + self.n_layer]
        if self.last_slots is not None:
            self.last_slots[layer].copy_(k)
            self.last_slots[layer + self.n_layer].copy_(v)
        else:
            keys[self.rows, :, self.lengths] = k[:, 0].to(keys.dtype)
            values[self.rows, :, self.lengths] = v[:, 0].to(values.dtype)
        return keys, values

    def positions(self) -> Tensor:
        """(R, 1) int64: of the token about to be appended."""
        return (self.lengths if self.starts is None else self.lengths - self.starts)[:, None]

    def mask(self, span: int, sliding_window: int | None) -> Tensor:
        """(R, 1, 1, span), to be added to scores: 0 where the token about to be appended attends to the slot, else −∞.
        For all layers at once, in the dtype and with the alignment (16 numbers) that spare PyTorch a copy per layer."""
        slots, last = self.slots[: span + -span % 16], self.lengths[:, None]
        hidden = slots > last
        if sliding_window is not None:
            hidden |= slots <= last - sliding_window
        if self.starts is not None:
            hidden |= slots < self.starts[:, None]
        mask = self.memory.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return mask[:, None, None, :span]

    def newest_ids(self, count: int) -> Tensor | None:
        """(R, count): the last ids of each row, oldest first, any ids if a row has fewer; None without n-grams."""
        if self.ids is None:
            return None
        index = self.lengths[:, None] + torch.arange(-count, 0, device=self.memory.device)
        return self.ids.gather(1, index.clamp(min=0))

    def advance(self, ids: Tensor) -> None:
        """Ends a decode step: stores the ids (R,) where they are kept, and lengthens the rows on the device."""
        if self.ids is not None:
            self.ids.scatter_(1, self.lengths[:, None], ids[:, None])
        self.lengths += self.growing

    def counts(self) -> list[Tensor]:
        """The tensors with a number per row."""
        return [self.lengths, self.growing, *([] if self.starts is None else [self.starts])]

    def copy_row(self, source: int, target: int) -> None:
        """Makes row `target` equal to row `source`."""
        filled = self.memory[:, :, :, : self.host_lengths[source]]
        filled[:, target].copy_(filled[:, source])
        for x in self.counts():
            x[target].copy_(x[source])
        if self.ids is not None:
            self.ids[target].copy_(self.ids[source])
        for values in (self.host_lengths, self.host_growing):
            values[target] = values[source]

    def make_idle(self, row: int) -> None:
        """Empties a row for good: decode steps still compute it, but its length stays 0 and no result counts."""
        for x in self.counts():
            x[row].zero_()
        self.host_lengths[row] = self.host_growing[row] = 0

    def narrow(self, rows: int) -> None:
        """Leaves the first `rows` rows, as views of the same memory."""
        self.memory, self.ids = self.memory[:, :rows], None if self.ids is None else self.ids[:rows]
        self.lengths, self.growing, self.rows = self.lengths[:rows], self.growing[:rows], self.rows[:rows]
        self.starts = None if self.starts is None else self.starts[:rows]
        self.host_lengths, self.host_growing = self.host_lengths[:rows], self.host_growing[:rows]


# ---- Attention -------------------------------------------------------------------------------------------------------
# softmax(q · kᵀ / √D) · v over the visible positions. With K < H (grouped queries), query head h uses
# key/value head h // (H / K). There are two paths, chosen once per model: "triton", the fused kernels below, for GPUs;
# and "sdpa", PyTorch's attention, for all other devices and for decode steps.

AttentionPath = Literal["triton", "sdpa"]
MAX_FUSED_HEAD = 128  # wider tiles do not fit into registers beside their accumulator


def attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, layer: int) -> Tensor:
    """q (B, T, H, D), k and v (B, T, K, D) of one layer → (B, T, H, D). In a prefill it also stores k and v in the
    cache; in a decode step (T = 1) it appends them and attends to the whole cache."""
    if context.cache is not None:
        if context.rows is None:
            return _decode_attention(q, *context.cache.append(layer, k, v), context.mask)
        context.cache.write(layer, context.rows, k, v)
    if context.path == "triton":
        return fused_attention(q, k, v, context.first_visible)[0]
    is_short = q.device.type == "cpu" and q.shape[1] <= MAX_UNFUSED_LENGTH.get(q.dtype, 0)
    if context.mask is None and is_short and torch.is_grad_enabled():
        return opaque_attention(q, k, v)[0] if torch.compiler.is_compiling() else CausalAttention.apply(q, k, v)
    return _sdpa(q, k.transpose(1, 2), v.transpose(1, 2), context.mask, causal=context.mask is None)


# PyTorch's fused attention on CPUs is made for long sequences. Up to these lengths plain matrix products, forward and
# backward, were faster in every timing (bench/NOTES.md); without gradients they are not. They hold a (T, T) matrix per
# head.
MAX_UNFUSED_LENGTH = {torch.float32: 128, torch.bfloat16: 1024}
BLOCK_ROWS = 64  # queries whose float32 scores are held at once


def dense_mask(first_visible: Tensor | None) -> Tensor | None:
    """first_visible (B, T) → (B, 1, T, T) bool, True where query t attends to key s; None → None."""
    if first_visible is None:
        return None
    steps = torch.arange(first_visible.shape[1], device=first_visible.device)
    return ((steps <= steps[:, None]) & (steps >= first_visible[:, :, None]))[:, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention by matrix products: q (B, T, H, D), k and v (B, T, K, D) → out like q, and the attention weights
    (B · H, T, T), both in their dtype. Scores are in float32, of one block of queries after the other: rounded to
    bfloat16, a score of 20 is off by up to 0.06, its weight by 6 %."""
    B, T, H, D = q.shape
    q, k, v = _by_head(q, k, v)
    weights, out = q.new_empty((B * H, T, T)), q.new_empty((B, T, H, D))
    wide_q, wide_k = q.to(torch.float32, copy=True).mul_(1 / math.sqrt(D)), k.float()
    future = torch.full((BLOCK_ROWS, BLOCK_ROWS), -torch.inf).triu_(1)
    for start in range(0, T, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, T)
        with torch.autocast("cpu", enabled=False):
            scores = wide_q[:, start:stop] @ wide_k[:, :stop].mT
            scores[..., start:] += future[: stop - start, : stop - start]
            weights[:, start:stop, :stop] = torch.softmax(scores, dim=-1, out=scores)
        weights[:, start:stop, stop:] = 0.0
    out.transpose(1, 2).copy_((weights @ v).view(B, H, T, D))
    return out, weights


def causal_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d_out, the gradient of out → the gradients of q, k, v."""
    (B, T, H, D), K, scale = q.shape, k.shape[2], 1 / math.sqrt(q.shape[3])
    q, k, v = _by_head(q, k, v)
    d_out, unread = d_out.transpose(1, 2).reshape(B * H, T, D), q.new_empty(())
    d_scores = torch._softmax_backward_data(d_out @ v.mT, weights, -1, weights.dtype)  # (N, T, T), computed in float32
    d_q = torch.baddbmm(unread, d_scores, k, beta=0, alpha=scale)
    d_k = torch.baddbmm(unread, d_scores.mT, q, beta=0, alpha=scale)
    d_q, d_k, d_v = (x.view(B, H, T, D) for x in (d_q, d_k, weights.mT @ d_out))
    if K != H:
        d_k, d_v = (x.view(B, K, H // K, T, D).sum(dim=2) for x in (d_k, d_v))
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D) → three of (B · H, T, D), contiguous."""
    B, T, H, D = q.shape
    if k.shape[2] != H:
        k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    return [x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v)]


class CausalAttention(torch.autograd.Function):
    """q, k, v → out, as in causal_attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = causal_attention(q, k, v)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return causal_attention_backward(d_out, *ctx.saved_tensors)


# The same for compiled code, opaque to torch.compile: its own code for attention is no faster, and takes it longer.
opaque_attention = torch.library.custom_op("sprout::causal_attention", causal_attention, mutates_args=())
opaque_attention_backward = torch.library.custom_op(
    "sprout::causal_attention_backward", causal_attention_backward, mutates_args=()
)


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """q (B, T, H, D), keys and values (B, K, S, D), the cache's layout → (B, T, H, D)."""
    q, grouped = q.transpose(1, 2), q.shape[2] != keys.shape[1]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q (R, 1, H, D), keys and values (R, K, S, D), mask (R, 1, 1, S) or None, added to the scores → (R, 1, H, D).
    The H / K queries that share keys become the rows of one matrix: for grouped heads with a mask, PyTorch 2.11 has no
    fused kernel, neither on CPUs nor on GPUs."""
    (R, _, H, D), K = q.shape, keys.shape[1]
    out = F.scaled_dot_product_attention(q.view(R, K, H // K, D), keys, values, attn_mask=mask)
    return out.reshape(R, 1, H, D)


# ---- The fused kernels -----------------------------------------------------------------------------------------------
#
# Unfused, attention moves matrices of T × T scores through memory; at T = 1024 and D = 64 they are 16 times as large as
# q. The kernels never write them (Dao et al. 2022, FlashAttention). A program of the forward kernel keeps BLOCK_Q
# queries of one head on chip and loops over the visible keys, BLOCK_K at a time. The maximum m and the sum l of a row,
# which softmax needs, are updated per block (Milakov and Gimelshein 2018). With s the scores of the next block of keys:
#
#     m' = max(m, max s)        alpha = exp(m − m')        p = exp(s − m')
#     l' = alpha · l + Σ p      acc' = alpha · acc + p · v
#
# and at the end out = acc / l. Exponentials are powers of two, with log2(e) folded into the scale: one multiply-add and
# one instruction per score. Beside out the kernel writes one number per row, lse = m + log2(l), from which the backward
# pass recomputes p = exp2(s · scale − lse). Computing q · kᵀ again in each of its two kernels takes less time than
# reading T × T numbers. With do the gradient of out and dp = do · vᵀ:
#
#     delta = Σ do ∘ out (per row)   ds = p ∘ (dp − delta)   dq = scale · ds · k   dk = scale · dsᵀ · q   dv = pᵀ · do
#
# One kernel sums dq over keys, for a block of queries; the other sums dk and dv over queries, of all heads that share
# the keys, for a block of keys. No two programs add to the same number: no atomics, bitwise reproducible gradients.
# The forward pass does T / 4 FLOP per byte in 16 bits. A Hopper GPU is compute-bound above 250, from T = 1024 on.
# Only some blocks need a mask: those on the diagonal, and with documents or a window those that contain the boundary
# given by first_visible; blocks beyond it are skipped. The mask is in a branch of the loop: three loops, one of them
# without a mask, would each fill the pipeline of loads anew. Masked scores are −2¹⁰⁰, not −inf: a row without a
# visible key so far sums garbage, which alpha = 0 removes at its first visible key, at the latest on the diagonal. They
# are a power of two because s · scale − m is one multiply-add: with −1e30 it is m's rounding error, up to 1e22, whose
# exponential is infinite.
# Head sizes that are not a power of two are padded to BLOCK_D on chip; numbers beyond D or T are read as 0 and never
# written. DOT is the dtype of the operands of products: the inputs', but float32 for bfloat16 in the interpreter.


def _query_block(T, H, BLOCK_Q: tl.constexpr):  # type: ignore[no-untyped-def]
    """The program's sequence, head and first query. Blocks with the most keys start first (load balance)."""
    blocks = (T + BLOCK_Q - 1) // BLOCK_Q
    bh = tl.program_id(0) // blocks
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q


def _key_bounds(first_ptr, b, start_q, rows, T, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block of queries: each row's first visible key; where the loop over keys begins; from where to where blocks
    need no mask; where it ends."""
    diagonal = start_q // BLOCK_K * BLOCK_K
    first, begin, clear = rows, 0, 0
    if first_ptr is not None:
        first = tl.maximum(tl.load(first_ptr + b * T + rows, mask=rows < T, other=0), 0)
        begin = tl.maximum(tl.load(first_ptr + b * T + start_q), 0) // BLOCK_K * BLOCK_K
        last = tl.load(first_ptr + b * T + tl.minimum(start_q + BLOCK_Q, T) - 1)
        clear = tl.minimum((tl.maximum(last, 0) + BLOCK_K - 1) // BLOCK_K * BLOCK_K, diagonal)
    return first, begin, clear, diagonal, tl.minimum(start_q + BLOCK_Q, T)


def _tile(ptr, b, h, stride_b, stride_t, stride_h, rows, offs_d):  # type: ignore[no-untyped-def]
    """Pointers to the numbers of one head in these rows (tokens)."""
    return ptr + b * stride_b + h * stride_h + rows[:, None] * stride_t + offs_d[None, :]


def _load(  # type: ignore[no-untyped-def]
    source, b, h, stride_b, stride_t, stride_h, start, offs, offs_d, T, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile of one head that begins at row `start`, 0 beyond T and D. WHOLE: no row is beyond T. TMA: source is a
    tensor descriptor of (B · T, heads · D), else a pointer."""
    if TMA:
        return source.load([(b * T + start).to(tl.int32), (h * D).to(tl.int32)])
    else:
        tile = _tile(source, b, h, stride_b, stride_t, stride_h, offs, offs_d) + start * stride_t
        in_bounds = (start + offs < T)[:, None] & (offs_d < D)[None, :]
        return tl.load(tile) if WHOLE and D == BLOCK_D else tl.load(tile, mask=in_bounds, other=0.0)


def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, T, H, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    b, h, start_q = _query_block(T, H, BLOCK_Q)
    offs_q, offs_k, offs_d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    rows, h_kv = start_q + offs_q, h // GROUP
    MASKED: tl.constexpr = first_ptr is not None
    first, begin, clear, diagonal, end = _key_bounds(first_ptr, b, start_q, rows, T, BLOCK_Q, BLOCK_K)
    q = _load(
        q_ptr, b, h, stride_qb, stride_qt, stride_qh, start_q, offs_q, offs_d, T, D, BLOCK_D, False, False
    ).to(DOT)  # fmt: skip
    m_i = tl.full((BLOCK_Q,), -float("inf"), tl.float32)  # running maximum
    l_i = tl.zeros((BLOCK_Q,), tl.float32)  # running sum
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start_k in tl.range(begin, end, BLOCK_K):
        k = _load(
            k_ptr, b, h_kv, stride_kb, stride_kt, stride_kh, start_k, offs_k, offs_d, T, D, BLOCK_D, WHOLE, TMA
        ).to(DOT)  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
        if _is_partial(start_k, clear, diagonal, MASKED):
            s = _mask_scores(s, rows, start_k + offs_k, first, MASKED)
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)  # rescaling factor of what was summed so far
        l_i = l_i * alpha + tl.sum(p, 1)
        v = _load(
            v_ptr, b, h_kv, stride_vb, stride_vt, stride_vh, start_k, offs_k, offs_d, T, D, BLOCK_D, WHOLE, TMA
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    out_tile = _tile(out_ptr, b, h, T * H * D, H * D, D, rows, offs_d)
    tl.store(out_tile, acc / l_i[:, None], mask=(rows < T)[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + (b * H + h) * T + rows, m_i + tl.log2(l_i), mask=rows < T)


def _is_partial(start_k, clear, diagonal, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether some query of the block does not see some key of the one at start_k."""
    return (start_k >= diagonal) | (start_k < clear) if MASKED else start_k >= diagonal


def _mask_scores(s, rows, keys, first, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """s (queries, keys) with masked scores at −2¹⁰⁰."""
    visible = keys[None, :] <= rows[:, None]
    return tl.where(visible & (keys[None, :] >= first[:, None]) if MASKED else visible, s, -1.2676506002282294e30)


def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, do_ptr, delta_ptr, dq_ptr, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dqb, stride_dqt, stride_dqh, T, H,
    scale_log2, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, DOT: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Loops like the forward kernel. Runs first in the backward pass and writes delta for the other kernel."""
    b, h, start_q = _query_block(T, H, BLOCK_Q)
    offs_q, offs_k, offs_d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    rows, h_kv = start_q + offs_q, h // GROUP
    MASKED: tl.constexpr = first_ptr is not None
    first, begin, clear, diagonal, end = _key_bounds(first_ptr, b, start_q, rows, T, BLOCK_Q, BLOCK_K)
    q = _load(
        q_ptr, b, h, stride_qb, stride_qt, stride_qh, start_q, offs_q, offs_d, T, D, BLOCK_D, False, False
    ).to(DOT)  # fmt: skip
    do = _load(do_ptr, b, h, T * H * D, H * D, D, start_q, offs_q, offs_d, T, D, BLOCK_D, False, False)
    out = _load(out_ptr, b, h, T * H * D, H * D, D, start_q, offs_q, offs_d, T, D, BLOCK_D, False, False)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + rows, delta, mask=rows < T)
    lse = tl.load(lse_ptr + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    do = do.to(DOT)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start_k in tl.range(begin, end, BLOCK_K):
        k = _load(
            k_ptr, b, h_kv, stride_kb, stride_kt, stride_kh, start_k, offs_k, offs_d, T, D, BLOCK_D, WHOLE, TMA
        )  # fmt: skip
        v = _load(
            v_ptr, b, h_kv, stride_vb, stride_vt, stride_vh, start_k, offs_k, offs_d, T, D, BLOCK_D, WHOLE, TMA
        ).to(DOT)  # fmt: skip
        s = tl.dot(q, k.to(DOT).T, input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
        if _is_partial(start_k, clear, diagonal, MASKED):
            s = _mask_scores(s, rows, start_k + offs_k, first, MASKED)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype).to(DOT), k.to(DOT), dq, input_precision="ieee")
    dq_tile = _tile(dq_ptr, b, h, stride_dqb, stride_dqt, stride_dqh, rows, offs_d)
    tl.store(dq_tile, dq * scale, mask=(rows < T)[:, None] & (offs_d < D)[None, :])


def _query_bounds(first_ptr, b, start_k, T, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block of keys: where the loop over queries begins; from where to where blocks need no mask; where it ends.
    From `clear` on, blocks of queries see only some of the keys; from `end` on, none."""
    diagonal, last_block = start_k // BLOCK_Q * BLOCK_Q, (T + BLOCK_Q - 1) // BLOCK_Q
    below = tl.minimum((start_k + BLOCK_K + BLOCK_Q - 1) // BLOCK_Q, last_block) * BLOCK_Q
    clear, end = T, T
    if first_ptr is not None:  # first_visible is nondecreasing, so bisection finds both
        for BOUND in tl.static_range(2):
            low, high = below // BLOCK_Q, last_block
            while low < high:
                middle = (low + high) // 2
                row = tl.minimum(middle * BLOCK_Q + BLOCK_Q, T) - 1 if BOUND == 0 else middle * BLOCK_Q
                seen = tl.load(first_ptr + b * T + row) <= (start_k if BOUND == 0 else start_k + BLOCK_K - 1)
                low, high = tl.where(seen, middle + 1, low), tl.where(seen, high, middle)
            if BOUND == 0:
                clear = low * BLOCK_Q
            else:
                end = tl.minimum(low * BLOCK_Q, T)
    return diagonal, below, clear, end


def _key_value_gradient_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dkb, stride_dkt, stride_dkh, T, H,
    scale_log2, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, DOT: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keeps a block of keys and values, loops over the queries that see them; s is transposed, (BLOCK_K, BLOCK_Q).
    Queries beyond T add nothing: their do, lse and delta are read as 0. The first block of keys starts first: it is
    seen by the most queries. dv has the strides of dk."""
    blocks, kv_heads = (T + BLOCK_K - 1) // BLOCK_K, H // GROUP
    b, h_kv = (tl.program_id(0) // blocks // kv_heads).to(tl.int64), tl.program_id(0) // blocks % kv_heads
    start_k, h_kv = tl.program_id(0) % blocks * BLOCK_K, h_kv.to(tl.int64)
    offs_q, offs_k, offs_d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    keys = start_k + offs_k
    MASKED: tl.constexpr = first_ptr is not None
    begin, below, clear, end = _query_bounds(first_ptr, b, start_k, T, BLOCK_Q, BLOCK_K)
    k = _load(
        k_ptr, b, h_kv, stride_kb, stride_kt, stride_kh, start_k, offs_k, offs_d, T, D, BLOCK_D, False, False
    ).to(DOT)  # fmt: skip
    v = _load(
        v_ptr, b, h_kv, stride_vb, stride_vt, stride_vh, start_k, offs_k, offs_d, T, D, BLOCK_D, False, False
    ).to(DOT)  # fmt: skip
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for member in range(GROUP):
        h = h_kv * GROUP + member
        row_tile = (b * H + h) * T + offs_q
        for start_q in tl.range(begin, end, BLOCK_Q):
            in_bounds = None if WHOLE else start_q + offs_q < T
            zero = None if WHOLE else 0.0
            q = _load(
                q_ptr, b, h, stride_qb, stride_qt, stride_qh, start_q, offs_q, offs_d, T, D, BLOCK_D, WHOLE, TMA
            )  # fmt: skip
            do = _load(do_ptr, b, h, T * H * D, H * D, D, start_q, offs_q, offs_d, T, D, BLOCK_D, WHOLE, TMA)
            lse = tl.load(lse_ptr + row_tile + start_q, mask=in_bounds, other=zero)
            delta = tl.load(delta_ptr + row_tile + start_q, mask=in_bounds, other=zero)
            s = tl.dot(k, q.to(DOT).T, input_precision="ieee")  # (BLOCK_K, BLOCK_Q)
            if (start_q < below) | (start_q >= clear) if MASKED else start_q < below:
                rows = start_q + offs_q
                visible = keys[:, None] <= rows[None, :]
                if MASKED:
                    first = tl.load(first_ptr + b * T + rows, mask=rows < T, other=0)
                    visible = visible & (keys[:, None] >= first[None, :])
                s = tl.where(visible, s, -1.2676506002282294e30)
            p = tl.exp2(s * scale_log2 - lse[None, :])
            dv = tl.dot(p.to(q.dtype).to(DOT), do.to(DOT), dv, input_precision="ieee")
            dp = tl.dot(v, do.to(DOT).T, input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype).to(DOT), q.to(DOT), dk, input_precision="ieee")
    in_tile = (keys < T)[:, None] & (offs_d < D)[None, :]
    tl.store(_tile(dk_ptr, b, h_kv, stride_dkb, stride_dkt, stride_dkh, keys, offs_d), dk * scale, mask=in_tile)
    tl.store(_tile(dv_ptr, b, h_kv, stride_dkb, stride_dkt, stride_dkh, keys, offs_d), dv, mask=in_tile)


class Launch(NamedTuple):
    """Launch configuration of a kernel: queries and keys per block, warps per program, stages of the pipeline, and how
    the loop loads its blocks: by pointers, or by TMA, Hopper's copy engine, through tensor descriptors. maxnreg: limit
    of the registers per thread, so that more programs fit on a multiprocessor."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    maxnreg: int | None = None

    def loaded(self, kernel: str) -> int:
        """Rows of a block that the loop of the kernel loads."""
        return self.block_q if kernel == "key_value_gradient" else self.block_k

    def options(self) -> dict[str, int]:
        """As Triton's compiler takes them."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


Launches = tuple[Launch, Launch, Launch]  # forward, query gradient, key and value gradient

# By architecture, bytes per number and padded head size. "other" fits 99 KB of shared memory (sm_86, sm_89, sm_120).
# sm_90: timed on an H200 by bench/tune_attention.py. The others: chosen by the machine code and the model of
# bench/ahead_of_time.py, and not timed yet.
LAUNCHES: dict[tuple[str, int, int], Launches] = {
    ("sm_90", 2, 64): (Launch(64, 64, 4, 3), Launch(128, 64, 8, 3), Launch(64, 64, 4, 3)),
    ("sm_90", 2, 128): (Launch(64, 64, 4, 3), Launch(128, 64, 8, 3), Launch(32, 64, 4, 3)),
    ("other", 2, 64): (Launch(64, 64, 4, 3), Launch(128, 64, 8, 2), Launch(32, 64, 4, 2)),
    ("other", 2, 128): (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 8, 2)),
    ("other", 4, 64): (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 32, 8, 2)),
    ("other", 4, 128): (Launch(32, 16, 8, 1), Launch(32, 16, 8, 1), Launch(16, 32, 8, 1)),
}
# The same for tensors that descriptors can describe, where their form of the loop is faster.
TMA_LAUNCHES: dict[tuple[str, int, int], Launches] = {
    ("sm_90", 2, 64): (Launch(64, 128, 4, 2, tma=True), Launch(64, 128, 4, 3, tma=True), Launch(64, 64, 4, 3)),
    ("sm_90", 2, 128): (
        Launch(64, 64, 4, 3, tma=True),
        Launch(128, 64, 8, 3, tma=True),
        Launch(64, 64, 4, 2, tma=True),
    ),
}


def launches_for(q: Tensor, k: Tensor, v: Tensor) -> Launches:
    """The launches for q (B, T, H, D), k and v (B, T, K, D), of TMA_LAUNCHES or LAUNCHES, there of "other" where the
    GPU has no row. Raises ValueError for what the kernels do not take."""
    (B, T, H, D), K, dtype = q.shape, k.shape[2], q.dtype
    if not (k.shape == v.shape == (B, T, K, D) and K and H % K == 0 and dtype == k.dtype == v.dtype):
        found = ", ".join(f"{tuple(x.shape)} in {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q (B, T, H, D), k and v (B, T, K, D) of one dtype are needed, K a divisor of H, not {found}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the fused kernel takes float32, float16 and bfloat16, not {dtype}; use the sdpa path")
    if D > MAX_FUSED_HEAD:
        raise ValueError(f"the fused kernel takes head sizes up to {MAX_FUSED_HEAD}, not {D}; use the sdpa path")
    architecture = "other"
    if q.device.type == "cuda" and torch.version.hip is None:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(q.device))
    key = dtype.itemsize, 64 if D <= 64 else 128
    by_pointer = LAUNCHES.get((architecture, *key)) or LAUNCHES["other", *key]
    by_tma = TMA_LAUNCHES.get((architecture, *key), by_pointer)
    read = (k, v), (k, v), (q,)  # by descriptors, beside do, which is contiguous
    forward, by_query, by_key = (
        fast if not fast.tma or all(fits_descriptor(x, fast.loaded(name)) for x in tensors) else plain
        for name, fast, plain, tensors in zip(KERNELS, by_tma, by_pointer, read, strict=True)
    )
    return forward, by_query, by_key


def fits_descriptor(x: Tensor, block: int) -> bool:
    """Whether x (B, T, heads, D) is a matrix (B · T, heads · D) in memory that TMA can read, in whole blocks of rows:
    it does not see where a sequence ends."""
    (B, T, heads, D), (stride_b, stride_t, stride_h, _) = x.shape, x.stride()
    is_matrix = (B == 1 or stride_b == T * stride_t) and (heads == 1 or stride_h == D)
    aligned = stride_t * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return is_matrix and aligned and T % block == 0 and padded_head(D) == D


def padded_head(D: int) -> int:
    """The head size on chip: the next power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


KERNELS = {
    "forward": _forward_kernel, "query_gradient": _query_gradient_kernel,
    "key_value_gradient": _key_value_gradient_kernel,
}  # fmt: skip
DESCRIBED = {
    "forward": ("k_ptr", "v_ptr"), "query_gradient": ("k_ptr", "v_ptr"), "key_value_gradient": ("q_ptr", "do_ptr")
}  # fmt: skip
_HELPERS = (_query_block, _key_bounds, _tile, _load, _is_partial, _mask_scores, _query_bounds)


def launch_kernel(name: str, launch: Launch, *tensors: Any) -> Any:
    """Launches a kernel on its tensors, in the order of its parameters; first_visible (B, T) int32, contiguous, may be
    None. Returns what Triton compiled, with its registers and shared memory (None in the interpreter)."""
    q, k, v = tensors[:3]
    strided = {"forward": (q, k, v), "query_gradient": (q, k, v, tensors[-1])}.get(name, (q, k, v, tensors[-2]))
    (B, T, H, D), K = q.shape, k.shape[2]
    if any(x.stride(3) != 1 or T * x.stride(1) >= 2**31 for x in strided):
        raise ValueError("the fused kernel needs heads that are contiguous and sequences of less than 2³¹ numbers")
    blocks = B * K * -(-T // launch.block_k) if name == "key_value_gradient" else B * H * -(-T // launch.block_q)
    kernel = _jitted(KERNELS[name])
    upcast = q.dtype == torch.bfloat16 and q.device.type == "cpu"  # products of bfloat16 are wrong in the interpreter
    scalars = {
        "T": T, "H": H, "scale_log2": math.log2(math.e) / math.sqrt(D), "scale": 1 / math.sqrt(D), "D": D,
        "BLOCK_D": padded_head(D), "BLOCK_Q": launch.block_q, "BLOCK_K": launch.block_k, "GROUP": H // K,
        "DOT": getattr(tl, "float32" if upcast else str(q.dtype).removeprefix("torch.")),
        "WHOLE": T % launch.loaded(name) == 0, "TMA": launch.tma,
    }  # fmt: skip
    strides = [stride for x in strided for stride in x.stride()[:3]]
    scalars = {parameter: value for parameter, value in scalars.items() if parameter in kernel.arg_names}
    arguments = list(tensors)
    for index in (kernel.arg_names.index(parameter) for parameter in DESCRIBED[name] if launch.tma):
        arguments[index] = _descriptor(tensors[index], launch.loaded(name))
    with torch.cuda.device_of(q):
        return kernel[blocks,](*arguments, *strides, **scalars, **launch.options())


def _descriptor(x: Tensor, block: int) -> Any:
    """Of x (B, T, heads, D) as a matrix (B · T, heads · D), read in tiles (block, D)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, T, heads, D = x.shape
    return TensorDescriptor(x, [B * T, heads * D], [x.stride(1), 1], [block, D])


@cache
def _jitted(kernel: Callable[..., None]) -> Any:
    """The kernel as a Triton function. The first call imports Triton, and binds `tl` and the helpers of the kernels."""
    import triton
    import triton.language

    globals().update({helper.__name__: triton.jit(helper) for helper in _HELPERS}, tl=triton.language)
    return triton.jit(kernel)


# Two operators that are opaque to torch, with output shapes and derivative; torch.compile does not break at them.
@torch.library.custom_op("sprout::attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor, first_visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Like `attention` → out (B, T, H, D), and lse (B, H, T) float32: log2 of each row's sum of exponentials."""
    out, lse = empty_outputs(q)
    launch_kernel("forward", launches_for(q, k, v)[0], q, k, v, as_read(first_visible, q), out, lse)
    return out, lse


def as_read(first_visible: Tensor | None, q: Tensor) -> Tensor | None:
    """first_visible (B, T) as the kernels read it: int32, without strides of its own."""
    if first_visible is not None and first_visible.shape != q.shape[:2]:
        raise ValueError(f"first_visible has the shape {tuple(first_visible.shape)}, expected {tuple(q.shape[:2])}")
    return None if first_visible is None else first_visible.to(torch.int32).contiguous()


def empty_outputs(q: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("sprout::attention_backward", mutates_args=())
def fused_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, first_visible: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """do, the gradient of out → the gradients dq, dk, dv, contiguous."""
    do, delta, first = do.contiguous(), torch.empty_like(lse), as_read(first_visible, q)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _, by_query, by_key = launches_for(q, k, v)
    launch_kernel("query_gradient", by_query, q, k, v, first, out, lse, do, delta, dq)
    launch_kernel("key_value_gradient", by_key, q, k, v, first, lse, do, delta, dk, dv)
    return dq, dk, dv


opaque_attention.register_fake(
    lambda q, k, v: (q.new_empty(q.shape), q.new_empty((q.shape[0] * q.shape[2], q.shape[1], q.shape[1])))
)
opaque_attention_backward.register_fake(
    lambda d_out, *saved: tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in saved[:3])
)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


fused_attention.register_fake(empty_outputs)
fused_attention_backward.register_fake(lambda do, *qkv_saved: tuple(x.new_empty(x.shape) for x in qkv_saved[:3]))
fused_attention.register_autograd(
    lambda ctx, do, _: (*fused_attention_backward(do, *ctx.saved_tensors), None), setup_context=_save_for_backward
)
opaque_attention.register_autograd(
    lambda ctx, do, _: opaque_attention_backward(do, *ctx.saved_tensors[:3], ctx.saved_tensors[4]),
    setup_context=_save_for_backward,
)
