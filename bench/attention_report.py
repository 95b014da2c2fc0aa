"""Reports the figures of bench/attention.py: ratios, targets, lines, a table for README, a plot. Needs no GPU.

A row is a dict: problem, T, D, direction and contender, then tflops, ms, spread, runs and memory_mib, or `unavailable`,
the reason.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from errors import UserError

# TFLOP/s on a Hopper GPU at T = 1k, 2k, 4k, 8k, 16k: "must" is what FlashAttention-2 reaches, "stretch" about
# FlashAttention-3.
TARGETS: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {
    ("forward", 64): {
        "must": (229, 262, 284, 295, 299),
        "good": (290, 340, 365, 375, 375),
        "stretch": (290, 371, 420, 460, 473),
    },
    ("forward", 128): {
        "must": (260, 298, 319, 333, 335),
        "good": (350, 420, 460, 475, 480),
        "stretch": (423, 521, 579, 602, 616),
    },
    ("backward", 64): {
        "must": (180, 222, 248, 265, 278),
        "good": (195, 255, 295, 315, 325),
        "stretch": (210, 310, 390, 450, 460),
    },
    ("backward", 128): {
        "must": (208, 254, 285, 299, 325),
        "good": (215, 270, 315, 335, 345),
        "stretch": (219, 347, 468, 539),
    },
}
TARGET_LENGTHS = (1024, 2048, 4096, 8192, 16384)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to the rows of one problem their speed relative to flash and cuDNN, and to ours the target that it meets."""
    speeds = {(row["direction"], row["contender"]): row["tflops"] for row in rows if "tflops" in row}
    for row in rows:
        for rival in ("flash", "cudnn"):
            if "tflops" in row and speeds.get((row["direction"], rival)):
                row[f"of_{rival}"] = round(row["tflops"] / speeds[row["direction"], rival], 2)
        if row["contender"] == "triton" and row["problem"] == "causal" and "tflops" in row:
            row["target"] = target_met(row["direction"], row["D"], row["T"], row["tflops"])
    return rows


def target_met(direction: str, head_size: int, length: int, tflops: float) -> str:
    """The highest of TARGETS that is met, "below must", or "" if this shape has none."""
    levels = TARGETS.get((direction, head_size), {})
    if not levels or length not in TARGET_LENGTHS:
        return ""
    asked = {
        level: dict(zip(TARGET_LENGTHS, values, strict=False)).get(length, math.inf) for level, values in levels.items()
    }
    return next((level for level in ("stretch", "good", "must") if tflops >= asked[level]), "below must")


def show(rows: list[dict[str, Any]]) -> None:
    """Prints errors and signatures: a line per row."""
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            ),
            flush=True,
        )


def show_speed(rows: list[dict[str, Any]]) -> None:
    """Prints a line per direction: TFLOP/s of every contender, ratios and target of ours."""
    for direction in ("forward", "backward"):
        mine = {row["contender"]: row for row in rows if row["direction"] == direction}
        if not mine:
            continue
        parts = [
            ", ".join(f"{name} {row['tflops']:.0f}" if "tflops" in row else f"{name} -" for name, row in mine.items())
        ]
        ours, where = mine.get("triton", {}), next(iter(mine.values()))
        parts += [f"{ours[f'of_{rival}']:.2f} x {rival}" for rival in ("flash", "cudnn") if f"of_{rival}" in ours]
        parts += [ours["target"]] if ours.get("target") else []
        print(
            f"{where['problem']:24} T={where['T']:<6} D={where['D']:<4} {direction:8}  {'; '.join(parts)}", flush=True
        )


def obstacles(rows: list[dict[str, Any]]) -> list[str]:
    """Which contender did not run where, and why: a line per contender and reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "unavailable" in row:
            where.setdefault((row["contender"], row["unavailable"]), []).append(
                f"{row['problem']} {row['direction']} T={row['T']} D={row['D']}"
            )
    return [
        f"{name} did not run ({len(places)} times, first {places[0]}): {reason}"
        for (name, reason), places in where.items()
    ]


def table(rows: list[dict[str, Any]], direction: str, head_size: int) -> str:
    """TFLOP/s of plain causal attention in Markdown: a row per contender, a column per T; "" if not measured."""
    mine = [row for row in rows if (row["problem"], row["direction"], row["D"]) == ("causal", direction, head_size)]
    if not mine:
        return ""
    lengths = sorted({row["T"] for row in mine})
    speeds = {(row["contender"], row["T"]): row.get("tflops") for row in mine}
    lines = [
        f"| {direction}, D = {head_size} | " + " | ".join(f"{T:,}" for T in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in dict.fromkeys(row["contender"] for row in mine):
        cells = ("-" if speeds.get((name, T)) is None else f"{speeds[name, T]:.0f}" for T in lengths)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(result: Path) -> Path:
    """Draws a result's TFLOP/s over T as a PNG beside it, a panel per direction and head size. Raises UserError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot is drawn with matplotlib, which is not installed: pip install matplotlib") from None
    try:
        figures = json.loads(result.read_text(encoding="utf-8"))
        rows = [row for row in figures["speed"] if row["problem"] == "causal" and "tflops" in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--plot={result}: no result of this bench ({error}); expected the JSON that it writes"
        ) from None
    if not rows:
        raise UserError(f"{result} holds no speeds to draw")
    panels = sorted({(row["D"], row["direction"]) for row in rows}, key=lambda panel: (panel[0], panel[1] != "forward"))
    figure = Figure(figsize=(11, 4 * ((len(panels) + 1) // 2)), dpi=150, layout="constrained")
    for number, (head_size, direction) in enumerate(panels):
        axes = figure.add_subplot((len(panels) + 1) // 2, 2, number + 1)
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = sorted(
                (row["T"], row["tflops"])
                for row in rows
                if (row["D"], row["direction"], row["contender"]) == (head_size, direction, name)
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="o", linewidth=2.5 if name == "triton" else 1.2, label=name
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths := sorted({row["T"] for row in rows}), [f"{T:,}" for T in lengths])
        axes.set(title=f"{direction}, head size {head_size}", xlabel="T", ylabel="TFLOP/s", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Causal attention, bfloat16, {figures['hardware'].get('gpu')}, {figures['hardware'].get('date')}")
    path = result.with_suffix(".png")
    figure.savefig(path)
    return path
