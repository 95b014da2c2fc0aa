"""The kernels of a run by torch.profiler: time by kind and by name, how long nothing runs, rates of matrix products.

Knows no model. `us` of a step are those of its kernels added up; `busy_us` is the time in which at least one kernel or
copy runs, `idle_us` what the step's time without the profiler has beyond it; `launches` count kernels and copies.
`gaps`: the longest waits between two kernels of the last record. The profiler slows the host, so they may be longer
than without it. On a CPU, for a trial, the innermost operators stand for kernels.

Reading order: GROUPS, summarize, profile, kernels_of.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.gpu import Run, synchronize

KERNELS, GAPS, NAME_LENGTH = 25, 8, 110  # rows of the tables, characters of a name there

# Kind of kernel → pattern of the names, case ignored. The first that matches counts: Inductor's come early, since they
# are named after what they fuse (triton_poi: elementwise; triton_red, triton_per: reductions).
GROUPS = {
    "attention, ours": r"^_(forward|query_gradient|key_value_gradient)_kernel",
    "loss, ours": r"^_loss_kernel",
    "Inductor's fused": r"^triton_(?!tem)",
    "attention, PyTorch's": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|split_?k|^triton_tem",
    "multi-tensor": r"multi_tensor|fusedadam|lpnorm_cleanup",
    "copies and casts": r"memcpy|memset|copy|catarray|fillfunctor",
    "sorting, top-k, scans": r"sort|topk|radix|scan",
    "norms": r"layer_?norm|rms_?norm",
    "softmax, reductions": r"softmax|reduce",
    "elementwise, indexing": r"elementwise|index|gather|scatter",
}
OTHER = "other"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


# ---- Names and times -------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """One run of a kernel, or a copy; times in µs."""

    name: str
    start: float
    end: float


def group_of(name: str) -> str:
    found = (group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHER)


def shorten(name: str) -> str:
    """Without namespaces, arguments and return type."""
    for part in ("(anonymous namespace)::", "<unnamed>::", "at::native::", "void "):
        name = name.replace(part, "")
    return name.partition("(")[0][:NAME_LENGTH].strip() or name[:NAME_LENGTH]


def groups_of_step(kernels: Sequence[Kernel]) -> list[str]:
    """The group of each kernel of a training step, in its order; after the last copy to the host the optimizer's."""
    waits = [place for place, kernel in enumerate(kernels) if "DtoH" in kernel.name]
    last = waits[-1] if waits else len(kernels)
    return ["optimizer: " * (place > last) + group_of(kernel.name) for place, kernel in enumerate(kernels)]


def busy_and_gaps(kernels: Sequence[Kernel]) -> tuple[float, list[dict[str, Any]]]:
    """µs in which something runs, and the longest waits between: µs, the kernel before, the kernel after. Kernels are
    in the order of their starts; those of several streams may overlap."""
    total, end, last, gaps = 0.0, -float("inf"), "", []
    for kernel in kernels:
        if last and kernel.start > end:
            gaps.append({"us": round(kernel.start - end, 2), "after": shorten(last), "before": shorten(kernel.name)})
        total += max(0.0, kernel.end - max(end, kernel.start))
        if kernel.end > end:
            end, last = kernel.end, kernel.name
    return total, sorted(gaps, key=lambda gap: -gap["us"])[:GAPS]


def summarize(
    sessions: Sequence[Sequence[Kernel]],
    steps: int,
    wall_us: float,
    grouped: Callable[[Sequence[Kernel]], list[str]] = lambda kernels: [group_of(kernel.name) for kernel in kernels],
) -> dict[str, Any]:
    """Everything for one of `steps` steps, which all sessions together are. wall_us: a step's, without the profiler."""
    times, counts = defaultdict[tuple[str, str], float](float), Counter[tuple[str, str]]()
    for kernels in sessions:
        for group, kernel in zip(grouped(kernels), kernels, strict=True):
            times[group, kernel.name] += (kernel.end - kernel.start) / steps
            counts[group, kernel.name] += 1
    found = [busy_and_gaps(kernels) for kernels in sessions]
    busy = sum(total for total, _ in found) / steps
    groups: dict[str, dict[str, Any]] = {}
    for (group, name), us in times.items():
        row = groups.setdefault(group, {"group": group, "us": 0.0, "launches": 0.0})
        row["us"] += us
        row["launches"] += counts[group, name] / steps
    for row in groups.values():
        share = round(row["us"] / wall_us, 4)
        row |= {"us": round(row["us"], 2), "launches": round(row["launches"], 1), "share": share}
    longest = [
        {
            "name": shorten(name),
            "group": group,
            "us": round(us, 2),
            "launches": round(counts[group, name] / steps, 1),
            "us_each": round(us * steps / counts[group, name], 2),
        }
        for (group, name), us in times.items()
    ]
    return {
        "wall_us": round(wall_us, 1),
        "busy_us": round(busy, 1),
        "idle_us": round(max(0.0, wall_us - busy), 1),
        "launches": round(sum(counts.values()) / steps, 1),
        "groups": sorted(groups.values(), key=lambda row: -row["us"]),
        "kernels": sorted(longest, key=lambda row: -row["us"])[:KERNELS],
        "gaps": found[-1][1],
    }


# ---- The profiler ----------------------------------------------------------------------------------------------------


def profile(run: Run, device: torch.device, with_operators: bool = False) -> Any:
    """torch.profiler's record of a run: the device's kernels, and with_operators what launched them, with shapes."""
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    activities = [ProfilerActivity.CPU, kind] if with_operators and device.type == "cuda" else [kind]
    synchronize(device)
    with torch.profiler.profile(
        activities=activities, record_shapes=with_operators, with_flops=with_operators
    ) as record:
        run()
        synchronize(device)
    return record


def kernels_of(run: Run, device: torch.device) -> list[Kernel]:
    """Kernels and copies of a run, by their starts; on a CPU the innermost operators. Raises RuntimeError for none."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile(run, device).events()
        if event.device_type == kind and not event.cpu_children and not event.is_user_annotation
        if not re.match(r"(Context|Stream|Event) (Sync|Wait)", event.name)  # no work
    ]
    if not found:
        raise RuntimeError("the profiler shows no kernels: may this user read the GPU's counters (CUPTI)?")
    return sorted(found, key=lambda kernel: kernel.start)


def products_of(run: Run, device: torch.device, peak_tflops: float) -> list[dict[str, Any]]:
    """The matrix products of a run by their shapes: times called, µs in all, TFLOP/s, also relative to the peak."""
    rows = []
    for row in profile(run, device, with_operators=True).key_averages(group_by_input_shape=True):
        us = row.device_time_total if device.type == "cuda" else row.self_cpu_time_total
        if row.key in PRODUCTS and row.flops and us:
            rate = row.flops / us / 1e6
            first = 1 if row.key in ("aten::addmm", "aten::baddbmm") else 0  # theirs is what is added
            shapes = " x ".join(str(tuple(shape)) for shape in row.input_shapes[first : first + 2])
            rows.append({"operator": row.key, "shapes": shapes, "launches": row.count, "us": round(us, 1)})
            rows[-1] |= {"tflops": round(rate, 1), "of_matmul": round(rate / peak_tflops, 3) if peak_tflops else None}
    return sorted(rows, key=lambda row: -row["us"])
