"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then a draw.

A draw depends on (seed, sample, position) alone, so that samples do not depend on the batch. Knows neither models nor
text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from errors import UserError
from generation.options import SamplingOptions
from model import widened

MIN_TEMPERATURE = 1e-30  # lower ones would overflow the logits; this one already leaves only the likeliest token


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2^−53. A hash of the three integers: stateless, the same on every machine."""
    digest = hashlib.blake2b(f"{seed},{sample},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Penalties:
    """Repetition, presence and frequency penalties of R texts.

    `generated` (R, V) float32 counts the tokens drawn so far; `seen` (R, V) bool marks these and the prompt's.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], vocab_size: int, options: SamplingOptions, device: torch.device
    ) -> None:
        self.options = options
        self.generated = torch.zeros(len(prompts), vocab_size, device=device)
        self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, ids in enumerate(prompts):
            self.seen[row, torch.tensor(ids, device=device)] = True

    @staticmethod
    def needed(options: SamplingOptions) -> bool:
        """Whether any penalty differs from its neutral value."""
        return (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) != (1, 0, 0)

    def apply(self, logits: Tensor) -> Tensor:
        """logits (R, V) → penalized logits (R, V)."""
        repetition = self.options.repetition_penalty
        logits = torch.where(self.seen, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
        presence = self.options.presence_penalty * (self.generated > 0)
        return logits - presence - self.options.frequency_penalty * self.generated

    def add(self, ids: Sequence[int]) -> None:
        """Records the id drawn in each row."""
        index = torch.tensor(ids, device=self.seen.device)[:, None]
        self.seen.scatter_(1, index, True)
        self.generated.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.seen.device)
        self.seen, self.generated = self.seen[index], self.generated[index]


def draw(logits: Tensor, uniforms: Sequence[float], options: SamplingOptions) -> list[int]:
    """logits (R, V), one uniform number in [0, 1) per row → R ids, by inverse transform sampling in the order of ids.

    Temperature 0 takes the argmax; ties go to the lower token id. Raises UserError if a row has no finite maximum.
    """
    if logits.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # mps has no float64, deterministic CUDA no cumsum
    logits = widened(logits)
    if options.temperature > 0:
        cumulative = filtered_probs(logits, options).cumsum(-1, dtype=torch.float64)
        points = torch.tensor([[u] for u in uniforms], dtype=torch.float64, device=logits.device) * cumulative[:, -1:]
        # right=True: the first sum above the point, so never an id of probability 0. NaN gives V, past the end.
        ids = torch.searchsorted(cumulative, points, right=True)
    else:
        highest, ids = logits.max(dim=-1, keepdim=True)  # max returns NaN if there is one
        ids = torch.where(highest.isfinite(), ids, logits.shape[-1])
    drawn: list[int] = [row[0] for row in ids.tolist()]
    if max(drawn) >= logits.shape[-1]:
        raise UserError(
            "the model computes NaN or infinity instead of probabilities: its weights are not finite, or too large for "
            "this precision; try another checkpoint (--checkpoint=latest or step-N) or --dtype=float32"
        )
    return drawn


def filtered_probs(logits: Tensor, options: SamplingOptions) -> Tensor:
    """logits (R, V) → probabilities (R, V), 0 where a filter removed the id; not renormalized after top-p and min-p."""
    logits = logits / max(options.temperature, MIN_TEMPERATURE)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, options.top_k)
    probs = logits.softmax(-1)
    if options.top_p is not None and options.top_p < 1:
        probs = keep_top_p(probs, options.top_p)
    if options.min_p is not None:
        probs = probs * (probs >= options.min_p * probs.amax(-1, keepdim=True))
    return probs


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but exactly k logits of each row to −∞; ties go to the lower token id."""
    values, ids = logits.topk(k + 1)
    # Without a tie at the threshold, topk's ids are enough. On a GPU this test would synchronize, which costs more.
    if logits.device.type == "cpu" and not (values[:, k - 1] == values[:, k]).any():
        return torch.full_like(logits, -torch.inf).scatter_(1, ids[:, :k], values[:, :k])
    threshold = values[:, k - 1 : k]
    above, tied = ~(logits <= threshold), logits == threshold  # NaN counts as above, so that `draw` raises
    ties_kept = k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (tied & (tied.cumsum(-1) <= ties_kept))), -torch.inf)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): zeroes all but the smallest set of each row whose total reaches p of the
    row's sum, at least one; ties go to the lower token id."""
    ordered, ids = probs.sort(descending=True, stable=True)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    kept = cumulative - ordered < p * cumulative[:, -1:]  # those before this one do not reach p
    return torch.zeros_like(probs).scatter(-1, ids, ordered * kept)


@torch.inference_mode()
def log_probabilities(
    logits: Tensor, drawn: Sequence[int], count: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """logits (R, V), the id drawn in each row → per row: its log-probability, the top `count` (id, log-probability)."""
    log_probs = widened(logits).log_softmax(-1)
    drawn_log_probs = log_probs.gather(1, torch.tensor(drawn, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_probs.topk(min(count, logits.shape[-1]))
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(drawn_log_probs, tops, strict=True))
