"""Where numbers stop being finite: the first layer of a step whose weights, activations or gradients are not.

The step is repeated without compiled or recorded code and with hooks. Its weights are still those that it started from:
an update with such numbers is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.hardware import Hardware
from common.memory import OutOfMemory, attempt
from model import GPT
from parallel.processes import gather, this_rank, world_size
from parallel.sharding import is_sharded, local
from training.data import MicroBatch


def first_not_finite(model: GPT, batches: Sequence[MicroBatch], hardware: Hardware) -> str:
    """What is not finite first in a step, in the order of computation: weights, activations, then gradients from the
    loss backwards, of a sharded model weights alone; "" where nothing is found, or memory does not suffice. Of several
    processes, all call this."""
    own = _first_weight(model)
    if not own and not is_sharded(model):  # the processes of a sharded one would have to go through all of it together
        try:
            own = attempt(partial(_first_in_step, model, batches, hardware))
        except OutOfMemory:
            own = ""
    model.zero_grad(set_to_none=True)
    found = [(name, rank) for name, rank in gather((own, this_rank() if world_size() > 1 else "")) if name]
    if not found:
        return ""
    name, rank = found[0]
    return f"{name} ({rank})" if rank else name


def first_bad_weight(model: GPT) -> str:
    """Names the first parameter that is not finite, in any process; "" where all are."""
    name = next(filter(None, gather(_first_weight(model))), "")
    return f"{name} are not finite" if name else ""


def _first_weight(model: GPT) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(local(parameter.detach())).all():
            return f"the weights {name}"
    return ""


def _first_in_step(model: GPT, batches: Sequence[MicroBatch], hardware: Hardware) -> str:
    for x, y, dropout_seed in batches:
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        found, outputs = list[str](), dict[str, Tensor]()
        with _eager(model), _watching(model, found, outputs), hardware.autocast():
            loss = model(x.to(hardware.device), y.to(hardware.device), reduction="sum")
        if not found and not torch.isfinite(loss).all():
            found.append("the loss")
        if not found and loss.requires_grad:
            found += _first_gradient(loss, outputs, model)
        if found:
            return found[0]
    return ""


@contextmanager
def _eager(model: GPT) -> Iterator[None]:
    """The blocks run as they are written: nothing compiled, nothing computed twice."""
    compiled = [
        (module, name, module.__dict__.pop(name))
        for module in (model, *model.blocks)
        for name in ("run_block", "forward")
        if name in module.__dict__
    ]
    recomputed, model.recompute_blocks = model.recompute_blocks, False
    try:
        yield
    finally:
        model.recompute_blocks = recomputed
        for module, name, value in compiled:
            module.__dict__[name] = value


@contextmanager
def _watching(model: GPT, found: list[str], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Hooks that note the first output that is not finite, and all outputs by name, in the order of computation."""

    def note(name: str, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        outputs[name] = output
        if not found and not torch.isfinite(output).all():
            found.append(f"the activations of {name}")

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                handle = module.register_forward_hook(_hook(note, name))
                stack.callback(handle.remove)
        yield


def _hook(note: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda module, args, output: note(name, output)


def _first_gradient(loss: Tensor, outputs: dict[str, Tensor], model: GPT) -> list[str]:
    """The first output, from the loss backwards, whose gradient is not finite; else such weights."""
    named = [(f"activations of {name}", x) for name, x in reversed(outputs.items()) if x.requires_grad]
    named += [(f"weights {name}", x) for name, x in model.named_parameters() if x.requires_grad]
    gradients = torch.autograd.grad(loss, [x for _, x in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is None:
            continue
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        if not torch.isfinite(values).all():
            return [f"the gradient of the {name}"]
    return []
