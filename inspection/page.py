"""What happens inside the model while it reads a prompt, as one self-contained page: `look_inside` → data → `page`.

The data hold every query, key and value of the tokens shown, from which the page computes scores, weights and sums before the reader's
eyes, and what the model expected after every token. inspection.html explains them; it asks nobody for anything.
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
from generation.sampling import Penalties, weights
from model import GPT, GPTConfig, dense_mask

PAGE = Path(__file__).with_name("page.html")
MOST_TOKENS, FEWEST_TOKENS = 96, 8  # shown at once
MOST_NUMBERS = (
    2_000_000  # of queries, keys and values, where FEWEST_TOKENS do not need more: with them the page is about 5 MB
)
TOP = 20  # likeliest next tokens that are shown
FILTERS = (
    "repetition_penalty",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)  # what the first draw depends on
CLEAR_SHARE, NEARBY_SHARE = 0.4, 0.6  # of a head's weight; less does not name its kind
FEWEST_ROWS = 3  # queries that such a share must be the mean of


@torch.inference_mode()
def look_inside(model: GPT, tokenizer: Tokenizer, ids: Sequence[int], options: SamplingOptions) -> dict[str, Any]:
    """What `page` shows of the model reading `ids` (one at least), as JSON with arrays in base64. Raises UserError on NaN and infinity."""
    config = model.config
    window = visible(ids, config.block_size, options.keep_head)
    positions = shown_positions(config, len(window))
    read = torch.tensor([window], device=model.embed.weight.device)
    layers: list[tuple[Tensor, ...]] = []  # q (H, T, D), k and v (K, T, D)
    logits = model.observe(
        read, lambda layer, *heads: layers.append(tuple(x[0].transpose(0, 1).float().cpu() for x in heads))
    )
    logits = logits[0, positions].float().cpu()  # (N, V)
    if not logits.isfinite().all():
        raise UserError(
            "the model computes NaN or infinity, so there is nothing to look at: its weights are not finite, or too large for this "
            "precision; take another checkpoint (--checkpoint=latest or step-N) or --dtype=float32"
        )
    read = read.cpu()
    starts = model.document_starts(read)[0] if config.document_mask else torch.zeros_like(read[0])
    first = model.first_visible(read)
    first = torch.zeros_like(read) if first is None else first
    kinds, rest = heads_of(layers, first, read[0], starts, positions)

    unseen = len(ids) - len(window)  # ids between the head and the rest that outgrew the context
    texts = [ids[: position + 1 + (unseen if position >= options.keep_head else 0)] for position in positions]
    drawn = to_be_drawn(logits, texts, config.eos_id, options)
    nexts = next_tokens(logits, drawn, [[*window, None][position + 1] for position in positions])
    named = {
        *(window[position] for position in positions),
        *(choice[0] for entry in nexts for choice in [*entry["top"], *entry["came"]]),
    }
    q, k, v = (packed(torch.stack([layer[i][:, positions] for layer in layers])) for i in range(3))
    return {
        "model": {"n_layer": config.n_layer, "n_head": config.n_head, "kv_heads": config.kv_heads, "head_size": config.head_size,
                  "positions": config.positions, "qk_norm": config.qk_norm, "window": config.sliding_window,
                  "document_mask": config.document_mask, "vocab_size": config.vocab_size, "block_size": config.block_size},
        "flags": " ".join(flags_of(options)),
        "left_out": left_out(len(positions), len(window), len(ids), config.block_size),
        "read": len(window),
        "positions": positions,
        "tokens": [window[position] for position in positions],
        "texts": {token: shown_text(tokenizer, token) for token in sorted(named)},
        "starts": starts[positions].tolist(),
        "first": first[0, positions].tolist(),
        "q": q, "k": k, "v": v,  # (L, H, N, D), (L, K, N, D) twice
        "rest": rest,
        "kinds": kinds,
        "next": nexts,
    }  # fmt: skip


def heads_of(
    layers: list[tuple[Tensor, ...]], first: Tensor, ids: Tensor, starts: Tensor, positions: list[int]
) -> tuple[list[list[tuple[str, float]]], str | None]:
    """Queries and keys of all layers, first visible positions (1, T), ids and document starts (T,) → the kind of every head, and
    (L, H, N) float32 in base64: the log of the sum of the exponentials of the keys that each query sees, but the page does not show."""
    mask = dense_mask(first)
    assert mask is not None
    hidden = sorted(set(range(len(ids))) - set(positions))
    kinds, rest = [], []
    for q, k, _ in layers:
        scores = masked_scores(q, k, mask[0, 0])
        kinds.append(head_kinds(torch.softmax(scores, dim=-1), mask[0, 0], ids, starts))
        rest.append(scores[:, positions][:, :, hidden].logsumexp(dim=-1))
    return kinds, encoded(torch.stack(rest).numpy(), "<f4") if hidden else None


def write_page(path: Path, data: dict[str, Any], title: str) -> None:
    """Replaces the file at `path`. Raises UserError where it cannot be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        replace_file(path, page(data, title).encode())
    except OSError as error:
        raise UserError(
            f"--inspect={path} cannot be written: {error.strerror}; name a file in a folder of yours: out.html"
        ) from None


