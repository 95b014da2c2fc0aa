"""Finds the fastest launches of the attention kernels on a CUDA GPU and prints the rows of LAUNCHES in model.py for it.

    python bench/tune_attention.py --out=DIR      bfloat16 and float32, under 8 minutes: DIR/DATE-tune_attention.json
    python bench/tune_attention.py --out=DIR --dtypes=bfloat16 --head_sizes=64      a part of it
    python bench/tune_attention.py --interpret    tries this script out without a GPU: tiny, nothing is written

A launch is queries and keys per block, warps per program and stages of the loading pipeline. First all launches are
compiled by one process per core, each of which runs them once on little data; this process finds the results in
Triton's cache on disk. Then every kernel is timed alone, on random numbers, 16k tokens, heads · head size = 2048: all
launches a few times, those near the best one again, in turns. A launch does not depend on T; the one is chosen whose
time relative to the best at each T has the smallest geometric mean. Launches that spill registers are timed and shown,
but not chosen: tests require that the table's launches do not spill.

After pasting a row, run the tests marked gpu and bench/attention.py, which compare results with attention in float64.

Reading order: candidates, compile_all, kernels, time_kernel, choose, main.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402

from bench.gpu import Deadline, card, choose_device, in_turns, reasons  # noqa: E402
from bench.hardware import commit_of, hardware, write_results  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import KERNELS, Launch, fused_attention, launch_kernel, launches_for  # noqa: E402

LENGTHS, TOKENS, CHANNELS = {"bfloat16": (1024, 4096, 16384), "float32": (1024, 4096)}, 16384, 2048
NEAR_BEST = 1.15  # launches within this factor of the best time are timed again, more often
MAX_ACCUMULATORS = 192  # float32 numbers per thread, of 255 registers
COMPILE_SHARE = 0.6  # of the time that is left may go into compiling
Job = tuple[str, str, int, Launch]  # kernel, dtype, head size, launch
Timings = dict[int, dict[Launch, float]]  # by T: seconds of each launch


def candidates(kernel: str, dtype: str, D: int) -> list[Launch]:
    """The launches to try. In 16 bits: every warp has 16 rows of the scores or more, and a thread's accumulators leave
    it registers (beyond MAX_ACCUMULATORS every launch spilled when compiled ahead of time). float32 uses no tensor
    cores: code grows with the block; large ones compile slowly."""
    if dtype == "float32":
        return [
            Launch(q, k, warps, stages)
            for q, k in ((32, 32), (32, 64), (64, 32))
            for warps in (4, 8)
            for stages in (1, 2)
        ]
    by_key = kernel == "key_value_gradient"
    found = [
        Launch(*choice)
        for choice in itertools.product(
            (32, 64, 128) if by_key else (64, 128), (64, 128), (4, 8), (2, 3), (False, True)
        )
    ]
    return [
        launch
        for launch in found
        if (launch.block_k if by_key else launch.block_q) >= 16 * launch.num_warps
        and accumulators(kernel, launch, D) <= MAX_ACCUMULATORS
    ]


def accumulators(kernel: str, launch: Launch, D: int) -> int:
    """float32 numbers that a thread holds: tiles of scores, and sums over the loop."""
    q, k = launch.block_q, launch.block_k
    scores = 1 if kernel == "forward" else 2
    sums = 2 * k * D if kernel == "key_value_gradient" else q * D
    return (scores * q * k + sums) // (32 * launch.num_warps)


# ---- Compiling -------------------------------------------------------------------------------------------------------


def compile_all(jobs: list[Job], seconds: float) -> dict[Job, dict[str, Any]]:
    """Compiles on every core, for at most `seconds` → registers, spills and shared memory, or why it does not run.

    Workers are processes, since much of the compiler is Python; a crash of the compiler costs one launch.
    """
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for job in jobs:
        todo.put(job)
    workers = [context.Process(target=compile_some, args=(todo, done), daemon=True) for _ in range(os.cpu_count() or 1)]
    for worker in workers:
        worker.start()
    found: dict[Job, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while len(found) < len(jobs) and time.monotonic() < end and any(worker.is_alive() for worker in workers):
        with suppress(queue.Empty):
            job, result = done.get(timeout=1)
            found[job] = result
    for worker in workers:
        worker.terminate()
    return {job: found.get(job, {"unavailable": "not compiled in time, or the compiler crashed"}) for job in jobs}


def compile_some(todo: Any, done: Any) -> None:
    """A worker: takes jobs until the queue is empty and runs each once on little data."""
    while True:
        try:
            job = todo.get(timeout=1)
        except queue.Empty:
            return
        kernel, dtype, head_size, launch = job
        refused: dict[str, str] = {}
        with reasons(refused, "unavailable"):
            compiled = kernels(1024, 1024, head_size, dtype, torch.device("cuda"), solved=False)[kernel](launch)
            torch.cuda.synchronize()
            done.put(
                (job, {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared})
            )
        if refused:
            done.put((job, refused))


# ---- Timing ----------------------------------------------------------------------------------------------------------


def kernels(
    T: int, tokens: int, head_size: int, dtype: str, device: torch.device, channels: int = CHANNELS, solved: bool = True
) -> dict[str, Callable[[Launch], Any]]:
    """Each kernel as a function of its launch, on random numbers. solved=False: out and lse are arbitrary numbers."""
    B, H = tokens // T, channels // head_size
    packed, do = (
        torch.randn(B, T, heads, head_size, device=device, dtype=getattr(torch, dtype)) for heads in (3 * H, H)
    )
    q, k, v = packed.split(H, dim=2)
    out, lse = fused_attention(q, k, v, None) if solved else (do.clone(), torch.zeros(B, H, T, device=device))
    dq, dk, dv = (torch.empty_like(do) for _ in range(3))
    delta = torch.zeros_like(lse)
    return {
        "forward": lambda launch: launch_kernel("forward", launch, q, k, v, None, out, lse),
        "query_gradient": lambda launch: launch_kernel(
            "query_gradient", launch, q, k, v, None, out, lse, do, delta, dq
        ),
        "key_value_gradient": lambda launch: launch_kernel(
            "key_value_gradient", launch, q, k, v, None, lse, do, delta, dk, dv
        ),
    }


def time_kernel(
    kernel: str, dtype: str, D: int, launches: list[Launch], device: torch.device, deadline: Deadline
) -> Timings:
    """A sweep at every T, or at the first one if the time is over; a T at which nothing runs is left out."""
    tokens, channels, lengths = (TOKENS, CHANNELS, LENGTHS[dtype]) if device.type == "cuda" else (32, 32, (32,))
    timings: Timings = {}
    for T in lengths if deadline.left() > 0 else lengths[:1]:
        with reasons({}, "not here"):
            timings[T] = sweep(kernels(T, tokens, D, dtype, device, channels)[kernel], launches, device)
    return {T: times for T, times in timings.items() if times}


def sweep(run: Callable[[Launch], Any], launches: list[Launch], device: torch.device) -> dict[Launch, float]:
    """Median seconds of each launch that runs: of 3 runs, of 15 if it is near the best one."""
    runs: dict[str, Callable[[], object]] = {}
    for launch in launches:
        with reasons({}, "not here"):
            run(launch)
            runs[show(launch)] = partial(run, launch)
    once, again = (3, 15) if device.type == "cuda" else (1, 1)
    if not runs:
        return {}
    seconds = {name: statistics.median(times) for name, times in in_turns(runs, once, device).items()}
    near = {name: runs[name] for name in runs if seconds[name] <= NEAR_BEST * min(seconds.values())}
    seconds |= {name: statistics.median(times) for name, times in in_turns(near, again, device).items()}
    return {launch: seconds[show(launch)] for launch in launches if show(launch) in seconds}


def rank(timings: Timings) -> list[tuple[Launch, float]]:
    """The launches that run at every T, best first, with the geometric mean over T of time relative to the best."""
    everywhere = set.intersection(*(set(times) for times in timings.values()))
    best = {T: min(times.values()) for T, times in timings.items()}
    scores = {launch: statistics.geometric_mean(timings[T][launch] / best[T] for T in timings) for launch in everywhere}
    return sorted(scores.items(), key=lambda item: (item[1], item[0]))


def choose(timings: Timings, present: Launch, compiled: Mapping[Launch, dict[str, Any]]) -> dict[str, Any]:
    """The best launch of a kernel that spills nothing, and how far behind it others are (0.02: 2 % slower)."""
    ranked = rank(timings)
    clean = [(launch, score) for launch, score in ranked if not compiled.get(launch, {}).get("spills")] or ranked
    best, score = clean[0]
    behind = {launch: round(other / score - 1, 3) for launch, other in ranked}
    return {
        "best": best,
        "second": clean[1][0] if len(clean) > 1 else None,
        "second_behind": behind[clean[1][0]] if len(clean) > 1 else None,
        "present": present,
        "present_behind": behind.get(present),
        "fastest_at": {
            T: (min(times, key=lambda launch: times[launch]), round(times[best] / min(times.values()) - 1, 3))
            for T, times in timings.items()
        },
        "ahead_but_spills": [launch for launch, other in ranked if other < score],
    }


# ---- The whole run ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    device = choose_device("bench/tune_attention.py", "--interpret", arguments.interpret)
    tiny = device.type == "cpu"
    torch.manual_seed(1337)
    deadline = Deadline(arguments.minutes)
    facts = {**hardware(), **card(device)}
    jobs = [
        (kernel, dtype, D, launch)
        for dtype in arguments.dtypes
        for D in ((16,) if tiny else arguments.head_sizes)
        for place, kernel in enumerate(KERNELS)
        for launch in with_present(
            candidates(kernel, dtype)[: 2 if tiny else None], launches_for(device, getattr(torch, dtype), D)[place]
        )
    ]
    compiled: dict[Job, dict[str, Any]] = {job: {} for job in jobs}
    if not tiny:
        print(f"{len(jobs)} launches to compile on {os.cpu_count()} cores", flush=True)
        compiled = compile_all(jobs, COMPILE_SHARE * deadline.left())
        running = sum("unavailable" not in result for result in compiled.values())
        print(f"{running} run here; {deadline.left():.0f} s are left to time them", flush=True)
    rows, chosen = [], []
    for dtype, D in dict.fromkeys((dtype, D) for _, dtype, D, _ in jobs):
        row: list[Launch] = []
        for place, kernel in enumerate(KERNELS):
            own = {job[3]: compiled[job] for job in jobs if job[:3] == (kernel, dtype, D)}
            timings = time_kernel(
                kernel, dtype, D, [launch for launch in own if "unavailable" not in own[launch]], device, deadline
            )
            rows += [record(kernel, dtype, D, launch, timings, own[launch]) for launch in own]
            if not timings or not rank(timings):
                print(f"{kernel:18} {dtype:8} D={D:<3} nothing runs; the compiler said: {next(iter(own.values()))}")
                continue
            choice = choose(timings, launches_for(device, getattr(torch, dtype), D)[place], own)
            chosen.append({"kernel": kernel, "dtype": dtype, "D": D, **choice})
            row.append(choice["best"])
            print(describe(chosen[-1]), flush=True)
        if len(row) < len(KERNELS):
            continue
        key = (
            f'"{facts.get("architecture", "interpreted")}", {getattr(torch, dtype).itemsize}, {64 if D <= 64 else 128}'
        )
        print(f"    ({key}): ({', '.join(map(show, row))}),", flush=True)
    if tiny:
        print("interpreted on the CPU: the script works; the timings mean nothing and nothing is written")
        return 0
    figures = {
        "bench": "tune_attention",
        "commit": commit_of(ROOT),
        "hardware": facts,
        "chosen": chosen,
        "launches": rows,
    }
    print(f"written: {write_results('tune_attention', figures, arguments.out)}")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    parser.add_argument(
        "--dtypes", default="bfloat16,float32", help="bfloat16 (whose launches float16 shares), float32, or both"
    )
    parser.add_argument("--head_sizes", default="64,128", help="64 (for all up to 64), 128, or both")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for everything; then what is left is left out")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="try the script out on a CPU, in tiny sizes; also with TRITON_INTERPRET=1",
    )
    arguments = parser.parse_args(argv)
    arguments.dtypes, arguments.head_sizes = arguments.dtypes.split(","), arguments.head_sizes.split(",")
    if not set(arguments.dtypes) <= set(LENGTHS) or not set(arguments.head_sizes) <= {"64", "128"}:
        raise UserError("--dtypes takes bfloat16 and float32, --head_sizes 64 and 128, separated by commas")
    arguments.head_sizes = [int(size) for size in arguments.head_sizes]
    return arguments


def with_present(launches: list[Launch], present: Launch) -> list[Launch]:
    return launches if present in launches else [present, *launches]


def record(
    kernel: str, dtype: str, D: int, launch: Launch, timings: Timings, compiled: dict[str, Any]
) -> dict[str, Any]:
    """A launch's line in the JSON: microseconds by T, and what the compiler said."""
    microseconds = {T: round(1e6 * times[launch], 1) for T, times in timings.items() if launch in times}
    return {"kernel": kernel, "dtype": dtype, "D": D, "launch": launch, "microseconds": microseconds, **compiled}


def show(launch: Launch) -> str:
    """As it is written in model.py."""
    return f"Launch({', '.join(map(str, launch))})"


def describe(choice: dict[str, Any]) -> str:
    """One line a kernel, and one a T at which another launch is faster."""
    line = f"{choice['kernel']:18} {choice['dtype']:8} D={choice['D']:<3} {show(choice['best'])}"
    if choice["second"] is not None:
        line += f", the second {show(choice['second'])} {choice['second_behind']:+.1%}"
    behind = choice["present_behind"]
    line += f", the present {show(choice['present'])} " + ("does not run" if behind is None else f"{behind:+.1%}")
    for T, (fastest, margin) in choice["fastest_at"].items():
        if fastest != choice["best"]:
            line += f"\n    at T={T:,} {show(fastest)} is faster: {margin:.1%}"
    if choice["ahead_but_spills"]:
        line += "\n    faster, but with spills: " + ", ".join(map(show, choice["ahead_but_spills"]))
    return line


if __name__ == "__main__":
    run_script(main)
