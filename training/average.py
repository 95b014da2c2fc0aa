"""An exponential moving average of the weights: what is evaluated, saved and sampled where ema_half_life is set.

Training goes on with the weights themselves. `WeightAverage.swap` exchanges the two in place, so that everything else
(evaluation, samples, the model folder of a checkpoint) simply uses the model; recorded and compiled code, which keeps
addresses, stays valid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.weights import trained_parameters
from model import GPT
from parallel.sharding import first_row, local

RAW = "weight"  # the name under which the weights themselves are stored beside the optimizer's state


class WeightAverage:
    """The average over the steps done, whose half-life is `half_life` times their number (after Karras et al. 2024,
    3.1: a width relative to the length of training needs no choice of a decay for each length).

    `tensors`, one for each parameter that is trained: the average, or the weights while the model holds the average.
    """

    def __init__(self, model: GPT, half_life: float) -> None:
        self.model, self.half_life = model, half_life
        self.parameters = trained_parameters(model)
        self.tensors = [local(parameter).clone() for parameter in self.parameters.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Counts in the weights after step number `step`, from 1; after the first they are the average."""
        share = 1.0 if step == 1 else 1 - 0.5 ** (1 / max(1.0, self.half_life * step))
        torch._foreach_lerp_(self.tensors, [local(parameter) for parameter in self.parameters.values()], share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the model's weights and `tensors`."""
        for parameter, tensor in zip(self.parameters.values(), self.tensors, strict=True):
            rows = local(parameter)
            kept = rows.clone()
            rows.copy_(tensor)
            tensor.copy_(kept)

    def stored(self) -> dict[str, Tensor]:
        """`tensors` for a checkpoint: `parameter name/weight` → tensor, without the rows that pad the vocabulary; of a
        sharded model this process's rows."""
        named = zip(self.parameters.items(), self.tensors, strict=True)
        return {f"{name}/{RAW}": self.model.unpad(name, tensor, first_row(p)) for (name, p), tensor in named}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes the model's weights for the average, and the weights from `tensors`, as `stored` returns them, which
        are removed from there. Raises ValueError where they do not fit."""
        for (name, parameter), average in zip(self.parameters.items(), self.tensors, strict=True):
            rows = local(parameter)
            weight, target = tensors.pop(f"{name}/{RAW}", None), self.model.unpad(name, rows, first_row(parameter))
            if weight is None or weight.shape != target.shape:
                raise ValueError(f"{name}/{RAW} is missing or has another shape than {tuple(target.shape)}")
            average.copy_(rows)
            target.copy_(weight)