def page(data: dict[str, Any], title: str) -> str:
    """The HTML of `look_inside`'s data. No text in it can end the script that carries it, since none holds a "<"."""
    content = json.dumps({"title": title, **data}, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("DATA_OF_THE_PAGE", content)


def left_out(shown: int, read: int, given: int, block_size: int) -> str | None:
    """What of the prompt the page does not show, as a sentence; None where it shows all."""
    parts = []
    if read < given:
        parts.append(f"the model sees {read:,} of the prompt's {given:,} tokens, since its context is {block_size:,}")
    if shown < read:
        parts.append(
            f"of the {read:,} tokens that the model reads, the page shows the first and the last {shown - 1:,}"
        )
    return "; ".join(parts) or None


def shown_positions(config: GPTConfig, length: int) -> list[int]:
    """Of `length` tokens read, those that a page has room for: the first, which many heads look at, and the newest."""
    numbers = config.n_layer * (config.n_head + 2 * config.kv_heads) * config.head_size  # a token
    most = max(FEWEST_TOKENS, min(MOST_TOKENS, MOST_NUMBERS // numbers))
    return list(range(length)) if length <= most else [0, *range(length - most + 1, length)]


def masked_scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q (H, T, D), k (K, T, D), mask (T, T) bool → q · kᵀ / √D (H, T, T), −∞ where a token does not see another."""
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)


def head_kinds(weight: Tensor, mask: Tensor, ids: Tensor, starts: Tensor) -> list[tuple[str, float]]:
    """weight (H, T, T), mask (T, T), ids and document starts (T,) → for each head where most of its weight goes, and that share on average
    over the tokens that have a choice; or ("spread", tokens as many as would share alike); ("", 0) where too few have a choice."""
    steps = torch.arange(len(ids))
    back = steps[:, None] - steps  # (T, T): how far back a key lies
    same = (ids[:, None] == ids) & mask
    after = mask.clone()  # keys that follow an earlier copy of the query
    after[:, 0] = False
    after[:, 1:] &= same[:, :-1]
    choice = steps - starts >= 3  # below that the first token, the last but one and the token itself are hardly apart
    places = {  # what to look at, and the queries that have it
        "itself": (back == 0, choice),
        "one back": (back == 1, choice),
        "two back": (back == 2, choice),
        "first token": (steps == starts[:, None], choice),
        "same token": (same & (back > 0), choice & (same.sum(dim=1) > 1)),
        "after same": (after, choice & after.any(dim=1)),
        "nearby": ((back >= 0) & (back <= 3), steps - starts >= 8),
    }
    places = {name: (place, rows) for name, (place, rows) in places.items() if rows.sum() >= FEWEST_ROWS}

    def shares(head: Tensor) -> dict[str, float]:
        return {name: float((head * place).sum(dim=1)[rows].mean()) for name, (place, rows) in places.items()}

    even = shares(mask / mask.sum(dim=1, keepdim=True))  # what a head without preferences gives
    found = []
    for head in weight:
        needed = {name: max(2 * even[name], CLEAR_SHARE if name != "nearby" else NEARBY_SHARE) for name in places}
        clear = {name: round(share, 4) for name, share in shares(head).items() if share >= needed[name]}
        if len(clear) > 1:
            clear.pop("nearby", None)  # the others say more
        spread = torch.special.entr(head).sum(dim=1).exp()[choice].mean()
        found.append(max(clear.items(), key=lambda item: item[1]) if clear else ("spread", round(float(spread), 2)))
    return found if places else [("", 0.0)] * len(weight)


def flags_of(options: SamplingOptions) -> list[str]:
    """The flags that change what may be drawn after a prompt, and always the temperature."""
    usual = SamplingOptions()
    values = {name: getattr(options, name) for name in FILTERS}
    return [
        f"--{name}={value}" for name, value in values.items() if name == "temperature" or value != getattr(usual, name)
    ]


def to_be_drawn(logits: Tensor, texts: list[Sequence[int]], eos_id: int | None, options: SamplingOptions) -> Tensor:
    """logits (N, V) after `texts` → (N, V) float64: the probability of each id to be drawn where such a text is the prompt."""
    if Penalties.wanted(options):
        logits = Penalties(texts, logits.shape[1], options, logits.device).apply(logits)
    if options.min_new_tokens > 0 and eos_id is not None:
        logits = logits.index_fill(1, torch.tensor([eos_id]), -torch.inf)
    if options.temperature == 0:
        return torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    weight = weights(logits, options).double()
    return weight / weight.sum(dim=1, keepdim=True)


def next_tokens(logits: Tensor, drawn: Tensor, came: Sequence[int | None]) -> list[dict[str, Any]]:
    """logits and drawn (N, V), and the token that came after each row's (None: nothing yet) → for each row the likeliest next tokens and
    the one that came, as (id, the model's probability, the probability to be drawn, rank)."""
    own = logits.double().softmax(dim=1)
    order = logits.argsort(dim=1, descending=True, stable=True)
    bits = [torch.special.entr(x).sum(dim=1) / math.log(2) for x in (own, drawn)]
    entries = []
    for row, follower in enumerate(came):
        ranked = [(int(token), rank) for rank, token in enumerate(order[row, :TOP], start=1)]
        if follower is not None:
            ranked.append((follower, int((order[row] == follower).nonzero()) + 1))
        numbers = [
            (token, significant(own[row, token]), significant(drawn[row, token]), rank) for token, rank in ranked
        ]
        shown = min(TOP, logits.shape[1])
        entries.append({"top": numbers[:shown], "came": numbers[shown:], "bits": [significant(x[row]) for x in bits],
                        "allowed": int((drawn[row] > 0).sum())})  # fmt: skip
    return entries


def significant(number: Tensor) -> float:
    return float(f"{float(number):.7g}")


def shown_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a reader can see it: spaces, control characters and bytes that are no character in a visible form."""
    if token == tokenizer.eos_id:
        return "⟨end⟩"
    text = tokenizer.token_bytes[token].decode("utf-8", errors="backslashreplace")
    shown = "".join(VISIBLE.get(char) or (escape(char) if hides(char) else char) for char in text)
    return "◌" + shown if text and unicodedata.category(text[0]).startswith("M") else shown or "⟨nothing⟩"


VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def hides(char: str) -> bool:
    """Control characters, odd spaces and what has no picture of its own."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Zs", "Zl", "Zp")


def escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def packed(x: Tensor) -> dict[str, str]:
    """x (…, D) in 16 bits a number: integers, and for each vector the float that they are multiples of."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 32767).clamp(min=1e-30)
    return {"integers": encoded((x / scale).round().numpy(), "<i2"), "scales": encoded(scale.numpy(), "<f4")}


def encoded(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()
