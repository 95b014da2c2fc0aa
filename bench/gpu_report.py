"""The final table of bench/gpu_session.py: what was reached, beside the marks that were set. Needs no GPU and no torch.

Everything is taken from the result, which may lack any part, or hold half of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

RIVALS = ("cudnn", "flash")
OUTPUTS = ("out", "dq", "dk", "dv")
FORWARD_OF_CUDNN, BACKWARD_OF_FLASH = 1.0, 1.1  # at head size 64, and at every head size
TRAIN_TOKENS, DECODE_TOKENS = 600_000, 3_500  # a second, of gpt2_124m: training, and decoding one sample
GOAL, GOAL_SECONDS = "seconds_to_1.47", 60


def report(result: dict[str, Any]) -> str:
    parts = result.get("parts", {})
    lines = [*heading(result), *statuses(parts), *tests(parts.get("tests", {}))]
    for name, title in (("attention", "as shipped"), ("attention_tuned", "tuned")):
        lines += attention(part(parts, name).get("speed", []), title)
    lines += [*errors(part(parts, "attention_tuned").get("errors", [])), *tuned(part(parts, "tune"))]
    lines += [
        *profile(part(parts, "profile")),
        *small_steps(part(parts, "small_steps").get("rows", [])),
        *train(part(parts, "train")),
        *generate(part(parts, "generate")),
        *short_run(part(parts, "short_run")),
    ]
    if result.get("smoke"):
        lines += ["", "tried out on a CPU: no figure means anything"]
    else:
        lines += ["", "marks:", *marks(parts)]
    return "\n".join(lines) + "\n"


def part(parts: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = parts.get(name, {}).get("result", {})
    return found


def heading(result: dict[str, Any]) -> list[str]:
    """Date and commit; the card, as any part names it, and its speed."""
    lines = [f"{result['date']}, commit {result.get('commit')}"] if "date" in result else []
    for row in result.get("parts", {}).values():
        figures = row.get("result", {})
        hardware, peaks = figures.get("hardware", figures), figures.get("ceilings", {})
        if "gpu" in hardware:
            rates = f": {peaks.get('matmul_tflops')} TFLOP/s of bfloat16 products, "
            rates += f"{peaks.get('copy_tb_per_second')} TB/s of a copy"
            card = f"{hardware['gpu']}, torch {hardware['torch']}, triton {hardware.get('triton')}"
            return [*lines, card + rates * bool(peaks)]
    return lines


def statuses(parts: dict[str, Any]) -> Iterable[str]:
    for name, row in parts.items():
        why = f": {row['why']}" if "why" in row else ""
        yield f"{name:16} {row['status']}, {row.get('seconds', 0):.0f} of {row.get('limit_seconds', 0)} s{why}"


def tests(row: dict[str, Any]) -> list[str]:
    outcomes = row.get("tests", {})
    if not outcomes:
        return []
    counts = ", ".join(f"{len(names)} {outcome}" for outcome, names in outcomes.items())
    broken = [name for outcome in ("failed", "error") for name in outcomes.get(outcome, ())]
    return ["", f"gpu tests: {counts}", *(f"  {name}" for name in broken)]


def attention(rows: list[dict[str, Any]], title: str) -> list[str]:
    """TFLOP/s, a line for each direction, head size and length; ours relative to cuDNN and flash."""
    lines: list[str] = []
    for (direction, D, T), speeds in by_shape(rows).items():
        if not lines:
            names = list(speeds)
            head = " ".join(f"{name:>10}" for name in [*names, *(f"/ {rival}" for rival in RIVALS)])
            lines = ["", f"attention {title}, TFLOP/s of causal attention in bfloat16", f"{'':24} {head}"]
        ratios = [ratio(speeds, rival) for rival in RIVALS]
        cells = [show(speeds.get(name), ".0f") for name in names] + [show(value, ".2f") for value in ratios]
        lines.append(f"{direction:8} D {D:<4} T {T:<6,} " + " ".join(f"{cell:>10}" for cell in cells))
    return lines


def errors(rows: list[dict[str, Any]]) -> list[str]:
    """Of out and the gradients, the largest, and that relative to flash's."""
    lines = [
        f"{row['contender']:8} D {row['D']:<4} T {row['T']:<6,} {max(row[name] for name in OUTPUTS):.2e}"
        + (f", {row['of_flash']:.2f} × flash" if "of_flash" in row else "")
        for row in rows
        if "out" in row
    ]
    return ["", "errors relative to float64, the largest of out, dq, dk and dv", *lines] if lines else []


