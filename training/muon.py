"""Muon: the update of a matrix is its orthogonalized momentum (Jordan et al. 2024). Knows tensors only.

AdamW scales each element of a gradient separately. Muon replaces the momentum U·S·Vᵀ of a whole matrix by about U·Vᵀ,
so that directions with small gradients move as fast as the dominant ones. That suits matrices between hidden states;
embeddings, the head, norms and biases use AdamW.

torch.optim.Muon does the same one matrix at a time and always in bfloat16, which CPUs without bfloat16 units multiply
several times slower than float32. Here all matrices of a shape share one batched product, in the caller's dtype.
"""

import math
from collections import defaultdict
from functools import partial

import torch
from torch import Tensor

from parallel.orthogonalizing import Divided

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients; five steps bring singular values to about 0.7 … 1.2


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """(N, R, C), R ≤ C → the same shape in `dtype`: all singular values near 1, same singular vectors; zeros stay.

    Newton–Schulz iteration: X ← aX + b(XXᵀ)X + c(XXᵀ)²X applies an odd polynomial to each singular value. Dividing by
    the Frobenius norm first makes them at most 1.
    """
    a, b, c = QUINTIC
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalize_all(matrices: list[Tensor], dtype: torch.dtype, steps: int) -> list[Tensor]:
    """Matrices of any shapes (R, C) → their orthogonalized forms; those of a shape share one batched product."""
    by_shape = defaultdict[tuple[int, int], list[int]](list)
    for number, matrix in enumerate(matrices):
        by_shape[min(matrix.shape), max(matrix.shape)].append(number)
    found: dict[int, Tensor] = {}
    for numbers in by_shape.values():
        some = [matrices[number] for number in numbers]
        stacked = torch.stack([matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in some])
        for number, direction in zip(numbers, orthogonalize(stacked, dtype, steps), strict=True):  # (R, C), R ≤ C
            found[number] = direction if direction.shape == matrices[number].shape else direction.mT
    return [found[number] for number in range(len(matrices))]


def muon(
    matrices: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    steps: int,
    dtype: torch.dtype,
    divided: Divided,
) -> None:
    """One step, in place: updates the matrices and their momentum buffers. lr: a scalar tensor on the device in a step
    that is recorded as a CUDA graph. steps, dtype: of orthogonalize. divided: of the matrices, of which the lists hold
    this process's rows.

    The RMS of an update is that of AdamW, about 0.2 · lr for any shape (Liu et al. 2025, "Muon is scalable", 2.2), so
    both may share a learning rate and a weight decay. The spectral norm then grows with √width, so the learning rate
    should fall as 1/√width: 3e-3 was best at 128 channels (bench/NOTES.md), which makes 2.4e-3 at 192 and 1.2e-3 at
    768; wider than 192 was not measured. A packed projection (qkv, swiglu's up) counts as one matrix.
    """
    ahead = torch._foreach_lerp(momentum_buffers, gradients, 1 - momentum)
    updates = torch._foreach_lerp(gradients, ahead, momentum)  # Nesterov
    directions = divided(partial(orthogonalize_all, dtype=dtype, steps=steps), [*updates], dtype)
    # what allocates is done, so a step that runs out of memory has changed nothing
    torch._foreach_lerp_(momentum_buffers, gradients, 1 - momentum)
    torch._foreach_mul_(matrices, 1 - lr * weight_decay)
    for matrix, direction, size in zip(matrices, directions, divided.sizes, strict=True):
        scale = 0.2 * math.sqrt(max(size))  # the RMS of a matrix with orthonormal rows is 1 / √columns
        if isinstance(lr, Tensor):
            matrix.addcmul_(direction, lr, value=-scale)
        else:
            matrix.add_(direction, alpha=-lr * scale)
