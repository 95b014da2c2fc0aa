"""A copy of the model's modules that call each other's `forward` directly.

It bypasses nn.Module.__call__ (hooks) and the attribute look-up of nn.Module.__getattr__: a third of a decode step of a
small model, 570 → 410 µs (bench/NOTES.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from model import GPT

MAX_COPIED = (
    2**18
)  # numbers; products of a few rows with matrices up to this size take half the time with weights stored as (in, out)


def with_direct_calls(model: GPT) -> GPT:
    """A copy of `model` that is faster to call, with its methods and parameters; small matrices on a CPU are copied,
    stored as (in, out).

    Returns `model` itself if a hook is registered on one of its modules, or for all modules: the copy would not call
    it. Make the copy anew for each use: later changes to the model's modules, and updates of the small matrices, do not
    reach it.
    """
    if _has_any_global_hook() or any(map(_is_hooked, model.modules())):
        return model
    return cast(GPT, _copy(model))


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)  # the latter: patched by a tool such as accelerate


def _copy(module: nn.Module) -> Any:
    if isinstance(module, nn.ModuleList):
        return [_copy(child) for child in module]
    copied = object.__new__(_direct_class(type(module)))  # type: ignore[arg-type]  # a class is hashable
    copied.__dict__.update(vars(module), **module._parameters, **module._buffers)
    for name, child in module._modules.items():
        copied.__dict__[name] = None if child is None else _copy(child)
    if isinstance(module, nn.Linear) and module.weight.device.type == "cpu" and module.weight.numel() <= MAX_COPIED:
        copied.__dict__["weight"] = module.weight.detach().t().contiguous().t()
    return copied


@cache
def _direct_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"__call__": kind.forward})
