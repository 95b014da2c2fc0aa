"""Finds the fastest launches of the attention kernels on a CUDA GPU and prints the rows of the tables in model.py.

    python bench/tune_attention.py --out=DIR      bfloat16, under 7 minutes: DIR/DATE-tune_attention.json
    python bench/tune_attention.py --out=DIR --dtypes=bfloat16 --head_sizes=64      a part of it
    python bench/tune_attention.py --interpret    tries this script out without a GPU: tiny, written only to --out

A launch is queries and keys per block, warps per program, stages of the loading pipeline, and loads by pointers or by
TMA. First all launches are compiled by one process per core, each of which runs them once on little data; this process
finds the results in Triton's cache on disk. Then every kernel is timed alone, on random numbers, 16k tokens, heads ·
head size = 2048: all launches a few times, those near the best one again, in turns. A launch does not depend on T; the
one is chosen whose time relative to the best at each T has the smallest geometric mean. Launches that spill registers
are timed and shown, but not chosen: tests require that the tables' launches do not spill. LAUNCHES gets the best one by
pointers, TMA_LAUNCHES the best of all. The best few are then also compiled and run as they are with a mask, with
grouped heads and with a T that is not divisible by the blocks; one that fails there is not chosen.

After pasting the rows, run the tests marked gpu and bench/attention.py, which compare results with attention in
float64. (float32 takes PyTorch's attention on a GPU unless the kernel is asked for, so it is not tuned by default.)

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
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402

import model  # noqa: E402
from bench.gpu import Deadline, card, choose_device, in_turns, reasons  # noqa: E402
from bench.hardware import RESULTS, commit_of, hardware, new_result, save_results  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import KERNELS, Launch, fused_attention, launch_kernel  # noqa: E402

LENGTHS, TOKENS, CHANNELS = {"bfloat16": (1024, 4096, 16384), "float32": (1024, 4096)}, 16384, 2048
NEAR_BEST = 1.15  # launches within this factor of the best time are timed again, more often
MAX_ACCUMULATORS = 192  # float32 numbers per thread, of 255 registers
COMPILE_SHARE = 0.6  # of the time that is left may go into compiling
FINALISTS = 3  # of each kernel and form of the loads, compiled in every variant
VARIANTS: dict[str, tuple[int, int, bool]] = {  # T, query heads per key/value head, masked
    "plain": (1024, 1, False), "masked": (1024, 1, True), "grouped": (1024, 4, True), "tail": (1000, 1, True)
}  # fmt: skip
TABLES = {"LAUNCHES": False, "TMA_LAUNCHES": True}  # of model.py: whether TMA may be chosen
Job = tuple[str, str, int, Launch, str]  # kernel, dtype, head size, launch, variant
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
    if kernel == "query_gradient" and D == 64:  # masked, it takes a few registers too many for two programs
        found += [launch._replace(maxnreg=128) for launch in found if launch[:3] == (128, 64, 8)]
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

    def start_worker() -> Any:
        worker = context.Process(target=compile_some, args=(todo, done), daemon=True)
        worker.start()
        return worker

    workers = [start_worker() for _ in range(os.cpu_count() or 1)]
    found: dict[Job, dict[str, Any]] = {}
    crashes, end = 0, time.monotonic() + seconds
    while len(found) < len(jobs) and time.monotonic() < end and any(worker.is_alive() for worker in workers):
        with suppress(queue.Empty):
            job, result = done.get(timeout=1)
            found[job] = result
        for place, worker in enumerate(workers):
            if worker.exitcode and crashes < len(jobs):  # an illegal access, for one, leaves a process without its GPU
                crashes, workers[place] = crashes + 1, start_worker()
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
        kernel, dtype, head_size, launch, variant = job
        T, group, masked = VARIANTS[variant]
        refused: dict[str, str] = {}
        with reasons(refused, "unavailable"):
            runs = kernels(T, T, head_size, dtype, torch.device("cuda"), group=group, masked=masked, solved=False)
            compiled = runs[kernel](launch)
            torch.cuda.synchronize()
            done.put(
                (job, {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared})
            )
        if refused:
            done.put((job, refused))


# ---- Timing ----------------------------------------------------------------------------------------------------------


def kernels(
    T: int, tokens: int, head_size: int, dtype: str, device: torch.device, channels: int = CHANNELS, *, group: int = 1,
    masked: bool = False, solved: bool = True,
) -> dict[str, Callable[[Launch], Any]]:  # fmt: skip
    """Each kernel as a function of its launch, on random numbers. group: query heads per key/value head. masked: with a
    window of T / 2. solved=False: out and lse are arbitrary numbers."""
    B, H = tokens // T, channels // head_size
    K = H // group
    packed, do = (
        torch.randn(B, T, heads, head_size, device=device, dtype=getattr(torch, dtype)) for heads in (H + 2 * K, H)
    )
    q, k, v = packed.split((H, K, K), dim=2)
    steps = torch.arange(T, device=device, dtype=torch.int32)
    first = (steps - T // 2).clamp(min=0).expand(B, T).contiguous() if masked else None
    out, lse = fused_attention(q, k, v, first) if solved else (do.clone(), torch.zeros(B, H, T, device=device))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.zeros_like(lse)
    tensors: dict[str, tuple[Any, ...]] = {
        "forward": (q, k, v, first, out, lse),
        "query_gradient": (q, k, v, first, out, lse, do, delta, dq),
        "key_value_gradient": (q, k, v, first, lse, do, delta, dk, dv),
    }
    return {name: partial(_launch, name, tensors[name]) for name in KERNELS}


def _launch(name: str, tensors: tuple[Any, ...], launch: Launch) -> Any:
    """TMA reads whole blocks: where T is not divisible by them, the kernel would take pointers, as model.py does."""
    T = tensors[0].shape[1]
    return launch_kernel(name, launch if T % launch.loaded(name) == 0 else launch._replace(tma=False), *tensors)


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
    return sorted(scores.items(), key=lambda item: (item[1], item[0][:5]))


def choose(timings: Timings, present: Launch, refused: Collection[Launch]) -> dict[str, Any]:
    """The best launch of a kernel that is not refused, and how far behind it others are (0.02: 2 % slower)."""
    ranked = rank(timings)
    allowed = [(launch, score) for launch, score in ranked if launch not in refused] or ranked
    best, score = allowed[0]
    behind = {launch: round(other / score - 1, 3) for launch, other in ranked}
    return {
        "best": best,
        "second": allowed[1][0] if len(allowed) > 1 else None,
        "second_behind": behind[allowed[1][0]] if len(allowed) > 1 else None,
        "present": present,
        "present_behind": behind.get(present),
        "fastest_at": {
            T: (min(times, key=lambda launch: times[launch]), round(times[best] / min(times.values()) - 1, 3))
            for T, times in timings.items()
        },
        "ahead_but_refused": [launch for launch, other in ranked if other < score],
    }


def by_form(timings: Timings, tma: bool) -> Timings:
    """Without the launches by TMA, if not tma."""
    return {
        T: {launch: seconds for launch, seconds in times.items() if tma or not launch.tma}
        for T, times in timings.items()
    }


# ---- The whole run ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    device = choose_device("bench/tune_attention.py", "--interpret", arguments.interpret)
    tiny = device.type == "cpu"
    torch.manual_seed(1337)
    deadline = Deadline(arguments.minutes)
    facts = {**hardware(), **card(device)}
    architecture = facts.get("architecture", "other")
    problems = [(dtype, D) for dtype in arguments.dtypes for D in ((16,) if tiny else arguments.head_sizes)]
    jobs: list[Job] = [
        (kernel, dtype, D, launch, "plain")
        for dtype, D in problems
        for kernel in KERNELS
        for launch in to_compile(kernel, dtype, D, architecture)[: 3 if tiny else None]
    ]
    compiled = compile_here(jobs, COMPILE_SHARE * deadline.left(), device)
    print(f"{deadline.left():.0f} s are left to time them", flush=True)
    timings = {}
    for dtype, D in problems:
        for kernel in KERNELS:
            launches = [job[3] for job in jobs if job[:3] == (kernel, dtype, D) and "unavailable" not in compiled[job]]
            timings[kernel, dtype, D] = time_kernel(kernel, dtype, D, launches, device, deadline)
    path = None if tiny and arguments.out is None else new_result("tune_attention", arguments.out or RESULTS)
    figures = {"bench": "tune_attention", "commit": commit_of(ROOT), "hardware": facts}
    figures["launches"] = [record(job, timings[job[:3]], compiled[job]) for job in jobs]
    figures["chosen"], _ = choose_rows(problems, architecture, timings, compiled)
    if path is not None:
        save_results(path, figures)  # the variants may crash, or take longer than there is time
    compiled |= compile_here(finalists(timings), max(30.0, deadline.left()), device)
    figures["chosen"], lines = choose_rows(problems, architecture, timings, compiled)
    figures["variants"] = [record(job, {}, compiled[job]) for job in compiled if job[4] != "plain"]
    print(*map(describe, figures["chosen"]), *lines, sep="\n", flush=True)
    if tiny:
        print("interpreted on the CPU: the script works; the timings mean nothing")
    if path is not None:
        save_results(path, figures)
    print("nothing is written" if path is None else f"written: {path}")
    return 0


def choose_rows(
    problems: list[tuple[str, int]], architecture: str, timings: Mapping[tuple[str, str, int], Timings],
    compiled: Mapping[Job, dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """The choice for each table and kernel, and the rows as they are written in model.py."""
    chosen: list[dict[str, Any]] = []
    lines = []
    for table in TABLES:
        for dtype, D in problems:
            choices = [choose_for(table, kernel, dtype, D, architecture, timings, compiled) for kernel in KERNELS]
            if None in choices:
                lines.append(f"{table} {dtype} D={D}: no row, since nothing runs of one of the kernels")
                continue
            chosen += choices
            row = ", ".join(show(choice["best"]) for choice in choices)
            key = f'"{architecture}", {getattr(torch, dtype).itemsize}, {64 if D <= 64 else 128}'
            lines.append(f"{table}: ({key}): ({row}),")
    return chosen, lines


def compile_here(jobs: list[Job], seconds: float, device: torch.device) -> dict[Job, dict[str, Any]]:
    """compile_all on a GPU; nothing is known of launches in the interpreter."""
    if device.type == "cpu" or not jobs:
        return {job: {} for job in jobs}
    print(f"{len(jobs)} launches to compile on {os.cpu_count()} cores", flush=True)
    compiled = compile_all(jobs, seconds)
    print(f"{sum('unavailable' not in result for result in compiled.values())} of them run here", flush=True)
    return compiled


def finalists(timings: Mapping[tuple[str, str, int], Timings]) -> list[Job]:
    """The best few launches of each kernel and form, in every variant but the plain one."""
    jobs: dict[Job, None] = {}
    for (kernel, dtype, D), own in timings.items():
        for tma in TABLES.values() if own else ():
            for launch, _ in rank(by_form(own, tma))[:FINALISTS]:
                jobs |= {(kernel, dtype, D, launch, variant): None for variant in VARIANTS if variant != "plain"}
    return list(jobs)


def choose_for(
    table: str, kernel: str, dtype: str, D: int, architecture: str,
    timings: Mapping[tuple[str, str, int], Timings], compiled: Mapping[Job, dict[str, Any]],
) -> dict[str, Any] | None:  # fmt: skip
    """choose, of launches that spill nothing and run in every variant that was compiled. None if nothing runs."""
    own = by_form(timings[kernel, dtype, D], TABLES[table])
    if not own or not rank(own):
        return None
    mine = {job: found for job, found in compiled.items() if job[:3] == (kernel, dtype, D)}
    refused = {
        job[3] for job, found in mine.items() if "unavailable" in found or (job[4] == "plain" and found.get("spills"))
    }
    choice = choose(own, present(architecture, dtype, D, kernel, table), refused)
    variants = {job[4]: found for job, found in mine.items() if job[3] == choice["best"]}
    return {"table": table, "kernel": kernel, "dtype": dtype, "D": D, **choice, "compiled": variants}


def present(architecture: str, dtype: str, D: int, kernel: str, table: str = "LAUNCHES") -> Launch:
    """The launch that model.py would take now."""
    size = getattr(torch, dtype).itemsize, 64 if D <= 64 else 128
    by_pointer = model.LAUNCHES.get((architecture, *size)) or model.LAUNCHES["other", *size]
    row = model.TMA_LAUNCHES.get((architecture, *size), by_pointer) if TABLES[table] else by_pointer
    return row[list(KERNELS).index(kernel)]


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figures (default: bench/results)")
    parser.add_argument(
        "--dtypes", default="bfloat16", help="bfloat16 (whose launches float16 shares), float32, or both"
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


def to_compile(kernel: str, dtype: str, D: int, architecture: str) -> list[Launch]:
    """The launches of the tables, then the candidates."""
    now = [present(architecture, dtype, D, kernel, table) for table in TABLES]
    return list(dict.fromkeys(now + candidates(kernel, dtype, D)))


def record(job: Job, timings: Timings, compiled: dict[str, Any]) -> dict[str, Any]:
    """A launch's line in the JSON: microseconds by T, and what the compiler said."""
    kernel, dtype, D, launch, variant = job
    found = {"kernel": kernel, "dtype": dtype, "D": D, "launch": launch, "variant": variant}
    if timings:
        found["microseconds"] = {T: round(1e6 * times[launch], 1) for T, times in timings.items() if launch in times}
    return found | compiled


def show(launch: Launch) -> str:
    """As it is written in model.py."""
    further = ", tma=True" * launch.tma + (f", maxnreg={launch.maxnreg}" if launch.maxnreg is not None else "")
    return f"Launch({', '.join(map(str, launch[:4]))}{further})"


def describe(choice: dict[str, Any]) -> str:
    """One line a kernel, and one a T at which another launch is faster."""
    line = f"{choice['table']:12} {choice['kernel']:18} {choice['dtype']:8} D={choice['D']:<3} {show(choice['best'])}"
    if choice["second"] is not None:
        line += f", the second {show(choice['second'])} {choice['second_behind']:+.1%}"
    behind = choice["present_behind"]
    line += f", the present {show(choice['present'])} " + ("does not run" if behind is None else f"{behind:+.1%}")
    for T, (fastest, margin) in choice["fastest_at"].items():
        if fastest != choice["best"]:
            line += f"\n    at T={T:,} {show(fastest)} is faster: {margin:.1%}"
    if choice["ahead_but_refused"]:
        line += "\n    faster, but with spills or not in every variant: " + ", ".join(
            map(show, choice["ahead_but_refused"])
        )
    return line


if __name__ == "__main__":
    run_script(main)
