"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then a draw by (seed, sample, position) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from errors import UserError
from generation.options import SamplingOptions
from model import widened

LOWEST_TEMPERATURE = (
    1e-30  # lower ones would make infinities of logits; here already every token but the likeliest has the weight 0
)


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2^−53: the same for the same three integers on every machine, whatever was drawn before."""
    digest = hashlib.blake2b(f"{seed},{sample},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Penalties:
    """Lowers the logits of tokens that a text holds already. A row for each text; `generated` (R, V) counts what was drawn,
    `seen` (R, V) also has the prompt's tokens (its counts do not matter)."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], vocab_size: int, options: SamplingOptions, device: torch.device
    ) -> None:
        self.options = options
        self.generated = torch.zeros(len(prompts), vocab_size, device=device)
        self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, ids in enumerate(prompts):
            self.seen[row, torch.tensor(ids, device=device)] = True

    @staticmethod
    def wanted(options: SamplingOptions) -> bool:
        return (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) != (1, 0, 0)

    def apply(self, logits: Tensor) -> Tensor:
        """logits (R, V) → (R, V)."""
        repetition = self.options.repetition_penalty
        logits = torch.where(self.seen, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
        presence = self.options.presence_penalty * (self.generated > 0)
        return logits - presence - self.options.frequency_penalty * self.generated

    def add(self, ids: Sequence[int]) -> None:
        """The id that each row has drawn."""
        index = torch.tensor(ids, device=self.seen.device)[:, None]
        self.seen.scatter_(1, index, True)
        self.generated.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.seen.device)
        self.seen, self.generated = self.seen[index], self.generated[index]


def draw(logits: Tensor, uniforms: Sequence[float], options: SamplingOptions) -> list[int]:
    """logits (R, V), a number in [0, 1) for each row → R ids: each the inverse of its row's cumulative distribution, in the order of ids.

    Raises UserError where a row has no finite maximum.
    """
    if logits.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # the one has no float64, the other no cumsum on CUDA
    logits = widened(logits)
    if options.temperature > 0:
        cumulated = weights(logits, options).cumsum(-1, dtype=torch.float64)
        points = torch.tensor([[u] for u in uniforms], dtype=torch.float64, device=logits.device) * cumulated[:, -1:]
        ids = torch.searchsorted(
            cumulated, points, right=True
        )  # the first sum above the point: never an id of weight 0; NaN: past the end
    else:
        highest, ids = logits.max(dim=-1, keepdim=True)  # NaN is higher than any number
        ids = torch.where(highest.isfinite(), ids, logits.shape[-1])
    drawn: list[int] = [row[0] for row in ids.tolist()]
    if max(drawn) >= logits.shape[-1]:
        raise UserError(
            "the model computes NaN or infinity instead of probabilities: its weights are not finite, or too large for this precision; "
            "take another checkpoint (--checkpoint=latest or step-N) or --dtype=float32"
        )
    return drawn


def weights(logits: Tensor, options: SamplingOptions) -> Tensor:
    """logits (R, V) → the probabilities of the ids that may be drawn, 0 elsewhere; a row's sum may be less than 1."""
    logits = logits / max(options.temperature, LOWEST_TEMPERATURE)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, options.top_k)
    weight = logits.softmax(-1)
    if options.top_p is not None and options.top_p < 1:
        weight = keep_top_p(weight, options.top_p)
    if options.min_p is not None:
        weight = weight * (weight >= options.min_p * weight.amax(-1, keepdim=True))
    return weight


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """−∞ for all but exactly k logits of each row; of equal ones the lower ids stay."""
    values, ids = logits.topk(k + 1)
    if (
        logits.device.type == "cpu" and not (values[:, k - 1] == values[:, k]).any()
    ):  # no tie to settle; on a GPU asking would take longer
        return torch.full_like(logits, -torch.inf).scatter_(1, ids[:, :k], values[:, :k])
    lowest = values[:, k - 1 : k]
    above, equal = ~(logits <= lowest), logits == lowest  # NaN stays, to be found
    spare = k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= spare))), -torch.inf)


def keep_top_p(weight: Tensor, p: float) -> Tensor:
    """0 for all but the fewest weights of each row that together hold the share p (at least one); of equal ones the lower ids stay."""
    ordered, ids = weight.sort(descending=True, stable=True)
    cumulated = ordered.cumsum(-1, dtype=torch.float64)
    needed = cumulated - ordered < p * cumulated[:, -1:]  # the weights before this one do not suffice
    return torch.zeros_like(weight).scatter(-1, ids, ordered * needed)


@torch.inference_mode()
def log_probabilities(
    logits: Tensor, drawn: Sequence[int], count: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """logits (R, V), the id that each row has drawn → for each row its log-probability, and the `count` likeliest ids with theirs."""
    log_probs = widened(logits).log_softmax(-1)
    of_drawn = log_probs.gather(1, torch.tensor(drawn, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_probs.topk(min(count, logits.shape[-1]))
    tops = [tuple(zip(row, of_row, strict=True)) for row, of_row in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(of_drawn, tops, strict=True))