def tuned(figures: dict[str, Any]) -> list[str]:
    """Rows for model.py, and how much slower its present launches are."""
    rows = figures.get("rows", [])
    behind = [
        f"{choice['table']} {choice['kernel']} D {choice['D']}: the present one {choice['present_behind']:+.1%}"
        for choice in figures.get("chosen", [])
        if choice.get("present_behind")
    ]
    wrong = sum(
        "unavailable" in row and "error" in row for key in ("launches", "variants") for row in figures.get(key, [])
    )
    count = [f"{wrong} launches have wrong results: see their `error` in the result"] if wrong else []
    return ["", "tuned rows for model.py", *rows, *behind, *count] if rows else []


def by_shape(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, float | None]]:
    """Direction, head size and T → TFLOP/s of each contender, None where it does not run; forward first."""
    found: dict[tuple[str, int, int], dict[str, float | None]] = {}
    for row in rows:
        if row["problem"] == "causal":
            shape = row["direction"], row["D"], row["T"]
            found.setdefault(shape, {})[row["contender"]] = row.get("tflops")
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != "forward", *item[0][1:])))


def ratio(speeds: dict[str, float | None], rival: str) -> float | None:
    mine, other = speeds.get("triton"), speeds.get(rival)
    return mine / other if mine and other else None


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def profile(figures: dict[str, Any]) -> list[str]:
    """Where the time of a training step and of a decode step goes: kinds of kernels, idle time, host."""
    lines: list[str] = []
    for preset, row in figures.get("training", {}).items():
        lines += ["", f"{preset}, a compiled step: {row['wall_us'] / 1e3:.2f} ms", *kinds(row, 1e3, "ms")]
    for name, row in figures.get("decoding", {}).items():
        line = f"decoding, {name}: {row['loop_us']:.0f} µs a step"
        if alone := row.get("replays_us"):
            line += f", its graphs alone {alone:.0f}, so {row['loop_us'] - alone:.0f} are the host's"
        lines += ["", line]
        for graph, replay in row["replays"].items():
            line = f"  graph of {graph}: {replay['us']:.0f} µs a replay, {replay['host_us']:.0f} to queue it"
            kernels = f"; {replay['launches']} kernels, busy {replay['busy_us']:.0f}" if "busy_us" in replay else ""
            lines.append(line + kernels)
        if "loop" in row:
            lines += [f"  the first {row['profiled_tokens']} steps: {row['loop']['wall_us']:.0f} µs a step"]
            lines += kinds(row["loop"], 1, "µs")
    missing = [f"{name}: not measured: {reason}" for name, reason in figures.get("unavailable", {}).items()]
    return [*lines, *missing]


def kinds(row: dict[str, Any], unit: float, name: str) -> Iterable[str]:
    """The groups of kernels of a step, with the time in which nothing runs; shares of the step's time without the
    profiler."""
    if "busy_us" not in row:
        return
    yield f"  {row['launches']:.0f} launches, device busy {row['busy_us'] / unit:.2f} {name}"
    idle = {"group": "idle", "us": row["idle_us"], "share": row["idle_us"] / row["wall_us"]}
    for group in [*row["groups"], idle]:
        launches = f"{group['launches']:8.1f} launches" if "launches" in group else ""
        yield f"  {group['group']:34} {group['us'] / unit:9.2f} {name} {group['share']:6.1%}{launches}"


def small_steps(rows: list[dict[str, Any]]) -> list[str]:
    """ms of a step by shape and tokens: launched by Python, recorded, compiled as well; predicted for recorded ones."""
    kinds = ("eager", "recorded", "compiled")
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        shape = found.setdefault((row["layers"], row["width"], row["tokens"]), {"predicted": row["predicted_ms"]})
        shape[row["kind"]] = row["passes_ms"] + row["optimizer_ms"]
    title = f"{'steps of small models, ms':32}" + "".join(f" {kind:>10}" for kind in (*kinds, "predicted"))
    lines = [
        f"{layers} x {width}, {tokens:,} tokens".ljust(32)
        + "".join(f" {show(row.get(kind), '.2f'):>10}" for kind in (*kinds, "predicted"))
        for (layers, width, tokens), row in found.items()
    ]
    return ["", title, *lines] if lines else []


