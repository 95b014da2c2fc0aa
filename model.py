"""The causal Transformer, whole: its options, its blocks, the language model, the key/value cache and the attention.

Read from top to bottom: GPTConfig (what can be chosen) → the small parts (norms, positions, dropout) → Attention, MLP,
Block → GPT (loss, generation, initialisation) → KVCache → attention itself, under a banner at the end.
This file imports nothing of the project. It knows ids and tensors; text, files, devices and schedules are others' business.

Dimension letters, everywhere: B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head size,
F width of the MLP, V vocabulary, S length of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_TARGET = -100  # a target with this id counts neither in the loss nor in its divisor


def _fixed(default: Any) -> Any:
    """An option that a resumed run may not change: the shapes or the meaning of the weights depend on it."""
    return field(default=default, metadata={"resume": "fixed"})


@dataclass(frozen=True)
class GPTConfig:
    """What kind of Transformer. The defaults are GPT-2 124M. Raises ValueError, naming the options, where they do not fit."""

    n_layer: Annotated[int, "1 <= x"] = _fixed(12)
    """Number of blocks."""
    n_head: Annotated[int, "1 <= x"] = _fixed(12)
    """Query heads a block; divides n_embd."""
    n_kv_head: Annotated[int, "1 <= x"] | None = _fixed(None)
    """Key/value heads a block (grouped-query attention), divides n_head; none: as many as n_head."""
    n_embd: Annotated[int, "1 <= x"] = _fixed(768)
    """Channels: the width of the residual stream."""
    block_size: Annotated[int, "1 <= x"] = _fixed(1024)
    """Tokens of context: the longest sequence that the model sees at once."""
    positions: Literal["learned", "sinusoidal", "rotary"] = _fixed("learned")
    """How a token knows where it stands: a learned table, fixed sine waves, or rotated queries and keys."""
    rope_theta: Annotated[float, "0 < x"] = _fixed(10_000.0)
    """Base of the rotary wavelengths; larger for longer contexts."""
    norm: Literal["layernorm", "rmsnorm"] = _fixed("layernorm")
    """Normalisation: LayerNorm, or RMSNorm (no mean, no bias)."""
    norm_eps: Annotated[float, "0 < x"] = _fixed(1e-5)
    """Added to the variance before the square root."""
    norm_position: Literal["pre", "post"] = _fixed("pre")
    """Normalise the input of a sublayer (GPT-2 and later), or its sum with the residual (the 2017 paper)."""
    mlp: Literal["gelu", "relu", "relu2", "swiglu"] = _fixed("gelu")
    """Nonlinearity of the MLP: GELU (tanh form), ReLU, squared ReLU, or SiLU-gated."""
    n_hidden: Annotated[int, "1 <= x"] | None = _fixed(None)
    """Width of the MLP; none: 4 * n_embd, for swiglu 8/3 * n_embd rounded up to a multiple of 64."""
    qk_norm: bool = _fixed(False)
    """RMSNorm with learned scales on every head's queries and keys, before the rotation."""
    bias: bool = _fixed(True)
    """Biases in the linear layers and in LayerNorm."""
    tie_embeddings: bool = _fixed(True)
    """Use the token embedding as the output head too."""
    scale_embeddings: bool = _fixed(False)
    """Multiply token embeddings by the square root of n_embd (the 2017 paper)."""
    zero_init: bool = _fixed(False)
    """The matrices that end a residual branch, and an untied head, start at 0: each block as the identity, the first guess uniform."""
    max_ngram: Annotated[int, "1 <= x"] = _fixed(1)
    """Add to a token's embedding those of the n-grams that end with it, n = 2 to this, from a hashed table; 1: none."""
    ngram_rows: Annotated[int, "1 <= x"] = _fixed(16_384)
    """Rows of the table of n-grams; those that share one by chance are not told apart."""
    sliding_window: Annotated[int, "1 <= x"] | None = _fixed(None)
    """Each token sees itself and the tokens before it, this many in all; none: the whole context."""
    document_mask: bool = _fixed(False)
    """Tokens see their own document only, and positions restart where a document starts."""
    dropout: Annotated[float, "0 <= x < 1"] = 0.0
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
            found.append(f"positions=rotary needs an even head size; n_embd={self.n_embd} / n_head={self.n_head} is {self.head_size}")
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """The config in a checkpoint's model/config.json. Raises ValueError on unknown names and wrong types."""
        hints = get_type_hints(cls)
        if unknown := sorted(set(values) - set(hints)):
            raise ValueError(f"unknown model options {unknown}; this version of Sprout knows {sorted(hints)}")
        for name, value in values.items():
            if not _has_type(value, hints[name]):
                raise ValueError(f"{name}={value!r} is not of the type {hints[name]}")
        return cls(**values)


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if choices := get_args(hint):
        return any(_has_type(value, choice) for choice in choices)
    return type(value) is hint or (hint is float and type(value) is int)


