"""What a checkpoint costs the training: written while it goes on (--async_save), against a training that waits, and one
that saves nothing.

    python bench/save_cost.py --text=FILE [--preset=gpt2_124m] [--rounds=3] [--steps=24] [--tokens=1024]

Each side is a whole train.py; the sides take turns. Two checkpoints are written, after a third and two thirds of the
steps. Time is that of the wall, from the log of each step; the cost of a checkpoint is half of what the steps from the
first save on take more than as many median steps of the side that saves nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

from bench.hardware import commit_of, hardware, new_result, save_results  # noqa: E402
from errors import run_script  # noqa: E402

SIDES = ("nothing", "waits", "goes on")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text to train on")
    parser.add_argument("--preset", default="gpt2_124m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--tokens", type=int, default=256, help="of a step, and the context")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    arguments = parser.parse_args(argv)
    seconds: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for side in SIDES:
                seconds[side].append(run(arguments, Path(folder), side))
                print(f"{side}, round {number + 1}: {seconds[side][-1][-1]:.1f} s", flush=True)
    step = statistics.median(span for run in seconds["nothing"] for span in spans(run)[2:])
    rows = {side: [cost(run, step) for run in runs] for side, runs in seconds.items()}
    result: dict[str, Any] = {"bench": "save_cost", "hardware": hardware(), "sprout": commit_of(ROOT)}
    result |= {"preset": arguments.preset, "tokens_per_step": arguments.tokens, "step_seconds": step, "seconds": rows}
    path = new_result("save_cost", arguments.results)
    save_results(path, result)
    print(f"a step: {step:.2f} s")
    for side, costs in rows.items():
        print(f"{side:<8} {statistics.median(costs):6.2f} s a checkpoint ({min(costs):.2f} to {max(costs):.2f})")
    print(f"written: {path}")
    return 0


def run(arguments: argparse.Namespace, folder: Path, side: str) -> list[float]:
    """Seconds at the end of each step of one run, since the first one began."""
    interval = arguments.steps // 3 if side != "nothing" else 10**6
    script = [str(ROOT / "train.py"), arguments.preset, f"--data={arguments.text.resolve()}", "--tokenizer=bytes"]
    script += [
        f"--tokens_per_step={arguments.tokens}",
        f"--block_size={arguments.tokens}",
        "--micro_batch_size=1",
        "--compile=false",
        "--log_interval=1",
    ]
    script += [f"--max_steps={arguments.steps}", "--eval_interval=1000000", "--eval_tokens=2", "--final_eval=false"]
    script += ["--sample_tokens=0", f"--save_interval={interval}", f"--async_save={str(side == 'goes on').lower()}"]
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        command = [sys.executable, *script, f"--run={run_folder}"]
        subprocess.run(command, cwd=folder, env={**os.environ}, check=True, capture_output=True)
        events = [json.loads(line) for line in Path(run_folder, "metrics.jsonl").read_text("utf-8").splitlines()]
    return [event["timing"]["seconds"] for event in events if event["event"] == "step"]


def spans(ends: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(ends)]


def cost(ends: list[float], step: float) -> float:
    """Seconds of a checkpoint: what the steps from the first one on took more than such steps take, by two."""
    first = len(ends) // 3
    return (ends[-1] - ends[first - 1] - step * (len(ends) - first)) / 2


if __name__ == "__main__":
    run_script(main)
