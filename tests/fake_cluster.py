"""Prints, as JSON, the collectives and the memory of a training step of model.GPT as process 0 of 512, without the
others: PyTorch's fake process group and fake tensors. A script of its own, since both leave global state.

    python -m tests.fake_cluster
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from parallel.sharding import local, make_mesh, shard
from training.optim import make_optimizer
from training.options import OptimizerOptions

PROCESSES, PER_NODE, LAYERS, CONTEXT, TOKENS = 512, 8, 2, 512, 32


def shape(width: int) -> GPTConfig:
    sizes = {"n_layer": LAYERS, "n_head": width // 64, "n_embd": width, "block_size": CONTEXT, "vocab_size": 8192}
    return GPTConfig(**sizes, eos_id=0, bias=False)


class Collectives(TorchDispatchMode):
    """Records (kind, dtype, bytes of the whole tensor) of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel)  # of a gather the output, of a scatter the input
            size = sum(map(torch.Tensor.nbytes.__get__, tensors)) if "allreduce" in str(func) else whole.nbytes
            self.seen.append((func.__name__.split(".")[0].strip("_"), str(whole.dtype)[6:], size))
        return func(*args, **(kwargs or {}))


def sharded(config: GPTConfig, mesh: DeviceMesh) -> GPT:
    """The model as train.py shards it for a bfloat16 run."""
    model = GPT(config, seed=None)
    shard(model, mesh, torch.device("cpu"), torch.bfloat16)
    return model


def step(model: nn.Module) -> dict[str, Any]:
    """One step on one short row."""
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    optimizer = make_optimizer(getattr(model, "module", model), OptimizerOptions())
    collectives = Collectives()
    if isinstance(model, nn.parallel.DistributedDataParallel):  # whose collectives do not come from Python

        def reduce(seen: list[tuple[str, str, int]], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            seen.append(("allreduce", str(bucket.buffer().dtype)[6:], bucket.buffer().nbytes))
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(collectives.seen, reduce)
    with collectives:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, ids)
        loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments: Iterator[torch.Tensor] = (
        local(value) for state in optimizer.state.values() for value in state.values() if value.dim()
    )
    return {
        "collectives": collectives.seen,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": sum(local(parameter).nbytes for parameter in parameters),
        "gradients": sum(local(parameter.grad).nbytes for parameter in parameters),
        "moments": sum(moment.nbytes for moment in moments),
    }


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    os.environ["LOCAL_WORLD_SIZE"] = str(PER_NODE)
    found, flat, nodes = {}, *(make_mesh(layout, torch.device("cpu")) for layout in ("fsdp", "hsdp"))
    for name, width, mesh in (("fsdp", 512, flat), ("hsdp", 512, nodes), ("padded", 768, flat)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            found[name] = step(sharded(shape(width), mesh))
    found["ddp"] = step(nn.parallel.DistributedDataParallel(GPT(shape(512))))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
