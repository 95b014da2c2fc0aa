"""The lines that show an estimate of training/cluster.py to the user: one number of GPUs in detail, several as a table."""

from __future__ import annotations

from collections.abc import Sequence

from training.cluster import (
    NODE,
    TOKENS_PER_PARAMETER,
    Estimate,
    Job,
    choose_mode,
    fitting_step,
    largest,
    replace,
    show_gib,
)

UNITS = (("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0), ("days", 86_400.0), ("years", 365 * 86_400.0))
UNIT_LIMITS = {"ms": 1.0, "s": 100.0, "min": 6000.0, "h": 48 * 3600.0, "days": 730 * 86_400.0}  # seconds


def describe_cluster(estimates: Sequence[Estimate], name: str, why_gpu: str, asked: Job) -> list[str]:
    """estimates: one for each number of GPUs. name: of the GPU in the table of devices; why_gpu: a note on it. asked: as
    the options have it."""
    first = estimates[0]
    gpu, model = first.gpu, first.model
    flops = f"{gpu.flops / 1e12:,.4g} TFLOP/s"
    lines = [
        f"many GPUs: {name}{why_gpu}, {gpu.memory:g} GiB, {flops}, nodes of {NODE}; closed forms, see README, \"Many GPUs\"",
        f"  model: {model.parameters:,} parameters, {show_count(model.flops_per_token)}FLOP per token,"
        f" {model.n_layer} layers, {model.n_embd} channels, context {model.block_size}",
    ]
    lines += _detail(first) if len(estimates) == 1 else _table(estimates)
    lines += [line for estimate in estimates if (line := _divided(estimate, asked))]
    lines += [line for estimate in estimates if (line := _too_large(estimate, name))]
    return lines + [_largest(estimates)]


def _detail(estimate: Estimate) -> list[str]:
    job, (fast, expected, slow) = estimate.job, estimate.seconds
    time, gpus = estimate.times[1], estimate.gpus
    parts = ", ".join(f"{part} {size / 2**30:.3g}" for part, size in estimate.memory.items())
    input_ = show_span(time.input) if time.input else "hidden"
    size = estimate.job.checkpoint_bytes(estimate.model)
    return [
        f"  step: {job.tokens_per_step:,} tokens = {show_plural(gpus, 'GPU')} × {estimate.micro_batches} micro-batch"
        f"{'es' * (estimate.micro_batches > 1)} × {show_plural(estimate.rows, 'row')} of {estimate.model.block_size:,}",
        f"  parallel: {estimate.mode} ({estimate.reason})",
        f"  memory: {estimate.used_bytes / 2**30:.3g} of {estimate.gpu.memory:g} GiB: {parts}",
        f"  time of a step: {show_span(expected)} ({show_range(fast, slow)}): compute {show_span(time.compute)},"
        f" communication not hidden {show_span(time.communication)}, optimizer {show_span(time.optimizer)}, input {input_}",
        f"  bound by: {show_bound(estimate)}",
        f"  speed: {estimate.tokens_per_second:,.0f} tokens/s, {estimate.tokens_per_second / gpus:,.0f} per GPU,"
        f" {estimate.utilization:.0%} of the peak (MFU)",
        f"  checkpoint: {show_gib(size)}, written in {show_span(estimate.save_seconds)}",
        f"  failures: {show_small(estimate.failures)} expected in the run, one in {show_span(estimate.mean_seconds)};"
        f" --save_interval={show_interval(estimate)} (every {show_span(estimate.interval_seconds)}) loses least,"
        f" {estimate.lost_share:.2%} of the time",
        f"  run: {_length(estimate)}: {show_range(*estimate.run_seconds[::2])}, {show_dollars(estimate)}"
        f" (${estimate.gpu.price[0]:g} to ${estimate.gpu.price[1]:g} a GPU-hour)",
        f"  1e9 tokens: {show_range(*(1e9 / job.tokens_per_step * seconds for seconds in (fast, slow)))}",
    ]


def _table(estimates: Sequence[Estimate]) -> list[str]:
    head = ["GPUs", "parallel", "rows", "GiB", "step", "tokens/s", "MFU", "bound by", "run", "dollars", "save every"]
    rows = [head]
    for estimate in estimates:
        row = [f"{estimate.gpus:,}{'*' * _is_larger(estimate, estimates)}", estimate.mode]
        row += [f"{estimate.micro_batches}×{estimate.rows}", f"{estimate.used_bytes / 2**30:.3g}"]
        if estimate.fits:
            row += [show_span(estimate.seconds[1]), show_count(estimate.tokens_per_second, 3)]
            row += [f"{estimate.utilization:.0%}", estimate.times[1].bound]
            row += [show_range(*estimate.run_seconds[::2]), show_dollars(estimate, "-").replace("$", "")]
            row += [f"{show_interval(estimate)} steps"]
        else:
            row += ["does not fit", *[""] * 6]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[4] = max(len(row[4]) for row in rows if row[4] != "does not fit")
    lines = list[str]()
    for row in rows:
        cells = [
            cell.ljust(width) if name in ("parallel", "bound by") or cell == "does not fit" else cell.rjust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return [f"  run: {_length(estimates[0])}; rows: micro-batches × rows, on each GPU", *lines]


def _length(estimate: Estimate) -> str:
    if estimate.job.tokens is None:
        what = f"{estimate.tokens:,} tokens"
        return f"no number of steps is given; for {TOKENS_PER_PARAMETER} tokens a parameter (Hoffmann et al. 2022), {what}"
    return f"{estimate.tokens:,} tokens, {estimate.steps:,} steps"


def _is_larger(estimate: Estimate, estimates: Sequence[Estimate]) -> bool:
    return estimate.job.tokens_per_step > min(other.job.tokens_per_step for other in estimates)


def _divided(estimate: Estimate, asked: Job) -> str | None:
    """What a number of tokens that the GPUs do not divide is replaced by."""
    block_size, found = estimate.model.block_size, estimate.job.tokens_per_step
    if found == asked.tokens_per_step:
        return None
    rows, gpus = asked.tokens_per_step // block_size, estimate.gpus
    assert found == fitting_step(asked.tokens_per_step, block_size, gpus)
    steps = "" if asked.tokens is None else f" --max_steps={estimate.steps}"
    return (
        f"  * the {rows:,} rows of a step (tokens_per_step={asked.tokens_per_step}) do not divide by {gpus:,} GPUs;"
        f" the figures are for --tokens_per_step={found}{steps}"
    )


def _too_large(estimate: Estimate, name: str) -> str | None:
    """What to do where the model does not fit."""
    if estimate.fits:
        return None
    model, job = estimate.model, estimate.job
    size = f"{show_gib(estimate.used_bytes)} do not fit into {estimate.gpu.memory:g} GiB on {estimate.gpus:,} × {name}"
    advice = "more GPUs (weights are divided among them)" if estimate.mode != "ddp" else "--parallel=fsdp"
    if not job.activation_checkpointing and estimate.memory["activations"] > estimate.used_bytes / 4:
        advice = "a smaller --block_size"
    return f"  {size}, with {show_plural(estimate.rows, 'row')} of {model.block_size:,} at a time: try {advice}, or a larger GPU"


def _largest(estimates: Sequence[Estimate]) -> str:
    found = []
    for estimate in estimates:
        sizes = []
        for repeats in (False, True):
            job = replace(estimate.job, activation_checkpointing=repeats, micro_batch=None)
            model, _ = largest(estimate.model, job, estimate.gpu, estimate.gpus)
            sizes.append(show_count(model.parameters, 2))
        found.append(f"{sizes[0]} ({sizes[1]}) on {estimate.gpus:,}")
    mode = choose_mode(largest(estimates[-1].model, estimates[-1].job, estimates[-1].gpu, estimates[-1].gpus)[0],
                       estimates[-1].job, estimates[-1].gpu, estimates[-1].gpus)  # fmt: skip
    how = f" by {mode}" if len(estimates) == 1 else ""
    return f"  largest model of this shape, one row at a time (with activation checkpointing): {', '.join(found)}{how}"


# ---- Numbers as text -------------------------------------------------------------------------------------------------


def show_bound(estimate: Estimate) -> str:
    bound, time = estimate.times[1].bound, estimate.times[1]
    if bound == "kernel launches":
        tokens = estimate.rows * estimate.model.block_size
        return f"kernel launches: {tokens:,} tokens of this model at a time are too few for the GPU"
    share = {"compute": time.compute, "communication": time.communication, "optimizer": time.optimizer}
    return f"{bound}, {share.get(bound, time.input) / time.total:.0%} of the step"


def show_count(number: float, digits: int = 3) -> str:
    """With G and so on: 855 M, 1.56 B, 40 T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{float(f'{number / size:.{digits}g}'):,g}{unit}"
    return f"{number:.0f}"


def show_span(seconds: float) -> str:
    unit, size = _unit(seconds)
    return f"{_digits(seconds / size)} {unit}"


def show_range(low: float, high: float) -> str:
    unit, size = _unit(high)
    if low < size / 10:
        return f"{show_span(low)} to {show_span(high)}"
    first, last = _digits(low / size), _digits(high / size)
    return f"{first} {unit}" if first == last else f"{first}-{last} {unit}"


def show_dollars(estimate: Estimate, to: str = " to ") -> str:
    low, high = (f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2f}" for number in estimate.dollars)
    return f"${low}{to}${high}"


def show_interval(estimate: Estimate) -> str:
    """Steps between checkpoints, two digits of them; those of the run where it is shorter."""
    steps = min(estimate.steps, max(1.0, estimate.interval_seconds / estimate.seconds[1]))
    return f"{int(float(f'{steps:.2g}'))}"


def show_small(number: float) -> str:
    return f"{number:.2g}" if number < 100 else f"{number:,.0f}"


def show_plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _unit(seconds: float) -> tuple[str, float]:
    return next((unit, size) for unit, size in UNITS if seconds < UNIT_LIMITS.get(unit, float("inf")))


def _digits(number: float) -> str:
    return f"{number:.2g}" if number < 100 else f"{number:,.0f}"
