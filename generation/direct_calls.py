"""A copy of the model's modules that call each other's `forward` directly: a decode step of a small model takes 410 µs
instead of 570 (bench/NOTES.md).

It bypasses nn.Module.__call__ (and with it all hooks), the look-up of attributes through nn.Module.__getattr__, and the
argument checks of F.embedding and F.layer_norm.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from model import GPT

MAX_COPIED = 2**18  # elements; products of a few rows with smaller weights take half the time if stored as (in, out)
FORWARD: dict[type[nn.Module], Any] = {
    nn.Embedding: lambda self, ids: torch.embedding(self.weight, ids),
    nn.LayerNorm: lambda self, x: torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps),
}


def with_direct_calls(model: GPT) -> GPT:
    """A copy of `model` with its methods and parameters; small matrices on a CPU are copied, stored as (in, out).

    Returns `model` itself if one of its modules has a hook, or all modules have: the copy would not call it. Make
    a new copy for each use: later changes to the model's modules and small matrices are not in it.
    """
    if _has_any_global_hook() or any(map(_is_hooked, model.modules())):
        return model
    return cast(GPT, _copy(model))


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward; tools such as accelerate patch `forward`."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def _copy(module: nn.Module) -> Any:
    if isinstance(module, nn.ModuleList):
        return [_copy(child) for child in module]
    copied = object.__new__(_direct_class(type(module)))  # type: ignore[arg-type]  # a class is hashable
    copied.__dict__.update(vars(module), **module._parameters, **module._buffers)
    copied.__dict__.update({name: child and _copy(child) for name, child in module._modules.items()})
    if isinstance(module, nn.Linear) and module.weight.device.type == "cpu" and module.weight.numel() <= MAX_COPIED:
        copied.__dict__["weight"] = module.weight.detach().t().contiguous().t()
    return copied


@cache
def _direct_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"__call__": FORWARD.get(kind, kind.forward)})
