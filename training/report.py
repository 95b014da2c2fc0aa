"""Report of a run, finished or in progress: RUN/report.html, one self-contained page, and RUN/loss.png, its curves.

    python -m training.report runs/quickstart-1

Reads the files of a run directory, and in its dataset what the samples have copied; writes only these two, and the
dataset's index. Text from outside (names, samples) is escaped in the page and never drawn in the image. Reading order:
read_metrics, read_facts, draw, page.
"""

from __future__ import annotations

from errors import UserError, run_script, start_script

if __name__ == "__main__":
    start_script()  # before the imports that take seconds

import base64
import io
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from checkpoint import list_checkpoints, run_hint, with_checkpoint
from files import DamagedFile, plain_file, read_json, reading, replace_file
from json_types import Mismatch, conform
from model_folder import BASE, CONFIG, STATE, WEIGHTS, open_tensors
from state_file import read_state
from tensor_files import TensorReader
from training.copied import Mark, check_samples
from training.metrics import METRICS, SAMPLES, format_duration
from training.records import Lines, read_lines
from training.reference import Reference, plan_of, read_curves

TRAIN, VAL = "#0072b2", "#d55e00"  # blue and vermilion of Okabe and Ito's color-blind safe palette
MAX_SAMPLES = 6  # of the last step
MAX_SAMPLE_BYTES = 200_000  # read from the end of samples.txt
STYLE: dict[str, Any] = {
    "axes.edgecolor": "#b0b0b0",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "lines.markersize": 3.5,
}
SCORE = (
    "{X[val_loss]:.4f}{X[spread]}, {X[bits_per_byte]:.4f} bits per byte, perplexity {X[perplexity]:.5g}"
    " (step {X[step]:,}, {X[targets]:,} tokens)"
)
ROWS = {  # title: template over read_facts; a row is omitted if a fact that it names is unknown
    "Best val loss": SCORE.replace("X", "best"),
    "Whole val split": SCORE.replace("X", "final"),
    "Is this normal?": "{reference}",
    "Old text": "val loss {kept}",
    "Train loss": "{last[loss]:.4f} (step {last[step]:,})",
    "Steps": "{length}, skipped updates: {skipped:,}",
    "Patience": "val loss had stopped falling at step {patience_event[step]:,} (patience {patience})",
    "Tokens": "{tokens:,}, {tokens_per_step:,} per step",
    "Time": "{time}, evaluations included; {speed:,.0f} tokens per second (median)",
    "Time budget": "plan corrected {plans:,}×, last to {plan[max_steps]:,} steps (at step {plan[step]:,})",
    "Dataset": "{dataset}",
    "Parameters": "{n_params:,}, vocabulary of {vocabulary:,}",
    "Model": "{n_layer} layers, {n_head} heads, {n_embd} channels, context {block_size}, dropout {dropout:g}",
    "Initial weights": "{init_from}",
    "Adapters": "rank {lora_rank}",
    "Blocks": "{positions} positions, {norm}, {mlp}",
    "Optimizer": "{optimizer}, {schedule}, learning rate {learning_rate:g}, {warmup_steps} warm-up steps,"
    " weight decay {weight_decay:g}",
    "Device": "{device}, {dtype}, micro-batch {micro_batch_size}",
    "Left out": "{unusable:,} lines of metrics.jsonl that could not be used",
}
COMPUTED = {"step", "length", "skipped", "plans", "unusable", "last", "final", "plan", "patience_event", "kept", "best"}
COMPUTED |= {"time", "speed", "tokens", "dataset", "vocabulary", "reference", "n_params"}  # facts, not options
SUMMARY = {"data": "{dataset}", "size": "{n_params:,} parameters", "state": "step {length}"}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}</title><style>
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222 }}
body {{ font: 16px/1.5 system-ui, sans-serif }}
h1 {{ margin: 0; overflow-wrap: anywhere }} h2 {{ margin: 2rem 0 .5rem; font-size: 1.2rem }}
h1 + p, h3 {{ color: #555 }} img {{ width: 100% }}
table {{ border-collapse: collapse; width: 100% }} tr {{ border-bottom: 1px solid #e6e6e6; vertical-align: top }}
th {{ text-align: left; padding: .3rem 0; width: 11rem }} td {{ padding: .3rem 0; overflow-wrap: anywhere }}
h3 {{ margin: 1rem 0 .3rem; font-size: .9rem }} mark {{ background: #dbe7f6; border-bottom: 1px solid #3a6ea8 }}
pre {{ margin: 0; padding: .8rem 1rem; background: #f5f5f5; white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head><body><h1>{name}</h1><p>{summary}</p>
<img alt="Loss, learning rate, gradient norm and speed over the steps" src="data:image/png;base64,{picture}">
<h2>Facts</h2><table>{rows}</table>{samples}</body></html>
"""


class Sizes(TypedDict, total=False):
    """Options that are counted with."""

    tokens_per_step: int
    max_steps: int | None
    data: str | None


def column(lines: list[dict[str, Any]], name: str, first: float = 0) -> np.ndarray:
    """One field of the lines from step `first` on, float64 (n,); NaN where it is missing or not a number."""
    values = [{**line, **line.get("timing", {})}.get(name) for line in lines if line["step"] >= first]
    return np.array([value if type(value) in (int, float) else math.nan for value in values], dtype=float)


def read_metrics(run: Path) -> Lines:
    """The lines of metrics.jsonl by event. Raises UserError if `run` is not a run directory or has no lines yet."""
    if not (run / METRICS).is_file():
        problem = f"not a run directory: it has no {METRICS}" if run.is_dir() else "no such directory"
        hint = run_hint(run) or "; give one such as runs/quickstart-1, or train first: python train.py"
        raise UserError(f"{run}: {problem}{hint}")
    lines = read_lines(run)
    if not any(lines.values()):
        what = f", but {lines.unusable:,} lines that cannot be used" if lines.unusable else ""
        again = "try again after the first steps, or train: python train.py"
        raise UserError(f"{run / METRICS}: nothing has been logged yet{what}; {again}")
    return lines


def read_facts(run: Path, lines: Lines) -> dict[str, Any]:
    """The values that ROWS and SUMMARY refer to, by name; unknown ones are missing."""
    options = read_options(run)
    step = max(line["step"] for event_lines in lines.values() for line in event_lines)
    max_steps = options.get("max_steps")
    facts = {
        "dataset": options.get("data"),
        **{name: value for name, value in options.items() if name not in COMPUTED},
        "step": step,
        "length": f"{step:,}" + (f" of {max_steps:,}" if isinstance(max_steps, int) else ", no fixed length"),
        "tokens": step * options.get("tokens_per_step", 0),
        "unusable": lines.unusable or None,
        "skipped": len(lines["skip"]),
        "plans": len(lines["plan"]),
    }
    for name, event in (("last", "step"), ("final", "final"), ("plan", "plan"), ("patience_event", "patience")):
        if lines[event]:
            facts[name] = {**lines[event][-1].get("timing", {}), **lines[event][-1]}
    kept = [line for line in lines["kept"] if line["step"] == lines["kept"][-1]["step"]]
    kept = [line for line in kept if line.get("before") and line.get("val_loss") is not None and line.get("name")]
    if kept:
        facts["kept"] = ", ".join(f"{line['before']:.4f} → {line['val_loss']:.4f} ({line['name']})" for line in kept)
    # random weights are the best only while there are no others
    scored = [line for line in lines["eval"] if line["step"] or options.get("init_from")] or lines["eval"]
    val_loss = column(scored, "val_loss")
    if np.isfinite(val_loss).any():
        facts["best"] = scored[int(np.nanargmin(val_loss))]
    for name in facts.keys() & {"best", "final"}:
        error = float(column([facts[name]], "standard_error")[0])
        facts[name] = {**facts[name], "spread": f" ± {error:.4f}" if error > 0 else " (no error estimate)"}
    if lines["step"]:
        seconds = column(lines["step"], "seconds")  # since the process started: they drop where the run was resumed
        ends = [*np.flatnonzero(seconds[1:] < seconds[:-1]), -1]
        facts["time"] = format_duration(float(np.nansum(seconds[ends]))) + f" in {len(ends)} sessions" * (len(ends) > 1)
        facts["speed"] = float(np.median(column(lines["step"], "tokens_per_second")))
    if list_checkpoints(run):
        with suppress(UserError):  # what it would tell is left out
            facts |= with_checkpoint(run, "latest", partial(checkpoint_facts, run, options, lines))
    return {name: value for name, value in facts.items() if value is not None}


def read_options(run: Path) -> dict[str, Any]:
    """The options in a run's config.json; {} where they are not what this version writes."""
    try:
        options = read_json(run / CONFIG).get("options") if (run / CONFIG).is_file() else {}
        conform(dict[str, bool | float | str | list[str] | None], options)
        conform(Sizes, options)
    except (DamagedFile, Mismatch) as error:
        print(f"{run / CONFIG}: its options are left out of the report: {error}", file=sys.stderr, flush=True)
        return {}
    return options or {}


def checkpoint_facts(run: Path, options: dict[str, Any], lines: Lines, model_folder: Path) -> dict[str, Any]:
    """The facts that a checkpoint has. Raises UserError."""
    facts, checkpoint = dict[str, Any](), model_folder.parent
    facts["vocabulary"] = read_json(model_folder / CONFIG).get("vocab_size")
    dataset = read_state(checkpoint / STATE)["dataset"]
    facts["dataset"] = dataset["name"]
    reference = Reference(dataset["fingerprint"], options, read_curves())
    last = lines["eval"][-1] if lines["eval"] else {}
    if reference.runs and last.get("val_loss") is not None:
        comparison = reference.describe(last["step"], last["val_loss"], plan_of(options))
        facts["reference"] = comparison and f"{last['val_loss']:.4f} at step {last['step']:,}: {comparison}"
    base = run / BASE / WEIGHTS  # of a run that trains adapters
    reader = TensorReader({base: None}) if base.is_file() else open_tensors(checkpoint, "model")
    facts["n_params"] = sum(math.prod(shape) for _, shape in reader.layout.values())
    return facts


def read_samples(run: Path) -> list[tuple[str, str]]:
    """(heading, text) of each of the last MAX_SAMPLES samples of the last step that has any."""
    if not (run / SAMPLES).is_file():
        return []
    with reading(run / SAMPLES), open(run / SAMPLES, "rb", opener=plain_file) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_SAMPLE_BYTES))
        content = file.read().decode("utf-8", errors="replace")
    _, *parts = re.split(r"^==== step (\d+) (\(.*\)) ====\n", content, flags=re.MULTILINE)
    found = list(zip(parts[0::3], parts[1::3], parts[2::3], strict=True))
    latest = [(f"step {step} {reason}", text.rstrip("\n")) for step, reason, text in found if step == found[-1][0]]
    return latest[-MAX_SAMPLES:]


def draw(lines: Lines, facts: dict[str, Any]) -> bytes:
    """The curves as PNG: loss (and its second half, enlarged), learning rate, gradient norm, tokens per second.

    Raises UserError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report needs matplotlib, which is not installed: pip install matplotlib") from None
    steps, last, buffer = lines["step"], facts["step"], io.BytesIO()
    with matplotlib.rc_context():  # ignores the user's matplotlibrc and restores rcParams
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its keys are a Literal of all names
        figure = Figure(figsize=(11, 7), dpi=160, layout="constrained")
        grid = figure.add_gridspec(2, 6, height_ratios=[2.2, 1])
        is_long = len(column(steps, "step", last / 2)) >= 10 and len(column(lines["eval"], "step", last / 2)) >= 2
        draw_loss(figure.add_subplot(grid[0, : 4 if is_long else 6]), "Loss (nats per token)", lines, facts, 0)
        if is_long:
            draw_loss(figure.add_subplot(grid[0, 4:]), "Loss, second half", lines, facts, last / 2)
        panels = {
            "learning_rate": "Learning rate",
            "grad_norm": "Gradient norm before clipping",
            "tokens_per_second": "Tokens per second",
        }
        for i, (name, title) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2])
            plot(axes, column(steps, "step"), fit(axes, title, 0, last, column(steps, name), low=0.0), TRAIN)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def draw_loss(axes: Any, title: str, lines: Lines, facts: dict[str, Any], first: float) -> None:
    """Draws train and val loss from step `first` on, the best evaluation, skipped updates, and an axis of tokens."""
    x, loss = (column(lines["step"], name, first) for name in ("step", "loss"))
    val_x, val_loss, error = (column(lines["eval"], name, first) for name in ("step", "val_loss", "standard_error"))
    loss, val_loss = np.split(fit(axes, title, first, facts["step"], np.concatenate([loss, val_loss])), [len(loss)])
    plot(axes, x, loss, TRAIN, "train loss")
    plot(axes, val_x, val_loss, VAL, "val loss" + " ± standard error" * bool(np.isfinite(error).any()))
    axes.fill_between(val_x, val_loss - error, val_loss + error, color=VAL, alpha=0.25, linewidth=0)
    if (best := facts.get("best")) and best["step"] >= first:
        label = f"best val loss: {best['val_loss']:.4f} at step {best['step']:,}"
        star = {"color": VAL, "markeredgecolor": "black", "markersize": 13, "zorder": 5}
        axes.plot(best["step"], best["val_loss"], "*", label=label, **star)
    if len(skips := column(lines["skip"], "step", first)):
        cross = {"color": "black", "markersize": 6, "transform": axes.get_xaxis_transform()}
        axes.plot(skips, 0.02 + 0 * skips, "x", label="skipped update", **cross)
    if facts["tokens"]:
        top = axes.twiny()
        top.set_xlim([step * facts["tokens_per_step"] for step in axes.get_xlim()])
        top.locator_params(nbins=4 if first else 8)
        top.grid(False)
        top.tick_params(length=0)
        top.xaxis.set_major_formatter(short)
        top.set_xlabel("tokens")
    if not first:
        axes.legend(loc="upper right", edgecolor="none")


def fit(axes: Any, title: str, first: float, last: float, values: np.ndarray, low: float | None = None) -> np.ndarray:
    """Sets title, ticks and limits; outliers are left out of the y limits and counted in the x label.

    `low` fixes the lower y limit. Returns the values, clipped far above the upper limit so that they can be drawn.
    """
    axes.set_title(title, loc="left", weight="bold", fontsize=11)
    axes.set_xlim(first - max(0.02 * (last - first), 0.5), last + max(0.02 * (last - first), 0.5))
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=6, integer=True, min_n_ticks=1)
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter(short)
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    median, usual = float(np.median(finite)), float(np.quantile(finite, 0.95))
    # Only the second half has the stricter limit: in a whole run the first losses are high and not outliers.
    high = min(float(finite.max()), 5 * median, 3 * usual - 2 * median if first else math.inf)
    low = float(finite.min()) if low is None else low
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin * (low != 0), high + margin)
    counts = {"above the frame": int((finite > high).sum()), "not finite": int((~np.isfinite(values)).sum())}
    axes.set_xlabel("step" + "".join(f", {count:,} {what}" for what, count in counts.items() if count))
    return np.minimum(values, high + 10 * margin)


def plot(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str | None = None) -> None:
    few, many = len(x) <= 40, len(x) > 300
    axes.plot(
        x, y, "o-" if few else "-", color=color, linewidth=0.8 if many else 1.6, alpha=0.8 if many else 1, label=label
    )


def short(value: float, _position: object = None) -> str:
    """25.6k for 25,600; also M, B, T."""
    units = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}
    return next((f"{value / unit:.4g}{name}" for name, unit in units.items() if abs(value) >= unit), f"{value:g}")


def page(
    name: str,
    facts: dict[str, Any],
    samples: list[tuple[str, str]],
    picture: bytes,
    marks: Sequence[Sequence[Mark]] = (),
    note: str = "",
) -> str:
    """The HTML of the report. marks: of each sample; note: on all samples. All text is escaped; control characters,
    which HTML forbids, become U+FFFD."""

    def clean(text: str) -> str:
        return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text))

    def fill(templates: dict[str, str]) -> dict[str, str]:
        filled = {}
        for title, template in templates.items():
            with suppress(LookupError, TypeError, ValueError):  # a fact of the template is unknown
                filled[title] = clean(template.format_map(facts))
        return filled

    def marked(text: str, marks: Sequence[Mark]) -> str:
        parts, at = [], 0
        for start, end, title in marks:
            parts.append(clean(text[at : max(at, start)]))
            parts.append(f'<mark title="{clean(title)}">{clean(text[max(at, start) : end])}</mark>')
            at = max(at, end)
        return "".join(parts) + clean(text[at:])

    shown = "".join(
        f"<h3>{clean(heading)}</h3><pre dir=auto>{marked(text, its_marks)}</pre>"
        for (heading, text), its_marks in zip(samples, marks or [()] * len(samples), strict=True)
    )
    return PAGE.format(
        name=clean(name),
        summary=" · ".join(fill(SUMMARY).values()),
        picture=base64.b64encode(picture).decode(),
        rows="\n".join(f"<tr><th>{title}</th><td>{text}</td></tr>" for title, text in fill(ROWS).items()),
        samples=f"<h2>Latest samples</h2><p>{clean(note)}</p>{shown}" if samples else "",
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("give one run directory; for example: python -m training.report runs/quickstart-1")
    run = Path(argv[0])
    lines = read_metrics(run)
    facts = read_facts(run, lines)
    picture = draw(lines, facts)
    samples = read_samples(run)
    marks, note = check_samples(run, [text for _, text in samples])
    text = page(run.resolve().name, facts, samples, picture, marks, note)
    try:
        for name, data in (("loss.png", picture), ("report.html", text.encode(errors="replace"))):
            replace_file(run / name, data)
    except OSError as error:
        raise UserError(
            f"cannot write the report in {run} ({error.strerror}); check its permissions and the free space"
        ) from error
    print(f"wrote {run / 'report.html'} (open it in a browser) and {run / 'loss.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
