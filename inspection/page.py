"""sample.py --inspect: a self-contained HTML page of one forward pass over a prompt (inspect_prompt → render_page).

The data hold q, k and v of every token shown, from which the page computes scores, attention weights and outputs, and
the next-token distribution after every token. page.html explains them; it makes no network requests.
"""

from __future__ import annotations

import base64
import errno
import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.tokenizer import Tokenizer
from errors import UserError
from files import replace_file
from generation.engine import visible
from generation.options import SamplingOptions
from generation.sampling import Penalties, filtered_probs
from model import GPT, Attention, AttentionContext, GPTConfig, dense_mask

PAGE = Path(__file__).with_name("page.html")
MAX_TOKENS, MIN_TOKENS = 96, 8  # shown at once
MAX_NUMBERS = 2_000_000  # elements of q, k and v, unless MIN_TOKENS need more: the page is then about 5 MB
TOP = 20  # likeliest next tokens that are shown
FILTERS = ("repetition_penalty", "min_new_tokens", "temperature", "top_k", "top_p", "min_p")  # that affect a first draw
MIN_SHARE, MIN_NEARBY_SHARE = 0.4, 0.6  # mean attention weight from which a head is named after a pattern
MIN_QUERIES = 3  # over which that mean is taken


@torch.inference_mode()
def inspect_prompt(model: GPT, tokenizer: Tokenizer, ids: Sequence[int], options: SamplingOptions) -> dict[str, Any]:
    """Runs the model on `ids` (at least one) and returns the page's data as JSON values, arrays in base64.

    Raises UserError if the logits are not finite.
    """
    config = model.config
    context = visible(ids, config.block_size, options.keep_head)
    positions = shown_positions(config, len(context))  # N of T
    inputs = torch.tensor([context], device=model.embed.weight.device)  # (1, T)
    logits, attended = attention_inputs(model, inputs)
    layers = [tuple(x[0].transpose(0, 1).float().cpu() for x in qkv) for qkv in attended]  # (H, T, D), 2 · (K, T, D)
    logits = logits[0, positions].float().cpu()  # (N, V)
    if not logits.isfinite().all():
        raise UserError(
            "the model computes NaN or infinity, so there is nothing to show: its weights are not finite, or too large "
            "for this precision; try another checkpoint (--checkpoint=latest or step-N) or --dtype=float32"
        )
    inputs = inputs.cpu()
    starts = model.document_starts(inputs)[0] if config.document_mask else torch.zeros_like(inputs[0])  # (T,)
    first_visible = model.first_visible(inputs)
    first_visible = torch.zeros_like(inputs) if first_visible is None else first_visible  # (1, T)
    kinds, hidden_lse = classify_heads(layers, first_visible, inputs[0], starts, positions)

    dropped = len(ids) - len(context)  # ids after the first keep_head that no longer fit into block_size
    prefixes = [ids[: position + 1 + (dropped if position >= options.keep_head else 0)] for position in positions]
    sampled = sampling_probs(logits, prefixes, config.eos_id, options)
    predictions = next_tokens(logits, sampled, [[*context, None][position + 1] for position in positions])
    used = {
        *(context[position] for position in positions),
        *(entry[0] for prediction in predictions for entry in [*prediction["top"], *prediction["actual"]]),
    }
    q, k, v = (pack_int16(torch.stack([layer[i][:, positions] for layer in layers])) for i in range(3))
    return {
        "model": {"n_layer": config.n_layer, "n_head": config.n_head, "kv_heads": config.kv_heads,
                  "head_size": config.head_size, "positions": config.positions, "qk_norm": config.qk_norm,
                  "window": config.sliding_window, "document_mask": config.document_mask,
                  "vocab_size": config.vocab_size, "block_size": config.block_size},
        "flags": " ".join(changed_flags(options)),
        "omitted": describe_omitted(len(positions), len(context), len(ids), config.block_size),
        "num_read": len(context),
        "positions": positions,
        "tokens": [context[position] for position in positions],
        "texts": {token: printable(tokenizer, token) for token in sorted(used)},
        "document_starts": starts[positions].tolist(),
        "first_visible": first_visible[0, positions].tolist(),
        "q": q, "k": k, "v": v,  # (L, H, N, D), (L, K, N, D) twice
        "hidden_lse": hidden_lse,
        "kinds": kinds,
        "predictions": predictions,
    }  # fmt: skip


