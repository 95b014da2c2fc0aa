"""How a model is laid out over the processes: --parallel.

    ddp     each process has the whole model; gradients are added up once per step, while the backward pass goes on
    fsdp    each process has its rows of every parameter (FSDP2's fully_shard); a block's weights are gathered before it
            computes, in the compute dtype, and its gradients are added up in float32 after it
    hsdp    fsdp among the processes of a machine, and each machine has the whole model

Gradients are sums over all targets of the step, so nothing is divided by the number of processes. A parameter of a
sharded model is a DTensor: `local` is this process's rows of it, `first_row` says which these are. Reading order:
make_mesh, shard, replicate, in_turn, then the rows of a sharded model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from parallel.processes import local_world_size, rank, wait_as_long, world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Layout = Literal["none", "ddp", "fsdp", "hsdp"]
SHARDED = ("fsdp", "hsdp")


# ---- The layouts -----------------------------------------------------------------------------------------------------


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The processes among which a model is sharded, in the last dimension; hsdp has another one, of the machines."""
    from torch.distributed.device_mesh import init_device_mesh

    if layout == "fsdp":
        mesh = init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    else:
        shape = world_size() // local_world_size(), local_world_size()
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    wait_as_long(mesh.get_all_groups())
    return mesh


def shard(model: GPT, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> None:
    """Leaves of every parameter this process's rows, on the device; a model on the meta device gets memory for them,
    without values. dtype: in which blocks compute. Embedding, norms outside of the blocks and head stay in float32."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)  # the residual stream is float32
    table, model.table = model.table, None
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other operation that does not divide
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
    model.table = None if table is None else table.to(device)


def replicate(forward: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP around the module that computes the loss. Gradients are added up in buckets while the backward pass goes on.
    Rank 0's weights are sent to all."""
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, 2.11 has no other name
        wrapped = DistributedDataParallel(forward, devices, gradient_as_bucket_view=True, broadcast_buffers=False)
    wrapped.register_comm_hook(None, lambda state, bucket: _add_up(bucket))
    return wrapped


def _add_up(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's default would divide by the number of processes."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def in_turn(batches: Iterable[T], module: nn.Module) -> Iterator[T]:
    """The micro-batches of a step. Under DDP gradients are added up with the last one alone; under FSDP with each,
    since the gradients of a whole model do not fit, but across machines with the last one alone."""
    batches = [*batches]
    for number, batch in enumerate(batches, 1):
        is_last = number == len(batches)
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = is_last
        elif is_sharded(module):
            module.set_requires_all_reduce(is_last)  # type: ignore[operator]
        yield batch


def release_gathered(model: nn.Module) -> None:
    """Drops what forward passes without a backward pass have left gathered: the next pass would compute with it, though
    the weights may have changed."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


# ---- Rows of a sharded model -----------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has divided the model, whose parameters are DTensors then, except within a forward pass."""
    return hasattr(model, "reshard")


def local(tensor: Tensor) -> Tensor:
    """This process's rows, which share the tensor's memory; the tensor itself where it is whole."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_row(tensor: Tensor) -> int:
    """Of the rows in local(tensor), in the whole tensor."""
    if not hasattr(tensor, "to_local"):
        return 0
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    size, number = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return min(len(tensor), number * -(-len(tensor) // size))  # as torch.chunk


def is_written_here(tensor: Tensor) -> bool:
    """Whether this process's rows are the ones that a checkpoint takes: those of the first replica."""
    if not hasattr(tensor, "to_local"):
        return rank() == 0
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


def whole(tensor: Tensor) -> Tensor:
    """All rows. All processes have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
