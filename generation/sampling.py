"""From logits to the next token: temperature, then top-k, then top-p, then a draw that depends on (seed, sample, position) alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from errors import UserError
from generation.options import SamplingOptions

LOWEST_TEMPERATURE = 1e-30  # lower ones would be 0 in float32; here already every token but the likeliest has the weight exp(−∞)


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2^−53: the same for the same three integers on every machine, whatever was drawn before."""
    digest = hashlib.blake2b(f"{seed},{sample},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@torch.inference_mode()
def draw(logits: Tensor, uniforms: list[float], options: SamplingOptions) -> list[int]:
    """logits (R, V), a number in [0, 1) for each row → R ids: each the inverse of its row's cumulative distribution, in the order of ids.

    Raises UserError where a row has no finite maximum.
    """
    if logits.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # the one has no float64, the other no cumsum on CUDA
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest, ids = logits.max(dim=-1)  # NaN is higher than any number
    if options.temperature > 0:
        cumulated = weights(logits, options).cumsum(-1, dtype=torch.float64)
        points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulated[:, -1:]
        ids = torch.searchsorted(cumulated, points, right=True)[:, 0]  # the first sum above the point: never an id of weight 0
    drawn: list[int] = torch.where(highest.isfinite(), ids, -1).tolist()
    if -1 in drawn:
        raise UserError(
            "the model computes NaN or infinity instead of probabilities: its weights are not finite, or too large for this precision; "
            "take another checkpoint (--checkpoint=latest or step-N) or --dtype=float32"
        )
    return drawn


def weights(logits: Tensor, options: SamplingOptions) -> Tensor:
    """logits (R, V) → the probabilities of the ids that may be drawn, 0 elsewhere, each row scaled so that its largest is 1."""
    logits = (logits - logits.amax(-1, keepdim=True)) / max(options.temperature, LOWEST_TEMPERATURE)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, options.top_k)
    weight = logits.exp()
    if options.top_p is not None and options.top_p < 1:
        weight = keep_top_p(weight, options.top_p)
    return weight


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """−∞ for all but exactly k logits of each row; of equal ones the lower ids stay."""
    lowest = logits.topk(k).values[:, -1:]
    above, equal = logits > lowest, logits == lowest
    spare = k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= spare))), -torch.inf)


def keep_top_p(weight: Tensor, p: float) -> Tensor:
    """0 for all but the fewest weights of each row that together hold the share p (at least one); of equal ones the lower ids stay."""
    ordered, ids = weight.sort(descending=True, stable=True)
    cumulated = ordered.cumsum(-1, dtype=torch.float64)
    needed = cumulated - ordered < p * cumulated[:, -1:]  # the weights before this one do not suffice
    return torch.zeros_like(weight).scatter(-1, ids, ordered * needed)
