"""The lines that show estimates of training/cluster_cost.py: one number of GPUs in detail, several as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from training.cluster import NODE, Job, largest, show_size
from training.cluster_cost import TOKENS_PER_PARAMETER, Estimate, StepTime

WIDTH = 100  # columns
# Unit: its seconds, and up to how many seconds it is used.
UNITS = {
    "ms": (1e-3, 1.0),
    "s": (1.0, 100.0),
    "min": (60.0, 6000.0),
    "h": (3600.0, 48 * 3600.0),
    "days": (86_400.0, 730 * 86_400.0),
    "years": (365 * 86_400.0, float("inf")),
}


def describe_cluster(estimates: Sequence[Estimate], name: str, asked: Job) -> list[str]:
    """estimates: one for each number of GPUs. name: of the GPU, with a note if there is one. asked: as the options have
    it."""
    first = estimates[0]
    gpu, model = first.gpu, first.model
    vocabulary = model.head_parameters // model.n_embd
    lines = [
        f"on many GPUs: {name}, {gpu.memory:g} GiB, {gpu.flops / 1e12:,.4g} TFLOP/s, {NODE} in a node (closed forms,"
        " nothing is measured)",
        f"model: {model.parameters:,} parameters, {show_count(model.flops_per_token)} FLOP per token, {model.n_layer}"
        f" layers, {model.n_embd:,} channels, context {model.block_size:,}, vocabulary {vocabulary:,}",
    ]
    lines = _wrapped(lines[:1], "") + _wrapped(lines[1:])
    if len(estimates) == 1:
        lines += _wrapped(_detail(first))
    else:
        length = f"{_length(first)}; rows: micro-batches × rows of each GPU"
        lines += _wrapped([length]) + _table(estimates, asked)
    others = [note for estimate in estimates for note in _notes(estimate, asked)]
    return lines + _wrapped([*others, _largest(estimates)])


def _wrapped(lines: Sequence[str], indent: str = "  ") -> list[str]:
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
        )
    ]


def _detail(estimate: Estimate) -> list[str]:
    job, model, gpus = estimate.job, estimate.model, estimate.gpus
    (fast, expected, slow), time, gpu = estimate.seconds, estimate.times[1], estimate.gpu
    parts = ", ".join(f"{part} {show_size(size)}" for part, size in estimate.memory.items())
    accumulated = f"{estimate.micro_batches} micro-batch{'es' * (estimate.micro_batches > 1)}"
    checkpoint = show_size(estimate.job.checkpoint_bytes(model))
    lines = [
        f"step: {job.tokens_per_step:,} tokens = {show_plural(gpus, 'GPU')} × {accumulated} ×"
        f" {show_plural(estimate.rows, 'row')} of {model.block_size:,}",
        f"parallel: {estimate.mode} ({estimate.reason})",
        f"memory: {estimate.used_bytes / 2**30:.3g} of {gpu.memory:g} GiB of each GPU: {parts}",
    ]
    if not estimate.fits:
        return lines
    return [
        *lines,
        f"time of a step: {show_span(expected)} ({show_range(fast, slow)}): compute {show_span(time.compute)},"
        f" communication that it does not hide {show_span(time.communication)} (each GPU sends"
        f" {show_size(estimate.sent_bytes)}), optimizer {show_span(time.optimizer)}, input"
        f" {show_span(time.input) if time.input else 'hidden'}",
        f"bound by: {_bound(estimate, time)}",
        f"speed: {estimate.tokens_per_second:,.0f} tokens/s, {estimate.tokens_per_second / gpus:,.0f} per GPU,"
        f" {show_share(estimate.utilization)} of the peak (MFU); 1e9 tokens take"
        f" {show_range(*(1e9 / job.tokens_per_step * seconds for seconds in (fast, slow)))}",
        f"checkpoint: {checkpoint} in {show_span(estimate.save_seconds)}; failures: one in"
        f" {show_span(estimate.mean_seconds)}, {estimate.failures:.2g} expected in the run; {_saving(estimate)}",
        f"{_length(estimate)}: {show_range(*estimate.run_seconds[::2])}, {show_dollars(estimate)} dollars"
        f" ({gpu.price[0]:g} to {gpu.price[1]:g} a GPU-hour in 2026)",
    ]


def _bound(estimate: Estimate, time: StepTime) -> str:
    if time.bound == "kernel launches":
        tokens = estimate.rows * estimate.model.block_size
        return f"kernel launches ({tokens:,} tokens of this model at a time are too few for the GPU)"
    shares = {"compute": time.compute, "communication": time.communication, "optimizer": time.optimizer}
    return f"{time.bound}, {show_share(shares.get(time.bound, time.input) / time.total)} of the step"


def _saving(estimate: Estimate) -> str:
    every = f"one in {show_span(estimate.interval_seconds)}"
    if estimate.steps <= estimate.interval_steps:
        return f"a checkpoint at the end is enough ({every} would lose least)"
    return f"--save_interval={estimate.interval_steps}, {every}, loses least: {show_share(estimate.lost_share)}"


def _length(estimate: Estimate) -> str:
    tokens = f"{estimate.tokens:,} tokens"
    if estimate.job.tokens is None:
        many = f"{TOKENS_PER_PARAMETER} tokens a parameter (Hoffmann et al. 2022)"
        return f"run, whose steps are not given, so {many}: {tokens}"
    return f"run: {tokens}, {estimate.steps:,} steps"


def _table(estimates: Sequence[Estimate], asked: Job) -> list[str]:
    left = ("parallel", "bound by")
    head = ["GPUs", "parallel", "rows", "GiB", "step", "tokens/s", "MFU", "bound by", "run", "dollars", "save every"]
    has_star = any(estimate.job.tokens_per_step != asked.tokens_per_step for estimate in estimates)
    rows = [head]
    for estimate in estimates:
        star = "*" if estimate.job.tokens_per_step != asked.tokens_per_step else " " * has_star
        row = [f"{estimate.gpus:,}{star}", estimate.mode, f"{estimate.micro_batches}×{estimate.rows}"]
        row.append(f"{estimate.used_bytes / 2**30:.3g}")
        if estimate.fits:
            row += [show_span(estimate.seconds[1]), show_count(estimate.tokens_per_second)]
            row += [show_share(estimate.utilization), estimate.times[1].bound.replace("kernel ", "")]
            row += [show_range(*estimate.run_seconds[::2]), show_dollars(estimate, "-")]
            row.append("the end" if estimate.steps <= estimate.interval_steps else f"{estimate.interval_steps} steps")
        else:
            row += ["", "", "", "does not fit", "", "", ""]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _notes(estimate: Estimate, asked: Job) -> list[str]:
    """Where the GPUs do not divide the tokens of a step: what these were replaced by. Where the model does not fit:
    what would help."""
    job, model, gpus, notes = estimate.job, estimate.model, estimate.gpus, []
    if job.tokens_per_step != asked.tokens_per_step:
        rows = show_plural(asked.tokens_per_step // model.block_size, "row")
        steps = "" if asked.tokens is None else f" --max_steps={estimate.steps}"
        notes.append(
            f"* {rows} a step (--tokens_per_step={asked.tokens_per_step}) cannot be divided among {gpus:,} GPUs; the"
            f" figures are those of --tokens_per_step={job.tokens_per_step}{steps}"
        )
    if not estimate.fits:
        trials = {
            "--micro_batch_size=auto": replace(job, micro_batch=None),
            "--parallel=fsdp": replace(job, parallel="fsdp"),
            "--activation_checkpointing=true": replace(job, activation_checkpointing=True),
        }
        helps = [flag for flag, trial in trials.items() if estimate.with_job(trial).fits]
        memory = f"{estimate.used_bytes / 2**30:.3g} GiB do not fit into {estimate.gpu.memory:g}"
        rows = f"{show_plural(estimate.rows, 'row')} of {model.block_size:,} at a time"
        advice = helps[0] if helps else "more GPUs, more memory, or a smaller model"
        notes.append(f"on {show_plural(gpus, 'GPU')} {memory}, with {rows}; what would help: {advice}")
    return notes


def _largest(estimates: Sequence[Estimate]) -> str:
    found = []
    for estimate in estimates:
        jobs = [replace(estimate.job, activation_checkpointing=again, micro_batch=None) for again in (False, True)]
        models = [largest(estimate.model, job, estimate.gpu, estimate.gpus) for job in jobs]
        sizes = [show_count(model.parameters, 2) for model in models]
        found.append(f"{sizes[0]} ({sizes[1]}) on {estimate.gpus:,}")
    what = "largest model of this shape in that memory, one row at a time (with activation checkpointing)"
    return f"{what}: {', '.join(found)}"


# ---- Numbers as text -------------------------------------------------------------------------------------------------


def show_count(number: float, digits: int = 3) -> str:
    """Three digits, with k, M, G and T (in counts of parameters B for G)."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{float(f'{number / size:.{digits}g}'):,g}{unit}"
    return f"{number:.0f}"


def show_share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{100 * share:.2g}%"


def show_span(seconds: float) -> str:
    unit, size = _unit(seconds)
    return f"{_digits(seconds / size)} {unit}"


def show_range(low: float, high: float) -> str:
    unit, size = _unit(high)
    if low < size / 10:
        return f"{show_span(low)}-{show_span(high)}"
    first, last = _digits(low / size), _digits(high / size)
    return f"{first} {unit}" if first == last else f"{first}-{last} {unit}"


def show_dollars(estimate: Estimate, to: str = " to ") -> str:
    low, high = (f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2f}" for number in estimate.dollars)
    return f"{low}{to}{high}"


def show_plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _unit(seconds: float) -> tuple[str, float]:
    return next((unit, size) for unit, (size, limit) in UNITS.items() if seconds < limit)


def _digits(number: float) -> str:
    return f"{number:.2g}" if number < 100 else f"{number:,.0f}"