def train(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:32} {row['tokens_per_second']:>10,} {show(row.get('mfu'), '.1%'):>8} {row.get('memory_gib', 0):>8} GiB"
        for name, row in figures.get("sides", {}).items()
        if "tokens_per_second" in row
    ]
    lines += [f"{name:32} not measured: {reason}" for name, reason in figures.get("unavailable", {}).items()]
    return ["", f"{'training steps':32} {'tokens/s':>10} {'MFU':>8} {'peak':>8}", *lines] if lines else []


def generate(figures: dict[str, Any]) -> list[str]:
    lines = []
    for shape in figures.values():
        if not isinstance(shape, dict) or "median_tokens_per_second" not in shape:
            continue
        for side, speed in shape["median_tokens_per_second"].items():
            line = f"{side:16} {speed:>10,.0f} tokens/s"
            if isinstance(bound := shape["bound"].get(side), dict):  # on a GPU there is one for each of our sides
                line += f", {bound['share']:.0%} of the bandwidth bound {bound['tokens_per_second']:,.0f}"
            lines.append(f"{line}; first request {shape['first_request'][side]['seconds']:.2f} s")
    return ["", "generation", *lines] if lines else []


def short_run(figures: dict[str, Any]) -> list[str]:
    if not figures:
        return []
    reached = [f"{row['val_loss']:.4f} after {row['seconds']:.0f} s" for row in figures["evaluations"]]
    picked = reached[:: max(1, len(reached) // 6)]
    command = " ".join(figures["command"][:2])
    return ["", f"{command}: val loss {', '.join(picked)}; best {figures['best_val_loss']}"]


def marks(parts: dict[str, Any]) -> Iterable[str]:
    """A line for each mark: reached, missed, or not measured."""
    as_shipped, as_tuned = (by_shape(part(parts, name).get("speed", [])) for name in ("attention", "attention_tuned"))
    speeds = as_shipped | as_tuned
    forward = {shape: ratio(row, "cudnn") for shape, row in speeds.items() if shape[0] == "forward" and shape[1] == 64}
    backward = {shape: ratio(row, "flash") for shape, row in speeds.items() if shape[0] == "backward"}
    yield mark(f"forward ≥ {FORWARD_OF_CUDNN} × cuDNN, D 64", forward.values(), FORWARD_OF_CUDNN)
    yield mark(f"backward ≥ {BACKWARD_OF_FLASH} × FlashAttention-2", backward.values(), BACKWARD_OF_FLASH)
    sides = part(parts, "train").get("sides", {})
    best = max(
        (row.get("tokens_per_second", 0) for name, row in sides.items() if name.startswith("gpt2_124m")), default=None
    )
    yield mark(f"training gpt2_124m ≥ {TRAIN_TOKENS:,} tokens/s", [best], TRAIN_TOKENS)
    shape = part(parts, "generate").get("124m", {})
    decoding = shape.get("median_tokens_per_second", {}).get("sprout")
    yield mark(f"decoding 124M, one sample ≥ {DECODE_TOKENS:,} tokens/s", [decoding], DECODE_TOKENS)
    run = part(parts, "short_run")
    preset = run["command"][1] if GOAL in run else "shakespeare_char_best"
    title = f"{preset} to 1.47 in under {GOAL_SECONDS} s"
    if GOAL not in run:
        yield mark(title, [], 0)
    elif run[GOAL] is None and run["seconds"] < GOAL_SECONDS:
        yield mark(f"{title}: ended after {run['seconds']:.0f} s", [], 0)
    else:
        seconds = run[GOAL]
        is_reached = seconds is not None and seconds < GOAL_SECONDS
        yield f"  {'reached' if is_reached else 'missed':12} {title} ({'never' if seconds is None else seconds})"


def mark(title: str, values: Iterable[float | None], least: float) -> str:
    measured = [value for value in values if value is not None]
    if not measured:
        return f"  {'not measured':12} {title}"
    shown = ", ".join(f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in measured)
    return f"  {'reached' if min(measured) >= least else 'missed':12} {title} ({shown})"