# ---- The small parts -------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear whose weights wait for GPT.init_weights, so that no start-up time goes into numbers that are overwritten."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding whose table waits for GPT.init_weights."""

    def reset_parameters(self) -> None:
        pass


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
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return (F.rms_norm(wide, wide.shape[-1:], eps=eps) * weight).to(x.dtype)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


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
    """(length, 2, D/2): cosines and sines of the angles t · theta^(−2i/D) (Su et al. 2021)."""
    angles = torch.arange(length)[:, None] * theta ** (torch.arange(0, head_size, 2) * (-1.0 / head_size))
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of every head: the rotate-half layout that Llama and Qwen checkpoints use.

    x: (B, T, heads, D); table: rows of rotary_table for its positions, (T, 2, D/2) or (B, T, 2, D/2). Same shape, same dtype.
    """
    cos, sin = table[..., None, 0, :], table[..., None, 1, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---- The block -------------------------------------------------------------------------------------------------------

# What a block calls for its attention: (layer, q (B, T, H, D), k (B, T, K, D), v (B, T, K, D)) → (B, T, H, D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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
        qk, v = self.qkv(x).view(B, T, H + 2 * K, self.head_size).split((H + K, K), dim=2)  # (B, T, H + K, D), (B, T, K, D)
        if self.q_norm is not None and self.k_norm is not None:  # queries and keys together: one pass over memory, not two
            scales = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(K, -1)))  # (H + K, D)
            qk = rms_norm(qk, scales, self.q_norm.eps)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.split((H, K), dim=2)
        return self.proj(attend(self.layer, q, k, v).reshape(B, T, C))


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
    whose weights are about to be loaded.
    """

    table: Tensor | None  # the fixed positions: (block_size, C) waves or (block_size, 2, D/2) rotations

    def __init__(self, config: GPTConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
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
        |                                               | with zero_init 0, and so is an untied head                      |
        | ngrams                                        | 0: a row that was never seen says nothing                       |
        | norms' weights; every bias                    | 1; 0                                                            |
        | rows that pad the vocabulary                  | 0, and they stay 0: no gradient reaches them                    |
        """
        generator = torch.Generator().manual_seed(seed)
        branch_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        branch_ends = ("attn.proj.weight", "mlp.down.weight")
        zeros = ("bias", *branch_ends, "head.weight") if self.config.zero_init else ("bias",)
        for name, parameter in self.named_parameters():
            if name.endswith(zeros) or name.startswith("ngrams"):
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
        mask = dense_mask(self.first_visible(ids))
        hidden = self._hidden(ids, self._positions(ids), partial(_attend_causally, mask))
        logits = self._logits(hidden)
        if targets is None:
            return logits
        flat = logits.flatten(0, 1).float()
        loss = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction, label_smoothing=label_smoothing)
        return loss.view_as(targets) if reduction == "none" else loss

    def _hidden(self, ids: Tensor, positions: Tensor | None, attend: Attend, before: Tensor | None = None) -> Tensor:
        """ids (B, T), positions (B, T) or None for 0…T−1, before (B, max_ngram − 1) or None: the ids ahead of these where there are
        any → the final hidden states (B, T, C)."""
        x = self.embed(ids)
        if self.ngrams is not None:
            x = x + self.ngrams(self._ngram_rows(ids, positions, before)).sum(dim=-2)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.n_embd)
        rows = slice(0, ids.shape[1]) if positions is None else positions
        rotation = None
        if self.position is not None:
            x = x + self.position.weight[rows]
        elif self.table is not None and self.config.positions == "sinusoidal":
            x = x + self.table[rows]
        elif self.table is not None:
            rotation = self.table[rows]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, attend)
        return self.final_norm(x)

    def _ngram_rows(self, ids: Tensor, positions: Tensor | None, before: Tensor | None) -> Tensor:
        """What `_hidden` takes → (B, T, max_ngram − 1): the rows of the table for the 2-, 3-, … grams that end with each token.

        Short sequences are so frequent that a table learns them sooner than attention does (hash n-gram embeddings: Pagnoni et al.
        2024, Byte Latent Transformer, 3.2.1; Huang et al. 2025, Over-Tokenized Transformer).
        """
        T, most = ids.shape[1], self.config.max_ngram - 1
        if positions is None:
            positions = torch.arange(T, device=ids.device)
        so_far = F.pad(ids, (most, 0)) if before is None else torch.cat((before, ids), dim=1)  # (B, max_ngram − 1 + T)
        keys = [ids + 1]  # 0 stands for what lies before the document
        for back in range(1, most + 1):
            earlier = (so_far[:, most - back : most - back + T] + 1) * (positions >= back)
            keys.append((keys[-1] * 1_000_003 + earlier) % (2**31 - 1))
        return torch.stack(keys[1:], dim=-1) % self.config.ngram_rows

    def _logits(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…, V): the padded columns end here."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight)[..., : self.config.vocab_size]

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

    def _positions(self, ids: Tensor) -> Tensor | None:
        if not self.config.document_mask:
            return None
        return torch.arange(ids.shape[1], device=ids.device) - self.document_starts(ids)

    # -- generation: the same mathematics, one token at a time

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Tensor, cache: KVCache, rows: Tensor) -> Tensor:
        """Reads prompts into rows of the cache, replacing what these rows held.

        ids (R, T) int64, prompts padded on the right with any id; lengths (R,) int64, 1 … T; rows (R,) int64 → logits (R, V)
        after each prompt's last token. What stands beyond a prompt's length is never seen: causality hides it here, the cache's
        lengths later.
        """
        mask = dense_mask(self.first_visible(ids))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, k, v)
            return causal_attention(q, k, v, mask)

        hidden = self._hidden(ids, self._positions(ids), attend)
        last = lengths - 1
        every = torch.arange(len(rows), device=ids.device)
        starts = self.document_starts(ids)[every, last] if self.config.document_mask else torch.zeros_like(last)
        cache.restart(rows, lengths, starts)
        cache.ids[rows, : ids.shape[1]] = ids
        return self._logits(hidden[every, last])

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (R,) int64, the next token of every row of the cache → logits (R, V). Raises ValueError where a row is full."""
        if cache.longest >= cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens and is full; prefill the row anew with fewer")
        if self.config.document_mask:
            cache.starts = torch.where(self._is_eos(ids), cache.lengths, cache.starts)
        positions = cache.lengths - cache.starts
        mask = cache.mask(self.config.sliding_window, self.config.document_mask)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cached_attention(q, *cache.append(layer, k, v), mask)

        before = None if self.ngrams is None else cache.newest_ids(self.config.max_ngram - 1)
        hidden = self._hidden(ids[:, None], positions[:, None], attend, before)
        cache.advance(ids)
        return self._logits(hidden[:, 0])

    # -- weights in and out

    def _vocabulary_matrices(self) -> list[Tensor]:
        return [self.embed.weight] if self.head is None else [self.embed.weight, self.head.weight]

    def n_params(self) -> int:
        """Parameters, without the rows that only pad the vocabulary."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd * len(self._vocabulary_matrices())

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
                raise ValueError(f"{name!r} has the shape {tuple(tensors[name].shape)}, this model has {tuple(target.shape)}")
            parameter.zero_()
            target.copy_(tensors[name])


# ---- The key/value cache ---------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens read so far, rows of different lengths side by side.

    keys, values: (n_layer, R, K, S, D), ids: (R, S), allocated once; lengths (R,) int64: tokens in each row; starts (R,): where the
    current document of each row starts. A row's token t lies at index t, so its length is also its next position.
    """

    def __init__(self, config: GPTConfig, rows: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        shape = (config.n_layer, rows, config.kv_heads, config.block_size, config.head_size)
        self.keys, self.values = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(rows, config.block_size, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.starts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._host_lengths = [0] * rows  # the same numbers where reading them costs no synchronisation

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def longest(self) -> int:
        return max(self._host_lengths)

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores a prompt's k, v (R, T, K, D) from index 0 on."""
        T = k.shape[1]
        self.keys[layer, rows, :, :T] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer, rows, :, :T] = v.transpose(1, 2).to(self.values.dtype)

    def restart(self, rows: Tensor, lengths: Tensor, starts: Tensor) -> None:
        self.lengths[rows], self.starts[rows] = lengths, starts
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            self._host_lengths[row] = length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one token's k, v (R, 1, K, D) behind each row → all keys and values so far, (R, K, S, D) with S = longest + 1."""
        S = self.longest + 1
        if min(self._host_lengths) == S - 1:  # all rows are equally long: a plain slice
            self.keys[layer, :, :, S - 1] = k[:, 0]
            self.values[layer, :, :, S - 1] = v[:, 0]
        else:
            every = torch.arange(len(self.lengths), device=self.lengths.device)
            self.keys[layer, every, :, self.lengths] = k[:, 0].to(self.keys.dtype)
            self.values[layer, every, :, self.lengths] = v[:, 0].to(self.values.dtype)
        return self.keys[layer, :, :, :S], self.values[layer, :, :, :S]

    def mask(self, sliding_window: int | None, document_mask: bool) -> Tensor | None:
        """(R, 1, 1, S) bool: what the token about to be appended sees; None where that is everything."""
        S = self.longest + 1
        if min(self._host_lengths) == S - 1 and sliding_window is None and not document_mask:
            return None
        first = self.starts if sliding_window is None else torch.maximum(self.starts, self.lengths - (sliding_window - 1))
        index = torch.arange(S, device=self.lengths.device)
        return ((index <= self.lengths[:, None]) & (index >= first[:, None]))[:, None, None]

    def newest_ids(self, count: int) -> Tensor:
        """(R, count): the last ids of each row, oldest first; where a row holds fewer, any id stands for what is not there."""
        index = self.lengths[:, None] + torch.arange(-count, 0, device=self.lengths.device)
        return self.ids.gather(1, index.clamp(min=0))

    def advance(self, ids: Tensor) -> None:
        self.ids.scatter_(1, self.lengths[:, None], ids[:, None])
        self.lengths += 1
        self._host_lengths = [length + 1 for length in self._host_lengths]

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.ids, self.lengths, self.starts = self.ids[index], self.lengths[index], self.starts[index]
        self._host_lengths = [self._host_lengths[row] for row in rows]


# ======================================================================================================================
# Attention: softmax(q · kᵀ / √D) · v over the visible positions. This section knows tensors only; everything above calls
# its two entries, causal_attention (training and prompts) and cached_attention (one token against the cache), and never
# asks how they work. Queries are (B, T, H, D), keys and values (B, T, K, D) as they lie in the packed projection: views,
# no copies. With K < H (grouped queries), query head h reads key/value head h // (H / K).
# ======================================================================================================================


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """The definition, for reading and for tests: softmax(q · kᵀ / √D), q (…, T, D), k (…, S, D) → (…, T, S).

    Scores q · k of 112 and 96 at D = 64 become 14 and 12 by the division, 0.88 and 0.12 by the softmax.
    """
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)


def dense_mask(first_visible: Tensor | None) -> Tensor | None:
    """(B, T) first visible positions → (B, 1, T, T) bool, True where query t sees key s; built once a batch, not once a layer."""
    if first_visible is None:
        return None
    steps = torch.arange(first_visible.shape[1], device=first_visible.device)
    return ((steps <= steps[:, None]) & (steps >= first_visible[:, :, None]))[:, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Token t sees tokens 0 … t, or what the mask of dense_mask leaves of them → (B, T, H, D)."""
    if attention_path(q.device, q.dtype, q.shape[1], masked=mask is not None) == "written out":
        return _written_out(q, k, v)
    return _sdpa(q, k.transpose(1, 2), v.transpose(1, 2), mask, causal=mask is None)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q (R, 1, H, D) against the cache's (R, K, S, D); mask (R, 1, 1, S) bool or None: sees all → (R, 1, H, D)."""
    return _sdpa(q, keys, values, mask, causal=False)


# On a CPU the fused kernel is made for long sequences; up to these lengths the plain products below, forward and backward, were
# faster wherever they were timed (bench/NOTES.md), in bfloat16 1.6 to 6 times. They hold a (T, T) matrix a head.
WRITTEN_OUT_UP_TO = {torch.float32: 128, torch.bfloat16: 1024}


AttentionPath = Literal["written out", "scaled_dot_product_attention"]


def attention_path(device: torch.device, dtype: torch.dtype, length: int, masked: bool) -> AttentionPath:
    """How causal_attention computes sequences of this length; masked: documents or a window hide more than the future."""
    is_short = device.type == "cpu" and length <= WRITTEN_OUT_UP_TO.get(dtype, 0)
    return "written out" if is_short and not masked else "scaled_dot_product_attention"


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """causal_attention as two batched matrix products around a softmax, the scale and the mask folded into the first."""
    B, T, H, D = q.shape

    def flat(x: Tensor) -> Tensor:  # (B, T, H or K, D) → (B · H, T, D)
        x = x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], dim=2)
        return x.transpose(1, 2).reshape(B * H, T, D)

    future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(future, flat(q), flat(k).mT, alpha=1 / math.sqrt(D))  # (B · H, T, T)
    return (torch.softmax(scores, dim=-1) @ flat(v)).view(B, H, T, D).transpose(1, 2)


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = q.shape[2] != keys.shape[1]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _attend_causally(mask: Tensor | None, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_attention(q, k, v, mask)
