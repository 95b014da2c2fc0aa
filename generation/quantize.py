"""int8 weights for generation on CPUs: decoding is bound by memory bandwidth, int8 has a quarter of the bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from errors import UserError
from model import GPT

MIN_SCALE = 1e-30  # lower bound of a row's largest number, so that a row of zeros stays zeros


class Int8Linear(nn.Module):
    """x (…, in) → (…, out) float32, by oneDNN's int8 matrix product.

    The weights have a scale for each output, chosen here, once. The inputs are rounded too, with a scale for each row,
    so that a row's result does not depend on the others: a sample is the same alone and in a batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, levels: int) -> None:
        super().__init__()
        weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.levels, self.outputs = levels, len(weight)
        self.scales = weight.abs().amax(dim=1).clamp_(min=MIN_SCALE) / 127  # (out,)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantized = (weight / self.scales[:, None]).round_().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        # Inputs are unsigned bytes with 0 at levels + 1; the offset removes what that adds to outputs. oneDNN's own
        # zero point is slower, and with signed inputs it takes a kernel that is hundreds of times slower.
        self.offset = quantized.sum(dim=1) * self.scales * (-(levels + 1) / levels)  # (out,)
        self.zero = torch.full((1,), levels + 1.5)  # the half turns truncation into rounding

    def forward(self, x: Tensor) -> Tensor:
        levels, rows = self.levels, x.flatten(0, -2)
        largest = rows.abs().amax(dim=1, keepdim=True).clamp_(min=MIN_SCALE)  # NaN stays NaN
        quantized = torch.addcdiv(self.zero, rows, largest, value=levels).to(torch.uint8)
        out = torch.ops.onednn.qlinear_pointwise(
            quantized,
            1 / levels,
            0,
            self.weight,
            self.scales,
            self.zeros,
            self.offset,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )  # (rows, out)
        out = out * largest if self.bias is None else torch.addcmul(self.bias, out, largest)
        return out.view(*x.shape[:-1], self.outputs)


def quantize(model: GPT) -> GPT:
    """Replaces the linear layers of blocks and head, in place. The model can then generate and be evaluated, but
    not be trained or saved. Raises UserError if the device, the dtype or this PyTorch does not support it."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    if device.type != "cpu" or dtype != torch.float32:
        raise UserError(
            f"--quantize=int8 works on a CPU in float32, not on {device} in {dtype}; add --device=cpu --dtype=float32"
        )
    if not torch.backends.mkldnn.is_available():
        raise UserError("--quantize=int8 needs a PyTorch with oneDNN, which this one lacks; leave --quantize out")
    levels = input_levels()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias, levels))
    if model.head is None:  # tied weights: the embedding keeps its float table
        model.head = Int8Linear(model.embed.weight, None, levels)  # type: ignore[assignment]
    return model


def input_levels() -> int:
    """Steps from 0 to the largest input. Without VNNI, x86 adds pairs of products in 16 bits: inputs get 7 bits."""
    flags = Path("/proc/cpuinfo")
    found = set(flags.read_text(errors="replace").split()) if flags.exists() else set()
    return 127 if "avx512_vnni" in found else 63
