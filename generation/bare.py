"""The same model, called with less ado: a third of a small model's token goes into nn.Module's look-ups and hooks."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import nn

from model import GPT

SMALL_MATRIX = (
    2**18
)  # numbers; products of a few rows with matrices up to this size take half the time where they lie as (in, out)


def bare(model: GPT) -> GPT:
    """A twin with the same methods whose parts are plain attributes and whose calls go straight to `forward`.

    The tensors are the model's own, but for small matrices on a CPU, which are copied to lie as (in, out). So make it anew for each use:
    it does not see modules that are replaced later, nor all training.
    """
    return cast(GPT, _bare(model))


def _bare(module: nn.Module) -> Any:
    if isinstance(module, nn.ModuleList):
        return [_bare(child) for child in module]
    twin = object.__new__(_bare_class(type(module)))  # type: ignore[arg-type]  # a class can be a key
    twin.__dict__.update(vars(module), **module._parameters, **module._buffers)
    for name, child in module._modules.items():
        twin.__dict__[name] = None if child is None else _bare(child)
    if isinstance(module, nn.Linear) and module.weight.device.type == "cpu" and module.weight.numel() <= SMALL_MATRIX:
        twin.__dict__["weight"] = module.weight.detach().t().contiguous().t()
    return twin


@cache
def _bare_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"__call__": kind.forward})
