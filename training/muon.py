"""Muon: the momentum of a matrix, orthogonalised, is its update (Jordan et al. 2024). Knows tensors only.

AdamW scales every number of a gradient by itself; Muon treats a matrix as one thing. It replaces the momentum U·S·Vᵀ
by about U·Vᵀ, so that the directions in which gradients are small move as fast as those that dominate. That suits
matrices that map hidden states to hidden states. Tables, the head, norms and biases stay with AdamW.

torch.optim.Muon does the same, one matrix after the other and always in bfloat16, which CPUs without bfloat16 units
multiply several times slower than float32. Here all matrices of a shape go through one batched product, in the dtype
that the caller names.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at 0, and five steps bring singular values to about 0.7 … 1.2


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """(N, R, C), R ≤ C → the same in `dtype` with all singular values near 1, singular vectors unchanged; zeros stay
    zeros.

    Newton–Schulz iteration: X ← aX + b(XXᵀ)X + c(XXᵀ)²X is an odd polynomial of X, hence one of each singular value.
    It starts from singular values of at most 1, since none exceeds the Frobenius norm.
    """
    a, b, c = QUINTIC
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon(
    matrices: list[Tensor],
    gradients: list[Tensor],
    memories: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    steps: int,
    dtype: torch.dtype,
) -> None:
    """One update of the matrices and of the memories of their gradients, in place. steps, dtype: of orthogonalize.

    An update's root mean square is that of AdamW's, about 0.2 of the learning rate, whatever the shape (Liu et al.
    2025, "Muon is scalable", 2.2), so both may share a learning rate and a weight decay. Its spectral norm then grows
    with √width, so the learning rate should fall with it: 3e-3 was best at 128 channels (bench/NOTES.md), which makes
    2.4e-3 at 192 and 1.2e-3 at 768; wider than 192 was not measured. A packed projection (qkv, swiglu's up) counts as
    one matrix.
    """
    torch._foreach_lerp_(memories, gradients, 1 - momentum)
    updates = torch._foreach_lerp(gradients, memories, momentum)  # Nesterov: one step ahead of the memory
    torch._foreach_mul_(matrices, 1 - lr * weight_decay)
    by_shape = defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]](list)
    for matrix, update in zip(matrices, updates, strict=True):
        if matrix.shape[0] > matrix.shape[1]:  # lying, its products are smaller
            matrix, update = matrix.mT, update.mT
        by_shape[matrix.shape[0], matrix.shape[1]].append((matrix, update))
    for (_, longer), pairs in by_shape.items():
        directions = orthogonalize(torch.stack([update for _, update in pairs]), dtype, steps)
        scale = 0.2 * math.sqrt(longer)  # the root mean square of orthogonal rows is 1 / √longer
        for (matrix, _), direction in zip(pairs, directions, strict=True):
            matrix.add_(direction, alpha=-lr * scale)
