"""Finds the fastest launches of the attention kernels on a CUDA GPU and prints the rows of the tables in model.py.

    python bench/tune_attention.py --out=DIR      bfloat16, under 7 minutes: DIR/DATE-tune_attention.json
    python bench/tune_attention.py --out=DIR --dtypes=bfloat16 --head_sizes=64      a part of it
    python bench/tune_attention.py --interpret    tries this script out without a GPU: tiny, written only to --out

A launch is queries and keys per block, warps per program, stages of the loading pipeline, and loads by pointers or by
TMA. First all launches are compiled by one process per core, each of which runs them once on little data and compares
what they write with float64 (bench/launch_check.py); this process finds the compiled code in Triton's cache on disk.
Then every kernel is timed alone, on random numbers, 16k tokens, heads · head size = 2048: all launches a few times,
those near the best one again, in turns. A launch does not depend on T; the one is chosen whose time relative to the
best at each T has the smallest geometric mean. Launches that spill more than a few registers are timed and shown, but
not chosen: with a mask they spill more, inside the loop. One that computes something else is neither timed nor chosen.
LAUNCHES gets the best one by pointers, TMA_LAUNCHES the best of all. The best few are then also compiled, run and
compared with a mask, with grouped heads and with a T that is not divisible by the blocks; one that fails there is not
chosen. Where the time ends before, a row's line names what was not checked. The result is written after each step.

float32 takes PyTorch's attention on a GPU unless the kernel is asked for, so it is not tuned by default.

Reading order: candidates, compile_all, time_kernel, choose, main.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402

import model  # noqa: E402
from bench.gpu import Deadline, card, choose_device, in_turns, reasons  # noqa: E402
from bench.hardware import RESULTS, commit_of, hardware, new_result, save_results  # noqa: E402
from bench.launch_check import Case, CheckedCase  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import KERNELS, Launch  # noqa: E402

LENGTHS, TOKENS, CHANNELS = {"bfloat16": (1024, 4096, 16384), "float32": (1024, 4096)}, 16384, 2048
CHECKED_ROWS = 2  # sequences that a launch is checked on: enough programs for all multiprocessors
NEAR_BEST = 1.15  # launches within this factor of the best time are timed again, more often
MAX_ACCUMULATORS = 192  # float32 numbers per thread, of 255 registers
MOST_SPILLS = 16  # a few, outside the loop, cost nothing: one such launch was the fastest by 14 % (bench/NOTES.md)
COMPILE_SHARE = 0.6  # of the time that is left may go into compiling
FINALISTS = 3  # of each kernel and form of the loads, compiled in every variant
VARIANTS: dict[str, tuple[int, int, bool]] = {  # T, query heads per key/value head, masked
    "plain": (1024, 1, False), "masked": (1024, 1, True), "grouped": (1024, 4, True), "tail": (1000, 1, True)
}  # fmt: skip
TABLES = {"LAUNCHES": False, "TMA_LAUNCHES": True}  # of model.py: whether TMA may be chosen
Job = tuple[str, str, int, Launch, str]  # kernel, dtype, head size, launch, variant
Timings = dict[int, dict[Launch, float]]  # by T: seconds of each launch
Problem = tuple[str, str, int]  # kernel, dtype, head size


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
    return {job: found.get(job, {"unchecked": "no time was left, or the compiler crashed"}) for job in jobs}


def compile_some(todo: Any, done: Any) -> None:
    """A worker: takes jobs until the queue is empty."""
    while True:
        try:
            job = todo.get(timeout=1)
        except queue.Empty:
            return
        done.put((job, compile_and_check(job, torch.device("cuda"))))
        torch.cuda.synchronize()  # after an illegal access it raises: this process has lost its GPU, and ends


def compile_and_check(job: Job, device: torch.device) -> dict[str, Any]:
    """Runs a launch once → registers, spills, shared memory and its error relative to the allowed one; `unavailable`
    and why, if it does not run or computes something else."""
    kernel, dtype, head_size, launch, variant = job
    found: dict[str, Any] = {}
    with reasons(found, "unavailable"):
        compiled, error = checked_case(dtype, head_size, variant, device).check(kernel, launch)
        found["error"] = round(error, 3) if math.isfinite(error) else None
        if not error <= 1:
            found["unavailable"] = f"wrong results: {error:.3g} times the error that is allowed"
        if compiled is not None:  # in the interpreter nothing is
            found |= {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}
    return found


@lru_cache(maxsize=2)  # each holds some of the memory
def checked_case(dtype: str, head_size: int, variant: str, device: torch.device) -> CheckedCase:
    T, group, masked = VARIANTS[variant]
    rows, channels = CHECKED_ROWS, CHANNELS
    if device.type == "cpu":
        T, rows, channels = T // 16, 1, 2 * group * head_size
    return CheckedCase(T, rows * T, head_size, dtype, device, channels, group=group, masked=masked)


# ---- Timing ----------------------------------------------------------------------------------------------------------


def time_kernel(
    kernel: str, dtype: str, D: int, launches: list[Launch], device: torch.device, deadline: Deadline
) -> Timings:
    """A sweep at every T, or at the first one if the time is over; a T at which nothing runs is left out."""
    tokens, channels, lengths = (TOKENS, CHANNELS, LENGTHS[dtype]) if device.type == "cuda" else (32, 32, (32,))
    timings: Timings = {}
    for T in lengths if deadline.left() > 0 else lengths[:1]:
        with reasons({}, "not here"):
            case = Case(T, tokens, D, dtype, device, channels)
            timings[T] = sweep(partial(case.launch, kernel), launches, device)
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
    if not timings:
        return []
    everywhere = set.intersection(*(set(times) for times in timings.values()))
    best = {T: min(times.values()) for T, times in timings.items()}
    scores = {launch: statistics.geometric_mean(timings[T][launch] / best[T] for T in timings) for launch in everywhere}
    return sorted(scores.items(), key=lambda item: (item[1], item[0][:5]))


def choose(timings: Timings, present: Launch, allowed: Collection[Launch]) -> dict[str, Any]:
    """The best of the launches that are allowed, and how far behind it others are (0.02: 2 % slower)."""
    ranked = rank(timings)
    (best, score), *others = [(launch, score) for launch, score in ranked if launch in allowed]
    behind = {launch: round(other / score - 1, 3) for launch, other in ranked}
    return {
        "best": best,
        "second": others[0][0] if others else None,
        "second_behind": behind[others[0][0]] if others else None,
        "present": present,
        "present_behind": behind.get(present),
        "fastest_at": {
            T: (min(times, key=lambda launch: times[launch]), round(times[best] / min(times.values()) - 1, 3))
            for T, times in timings.items()
        },
        "ahead_but_refused": [launch for launch, other in ranked if other < score],
    }


def by_form(timings: Timings, tma: bool) -> Timings:
    """Without the launches by TMA, if not tma; a T at which nothing is left is left out."""
    kept = {T: {launch: times[launch] for launch in times if tma or not launch.tma} for T, times in timings.items()}
    return {T: times for T, times in kept.items() if times}


# ---- The whole run ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    device = choose_device("bench/tune_attention.py", "--interpret", arguments.interpret)
    tiny = device.type == "cpu"
    torch.manual_seed(1337)
    deadline = Deadline(arguments.minutes)
    facts = {**hardware(), **card(device)}
    problems = [(dtype, D) for dtype in arguments.dtypes for D in ((16,) if tiny else arguments.head_sizes)]
    path = None if tiny and arguments.out is None else new_result("tune_attention", arguments.out or RESULTS)
    jobs = to_compile(problems, facts.get("architecture", "other"), 3 if tiny else None)
    compiled = compile_here(jobs, COMPILE_SHARE * deadline.left(), device)
    timings: dict[Problem, Timings] = {job[:3]: {} for job in jobs}

    def save() -> dict[str, Any]:
        figures = figures_of(problems, facts, timings, compiled)
        if path is not None:
            save_results(path, figures)
        return figures

    save()
    print(f"{deadline.left():.0f} s are left to time them", flush=True)
    for problem in timings:
        launches = [job[3] for job in jobs if job[:3] == problem and runs(compiled[job])]
        timings[problem] = time_kernel(*problem, launches, device, deadline)
        save()  # what follows may crash, or take longer than there is time
    compiled |= compile_here(finalists(timings), max(30.0, deadline.left()), device)
    figures = save()
    print(*map(describe, figures["chosen"]), *figures["rows"], sep="\n", flush=True)
    if tiny:
        print("interpreted on the CPU: the script works; the timings mean nothing")
    print("nothing is written" if path is None else f"written: {path}")
    return 0


def figures_of(
    problems: list[tuple[str, int]], facts: dict[str, Any], timings: Mapping[Problem, Timings],
    compiled: Mapping[Job, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """The result so far, ready for JSON."""
    chosen, rows = choose_rows(problems, facts.get("architecture", "other"), timings, compiled)
    plain = [record(job, timings[job[:3]], found) for job, found in compiled.items() if job[4] == "plain"]
    return {
        "bench": "tune_attention",
        "commit": commit_of(ROOT),
        "hardware": facts,
        "launches": plain,
        "chosen": chosen,
        "rows": rows,
        "variants": [record(job, {}, found) for job, found in compiled.items() if job[4] != "plain"],
    }


def choose_rows(
    problems: list[tuple[str, int]], architecture: str, timings: Mapping[Problem, Timings],
    compiled: Mapping[Job, dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """The choice for each table and kernel, and the rows as they are written in model.py."""
    chosen: list[dict[str, Any]] = []
    lines = []
    for table in TABLES:
        for dtype, D in problems:
            choices = [choose_for(table, kernel, dtype, D, architecture, timings, compiled) for kernel in KERNELS]
            if None in choices:
                lines.append(f"{table} {dtype} D={D}: no row: of a kernel nothing was timed, or everything refused")
                continue
            chosen += choices
            row = ", ".join(show(choice["best"]) for choice in choices)
            key = f'"{architecture}", {getattr(torch, dtype).itemsize}, {64 if D <= 64 else 128}'
            open_ones = dict.fromkeys(variant for choice in choices for variant in choice["unchecked"])
            lines.append(f"{table}: ({key}): ({row})," + f"  # not checked: {', '.join(open_ones)}" * bool(open_ones))
    return chosen, lines


def compile_here(jobs: list[Job], seconds: float, device: torch.device) -> dict[Job, dict[str, Any]]:
    """compile_all on a GPU; in the interpreter one after the other."""
    if device.type == "cpu" or not jobs:
        return {job: compile_and_check(job, device) for job in jobs}
    print(f"{len(jobs)} launches to compile on {os.cpu_count()} cores", flush=True)
    compiled = compile_all(jobs, seconds)
    print(f"{sum(map(runs, compiled.values()))} of them run here, with right results", flush=True)
    wrong = [describe_job(job) for job, found in compiled.items() if "unavailable" in found and "error" in found]
    print(*(f"wrong results: {job}" for job in wrong), sep="\n", end="\n" * bool(wrong), flush=True)
    return compiled


def runs(found: dict[str, Any]) -> bool:
    """Whether a launch was run, with right results."""
    return "unavailable" not in found and "unchecked" not in found


def finalists(timings: Mapping[Problem, Timings]) -> list[Job]:
    """The best few launches of each kernel and form, in every variant but the plain one; the best of all first."""
    jobs: list[Job] = []
    for place in range(FINALISTS):
        for problem, own in timings.items():
            for tma in TABLES.values():
                for launch, _ in rank(by_form(own, tma))[place : place + 1]:
                    jobs += [(*problem, launch, variant) for variant in VARIANTS if variant != "plain"]
    return list(dict.fromkeys(jobs))


def choose_for(
    table: str, kernel: str, dtype: str, D: int, architecture: str,
    timings: Mapping[Problem, Timings], compiled: Mapping[Job, dict[str, Any]],
) -> dict[str, Any] | None:  # fmt: skip
    """choose, of the launches that are right in every variant, else of those that are not known to be wrong anywhere.
    One with more than MOST_SPILLS is never chosen. None if nothing is left."""
    problem = kernel, dtype, D
    own = by_form(timings[problem], TABLES[table])
    ranked = [launch for launch, _ in rank(own)]
    found = {launch: {v: compiled.get((*problem, launch, v), {"unchecked": ""}) for v in VARIANTS} for launch in ranked}
    fine = [
        launch
        for launch, results in found.items()
        if not any("unavailable" in result for result in results.values())
        and (results["plain"].get("spills") or 0) <= MOST_SPILLS
    ]
    checked = [launch for launch in fine if all(map(runs, found[launch].values()))]
    if not fine:
        return None
    choice = choose(own, present(architecture, dtype, D, kernel, table), checked or fine)
    results = found[choice["best"]]
    choice["unchecked"] = [variant for variant, result in results.items() if not runs(result)]
    return {"table": table, "kernel": kernel, "dtype": dtype, "D": D, **choice, "compiled": results}


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


def to_compile(problems: list[tuple[str, int]], architecture: str, most: int | None) -> list[Job]:
    """The launches of the tables and the candidates, at most so many of each kernel. The kernels take turns, so that
    each has some where the time ends before all are compiled."""
    lists = []
    for dtype, D in problems:
        for kernel in KERNELS:
            now = [present(architecture, dtype, D, kernel, table) for table in TABLES]
            launches = list(dict.fromkeys(now + candidates(kernel, dtype, D)))[:most]
            lists.append([(kernel, dtype, D, launch, "plain") for launch in launches])
    return [job for turn in itertools.zip_longest(*lists) for job in turn if job is not None]


def record(job: Job, timings: Timings, compiled: dict[str, Any]) -> dict[str, Any]:
    """A launch's line in the JSON: microseconds by T, and what the compiler said."""
    kernel, dtype, D, launch, variant = job
    found = {"kernel": kernel, "dtype": dtype, "D": D, "launch": launch, "variant": variant}
    if timings:
        found["microseconds"] = {T: round(1e6 * times[launch], 1) for T, times in timings.items() if launch in times}
    return found | compiled


def describe_job(job: Job) -> str:
    kernel, dtype, D, launch, variant = job
    return f"{kernel} {dtype} D={D} {show(launch)} {variant}"


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
        line += "\n    faster, but with many spills or not in every variant: " + ", ".join(
            map(show, choice["ahead_but_refused"])
        )
    return line


if __name__ == "__main__":
    run_script(main)
