"""Inputs of the attention kernels, one kernel at a time, and whether a launch of one computes what it should.

A launch is right if every output that it writes is as near to float64 as PyTorch's attention is in the same dtype: the
error of a row (a head's numbers of one token) is ‖x − exact‖ / (‖exact‖ + root mean square of all rows' norms), and the
largest may be FACTOR × PyTorch's plus one rounding unit. Outputs are NaN before the launch, so that numbers that it
does not write are wrong, too.

Reading order: Case, check; then the two ways to compute what is expected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Launch, dense_mask, fused_attention, launch_kernel

FACTOR = {"out": 2, "dq": 3, "dk": 3, "dv": 3}  # as FlashAttention's tests have it
WRITTEN = {"forward": ("out", "lse"), "query_gradient": ("delta", "dq"), "key_value_gradient": ("dk", "dv")}
EXACT = 1e-3  # lse and delta are sums in float32 of products that are exact


class Case:
    """Random q, k, v, views of one projection, and do; tensors for the outputs. group: query heads per key/value head.
    masked: with a window of T / 2. solved=False: out and lse are arbitrary numbers, for timing; True: those of the
    forward kernel."""

    def __init__(
        self, T: int, tokens: int, head_size: int, dtype: str, device: torch.device, channels: int, *, group: int = 1,
        masked: bool = False, solved: bool = True,
    ) -> None:  # fmt: skip
        B, H = tokens // T, channels // head_size
        K = H // group
        packed, self.do = (
            torch.randn(B, T, heads, head_size, device=device, dtype=getattr(torch, dtype)) for heads in (H + 2 * K, H)
        )
        self.q, self.k, self.v = packed.split((H, K, K), dim=2)
        steps = torch.arange(T, device=device, dtype=torch.int32)
        self.first = (steps - T // 2).clamp(min=0).expand(B, T).contiguous() if masked else None
        self.out, self.lse = (
            fused_attention(self.q, self.k, self.v, self.first)
            if solved
            else (self.do.clone(), torch.zeros(B, H, T, device=device))
        )
        self.delta = torch.zeros_like(self.lse)
        self.dq, self.dk, self.dv = (x.new_empty(x.shape) for x in (self.q, self.k, self.v))

    def launch(self, kernel: str, launch: Launch) -> Any:
        """TMA reads whole blocks: where T is not divisible by them, the kernel takes pointers, as in model.py."""
        q, k, v, first, lse, do, delta = self.q, self.k, self.v, self.first, self.lse, self.do, self.delta
        tensors: dict[str, tuple[Any, ...]] = {
            "forward": (q, k, v, first, self.out, lse),
            "query_gradient": (q, k, v, first, self.out, lse, do, delta, self.dq),
            "key_value_gradient": (q, k, v, first, lse, do, delta, self.dk, self.dv),
        }
        T = q.shape[1]
        own = launch if T % launch.loaded(kernel) == 0 else launch._replace(tma=False)
        return launch_kernel(kernel, own, *tensors[kernel])


class CheckedCase(Case):
    """A Case with solved=False whose outputs are known: by_definition in float64, and PyTorch's attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, solved=False)
        self.exact = by_definition(self)
        plain = by_pytorch(self)
        self.allowed = {
            name: factor * largest_error(plain[name], self.exact[name]) + torch.finfo(self.q.dtype).eps
            for name, factor in FACTOR.items()
        } | {"lse": EXACT, "delta": EXACT}

    def check(self, kernel: str, launch: Launch) -> tuple[Any, float]:
        """Runs it → what Triton compiled, and its largest error relative to what is allowed: above 1, or NaN, it is
        wrong."""
        self.out.copy_(self.exact["out"])
        self.lse.copy_(self.exact["lse"])
        self.delta.copy_(self.exact["delta"])
        for name in WRITTEN[kernel]:
            getattr(self, name).fill_(math.nan)
        compiled = self.launch(kernel, launch)
        errors = [largest_error(getattr(self, name), self.exact[name]) / self.allowed[name] for name in WRITTEN[kernel]]
        return compiled, math.nan if any(map(math.isnan, errors)) else max(errors)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """As the module docstring defines it. lse and delta have rows of one number."""
    if exact.ndim == 3:
        found, exact = found.unsqueeze(-1), exact.unsqueeze(-1)
    size = exact.norm(dim=-1)
    return float(((found.double() - exact).norm(dim=-1) / (size + size.square().mean().sqrt())).max())


# ---- What is expected ------------------------------------------------------------------------------------------------


def by_definition(case: Case) -> dict[str, Tensor]:
    """In float64, one sequence at a time, for its matrices of scores: out, lse (log2), delta, dq, dk, dv."""
    (B, T, _, D), group = case.q.shape, case.q.shape[2] // case.k.shape[2]
    mask = dense_mask(case.first)
    found: dict[str, list[Tensor]] = {}
    for b in range(B):
        visible = torch.ones(T, T, dtype=torch.bool, device=case.q.device).tril() if mask is None else mask[b]
        leaves = [x[b].double().transpose(0, 1).requires_grad_() for x in (case.q, case.k, case.v)]  # (heads, T, D)
        k, v = (x.repeat_interleave(group, dim=0) for x in leaves[1:])
        scores = (leaves[0] @ k.mT / math.sqrt(D)).masked_fill(~visible, -math.inf)
        out, do = torch.softmax(scores, dim=-1) @ v, case.do[b].double().transpose(0, 1)
        rows = [out.detach(), *torch.autograd.grad(out, leaves, do)]
        rounded = rows[0].to(case.q.dtype).double()  # delta is computed from the output as it is stored
        found.setdefault("lse", []).append(scores.detach().logsumexp(-1) / math.log(2))
        found.setdefault("delta", []).append((do * rounded).sum(-1))
        for name, x in zip(("out", "dq", "dk", "dv"), rows, strict=True):
            found.setdefault(name, []).append(x.transpose(0, 1))
    return {name: torch.stack(rows) for name, rows in found.items()}


def by_pytorch(case: Case) -> dict[str, Tensor]:
    """out, dq, dk, dv of scaled_dot_product_attention in the case's dtype."""
    mask, group = dense_mask(case.first), case.q.shape[2] // case.k.shape[2]
    leaves = [x.detach().contiguous().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = (x.transpose(1, 2) for x in (leaves[0], *(x.repeat_interleave(group, dim=2) for x in leaves[1:])))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    return dict(zip(FACTOR, [out.detach(), *torch.autograd.grad(out, leaves, case.do)], strict=True))
