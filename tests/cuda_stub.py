"""A stand-in for torch.cuda on CPU tensors: graphs that replay operations on their static memory, copies in flight.

A capture runs the work, then undoes it: memory that it has changed is restored, and its results are filled with
garbage, as a real capture computes nothing. A replay runs the recorded operations on the same tensors. A copy to the
host holds garbage until an event recorded after it is waited for.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "lift_fresh", "equal"}  # for the host, or from it


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def fill_with_garbage(x):
    x.fill_(torch.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else 2**30)


class Capture(TorchDispatchMode):
    """Records (operation, arguments, results that it allocates); None where it writes into an argument."""

    def __init__(self):
        super().__init__()
        self.calls, self.overwritten = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        written = [
            given[argument.name]
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
        ]
        self.overwritten += [(x, x.clone()) for x in tensors(written)]
        out = func(*args, **kwargs)
        memory = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        fresh = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in memory]
        if written or fresh:
            self.calls.append((func, args, kwargs, None if written else out))
        return out

    def undo(self):
        for _, _, _, out in self.calls:
            for x in tensors(out):
                fill_with_garbage(x)
        for x, before in reversed(self.overwritten):
            x.copy_(before)
        self.overwritten.clear()


class Graph:
    def __init__(self):
        self.capture = Capture()

    def replay(self):
        for func, args, kwargs, out in self.capture.calls:
            again = func(*args, **kwargs)
            for x, new in zip(tensors(out), tensors(again) if out is not None else [], strict=True):
                x.copy_(new)


class Stream:
    def wait_stream(self, other):
        pass


def install(monkeypatch):
    """Makes generation take the CPU for a GPU. Returns counters: `log` has "capture", "replay", "copy" and "wait"."""
    log, in_flight, pinned, real_to = [], [], set(), torch.Tensor.to

    class Event:
        def record(self, stream):
            self.copies = list(in_flight)

        def synchronize(self):
            log.append("wait")
            with torch.inference_mode():
                for target, source in self.copies:
                    target.copy_(source)
            in_flight[:] = [each for each in in_flight if not any(each is copied for copied in self.copies)]

    class CountedGraph(Graph):
        def replay(self):
            log.append("replay")
            super().replay()

    @contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        log.append("capture")
        with recorded.capture:
            yield
        recorded.capture.undo()

    def to(self, *args, non_blocking=False, **kwargs):
        out = real_to(self, *args, **kwargs)
        if non_blocking:
            out = self.clone()
            if id(self) in pinned:
                return out
            log.append("copy")
            in_flight.append((out, self.clone()))
            fill_with_garbage(out)
        return out

    def pin_memory(self):
        pinned.add(id(self))
        return self

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for name, value in {
        "Event": Event, "CUDAGraph": CountedGraph, "graph": graph, "graph_pool_handle": object,
        "Stream": lambda device: Stream(), "current_stream": lambda device: Stream(),
        "stream": nullcontext, "device": nullcontext, "empty_cache": lambda: log.append("empty_cache"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for module in ("transfer", "batch", "engine"):
        monkeypatch.setattr(f"generation.{module}.is_gpu", lambda device: True)
    monkeypatch.setattr("generation.sampling.is_host", lambda device: False)
    monkeypatch.setattr("generation.direct_calls.MAX_COPIED", 0)  # on a GPU no matrix is copied
    return SimpleNamespace(log=log, in_flight=in_flight)
