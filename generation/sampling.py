"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then a draw.

A draw depends on (seed, sample, position) alone, so that samples do not depend on the batch. What runs at every step
takes and returns tensors, and never makes the host wait for a GPU. Knows neither models nor text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from errors import UserError
from generation.options import SamplingOptions
from generation.transfer import is_host
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

    def add(self, ids: Tensor) -> None:
        """Records the id drawn in each row, (R,) int64."""
        index = ids[:, None]
        self.seen.scatter_(1, index, True)
        self.generated.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))

    def copy_row(self, source: int, target: int) -> None:
        """Makes row `target` equal to row `source`."""
        for x in (self.seen, self.generated):
            x[target].copy_(x[source])

    def narrow(self, rows: int) -> None:
        """Leaves the first `rows` rows."""
        self.seen, self.generated = self.seen[:rows], self.generated[:rows]


def draws_on_host(device: torch.device) -> bool:
    """Whether `draw` computes on the CPU: mps has no float64, deterministic CUDA no cumsum."""
    return device.type == "mps" or torch.are_deterministic_algorithms_enabled()


def draw(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """logits (R, V), uniforms (R,) float64 in [0, 1) → ids (R,) int64, by inverse transform sampling in the order of
    ids; V where a row has no finite maximum (see check_drawn). Temperature 0 takes the argmax; ties go to the lower id.
    """
    device = logits.device
    if draws_on_host(device):
        logits, uniforms = logits.cpu(), uniforms.cpu()
    logits = widened(logits)
    if options.temperature > 0:
        cumulative = filtered_probs(logits, options).cumsum(-1, dtype=torch.float64)
        points = uniforms[:, None] * cumulative[:, -1:]
        # right=True: the first sum above the point, so never an id of probability 0. NaN gives V, past the end.
        ids = torch.searchsorted(cumulative, points, right=True)
    else:
        highest, ids = logits.max(dim=-1, keepdim=True)  # max returns NaN if there is one
        ids = ids.masked_fill(~highest.isfinite(), logits.shape[-1])
    return ids[:, 0].to(device)


def check_drawn(ids: Sequence[int], vocab_size: int) -> None:
    """Raises UserError if one of the drawn ids says that its row had no finite maximum."""
    if max(ids) >= vocab_size:
        raise UserError(
            "the model computes NaN or infinity instead of probabilities: its weights are not finite, or too large for "
            "this precision; try another checkpoint (--checkpoint=latest or step-N) or --dtype=float32"
        )


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
    if is_host(logits.device) and not (values[:, k - 1] == values[:, k]).any():
        return torch.full_like(logits, -torch.inf).scatter_(1, ids[:, :k], values[:, :k])
    threshold = values[:, k - 1 : k]
    ties_kept = (values[:, :k] == threshold).sum(-1, keepdim=True)
    tied = logits == threshold
    removed = (logits < threshold) | (tied & (tied.cumsum(-1) > ties_kept))  # no NaN, so that `draw` fails
    return logits.masked_fill(removed, -torch.inf)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): zeroes all but the smallest set of each row whose total reaches p of the
    row's sum, at least one; ties go to the lower token id."""
    ordered, ids = probs.sort(descending=True, stable=True)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    kept = cumulative - ordered < p * cumulative[:, -1:]  # those before this one do not reach p
    return torch.zeros_like(probs).scatter(-1, ids, ordered * kept)


def top_log_probs(logits: Tensor, drawn: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (R, V), the drawn ids (R,) → their log-probabilities (R,), the likeliest ids (R, count), and theirs."""
    log_probs = widened(logits).log_softmax(-1)
    values, ids = log_probs.topk(min(count, logits.shape[-1]))
    return log_probs.gather(1, drawn[:, None])[:, 0], ids, values


LogProbability = tuple[float, tuple[tuple[int, float], ...]]  # of the drawn id; the likeliest ids with theirs


@torch.inference_mode()
def log_probabilities(logits: Tensor, drawn: Sequence[int], count: int) -> list[LogProbability]:
    """top_log_probs row by row, as numbers of the host."""
    found = top_log_probs(logits, torch.tensor(drawn, device=logits.device), count)
    return by_row(*(x.tolist() for x in found))


def by_row(drawn: list[float], ids: list[list[int]], values: list[list[float]]) -> list[LogProbability]:
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
    return list(zip(drawn, tops, strict=True))
