"""The causal Transformer, whole: its options, its blocks, the language model, the key/value cache and the attention.

Read from top to bottom: GPTConfig (what can be chosen) → the small parts (norms, positions, dropout) → Attention, MLP,
Block → GPT (loss, generation, initialisation) → KVCache → attention itself, under a banner at the end.
This file imports nothing of the project. It knows ids and tensors; text, files, devices and schedules are others' business.

Dimension letters, everywhere: B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head size,
F width of the MLP, V vocabulary, S length of the cache.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import triton.language as tl
    from annotated_types import Ge, Gt, Interval

IGNORED_TARGET = -100  # a target with this id counts neither in the loss nor in its divisor


def _fixed(default: Any) -> Any:
    """An option that a resumed run may not change: the shapes or the meaning of the weights depend on it."""
    return field(default=default, metadata={"resume": "fixed"})


@dataclass(frozen=True)
class GPTConfig:
    """What kind of Transformer. The defaults are GPT-2 124M. Raises ValueError, naming the options, where they do not fit."""

    n_layer: Annotated[int, Ge(1)] = _fixed(12)
    """Number of blocks."""
    n_head: Annotated[int, Ge(1)] = _fixed(12)
    """Query heads a block; divides n_embd."""
    n_kv_head: Annotated[int, Ge(1)] | None = _fixed(None)
    """Key/value heads a block (grouped-query attention), divides n_head; none: as many as n_head."""
    n_embd: Annotated[int, Ge(1)] = _fixed(768)
    """Channels: the width of the residual stream."""
    block_size: Annotated[int, Ge(1)] = _fixed(1024)
    """Tokens of context: the longest sequence that the model sees at once."""
    positions: Literal["learned", "sinusoidal", "rotary"] = _fixed("learned")
    """How a token knows where it stands: a learned table, fixed sine waves, or rotated queries and keys."""
    rope_theta: Annotated[float, Gt(0)] = _fixed(10_000.0)
    """Base of the rotary wavelengths; larger for longer contexts."""
    norm: Literal["layernorm", "rmsnorm"] = _fixed("layernorm")
    """Normalisation: LayerNorm, or RMSNorm (no mean, no bias)."""
    norm_eps: Annotated[float, Gt(0)] = _fixed(1e-5)
    """Added to the variance before the square root."""
    norm_position: Literal["pre", "post"] = _fixed("pre")
    """Normalise the input of a sublayer (GPT-2 and later), or its sum with the residual (the 2017 paper)."""
    mlp: Literal["gelu", "relu", "relu2", "swiglu"] = _fixed("gelu")
    """Nonlinearity of the MLP: GELU (tanh form), ReLU, squared ReLU, or SiLU-gated."""
    n_hidden: Annotated[int, Ge(1)] | None = _fixed(None)
    """Width of the MLP; none: 4 * n_embd, for swiglu 8/3 * n_embd rounded up to a multiple of 64."""
    qk_norm: bool = _fixed(False)
    """RMSNorm with learned scales on every head's queries and keys, before the rotation."""
    bias: bool = _fixed(True)
    """Biases in the linear layers and in LayerNorm."""
    tie_embeddings: bool = _fixed(True)
    """Use the token embedding as the output head too."""
    scale_embeddings: bool = _fixed(False)
    """Multiply token embeddings by the square root of n_embd (the 2017 paper)."""
    max_ngram: Annotated[int, Ge(1)] = _fixed(1)
    """Add to a token's embedding those of the n-grams that end with it, n = 2 to this, from a hashed table; 1: none."""
    ngram_rows: Annotated[int, Ge(1)] = _fixed(16_384)
    """Rows of the table of n-grams; those that share one by chance are not told apart."""
    sliding_window: Annotated[int, Ge(1)] | None = _fixed(None)
    """Each token sees itself and the tokens before it, this many in all; none: the whole context."""
    document_mask: bool = _fixed(False)
    """Tokens see their own document only, and positions restart where a document starts."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the embedding's and the residual branches' outputs set to 0 in training; attention weights are never dropped."""
    vocab_size: int = field(default=50_257, metadata={"derived": True, "resume": "fixed"})
    """Number of token ids. It belongs to the tokenizer, so it is no option."""
    eos_id: int | None = field(default=50_256, metadata={"derived": True, "resume": "fixed"})
    """The id that ends a document and starts the next; the document mask needs it."""

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_size(self) -> int:
        if self.n_hidden is not None:
            return self.n_hidden
        return 64 * math.ceil(8 * self.n_embd / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory. Large vocabularies are padded to a multiple of 128, which GPUs multiply faster;
        padded logits are cut off before anything sees them, and files hold vocab_size rows."""
        return 128 * math.ceil(self.vocab_size / 128) if self.vocab_size > 1024 else self.vocab_size

    def problems(self) -> list[str]:
        """Rules that join several options, each as one line that names them."""
        found = []
        if self.n_embd % self.n_head:
            found.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_head % self.kv_heads:
            found.append(f"n_head={self.n_head} is not divisible by n_kv_head={self.kv_heads}")
        if self.positions == "rotary" and self.head_size % 2:
            found.append(
                f"positions=rotary needs an even head size; n_embd={self.n_embd} / n_head={self.n_head} is {self.head_size}"
            )
        if self.positions == "sinusoidal" and self.n_embd % 2:
            found.append(f"positions=sinusoidal needs an even n_embd; it is {self.n_embd}")
        if self.document_mask and self.eos_id is None:
            found.append("document_mask=true needs a tokenizer with an end-of-sequence id")
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocab_size:
            found.append(f"eos_id={self.eos_id} lies outside the vocabulary of {self.vocab_size}")
        return found

    def __post_init__(self) -> None:
        if min(self.n_embd, self.n_head, self.kv_heads, self.n_layer, self.block_size, self.vocab_size) < 1:
            raise ValueError("n_layer, n_head, n_kv_head, n_embd, block_size and vocab_size must be at least 1")
        if found := self.problems():
            raise ValueError("; ".join(found))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- The small parts -------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear whose weights wait for GPT.init_weights, so that no start-up time goes into numbers that are overwritten."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding whose table waits for GPT.init_weights."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        return torch.embedding(
            self.weight, ids
        )  # what nn.Embedding comes to, after questions that a small model's token has no time for


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm without its own questions."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich 2019), statistics in float32 for narrower types."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(…, D) normalised over D and scaled by weight (…, D); same dtype as x."""
    wide = widened(x)
    return (F.rms_norm(wide, wide.shape[-1:], eps=eps) * weight).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x in float32 where it is in a narrower type."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Dropout(nn.Module):
    """Zeroes a share p of the inputs in training and scales the rest by 1 / (1 − p).

    On a CPU drawing a float for each element costs more than the layer around it, so there a mask is cut from random bytes:
    p is rounded to 1/256 and the scale follows the rounded value. Draws come from torch's default generator, which the
    training loop seeds anew for every micro-step.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = min(255, max(1, round(256 * self.p)))
        # random_(-2**63, None) fills all 64 bits; plain random_() leaves the sign bit at 0 and every eighth byte would be biased
        draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        keep = (draws[: x.numel()] >= dropped).view(x.shape)
        return x * keep * (256 / (256 - dropped))


def sinusoidal_table(length: int, channels: int) -> Tensor:
    """(length, channels): sin(t / 10000^(2i/C)) in the even channels, the cosines in the odd ones (Vaswani et al. 2017, 3.5)."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000.0) / channels))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).view(length, channels)


def rotary_table(length: int, head_size: int, theta: float) -> Tensor:
    """(length, 2, D): cosines and sines of the angles t · theta^(−2i/D), for both halves of a head (Su et al. 2021).

    The sines of the first half are negative, so that rotate needs no test for the half.
    """
    angles = torch.arange(length)[:, None] * theta ** (torch.arange(0, head_size, 2) * (-1.0 / head_size))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)), dim=1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of every head: the rotate-half layout that Llama and Qwen checkpoints use.

    x: (B, T, heads, D); table: rows of rotary_table for its positions, (T, 2, D) or (B, T, 2, D). Same shape, same dtype.
    """
    cos, sin = table[..., None, 0, :], table[..., None, 1, :]
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(
        x.dtype
    )  # the halves swapped; compilers fuse a roll, but no cat


# ---- The block -------------------------------------------------------------------------------------------------------

# What a block calls for its attention: (layer, qk, v) → (B, T, H, D); qk and v as causal_attention takes them.
Attend = Callable[[int, Tensor, Tensor | None], Tensor]


class Attention(nn.Module):
    """Projects to queries, keys and values, prepares them, attends, projects back."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_size = layer, config.n_head, config.kv_heads, config.head_size
        self.qkv = Linear(config.n_embd, (self.heads + 2 * self.kv_heads) * self.head_size, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        B, T, C = x.shape
        H, K = self.heads, self.kv_heads
        qk, v = self.qkv(x).view(B, T, H + 2 * K, self.head_size), None  # (B, T, H + 2K, D)
        if rotation is not None or self.q_norm is not None:
            qk, v = qk.split((H + K, K), dim=2)  # (B, T, H + K, D), (B, T, K, D)
        if self.q_norm is not None and self.k_norm is not None:
            # Queries and keys together, and divided by their size last, which a rotation does not change: one pass for a compiler.
            is_query = torch.arange(H + K, device=x.device)[:, None] < H
            wide = widened(qk)
            inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.q_norm.eps)
            scaled = wide * torch.where(is_query, self.q_norm.weight, self.k_norm.weight)  # (H + K, D) scales
            qk = ((scaled if rotation is None else rotate(scaled, rotation)) * inverse_rms).to(qk.dtype)
        elif rotation is not None:
            qk = rotate(qk, rotation)
        return self.proj(attend(self.layer, qk, v).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers around a nonlinearity; for swiglu, `up` holds the gate's rows first, then the values'."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        width = config.hidden_size
        self.up = Linear(config.n_embd, 2 * width if config.mlp == "swiglu" else width, bias=config.bias)
        self.down = Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.kind == "relu":
            x = F.relu(x)
        elif self.kind == "relu2":
            x = F.relu(x).square()
        else:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        return self.down(x)


class Block(nn.Module):
    """Attention, then an MLP, each on a residual branch."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        if self.post_norm:
            x = self.attn_norm(x + self.dropout(self.attn(x, rotation, attend)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attn(self.attn_norm(x), rotation, attend))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# ---- The language model ----------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A decoder-only Transformer over token ids.

    `seed` draws the initial weights on the CPU, so they are the same on every device; None leaves them unset, for a model
    whose weights are about to be loaded. `attention` is what choose_attention says of the device that the model will be on.
    """

    table: Tensor | None  # the fixed positions: (block_size, C) waves or (block_size, 2, D) rotations

    def __init__(self, config: GPTConfig, seed: int | None = 0, attention: AttentionPath = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        V, C = config.padded_vocab_size, config.n_embd
        self.embed = Embedding(V, C)
        self.ngrams = Embedding(config.ngram_rows, C) if config.max_ngram > 1 else None
        self.position = Embedding(config.block_size, C) if config.positions == "learned" else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.head = None if config.tie_embeddings else Linear(C, V, bias=False)
        table = None
        if config.positions == "sinusoidal":
            table = sinusoidal_table(config.block_size, C)
        elif config.positions == "rotary":
            table = rotary_table(config.block_size, config.head_size, config.rope_theta)
        self.register_buffer("table", table, persistent=False)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The initial weights, all of them, in the order of named_parameters.

        | parameters                                    | drawn from                                                      |
        |-----------------------------------------------|-----------------------------------------------------------------|
        | embed, position, head, attn.qkv, mlp.up       | normal, standard deviation 0.02                                 |
        | attn.proj, mlp.down (a residual branch's end) | normal, 0.02 / √(2 · n_layer): the sum of branches does not grow with depth;
        | ngrams                                        | 0: a row that was never seen says nothing                       |
        | norms' weights; every bias                    | 1; 0                                                            |
        | rows that pad the vocabulary                  | 0, and they stay 0: no gradient reaches them                    |
        """
        generator = torch.Generator().manual_seed(seed)
        branch_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        branch_ends = ("attn.proj.weight", "mlp.down.weight")
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith("ngrams"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                std = branch_std if name.endswith(branch_ends) else 0.02
                parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))
        for vocabulary in self._vocabulary_matrices():
            vocabulary[self.config.vocab_size :] = 0.0

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """ids (B, T) int64, T ≤ block_size → logits (B, T, V); with targets (B, T), the next ids, their loss in nats instead.

        Targets of IGNORED_TARGET do not count. "mean" divides by the number of counted targets; "none" gives (B, T).
        """
        attend = self._causal_attention(ids)
        hidden = self._hidden(ids, self._positions(ids), lambda layer, qk, v: attend(qk, v))
        if targets is None:
            return self._logits(hidden)
        if reduction != "none" and not label_smoothing and losses_in_chunks(hidden, self.config.vocab_size):
            total = ChunkedCrossEntropy.apply(
                hidden.flatten(0, 1), self._head_weight(), targets.flatten(), self.config.vocab_size
            )
            return total if reduction == "sum" else total / (targets != IGNORED_TARGET).sum()
        flat = self._logits(hidden).flatten(0, 1).float()
        loss = F.cross_entropy(
            flat, targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction, label_smoothing=label_smoothing
        )
        return loss.view_as(targets) if reduction == "none" else loss

    def observe(self, ids: Tensor, see: Callable[[int, Tensor, Tensor, Tensor], None]) -> Tensor:
        """forward(ids), and on the way see(layer, q (B, T, H, D), k, v (B, T, K, D)) with what enters the attention of every layer."""
        attend = self._causal_attention(ids)

        def seen(layer: int, qk: Tensor, v: Tensor | None) -> Tensor:
            see(layer, *split_heads(qk, v, self.config.n_head))
            return attend(qk, v)

        return self._logits(self._hidden(ids, self._positions(ids), seen))

    def _hidden(self, ids: Tensor, positions: Tensor | slice, attend: Attend, before: Tensor | None = None) -> Tensor:
        """ids (B, T), positions (B, T) or a slice of length T for all rows, before (B, max_ngram − 1) or None: the ids ahead of these
        where there are any → the final hidden states (B, T, C)."""
        x = self.embed(ids)
        if self.ngrams is not None:
            x = x + self.ngrams(self._ngram_rows(ids, positions, before)).sum(dim=-2)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.n_embd)
        rotation = None
        if self.position is not None:
            x = x + self.position.weight[positions]
        elif self.table is not None and self.config.positions == "sinusoidal":
            x = x + self.table[positions].to(x.dtype)
        elif self.table is not None:
            rotation = self.table[positions]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, attend)
        return self.final_norm(x)

    def _ngram_rows(self, ids: Tensor, positions: Tensor | slice, before: Tensor | None) -> Tensor:
        """What `_hidden` takes → (B, T, max_ngram − 1): the rows of the table for the 2-, 3-, … grams that end with each token.

        Short sequences are so frequent that a table learns them sooner than attention does (hash n-gram embeddings: Pagnoni et al.
        2024, Byte Latent Transformer, 3.2.1; Huang et al. 2025, Over-Tokenized Transformer).
        """
        T, most = ids.shape[1], self.config.max_ngram - 1
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=ids.device)
        so_far = F.pad(ids, (most, 0)) if before is None else torch.cat((before, ids), dim=1)  # (B, max_ngram − 1 + T)
        keys = [ids + 1]  # 0 stands for what lies before the document
        for back in range(1, most + 1):
            earlier = (so_far[:, most - back : most - back + T] + 1) * (positions >= back)
            keys.append((keys[-1] * 1_000_003 + earlier) % (2**31 - 1))
        return torch.stack(keys[1:], dim=-1) % self.config.ngram_rows

    def _logits(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…, V): the padded columns end here."""
        logits = F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
        return logits if logits.shape[-1] == self.config.vocab_size else logits[..., : self.config.vocab_size]

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def document_starts(self, ids: Tensor) -> Tensor:
        """(B, T) ids → (B, T) int64: where the document of each token starts. An EOS is the start of the document after it."""
        steps = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(self._is_eos(ids), steps, 0).cummax(dim=1).values

    def _is_eos(self, ids: Tensor) -> Tensor:
        return ids.eq(-1 if self.config.eos_id is None else self.config.eos_id)

    def first_visible(self, ids: Tensor) -> Tensor | None:
        """(B, T) ids → (B, T) int32, the first position that each token sees; None where every token sees all before it."""
        if not self.config.document_mask and self.config.sliding_window is None:
            return None
        first = self.document_starts(ids) if self.config.document_mask else torch.zeros_like(ids)
        if self.config.sliding_window is not None:
            steps = torch.arange(ids.shape[1], device=ids.device)
            first = torch.maximum(first, steps - (self.config.sliding_window - 1))  # (B, T)
        return first.to(torch.int32)

    def _causal_attention(self, ids: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        return causal_attention(self.attention, self.config.n_head, self.first_visible(ids))

    def _positions(self, ids: Tensor) -> Tensor | slice:
        if not self.config.document_mask:
            return slice(0, ids.shape[1])
        return torch.arange(ids.shape[1], device=ids.device) - self.document_starts(ids)

    # -- generation: the same mathematics, one token at a time

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Tensor, cache: KVCache, rows: Tensor) -> Tensor:
        """Reads prompts into rows of the cache, replacing what these rows held.

        ids (R, T) int64, prompts padded on the right with any id; lengths (R,) int64, 1 … T; rows (R,) int64 → logits (R, V)
        after each prompt's last token. What stands beyond a prompt's length is never seen: causality hides it here, the cache's
        lengths later.
        """
        attend_to_prompt = self._causal_attention(ids)

        def attend(layer: int, qk: Tensor, v: Tensor | None) -> Tensor:
            cache.write(layer, rows, *split_heads(qk, v, self.config.n_head)[1:])
            return attend_to_prompt(qk, v)

        hidden = self._hidden(ids, self._positions(ids), attend)
        last = lengths - 1
        every = torch.arange(len(rows), device=ids.device)
        starts = self.document_starts(ids)[every, last] if self.config.document_mask else torch.zeros_like(last)
        cache.restart(rows, lengths, starts)
        if cache.ids is not None:
            cache.ids[rows, : ids.shape[1]] = ids
        return self._logits(hidden[every, last])

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (R,) int64, the next token of every row of the cache → logits (R, V). Raises ValueError where a row is full."""
        cache.check_room()
        positions: Tensor | slice = slice(cache.longest, cache.longest + 1)
        if self.config.document_mask:
            cache.starts.copy_(torch.where(self._is_eos(ids), cache.lengths, cache.starts))
        if self.config.document_mask or not cache.even:
            positions = (cache.lengths - cache.starts)[:, None]
        mask = cache.mask(self.config.sliding_window, self.config.document_mask)
        append, n_head = cache.appender(), self.config.n_head

        def attend(layer: int, qk: Tensor, v: Tensor | None) -> Tensor:
            q, k, v = split_heads(qk, v, n_head)
            return cached_attention(q, *append(layer, k, v), mask)

        before = cache.newest_ids(self.config.max_ngram - 1)
        hidden = self._hidden(ids[:, None], positions, attend, before)
        cache.advance(ids)
        return self._logits(hidden[:, 0])

    # -- weights in and out

    def _vocabulary_matrices(self) -> list[Tensor]:
        return [self.embed.weight] if self.head is None else [self.embed.weight, self.head.weight]

    def n_params(self) -> int:
        """Parameters, without the rows that only pad the vocabulary."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd * len(
            self._vocabulary_matrices()
        )

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward a token at the full context: six a number of every matrix that multiplies (Kaplan et al. 2020),
        and 12 · L · T · C for attention's products, hidden scores counted too, as the field does."""
        c = self.config
        matrices = sum(p.numel() for p in self.blocks.parameters()) + c.vocab_size * c.n_embd
        return 6 * matrices + 12 * c.n_layer * c.block_size * c.n_embd

    def export_state(self) -> dict[str, Tensor]:
        """The weights by name, with exactly vocab_size rows: what checkpoints hold."""
        return {name: self.unpad(name, tensor.detach()) for name, tensor in self.named_parameters()}

    def unpad(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor shaped like the parameter `name` (weights, moments) without the rows that pad the vocabulary."""
        return tensor[: self.config.vocab_size] if name in ("embed.weight", "head.weight") else tensor

    @torch.no_grad()
    def import_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies exported weights in, padding with zeros. Raises ValueError, naming the tensor, where names or shapes differ."""
        own = dict(self.named_parameters())
        if missing := sorted(own.keys() - tensors.keys()):
            raise ValueError(f"the weights lack {missing[0]!r} ({len(missing)} missing)")
        if extra := sorted(tensors.keys() - own.keys()):
            raise ValueError(f"the weights hold {extra[0]!r}, which this model does not have ({len(extra)} too many)")
        for name, parameter in own.items():
            target = self.unpad(name, parameter)
            if target.shape != tensors[name].shape:
                raise ValueError(
                    f"{name!r} has the shape {tuple(tensors[name].shape)}, this model has {tuple(target.shape)}"
                )
            parameter.zero_()
            target.copy_(tensors[name])


# ---- The loss of a large vocabulary ----------------------------------------------------------------------------------

CHUNK_ROWS = 256  # tokens whose logits exist at a time
SMALLEST_CHUNKED = 2**22  # logits; fewer stay near the caches anyway


def losses_in_chunks(hidden: Tensor, vocab_size: int) -> bool:
    """Whether ChunkedCrossEntropy pays: on CPUs, in training, for many logits. torch.compile fuses the plain loss by itself."""
    wanted = hidden.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return wanted and hidden.shape[:-1].numel() * vocab_size >= SMALLEST_CHUNKED


class ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (N, C), head weight (≥ V, C), targets (N,) int64 → sum of the counted targets' losses in nats.

    The gradients are known as soon as the logits are, softmax − one-hot, so they are made on the way, chunk by chunk, in the
    logits' own memory: never are there (N, V) numbers, let alone the three or four copies that a separate head, softmax and loss make.
    F.linear_cross_entropy (torch 2.13) has the same aim, but was six times slower than the plain loss on a CPU (bench/NOTES.md).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        with torch.autocast("cpu", enabled=False):
            narrow_hidden, narrow_weight = hidden.to(dtype), weight[:vocab_size].to(dtype)
            total = widened(hidden.new_zeros(()))
            for start in range(0, len(hidden), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                counts = (targets[rows] != IGNORED_TARGET)[:, None]
                target = targets[rows, None].clamp(min=0)
                logits = widened(narrow_hidden[rows] @ narrow_weight.mT)  # (CHUNK_ROWS, V)
                of_target, largest = logits.gather(1, target), logits.amax(dim=1, keepdim=True)
                sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
                total += ((sums.log() + largest - of_target) * counts).sum()
                d_logits = logits.mul_(counts / sums).scatter_add_(1, target, -counts.to(logits.dtype)).to(dtype)
                d_hidden[rows] = d_logits @ narrow_weight
                if dtype == weight.dtype:
                    d_weight[:vocab_size].addmm_(d_logits.mT, narrow_hidden[rows])
                else:
                    d_weight[:vocab_size] += d_logits.mT @ narrow_hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, None


# ---- The key/value cache ---------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens read so far, rows of different lengths side by side.

    memory (2 · n_layer, R, K, S, D): the keys of every layer, then the values of every layer; ids (R, S) where the model has n-grams; both
    allocated once. host_lengths: tokens in each row, known without waiting for a device; starts (R,) int64: where the current document of
    each row starts. A row's token t lies at index t, so its length is also its next position.
    """

    def __init__(
        self, config: GPTConfig, rows: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        shape = (2 * config.n_layer, rows, config.kv_heads, config.block_size, config.head_size)
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = (
            torch.zeros(rows, config.block_size, dtype=torch.int64, device=device) if config.max_ngram > 1 else None
        )
        self.starts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.host_lengths = [0] * rows

    @property
    def capacity(self) -> int:
        return self.memory.shape[3]

    @property
    def lengths(self) -> Tensor:
        """(R,) int64: tokens in each row."""
        return torch.tensor(self.host_lengths, device=self.memory.device)

    @property
    def longest(self) -> int:
        return max(self.host_lengths)

    @property
    def even(self) -> bool:
        """Whether all rows are equally long, which saves masks and indices."""
        return min(self.host_lengths) == max(self.host_lengths)

    def check_room(self) -> None:
        if self.longest >= self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and is full; prefill the row anew with fewer")

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores a prompt's k, v (R, T, K, D) from index 0 on."""
        for all_rows, new in ((self.memory[layer], k), (self.memory[layer + len(self.memory) // 2], v)):
            all_rows[:, :, : k.shape[1]].index_copy_(0, rows, new.transpose(1, 2).to(all_rows.dtype))

    def restart(self, rows: Tensor, lengths: Tensor, starts: Tensor) -> None:
        self.starts[rows] = starts
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            self.host_lengths[row] = length

    def appender(self) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function for one step: it stores a layer's k, v (R, 1, K, D) of one token behind each row and returns all keys and values so
        far, (R, K, S, D) with S = longest + 1. What the layers share is made here, once."""
        S, n_layer = self.longest + 1, len(self.memory) // 2
        so_far = self.memory.narrow(3, 0, S).unbind()
        if self.even:
            slots = self.memory.narrow(3, S - 1, 1).transpose(2, 3).unbind()  # (R, 1, K, D) each

            def append(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                slots[layer].copy_(k)
                slots[n_layer + layer].copy_(v)
                return so_far[layer], so_far[n_layer + layer]

        else:
            every, lengths = torch.arange(len(self.starts), device=self.memory.device), self.lengths

            def append(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                keys, values = so_far[layer], so_far[n_layer + layer]
                keys[every, :, lengths] = k[:, 0].to(keys.dtype)
                values[every, :, lengths] = v[:, 0].to(values.dtype)
                return keys, values

        return append

    def mask(self, sliding_window: int | None, document_mask: bool) -> Tensor | None:
        """(R, 1, 1, S) bool: what the token about to be appended sees; None where that is everything."""
        S = self.longest + 1
        if self.even and not document_mask and (sliding_window is None or sliding_window >= S):
            return None
        lengths = self.lengths
        first = self.starts if sliding_window is None else torch.maximum(self.starts, lengths - (sliding_window - 1))
        index = torch.arange(S, device=self.memory.device)
        return ((index <= lengths[:, None]) & (index >= first[:, None]))[:, None, None]

    def newest_ids(self, count: int) -> Tensor | None:
        """(R, count): the last ids of each row, oldest first, any ids where a row holds fewer; None where the model has no n-grams."""
        if self.ids is None:
            return None
        index = self.lengths[:, None] + torch.arange(-count, 0, device=self.memory.device)
        return self.ids.gather(1, index.clamp(min=0))

    def advance(self, ids: Tensor) -> None:
        if self.ids is not None:
            self.ids.scatter_(1, self.lengths[:, None], ids[:, None])
        self.host_lengths = [length + 1 for length in self.host_lengths]

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these, in this order."""
        if rows == list(range(len(self.host_lengths))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.memory.device)
        self.memory = self.memory[:, index]
        self.ids = None if self.ids is None else self.ids[index]
        self.starts = self.starts[index]
        self.host_lengths = [self.host_lengths[row] for row in rows]


# ======================================================================================================================
# Attention: softmax(q · kᵀ / √D) · v over the visible positions. This section knows tensors only. Everything above calls its
# two entries, causal_attention (training and prompts) and cached_attention (one token against the cache), and never asks
# how they work. Queries are (B, T, H, D), keys and values (B, T, K, D) as they lie in the packed projection: views, no
# copies. With K < H (grouped queries), query head h reads key/value head h // (H / K).
#
# There are two ways, chosen once, when the model is made: "triton", the fused kernel at the end of this file, for GPUs; and
# "sdpa", PyTorch's own, for every other machine.
# ======================================================================================================================

AttentionPath = Literal["triton", "sdpa"]
LARGEST_FUSED_HEAD = 128  # a tile of rows this wide still fits into registers beside its accumulator


def choose_attention(
    asked: AttentionPath | Literal["auto"], device: torch.device, head_size: int
) -> tuple[AttentionPath, str]:
    """The way to attend on this device, and the reason. Raises ValueError with the reason where "triton" is asked for in vain."""
    if asked == "sdpa":
        return "sdpa", "asked for"
    obstacle = triton_obstacle(device, (8, 0))
    if head_size > LARGEST_FUSED_HEAD:
        obstacle = f"the kernel takes heads up to {LARGEST_FUSED_HEAD} wide, these have {head_size}"
    if asked == "triton":
        if obstacle is not None:
            raise ValueError(obstacle)
        return "triton", "asked for"
    if obstacle is None and device.type == "cuda":
        return "triton", "the fused kernel runs here"
    return "sdpa", f"no fused kernel: {obstacle or 'its interpreter is for tests'}"


def triton_obstacle(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why Triton cannot run on this device, or None where it can; capability: the oldest NVIDIA GPU that will do."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as Python, on any device: for tests
    if device.type != "cuda" and not interpreted:
        return f"Triton needs a GPU, the device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < capability:
        return f"the GPU has compute capability {torch.cuda.get_device_capability(device)}, {capability} is needed"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "there is no C compiler, which Triton needs"
    return None


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """The definition, for reading and for tests: softmax(q · kᵀ / √D), q (…, T, D), k (…, S, D) → (…, T, S).

    Scores q · k of 112 and 96 at D = 64 become 14 and 12 by the division, 0.88 and 0.12 by the softmax.
    """
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)


def causal_attention(
    path: AttentionPath, n_head: int, first_visible: Tensor | None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The attention of one batch, a function (qk, v) → (B, T, H, D): token t sees tokens first_visible[t] … t.

    qk (B, T, H + K, D) holds queries, then keys, and v (B, T, K, D) the values; or v is None and qk (B, T, H + 2K, D) holds them
    too, last: a projection that needs neither rotation nor normalisation goes in as it is, and its gradient comes back whole.
    first_visible (B, T) int32 never falls with t; None: every token sees all before it. What all layers share is made here, once.
    """
    if path == "triton":
        return lambda qk, v: _attention(qk, v, first_visible, n_head)[0]
    mask = dense_mask(first_visible)
    return lambda qk, v: _pytorch_attention(*split_heads(qk, v, n_head), mask)


def split_heads(qk: Tensor, v: Tensor | None, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """The views q (B, T, H, D), k and v (B, T, K, D) of what causal_attention takes."""
    if v is None:  # split, whose gradient is one cat; that of slices is zeros and sums
        kv_heads = (qk.shape[2] - n_head) // 2
        q, k, v = qk.split_with_sizes((n_head, kv_heads, kv_heads), dim=2)
    else:
        q, k = qk.split_with_sizes((n_head, qk.shape[2] - n_head), dim=2)
    return q, k, v


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q (R, 1, H, D) against the cache's (R, K, S, D); mask (R, 1, 1, S) bool or None: sees all → (R, 1, H, D)."""
    return _sdpa(q, keys, values, mask, causal=False)


# ---- PyTorch's attention ---------------------------------------------------------------------------------------------

# On a CPU the fused kernel is made for long sequences; up to these lengths the plain products below, forward and backward, were
# faster wherever they were timed (bench/NOTES.md), in bfloat16 1.6 to 6 times. They hold a (T, T) matrix a head.
WRITTEN_OUT_UP_TO = {torch.float32: 128, torch.bfloat16: 1024}


def dense_mask(first_visible: Tensor | None) -> Tensor | None:
    """(B, T) first visible positions → (B, 1, T, T) bool, True where query t sees key s."""
    if first_visible is None:
        return None
    steps = torch.arange(first_visible.shape[1], device=first_visible.device)
    return ((steps <= steps[:, None]) & (steps >= first_visible[:, :, None]))[:, None]


def _pytorch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None and q.device.type == "cpu" and q.shape[1] <= WRITTEN_OUT_UP_TO.get(q.dtype, 0):
        return _written_out(q, k, v)
    return _sdpa(q, k.transpose(1, 2), v.transpose(1, 2), mask, causal=mask is None)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as two batched matrix products around a softmax, the scale and the mask folded into the first."""
    B, T, H, D = q.shape

    def flat(x: Tensor) -> Tensor:  # (B, T, H or K, D) → (B · H, T, D)
        x = x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], dim=2)
        return x.transpose(1, 2).reshape(B * H, T, D)

    future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(future, flat(q), flat(k).mT, alpha=1 / math.sqrt(D))  # (B · H, T, T)
    return (torch.softmax(scores, dim=-1) @ flat(v)).view(B, H, T, D).transpose(1, 2)


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = q.shape[2] != keys.shape[1]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2)


# ---- The fused kernel ------------------------------------------------------------------------------------------------
#
# Written out, attention moves matrices of T × T scores through memory; at T = 1024 and D = 64 they are 16 times the size of q.
# The kernel never writes them. A program owns a block of BLOCK_Q queries of one head, keeps them on chip, and walks over the
# keys it may see, BLOCK_K at a time. Softmax needs the whole row's maximum and sum, but both can be carried along (Milakov and
# Gimelshein 2018; Rabe and Staats 2021; Dao et al. 2022, FlashAttention). With s the scores of one more block of keys:
#
#     peak' = max(peak, max s)        fade = exp(peak − peak')        p = exp(s − peak')
#     total' = fade · total + Σ p     acc' = fade · acc + p · v
#
# and in the end out = acc / total. On chip stay q, acc (BLOCK_Q × D, float32), peak and total; k and v blocks stream through
# shared memory. Exponentials are powers of two, with log2(e) folded into the scale: one multiply-add and one instruction a score.
# What is written beside out is one number a row, lse = peak + log2(total), from which any p can be had again without
# a maximum or a sum: p = exp2(s · scale − lse). So the backward pass stores no probabilities; it multiplies q · kᵀ once more in
# each of its two kernels, because reading T × T numbers back would take longer than computing them. With dp = do · vᵀ,
#
#     delta = Σ do ∘ out (a row's)    ds = p ∘ (dp − delta)    dq = scale · ds · k    dk = scale · dsᵀ · q    dv = pᵀ · do
#
# one kernel owns queries and sums dq over keys, the other owns keys and sums dk and dv over queries (of all heads that share
# them). Nothing is added by two programs, so there are no atomics and the gradients are the same bits every time.
#
# Cost of a head, causal: forward two products over half of the square, 2 · T² · D FLOP, and 4 · T · D numbers moved (what several
# programs of a head read comes from the L2 cache after the first time): T / 4 FLOP a byte in 16 bits. Backward seven
# products, 7 · T² · D, and 12 · T · D numbers. A Hopper GPU turns from memory-bound to compute-bound near 250 FLOP a byte: at T = 1024.
#
# Only some blocks need a mask: those on the diagonal, and, where documents or a window hide old keys, those that the
# line of first visible keys crosses. Blocks beyond it are not visited. So every loop over blocks is three loops, PHASE 0 for
# blocks cut by that line, 1 for blocks that are wholly visible and need no test at all, 2 for the diagonal. Hidden scores become
# a large negative number, not −inf: a row that has seen nothing yet then sums garbage, which `fade` = 0 removes
# when its first visible key comes; every row sees at least itself.
#
# A head size that is no power of two is padded to BLOCK_D on chip; numbers beyond D or T are read as 0 and never written.
# DOT is the type in which tiles enter the tensor cores: that of the inputs, but float32 for bfloat16 in the interpreter.


def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_vb, stride_vt, stride_vh, T, H, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    blocks = (T + BLOCK_Q - 1) // BLOCK_Q
    b, h = (tl.program_id(0) // blocks // H).to(tl.int64), tl.program_id(0) // blocks % H
    start_q = (
        blocks - 1 - tl.program_id(0) % blocks
    ) * BLOCK_Q  # the longest rows first, so that no long one is left for the end
    rows, cols, d = start_q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    own = (rows < T)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + rows[:, None] * stride_qt + d[None, :], mask=own, other=0.0).to(
        DOT
    )
    k_tile = k_ptr + b * stride_qb + h // GROUP * stride_qh + cols[:, None] * stride_qt + d[None, :]
    v_tile = v_ptr + b * stride_vb + h // GROUP * stride_vh + cols[:, None] * stride_vt + d[None, :]

    diagonal = start_q // BLOCK_K * BLOCK_K
    MASKED: tl.constexpr = first_ptr is not None
    begin, clear = 0, 0  # the first block of keys that a row sees, the first one that all rows see whole
    if MASKED:
        first = tl.maximum(tl.load(first_ptr + b * T + rows, mask=rows < T, other=0), 0)
        begin = tl.maximum(tl.load(first_ptr + b * T + start_q), 0) // BLOCK_K * BLOCK_K
        last = tl.load(first_ptr + b * T + tl.minimum(start_q + BLOCK_Q, T) - 1)
        clear = tl.minimum((tl.maximum(last, 0) + BLOCK_K - 1) // BLOCK_K * BLOCK_K, diagonal)

    peak = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for PHASE in tl.static_range(0 if MASKED else 1, 3):
        low = begin if PHASE == 0 else clear if PHASE == 1 else diagonal
        high = clear if PHASE == 0 else diagonal if PHASE == 1 else tl.minimum(start_q + BLOCK_Q, T)
        for start_k in tl.range(low, high, BLOCK_K):
            keys = start_k + cols
            there = None if PHASE == 1 and D == BLOCK_D else (keys < T)[:, None] & (d < D)[None, :]
            k = tl.load(k_tile + start_k * stride_qt, mask=there, other=None if there is None else 0.0).to(DOT)
            s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
            if PHASE == 0:
                s = tl.where(keys[None, :] >= first[:, None], s, -1.0e30)
            elif PHASE == 2:
                visible = keys[None, :] <= rows[:, None]
                s = tl.where(visible & (keys[None, :] >= first[:, None]) if MASKED else visible, s, -1.0e30)
            higher = tl.maximum(peak, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - higher[:, None])
            fade = tl.exp2(peak - higher)
            total = total * fade + tl.sum(p, 1)
            v = tl.load(v_tile + start_k * stride_vt, mask=there, other=None if there is None else 0.0)
            acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), acc * fade[:, None], input_precision="ieee")
            peak = higher
    out_tile = out_ptr + ((b * T + rows[:, None]) * H + h) * D + d[None, :]
    tl.store(out_tile, acc / total[:, None], mask=own)
    tl.store(lse_ptr + (b * H + h) * T + rows, peak + tl.log2(total), mask=rows < T)


def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, grad_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qt, stride_qh, stride_vb, stride_vt, stride_vh, stride_dqb, stride_dqt, stride_dqh, T, H, scale, root,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Walks as the forward kernel does. It comes first in the backward pass and leaves delta for the other one."""
    blocks = (T + BLOCK_Q - 1) // BLOCK_Q
    b, h = (tl.program_id(0) // blocks // H).to(tl.int64), tl.program_id(0) // blocks % H
    start_q = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    rows, cols, d = start_q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    own = (rows < T)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + rows[:, None] * stride_qt + d[None, :], mask=own, other=0.0).to(
        DOT
    )
    k_tile = k_ptr + b * stride_qb + h // GROUP * stride_qh + cols[:, None] * stride_qt + d[None, :]
    v_tile = v_ptr + b * stride_vb + h // GROUP * stride_vh + cols[:, None] * stride_vt + d[None, :]
    out_tile = ((b * T + rows[:, None]) * H + h) * D + d[None, :]
    grad = tl.load(grad_ptr + out_tile, mask=own, other=0.0)
    out = tl.load(out_ptr + out_tile, mask=own, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + rows, delta, mask=rows < T)
    lse = tl.load(lse_ptr + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    grad = grad.to(DOT)

    diagonal = start_q // BLOCK_K * BLOCK_K
    MASKED: tl.constexpr = first_ptr is not None
    begin, clear = 0, 0
    if MASKED:
        first = tl.maximum(tl.load(first_ptr + b * T + rows, mask=rows < T, other=0), 0)
        begin = tl.maximum(tl.load(first_ptr + b * T + start_q), 0) // BLOCK_K * BLOCK_K
        last = tl.load(first_ptr + b * T + tl.minimum(start_q + BLOCK_Q, T) - 1)
        clear = tl.minimum((tl.maximum(last, 0) + BLOCK_K - 1) // BLOCK_K * BLOCK_K, diagonal)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for PHASE in tl.static_range(0 if MASKED else 1, 3):
        low = begin if PHASE == 0 else clear if PHASE == 1 else diagonal
        high = clear if PHASE == 0 else diagonal if PHASE == 1 else tl.minimum(start_q + BLOCK_Q, T)
        for start_k in tl.range(low, high, BLOCK_K):
            keys = start_k + cols
            there = None if PHASE == 1 and D == BLOCK_D else (keys < T)[:, None] & (d < D)[None, :]
            k = tl.load(k_tile + start_k * stride_qt, mask=there, other=None if there is None else 0.0)
            v = tl.load(v_tile + start_k * stride_vt, mask=there, other=None if there is None else 0.0).to(DOT)
            s = tl.dot(q, k.to(DOT).T, input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
            if PHASE == 0:
                s = tl.where(keys[None, :] >= first[:, None], s, -1.0e30)
            elif PHASE == 2:
                visible = keys[None, :] <= rows[:, None]
                s = tl.where(visible & (keys[None, :] >= first[:, None]) if MASKED else visible, s, -1.0e30)
            p = tl.exp2(s * scale - lse[:, None])
            ds = p * (tl.dot(grad, v.T, input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype).to(DOT), k.to(DOT), dq, input_precision="ieee")
    dq_tile = dq_ptr + b * stride_dqb + h * stride_dqh + rows[:, None] * stride_dqt + d[None, :]
    tl.store(dq_tile, dq * root, mask=own)


def _key_value_gradient_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_vb, stride_vt, stride_vh,
    stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh, T, H, scale, root,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Owns keys and values, walks over the queries that see them, transposed: s is (BLOCK_K, BLOCK_Q).

    PHASE 0 here is also the last, incomplete block of queries (TAIL). The first block of keys, which most queries see, starts first.
    """
    blocks, kv_heads = (T + BLOCK_K - 1) // BLOCK_K, H // GROUP
    b, h_kv = (tl.program_id(0) // blocks // kv_heads).to(tl.int64), tl.program_id(0) // blocks % kv_heads
    start_k = tl.program_id(0) % blocks * BLOCK_K
    keys, cols, d = start_k + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    own = (keys < T)[:, None] & (d < D)[None, :]
    k = tl.load(
        k_ptr + b * stride_qb + h_kv * stride_qh + keys[:, None] * stride_qt + d[None, :], mask=own, other=0.0
    ).to(DOT)
    v = tl.load(
        v_ptr + b * stride_vb + h_kv * stride_vh + keys[:, None] * stride_vt + d[None, :], mask=own, other=0.0
    ).to(DOT)

    diagonal, whole = start_k // BLOCK_Q * BLOCK_Q, T // BLOCK_Q * BLOCK_Q
    below = tl.minimum(
        (start_k + BLOCK_K + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q, (T + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    )  # past the diagonal
    clear, end = tl.maximum(whole, below), T  # where blocks stop to be wholly visible, and to be visible at all
    MASKED: tl.constexpr = first_ptr is not None
    if MASKED:  # first_visible never falls, so both are found by bisection
        for BOUND in tl.static_range(2):
            low, high = below // BLOCK_Q, (T + BLOCK_Q - 1) // BLOCK_Q
            while low < high:
                middle = (low + high) // 2
                row = tl.minimum(middle * BLOCK_Q + BLOCK_Q, T) - 1 if BOUND == 0 else middle * BLOCK_Q
                seen = tl.load(first_ptr + b * T + row) <= (start_k if BOUND == 0 else start_k + BLOCK_K - 1)
                low, high = tl.where(seen, middle + 1, low), tl.where(seen, high, middle)
            if BOUND == 0:
                clear = tl.minimum(low * BLOCK_Q, clear)
            else:
                end = tl.minimum(low * BLOCK_Q, T)

    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for member in range(GROUP):
        h = h_kv * GROUP + member
        q_tile = q_ptr + b * stride_qb + h * stride_qh + cols[:, None] * stride_qt + d[None, :]
        grad_tile = grad_ptr + ((b * T + cols[:, None]) * H + h) * D + d[None, :]
        row_numbers = (b * H + h) * T + cols
        for PHASE in tl.static_range(0 if MASKED or TAIL else 1, 3):
            low = clear if PHASE == 0 else below if PHASE == 1 else diagonal
            high = end if PHASE == 0 else clear if PHASE == 1 else below
            for start_q in tl.range(low, high, BLOCK_Q):
                rows = start_q + cols
                is_row = None if PHASE == 1 else rows < T
                there = None if PHASE == 1 and D == BLOCK_D else (rows < T)[:, None] & (d < D)[None, :]
                q = tl.load(q_tile + start_q * stride_qt, mask=there, other=None if there is None else 0.0)
                grad = tl.load(grad_tile + start_q * H * D, mask=there, other=None if there is None else 0.0)
                lse = tl.load(lse_ptr + row_numbers + start_q, mask=is_row, other=None if is_row is None else 0.0)
                delta = tl.load(delta_ptr + row_numbers + start_q, mask=is_row, other=None if is_row is None else 0.0)
                s = tl.dot(k, q.to(DOT).T, input_precision="ieee")  # (BLOCK_K, BLOCK_Q)
                if PHASE != 1:
                    visible = (rows < T)[None, :] & (keys[:, None] <= rows[None, :])
                    if MASKED:
                        first = tl.load(first_ptr + b * T + rows, mask=rows < T, other=0)
                        visible = visible & (keys[:, None] >= first[None, :])
                    s = tl.where(visible, s, -1.0e30)
                p = tl.exp2(s * scale - lse[None, :])
                dv = tl.dot(p.to(q.dtype).to(DOT), grad.to(DOT), dv, input_precision="ieee")
                ds = p * (tl.dot(v, grad.to(DOT).T, input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype).to(DOT), q.to(DOT), dk, input_precision="ieee")
    tl.store(dk_ptr + b * stride_dkb + h_kv * stride_dkh + keys[:, None] * stride_dkt + d[None, :], dk * root, mask=own)
    tl.store(dv_ptr + b * stride_dvb + h_kv * stride_dvh + keys[:, None] * stride_dvt + d[None, :], dv, mask=own)


class Launch(NamedTuple):
    """How a kernel is launched: queries and keys a block, warps a program, stages of the pipeline that loads ahead."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# Launches by architecture, bytes a number and padded head size: forward, query gradient, key and value gradient. "other" has the least
# shared memory that we know of, 99 KB (sm_86, sm_89, sm_120). None was timed yet: these compile, in 16 bits without spilling registers
# (tests/test_kernel_compile.py), and follow the occupancy that their registers allow. bench/tune_attention.py finds the fastest.
LAUNCHES: dict[tuple[str, int, int], tuple[Launch, Launch, Launch]] = {
    ("sm_90", 2, 64): (Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(32, 128, 8, 2)),
    ("sm_90", 2, 128): (Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(32, 128, 8, 2)),
    ("other", 2, 64): (Launch(64, 64, 4, 3), Launch(128, 64, 8, 2), Launch(32, 64, 4, 2)),
    ("other", 2, 128): (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 8, 2)),
    ("other", 4, 64): (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 32, 8, 2)),
    ("other", 4, 128): (Launch(32, 16, 8, 1), Launch(32, 16, 8, 1), Launch(16, 32, 8, 1)),
}


def launches_for(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Launch, Launch, Launch]:
    """The table's row; devices that it does not name get the most careful one. Raises ValueError on other types than the kernel's."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the fused kernel takes float32, float16 and bfloat16, not {dtype}; take the sdpa path")
    architecture = "other"
    if device.type == "cuda" and torch.version.hip is None:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    key = dtype.itemsize, 64 if head_size <= 64 else 128
    return LAUNCHES.get((architecture, *key)) or LAUNCHES["other", *key]


def fused_forward(qk: Tensor, v: Tensor | None, first_visible: Tensor | None, n_head: int) -> list[Tensor]:
    """What causal_attention takes → out (B, T, H, D) and lse (B, H, T) float32: log2 of the sum of a row's exponentials."""
    q, k, v = split_heads(qk, v, n_head)
    B, T, H, D = q.shape
    out, lse = q.new_empty((B, T, H, D)), q.new_empty((B, H, T), dtype=torch.float32)
    launch_forward(launches_for(q.device, q.dtype, D)[0], q, k, v, first_visible, out, lse)
    return [out, lse]


def fused_backward(
    grad: Tensor, qk: Tensor, v: Tensor | None, first_visible: Tensor | None, out: Tensor, lse: Tensor, n_head: int
) -> list[Tensor]:
    """The gradient of out → the gradients of qk and, where it is not None, of v."""
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (qk, v) if x is not None]
    dq, dk, dv = split_heads(grads[0], None if v is None else grads[1], n_head)
    q, k, v = split_heads(qk, v, n_head)
    _, by_query, by_key = launches_for(q.device, q.dtype, q.shape[3])
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    launch_query_gradient(by_query, q, k, v, first_visible, out, lse, grad, delta, dq)
    launch_key_value_gradient(by_key, q, k, v, first_visible, lse, grad, delta, dk, dv)
    return grads


# The three launches fill their last arguments: out and lse; delta and dq; dk and dv.


def launch_forward(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, first_visible: Tensor | None, out: Tensor, lse: Tensor
) -> Any:
    B, T, H, D = q.shape
    tensors = (q, k, v, first_visible, out, lse)
    return _run(
        _forward_kernel,
        B * H * -(-T // launch.block_q),
        launch,
        q,
        k,
        tensors,
        (q, v),
        (math.log2(math.e) / math.sqrt(D),),
    )


def launch_query_gradient(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, first_visible: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor,
    delta: Tensor, dq: Tensor,
) -> Any:  # fmt: skip
    B, T, H, D = q.shape
    tensors = (q, k, v, first_visible, out, lse, grad, delta, dq)
    numbers = math.log2(math.e) / math.sqrt(D), 1 / math.sqrt(D)
    return _run(_query_gradient_kernel, B * H * -(-T // launch.block_q), launch, q, k, tensors, (q, v, dq), numbers)


def launch_key_value_gradient(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, first_visible: Tensor | None, lse: Tensor, grad: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor,
) -> Any:  # fmt: skip
    B, T, K, D = k.shape
    tensors = (q, k, v, first_visible, lse, grad, delta, dk, dv)
    numbers = math.log2(math.e) / math.sqrt(D), 1 / math.sqrt(D)
    programs, tail = B * K * -(-T // launch.block_k), T % launch.block_q != 0
    return _run(_key_value_gradient_kernel, programs, launch, q, k, tensors, (q, v, dk, dv), numbers, TAIL=tail)


def _run(
    kernel: Callable[..., None], programs: int, launch: Launch, q: Tensor, k: Tensor,
    tensors: tuple[Tensor | None, ...], strided: tuple[Tensor, ...], numbers: tuple[float, ...], **flags: bool,
) -> Any:  # fmt: skip
    """Launches a kernel on `tensors`, with the strides of batch, time and head of the `strided` ones, then the numbers and constants.

    Returns what Triton compiled, which can tell its registers and shared memory (the interpreter: None).
    """
    T, H, D = q.shape[1:]
    if any(x.stride(3) != 1 or T * x.stride(1) >= 2**31 for x in strided):
        raise ValueError(
            "the kernel needs heads whose numbers lie side by side, and sequences of less than 2³¹ numbers"
        )
    jitted = _jitted(kernel)
    wide = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    with torch.cuda.device_of(q):
        return jitted[(programs,)](
            *tensors, *(stride for x in strided for stride in x.stride()[:3]), T, H, *numbers,
            D=D, BLOCK_D=max(16, 1 << (D - 1).bit_length()), BLOCK_Q=launch.block_q, BLOCK_K=launch.block_k, GROUP=H // k.shape[2],
            DOT=getattr(tl, "float32" if wide else str(q.dtype).removeprefix("torch.")), **flags,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip


@cache
def _jitted(kernel: Callable[..., None]) -> Any:
    """The kernel, compiled when it is launched. Triton is imported here, on first use; kernels look `tl` up among this file's names."""
    import triton
    import triton.language

    globals()["tl"] = triton.language
    return triton.jit(kernel, do_not_specialize=["T"])


# What torch sees: two opaque operators, their shapes and their derivative. torch.compile goes through them without a break.

_attention = torch.library.custom_op(
    "sprout::attention", fused_forward, mutates_args=(),
    schema="(Tensor qk, Tensor? v, Tensor? first_visible, int n_head) -> (Tensor, Tensor)",
)  # fmt: skip
_attention_backward = torch.library.custom_op(
    "sprout::attention_backward", fused_backward, mutates_args=(),
    schema="(Tensor grad, Tensor qk, Tensor? v, Tensor? first_visible, Tensor out, Tensor lse, int n_head) -> Tensor[]",
)  # fmt: skip


@_attention.register_fake
def _(qk: Tensor, v: Tensor | None, first_visible: Tensor | None, n_head: int) -> tuple[Tensor, Tensor]:
    B, T, _, D = qk.shape
    return qk.new_empty((B, T, n_head, D)), qk.new_empty((B, n_head, T), dtype=torch.float32)


@_attention_backward.register_fake
def _(grad: Tensor, qk: Tensor, v: Tensor | None, *saved: Any) -> list[Tensor]:
    return [qk.new_empty(x.shape) for x in (qk, v) if x is not None]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.n_head = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    d_qk, *d_v = _attention_backward(grad, *ctx.saved_tensors, ctx.n_head)
    return d_qk, d_v[0] if d_v else None, None, None


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)
