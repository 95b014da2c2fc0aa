"""How soon Sprout reaches nanoGPT's loss: its documented CPU command and ours in turns, same text, same machine.

    python bench/time_to_loss.py --peer PATH_TO_NANOGPT [--text FILE] [--rounds 3] [--sprout_steps N[,N…]]
                                 [-- PRESET --option=value … [+ PRESET --option=value …]]

**Our recipes** are train.py's arguments, separated by +. Without any: `qwen3_char_cpu`, the fastest one known whose
model the Qwen3 class of other programs can express, and `speedrun_char_cpu`, whose table of n-grams none has.

**The target** is the peer's loss after its last step over the whole val split, the last tenth of the characters: the
median of the rounds. The last weights of both sides are scored by the same code in float32, every target once, in
windows at 0, T, 2T … of the side's own block size T. Block sizes may differ: the context length is part of a recipe, as
the width is. Before its end, our run is judged by its own evaluations on the same targets (without our EOS), in the
dtype in which it trains; `reported_loss` keeps its own figure at the end, beside the score. The peer's own estimates
before its end are means over 20 random batches; they are drawn in the picture and used for nothing else.

**Time** runs from the start of the process (imports and compilation included) to the step; evaluation, saving and
sampling do not count. Ours is `timing.train_seconds` in metrics.jsonl. The peer's is when that step began, less the
excess over the median iteration of each earlier iteration with an evaluation (which also removes the slow first step,
in the peer's favor).

**Each length is a run of its own.** With a decaying learning rate, the loss at some step depends on the length of the
run. So each N of --sprout_steps is a separate run that decays to its end, for each recipe; the default is a recipe's
own length. The time to the target is that of the run's first evaluation at or below it, often the last one. Several
lengths are reported separately, by the medians of their rounds. A length chosen by its result on these seeds is biased:
choose it on other seeds. "In nanoGPT's time" is our last evaluation within the peer's training time.

Round r (from 1) has the seed 1336 + r on both sides; the order of the sides rotates. With --first_round and --join
the rounds of one bench may be measured in several pieces. Reading order: main, run_round, summarise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import config  # noqa: E402
from bench.hardware import commit_of, hardware, write_results  # noqa: E402
from bench.peer import (  # noqa: E402
    EVAL_INTERVAL,
    PEER_DATA,
    SEED,
    check_same_ids,
    copy_peer,
    load_ours,
    load_peer,
    peer_command,
    peer_ids,
    plain_copy,
    prepare_ours,
    reseeded,
    rotated,
    run_process,
    score,
)
from errors import UserError, run_script  # noqa: E402
from training.options import TrainOptions  # noqa: E402

PEER = "nanoGPT"
PEER_BLOCK_SIZE, PEER_TOKENS_PER_STEP = 64, 12 * 64
DEFAULT_RECIPES = ["qwen3_char_cpu", "--max_steps=170", "+", "speedrun_char_cpu", "--max_steps=100"]

Point = dict[str, float]  # step, tokens, seconds of training, loss in nats per character


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    plans = plan_runs(arguments.sprout, arguments.sprout_steps, arguments.evaluations)
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        work = Path(folder)
        text = plain_copy(arguments.text, work / "input.txt")
        figures: dict[str, Any] = {
            "bench": "time_to_loss",
            "text": {
                "name": arguments.text.name,
                "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
                "bytes": text.stat().st_size,
            },
            "hardware": hardware(),
            "sprout": commit_of(ROOT),
            "peer": commit_of(arguments.peer),
        }
        peer, data = copy_peer(arguments.peer, text, work / "peer"), prepare_ours(text, work / "data")
        check_same_ids(peer, data)
        runs, script = earlier_runs(arguments.join, figures), (peer / "train.py").read_text(encoding="utf-8")
        for number in range(arguments.first_round - 1, arguments.first_round - 1 + arguments.rounds):
            (peer / "train.py").write_text(reseeded(script, SEED + number), encoding="utf-8")
            runs += run_round(number, peer, data / "shakespeare", work / f"runs-{number}", plans, arguments.peer_steps)
    figures |= {"summary": summarise(runs), "runs": runs}
    show(figures["summary"])
    path = write_results(f"time_to_loss-{arguments.text.stem}", figures, arguments.results)
    plot = arguments.plot or path.with_suffix(".png")
    draw(runs, figures["summary"], arguments.text.name, plot)
    print(f"written: {path} and {plot}")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument(
        "--text",
        type=Path,
        help="any UTF-8 text (default: the checkout's own tinyshakespeare, if it was prepared there)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--first_round", type=int, default=1, help="number of the first round, for a bench in pieces")
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="results with earlier rounds of the same text")
    parser.add_argument(
        "--sprout_steps", default="", help="lengths of our runs, separated by commas (default: the preset's)"
    )
    parser.add_argument(
        "--evaluations", type=int, default=10, help="evaluations in each of our runs; their time is not counted"
    )
    parser.add_argument(
        "--peer_steps", type=int, default=2000, help="length of the peer's run; its documented command has 2000"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    parser.add_argument("--plot", type=Path, help="path of the picture (default: beside the figures)")
    parser.add_argument(
        "sprout",
        nargs="*",
        metavar="-- PRESET --option=value + …",
        help=f"train.py's arguments, of several recipes with + between them (default: {' '.join(DEFAULT_RECIPES)})",
    )
    arguments = parser.parse_args(argv)
    arguments.peer = arguments.peer.resolve()
    if not (arguments.peer / "train.py").is_file():
        raise UserError(f"--peer={arguments.peer}: no train.py there; expected a checkout of nanoGPT")
    arguments.text = (arguments.text or arguments.peer / PEER_DATA / "input.txt").resolve()
    if not arguments.text.is_file():
        raise UserError(f"--text={arguments.text}: no such file; give a text of yours, or tinyshakespeare")
    if min(arguments.rounds, arguments.first_round, arguments.peer_steps, arguments.evaluations) < 1:
        raise UserError("--rounds, --first_round, --peer_steps and --evaluations must be at least 1")
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", arguments.sprout_steps):
        raise UserError(
            f"--sprout_steps={arguments.sprout_steps}: expected numbers of steps separated by commas, such as 400,800"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("this bench draws its curves with matplotlib, which is not installed: pip install matplotlib")
    if not Path("/proc/self/stat").exists():
        raise UserError("this bench needs Linux: it reads the start time of a process from /proc/self/stat")
    return arguments


def plan_runs(recipes: Sequence[str], lengths: str, evaluations: int) -> dict[str, dict[str, Any]]:
    """Our runs of a round by name: train.py's arguments, checked beforehand, and sizes. Raises UserError."""
    plans = {}
    for flags in split_at_plus(recipes or DEFAULT_RECIPES):
        options = config.load("train.py", flags).section(TrainOptions)
        if not lengths and (options.budget_minutes is not None or options.max_steps is None):
            raise UserError(
                f"{' '.join(flags)}: plans its length by measuring speed, which would count as training; "
                "give --sprout_steps=N"
            )
        for steps in [int(length) for length in lengths.split(",") if length] or [options.max_steps]:
            arguments = [*flags, *([f"--max_steps={steps}"] if lengths else [])]
            sizes = {
                "steps": steps,
                "eval_interval": max(1, steps // evaluations),
                "tokens_per_step": options.tokens_per_step,
            }
            plans[" ".join(["Sprout", *arguments])] = {"arguments": arguments, **sizes}
    return plans


def split_at_plus(words: Sequence[str]) -> list[list[str]]:
    recipes: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            recipes.append([])
        else:
            recipes[-1].append(word)
    return recipes


def earlier_runs(paths: Sequence[Path], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of earlier results. Raises UserError where text or peer is another one."""
    runs: list[dict[str, Any]] = []
    for path in paths:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["text"] != figures["text"] or earlier["peer"] != figures["peer"]:
            raise UserError(f"--join={path}: its text or its peer is another one, so its rounds do not count here")
        runs += earlier["runs"]
    return runs


# ---- Runs ------------------------------------------------------------------------------------------------------------


def run_round(
    number: int, peer: Path, data: Path, folder: Path, plans: Mapping[str, Any], peer_steps: int
) -> list[dict[str, Any]]:
    """Runs each side once. Returns their curves, whose last loss is over all val targets."""
    seed, val, runs = SEED + number, peer_ids(peer, "val"), []
    for side in rotated([PEER, *plans], number):
        if side == PEER:
            command = peer_command(peer_steps, EVAL_INTERVAL if peer_steps % EVAL_INTERVAL == 0 else peer_steps)
            result = run_process([sys.executable, *command], peer)
            curve, logits, block_size = (
                peer_curve(result["lines"], PEER_TOKENS_PER_STEP),
                load_peer(peer),
                PEER_BLOCK_SIZE,
            )
        else:
            plan = plans[side]
            run = folder / str(list(plans).index(side))
            command = our_command(plan, seed, targets=len(val) - 1)
            result = run_process([sys.executable, *command, f"--data={data}", f"--run={run}"], ROOT)
            curve = our_curve((run / "metrics.jsonl").read_text(encoding="utf-8"), plan["tokens_per_step"])
            logits = model = load_ours(run)
            block_size = model.config.block_size
        reported_loss = curve[-1]["loss"]
        curve[-1]["loss"] = score(logits, val, block_size)
        print(
            f"round {number + 1}: {side}: {curve[-1]['loss']:.4f} nats a character"
            f" after {curve[-1]['seconds']:.1f} s of training (it reports {reported_loss:.4f}); {result['machine']}",
            flush=True,
        )
        facts = {
            "side": side,
            "seed": seed,
            "command": " ".join(["python", *command]),
            "block_size": block_size,
            "targets": len(val) - 1,
        }
        runs.append({**facts, "machine": result["machine"], "reported_loss": reported_loss, "curve": curve})
    return runs


def our_command(plan: Mapping[str, Any], seed: int, targets: int) -> list[str]:
    """Evaluates on the first targets + 1 tokens: all characters of the val split, without the EOS after them."""
    flags = [f"--seed={seed}", f"--eval_interval={plan['eval_interval']}", f"--eval_tokens={targets + 1}"]
    return ["train.py", *plan["arguments"], *flags, "--device=cpu", "--sample_tokens=0", "--final_samples=0"]


def our_curve(metrics: str, tokens_per_step: int) -> list[Point]:
    """The evaluations in a metrics.jsonl."""
    events = [json.loads(line) for line in metrics.splitlines()]
    points = [
        (event["step"], event["timing"]["train_seconds"], event["val_loss"])
        for event in events
        if event["event"] == "eval"
    ]
    return [point(step, tokens_per_step, seconds, loss) for step, seconds, loss in points]


def peer_curve(lines: Sequence[tuple[float, str]], tokens_per_step: int) -> list[Point]:
    """The peer's own estimates, from its lines and the seconds at which they were printed. Raises UserError if there
    are none."""
    estimates: dict[int, float] = {}
    # step N → when the update after it ended, and its duration, evaluation included
    iterations: dict[int, tuple[float, float]] = {}
    for printed_at, line in lines:
        if found := re.match(r"step (\d+): train loss \S+, val loss (\S+)", line):
            estimates[int(found[1])] = float(found[2])
        elif found := re.match(r"iter (\d+): loss \S+, time ([\d.]+)ms", line):
            iterations[int(found[1])] = printed_at, float(found[2]) / 1000
    if not estimates or not estimates.keys() <= iterations.keys():
        raise UserError("the peer printed no losses as nanoGPT does; use the commit named in bench/results")
    undisturbed = [duration for step, (_, duration) in iterations.items() if step not in estimates]
    usual = statistics.median(undisturbed or [0.0])
    points, paused = [], 0.0
    for step, loss in sorted(estimates.items()):
        end, duration = iterations[step]
        points.append(point(step, tokens_per_step, end - duration - paused, loss))
        paused += max(0.0, duration - usual)
    return points


def point(step: int, tokens_per_step: int, seconds: float, loss: float) -> Point:
    return {"step": step, "tokens": step * tokens_per_step, "seconds": round(seconds, 3), "loss": loss}


# ---- Comparison ------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The target, and for each side the medians of the time to the target (None if half of the runs or more miss it)
    and of the losses."""
    curves = {
        side: [run["curve"] for run in runs if run["side"] == side]
        for side in dict.fromkeys(run["side"] for run in runs)
    }
    theirs = curves.pop(PEER)
    target, time = (statistics.median(curve[-1][name] for curve in theirs) for name in ("loss", "seconds"))
    tokens = theirs[0][-1]["tokens"]
    sides = {}
    for side, own in curves.items():
        hits = [first_at(curve, target) for curve in own]
        reached = {
            name: median_or_none([hit[name] if hit else math.inf for hit in hits])
            for name in ("seconds", "tokens", "step")
        }
        sides[side] = {
            "reached_in": f"{sum(hit is not None for hit in hits)} of {len(hits)}",
            **reached,
            "times_sooner": time / reached["seconds"] if reached["seconds"] else None,
            "times_fewer_tokens": tokens / reached["tokens"] if reached["tokens"] else None,
            "loss_in_equal_time": statistics.median(last_within(curve, time)["loss"] for curve in own),
            "loss_at_end": statistics.median(curve[-1]["loss"] for curve in own),
            "seconds_to_end": statistics.median(curve[-1]["seconds"] for curve in own),
        }
    return {"target": target, "peer_seconds": time, "peer_tokens": tokens, "sides": sides}


def first_at(curve: Sequence[Point], target: float) -> Point | None:
    """The first evaluation at or below the target."""
    return next((entry for entry in curve if entry["loss"] <= target), None)


def last_within(curve: Sequence[Point], seconds: float) -> Point:
    """The last evaluation within `seconds` of training, or the first one if none is."""
    return [curve[0], *(entry for entry in curve if entry["seconds"] <= seconds)][-1]


def median_or_none(values: Sequence[float]) -> float | None:
    median = statistics.median(values)
    return median if math.isfinite(median) else None


def show(summary: Mapping[str, Any]) -> None:
    effort = f"{summary['peer_seconds']:.1f} s of training, {summary['peer_tokens']:,} tokens"
    print(f"\ntarget: {summary['target']:.4f} nats a character, where nanoGPT ends after {effort}")
    for side, row in summary["sides"].items():
        print(f"{side}: reaches the target in {row['reached_in']} runs")
        if row["seconds"] is not None:
            print(f"  after {row['seconds']:.1f} s, {row['times_sooner']:.2f} times sooner", end="; ")
            print(f"{row['tokens']:,.0f} tokens, {row['times_fewer_tokens']:.2f} times fewer (step {row['step']:,.0f})")
        difference = row["loss_in_equal_time"] - summary["target"]
        print(f"  {row['loss_in_equal_time']:.4f} in nanoGPT's time ({difference:+.4f})", end="; ")
        print(f"{row['loss_at_end']:.4f} at its end, after {row['seconds_to_end']:.1f} s", flush=True)


def draw(runs: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], text: str, path: Path) -> None:
    """Draws loss over seconds of training, one line per run, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    sides = list(dict.fromkeys([PEER, *(run["side"] for run in runs)]))
    labels = {
        side: side if side != PEER else f"{PEER}: its estimates on 20 batches; at the end the whole split"
        for side in sides
    }
    for run in runs:
        seconds, loss = ([entry[name] for entry in run["curve"]] for name in ("seconds", "loss"))
        color = "black" if run["side"] == PEER else f"C{sides.index(run['side']) - 1}"
        axes.plot(
            seconds, loss, "o-", color=color, markersize=3, linewidth=1, alpha=0.8, label=labels.pop(run["side"], None)
        )
    target = summary["target"]
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:.4f}")
    ends = [run["curve"][-1]["loss"] for run in runs]
    axes.set_ylim(min(ends) - 0.05, max(run["curve"][0]["loss"] for run in runs) if max(ends) > 2.8 else 3.0)
    axes.set_xlim(left=0)
    axes.set_title(f"Nats a character over the whole val split, {text}", loc="left")
    axes.set_xlabel("seconds of training, from the start of the process, evaluations left out")
    axes.grid(color="#e6e6e6")
    axes.legend(edgecolor="none", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


if __name__ == "__main__":
    run_script(main)