def attention_inputs(model: GPT, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """ids (B, T) → logits (B, T, V), and what enters the attention of each layer, normalized and rotated:
    q (B, T, H, D), k and v (B, T, K, D)."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(attention: Attention, inputs: tuple[Tensor, AttentionContext]) -> None:
        found.append(attention.queries_keys_values(inputs[0], inputs[1].rotation))

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [module.register_forward_pre_hook(record) for module in attentions]
    try:
        return model(ids), found
    finally:
        for hook in hooks:
            hook.remove()


def classify_heads(
    layers: list[tuple[Tensor, ...]], first_visible: Tensor, ids: Tensor, starts: Tensor, positions: list[int]
) -> tuple[list[list[tuple[str, float]]], str | None]:
    """Returns the kind of every head, and the logsumexp of each shown query's scores over the keys that are not shown.

    layers: q (H, T, D), k and v (K, T, D) each. first_visible: (1, T). ids, starts: (T,), `starts` of the documents.
    The logsumexp is (L, H, N) float32 in base64, or None if all tokens are shown.
    """
    mask = dense_mask(first_visible)
    assert mask is not None
    hidden = sorted(set(range(len(ids))) - set(positions))
    kinds, lse = [], []
    for q, k, _ in layers:
        scores = masked_scores(q, k, mask[0, 0])  # (H, T, T)
        kinds.append(head_kinds(torch.softmax(scores, dim=-1), mask[0, 0], ids, starts))
        lse.append(scores[:, positions][:, :, hidden].logsumexp(dim=-1))
    return kinds, encode_base64(torch.stack(lse).numpy(), "<f4") if hidden else None


def write_page(path: Path, data: dict[str, Any], title: str) -> None:
    """Writes the page to `path`, replacing the file atomically. Raises UserError if it cannot be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        replace_file(path, render_page(data, title).encode())
    except OSError as error:
        raise UserError(
            f"--inspect={path} cannot be written: {error.strerror}; give a file in a writable folder, such as out.html"
        ) from None


def render_page(data: dict[str, Any], title: str) -> str:
    """The HTML of inspect_prompt's data. "<" is escaped, so that no text can close the script element that holds it."""
    content = json.dumps({"title": title, **data}, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("DATA_OF_THE_PAGE", content)


def describe_omitted(num_shown: int, num_read: int, num_given: int, block_size: int) -> str | None:
    """Which tokens of the prompt the page does not show; None if it shows all."""
    parts = []
    if num_read < num_given:
        parts.append(
            f"the model sees {num_read:,} of the prompt's {num_given:,} tokens, since its context is {block_size:,}"
        )
    if num_shown < num_read:
        parts.append(
            f"of the {num_read:,} tokens that the model reads, the page shows the first and the last {num_shown - 1:,}"
        )
    return "; ".join(parts) or None


def shown_positions(config: GPTConfig, length: int) -> list[int]:
    """Positions of the tokens to show: all if they fit, else the first (a common attention sink) and the newest."""
    numbers = config.n_layer * (config.n_head + 2 * config.kv_heads) * config.head_size  # per token
    limit = max(MIN_TOKENS, min(MAX_TOKENS, MAX_NUMBERS // numbers))
    return list(range(length)) if length <= limit else [0, *range(length - limit + 1, length)]


def masked_scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q (H, T, D), k (K, T, D), mask (T, T) bool → q · kᵀ / √D (H, T, T), −∞ where the mask is False."""
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)


def head_kinds(weight: Tensor, mask: Tensor, ids: Tensor, starts: Tensor) -> list[tuple[str, float]]:
    """Names the attention pattern of each head: (name, mean weight on it), or ("spread", mean perplexity of its rows).

    weight: (H, T, T). mask: (T, T) bool. ids, starts: (T,). The mean is over the queries that can show the pattern.
    Returns ("", 0) if no pattern has MIN_QUERIES of these.
    """
    steps = torch.arange(len(ids))
    distance = steps[:, None] - steps  # (T, T), from query back to key
    same = (ids[:, None] == ids) & mask
    after_same = mask.clone()  # keys that follow an earlier occurrence of the query's token
    after_same[:, 0] = False
    after_same[:, 1:] &= same[:, :-1]
    distinct = steps - starts >= 3  # before that, the patterns below share keys
    patterns = {  # keys (T, T), and the queries (T,) that can show the pattern
        "itself": (distance == 0, distinct),
        "one back": (distance == 1, distinct),
        "two back": (distance == 2, distinct),
        "first token": (steps == starts[:, None], distinct),
        "same token": (same & (distance > 0), distinct & (same.sum(dim=1) > 1)),
        "after same": (after_same, distinct & after_same.any(dim=1)),
        "nearby": ((distance >= 0) & (distance <= 3), steps - starts >= 8),
    }
    patterns = {name: (keys, queries) for name, (keys, queries) in patterns.items() if queries.sum() >= MIN_QUERIES}

    def shares(head: Tensor) -> dict[str, float]:
        return {name: float((head * keys).sum(dim=1)[queries].mean()) for name, (keys, queries) in patterns.items()}

    uniform = shares(mask / mask.sum(dim=1, keepdim=True))  # of a head with equal weights
    minimum = {name: max(2 * uniform[name], MIN_NEARBY_SHARE if name == "nearby" else MIN_SHARE) for name in patterns}
    kinds = []
    for head in weight:
        clear = {name: round(share, 4) for name, share in shares(head).items() if share >= minimum[name]}
        if len(clear) > 1:
            clear.pop("nearby", None)  # the other names are more specific
        spread = torch.special.entr(head).sum(dim=1).exp()[distinct].mean()
        kinds.append(max(clear.items(), key=lambda item: item[1]) if clear else ("spread", round(float(spread), 2)))
    return kinds if patterns else [("", 0.0)] * len(weight)


def changed_flags(options: SamplingOptions) -> list[str]:
    """The flags of FILTERS that differ from their defaults, and always the temperature."""
    defaults = SamplingOptions()
    values = {name: getattr(options, name) for name in FILTERS}
    return [
        f"--{name}={value}"
        for name, value in values.items()
        if name == "temperature" or value != getattr(defaults, name)
    ]


def sampling_probs(
    logits: Tensor, prefixes: list[Sequence[int]], eos_id: int | None, options: SamplingOptions
) -> Tensor:
    """logits (N, V) after N prefixes → (N, V) float64, the probabilities of the first draw after such a prompt."""
    if Penalties.needed(options):
        logits = Penalties(prefixes, logits.shape[1], options, logits.device).apply(logits)
    if options.min_new_tokens > 0 and eos_id is not None:
        logits = logits.index_fill(1, torch.tensor([eos_id]), -torch.inf)
    if options.temperature == 0:
        return torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    probs = filtered_probs(logits, options).double()
    return probs / probs.sum(dim=1, keepdim=True)


def next_tokens(logits: Tensor, sampled: Tensor, actual_next: Sequence[int | None]) -> list[dict[str, Any]]:
    """Returns per row the likeliest next tokens and the actual one: (id, model's and sampling probability, rank).

    logits, sampled: (N, V). actual_next: N ids of the prompt, None after its last token. "bits" are the entropies of
    both distributions, "allowed" counts the tokens that may be drawn.
    """
    probs = logits.double().softmax(dim=1)
    order = logits.argsort(dim=1, descending=True, stable=True)  # ties go to the lower token id
    bits = [torch.special.entr(x).sum(dim=1) / math.log(2) for x in (probs, sampled)]
    num_top = min(TOP, logits.shape[1])
    predictions = []
    for row, actual in enumerate(actual_next):
        ranked = [(int(token), rank) for rank, token in enumerate(order[row, :num_top], start=1)]
        if actual is not None:
            ranked.append((actual, int((order[row] == actual).nonzero()) + 1))
        entries = [
            (token, round_digits(probs[row, token]), round_digits(sampled[row, token]), rank) for token, rank in ranked
        ]
        predictions.append(
            {
                "top": entries[:num_top],
                "actual": entries[num_top:],
                "bits": [round_digits(x[row]) for x in bits],
                "allowed": int((sampled[row] > 0).sum()),
            }
        )
    return predictions


def round_digits(number: Tensor) -> float:
    """Rounded to 7 significant digits, to keep the page small."""
    return float(f"{float(number):.7g}")


def printable(tokenizer: Tokenizer, token: int) -> str:
    """A token's text with spaces, control characters and incomplete UTF-8 in a visible form."""
    if token == tokenizer.eos_id:
        return "⟨end⟩"
    text = tokenizer.token_bytes[token].decode("utf-8", errors="backslashreplace")
    shown = "".join(VISIBLE.get(char) or (escape(char) if is_invisible(char) else char) for char in text)
    return "◌" + shown if text and unicodedata.category(text[0]).startswith("M") else shown or "⟨nothing⟩"


VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def is_invisible(char: str) -> bool:
    """Control and format characters, unassigned and private ones, all kinds of spaces."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Zs", "Zl", "Zp")


def escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def pack_int16(x: Tensor) -> dict[str, str]:
    """Quantizes x (…, D) to int16 with one float32 scale per vector, both in base64."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 32767).clamp(min=1e-30)
    return {
        "integers": encode_base64((x / scale).round().numpy(), "<i2"),
        "scales": encode_base64(scale.numpy(), "<f4"),
    }


def encode_base64(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()
