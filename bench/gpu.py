"""Shared by the GPU benches: timing on the device, runs in turns, the GPU's matmul and copy speed, its name, and the
launches that were tuned for it.

Knows of the model only its table of launches. Everything also runs on a CPU, so that a bench can be tested without a
GPU; such timings mean nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

import model
from errors import UserError

# Written before every timed run: it evicts the caches, and takes longer than Python needs to queue that run.
FLUSH_BYTES = 2**31
WAKE_SECONDS = 0.1  # a GPU that idled, during a compilation for instance, needs some of it to raise its clocks
Run = Callable[[], object]


class OutOfTime(Exception):
    """The bench's own time limit: what is left is not measured."""


class Deadline:
    """So many minutes from now; `check()` raises OutOfTime once they are over."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds; negative once it is over."""
        return self._end - time.monotonic()

    def check(self) -> None:
        if self.left() < 0:
            raise OutOfTime


def choose_device(script: str, trial: str, interpret: bool) -> torch.device:
    """CUDA, or the CPU with interpreted kernels if the option named `trial` is set. Raises UserError without a GPU."""
    if interpret or os.environ.get("TRITON_INTERPRET") == "1":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which nothing has done yet
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"{script} needs a CUDA GPU and finds none; {trial} tries it out on a CPU, in tiny sizes, without figures"
        )
    return torch.device("cuda")


def some(given: str | None, default: Sequence[str], known: Sequence[str], option: str) -> list[str]:
    """A list option's values, separated by commas. Raises UserError for unknown ones."""
    names = list(default) if given is None else given.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--{option}={given}: unknown {unknown[0]!r}; expected some of {','.join(known)}")
    return names


def card(device: torch.device) -> dict[str, Any]:
    """The GPU and the versions of the libraries that drive it, ready for JSON."""
    if device.type != "cuda":
        return {"gpu": "none: interpreted on the CPU, the timings mean nothing"}
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }


Tables = dict[str, dict[tuple[str, int, int], tuple[model.Launch, ...]]]  # by their names in model.py


def read_launches(path: Path) -> tuple[str, Tables]:
    """The architecture that bench/tune_attention.py chose launches for, and the rows for model.py's tables. path: its
    result, or one of bench/gpu_session.py. Raises UserError for other files."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        if figures["bench"] == "gpu_session":
            figures = figures["parts"]["tune"]["result"]
        architecture = figures["hardware"].get("architecture", "other")  # tried out on a CPU: "other"
        found: dict[tuple[str, tuple[str, int, int]], dict[str, model.Launch]] = {}
        for choice in figures["chosen"]:
            key = architecture, getattr(torch, choice["dtype"]).itemsize, 64 if choice["D"] <= 64 else 128
            found.setdefault((choice["table"], key), {})[choice["kernel"]] = model.Launch(*choice["best"])
        tables: Tables = {}
        for (table, key), row in found.items():
            if set(row) == {*model.KERNELS}:
                tables.setdefault(table, {})[key] = tuple(row[kernel] for kernel in model.KERNELS)
        for table in tables:
            getattr(model, table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--launches={path}: {type(error).__name__}: {error}; expected a result of bench/tune_attention.py, or of"
            " bench/gpu_session.py with its part `tune`"
        ) from None
    return architecture, tables


def use_launches(path: Path | None, device: torch.device) -> list[str]:
    """Puts the rows of read_launches into the tables of model.py, for this process alone, and returns them as text.
    None: nothing changes. Raises UserError for launches of another GPU."""
    if path is None:
        return []
    (architecture, tables), here = read_launches(path), card(device).get("architecture", "other")
    if here != architecture:
        raise UserError(f"--launches={path}: tuned for {architecture}, this GPU is {here}; tune here, or leave it out")
    for table, rows in tables.items():
        getattr(model, table).update(rows)
    return [f"{table} {key}: {row}" for table, rows in tables.items() for key, row in rows.items()]


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured: TFLOP/s of a square bfloat16 product of random numbers, TB/s of a copy of 1 GiB, which no cache holds
    (bytes read plus written)."""
    size, rounds = (8192, 20) if device.type == "cuda" else (64, 1)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, source = torch.empty_like(a), torch.empty(size * size * 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    in_turns(runs, 3, device)
    product, copy = (statistics.median(seconds) for seconds in in_turns(runs, rounds, device).values())
    return {
        "matmul_tflops": round(2 * size**3 / product / 1e12, 1),
        "copy_tb_per_second": round(2 * source.numel() / copy / 1e12, 2),
    }


def in_turns(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run, `rounds` of each. They take turns, in reverse order every other round, so that a GPU that
    warms up and clocks down slows all alike. Call each once before: the first call may compile."""
    flush = _flush_buffer(device)
    wake(device)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            flush.zero_()
            begin = _mark(device)
            runs[name]()
            marks[name].append((begin, _mark(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in marks.items()}
    return {name: [end - begin for begin, end in pairs] for name, pairs in marks.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wake(device: torch.device, seconds: float = WAKE_SECONDS) -> None:
    """Keeps a GPU busy for that long."""
    end = time.monotonic() + seconds
    while device.type == "cuda" and time.monotonic() < end:
        _flush_buffer(device).zero_()
        torch.cuda.synchronize(device)


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Allocated once, so that it cannot fail when memory is full later."""
    return torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)


def _mark(device: torch.device) -> Any:
    """A CUDA event in the device's queue; on a CPU the time in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def summary(seconds: list[float]) -> dict[str, float]:
    """Median milliseconds, and the interquartile range relative to it: smaller differences are noise."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"ms": round(1e3 * middle, 4), "spread": round((high - low) / middle, 3), "runs": len(seconds)}


def peak_memory(run: Run, device: torch.device) -> int:
    """Peak bytes of device memory of a run, beyond what was allocated before it."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def refusals() -> tuple[type[Exception], ...]:
    """What PyTorch and Triton raise if something cannot run: no kernel, memory, shared memory or compiler."""
    found: list[type[Exception]] = [RuntimeError]  # NotImplementedError is one
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import TritonError

        found += [TritonError, CompilationError]
    except ImportError:
        pass
    return tuple(found)


def first_line(text: str) -> str:
    """The first line of a message, and the second where the first announces it: "backend='inductor' raised:"."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


@contextmanager
def reasons(rows: dict[str, str], name: str) -> Iterator[None]:
    """Catches errors of `refusals` and stores them in rows[name] as one line, with PyTorch's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
            return
        except refusals() as error:
            texts = [str(error).strip() or type(error).__name__, *(str(warning.message).strip() for warning in caught)]
        rows[name] = "; ".join(first_line(text) for text in texts[:4])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
