"""Two processes on one machine (gloo) against one, the same global batch: the time of a step beside the ideal.

    python bench/parallel_speed.py --text=FILE [--rounds=3] [--steps=12] [--shape=n_layer=4,…] [--tokens=4096]

Each side is a whole command, train.py alone or under torchrun, one thread for each process; the sides take turns, and a
round runs each once. A step is timed by the run's own log. The ideal is half of the step of one process; `two threads`
is one process that uses both cores, what the machine gives without torchrun. Several optimizers and layouts.
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

SHAPE = "n_layer=4,n_embd=256,n_head=4,block_size=256"
SIDES = {  # processes, threads of each, flags
    "one process": (1, 1, []),
    "one process, two threads": (1, 2, []),
    "two processes, ddp": (2, 1, ["--parallel=ddp"]),
    "two processes, fsdp": (2, 1, ["--parallel=fsdp"]),
}
WARM_UP = 3  # steps that are not counted


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for optimizer in ("adamw", "muon"):
            for number in range(arguments.rounds):
                for side in SIDES:
                    steps = run(arguments, Path(folder), side, optimizer)
                    figures.setdefault(optimizer, {}).setdefault(side, []).append(steps)
                    print(
                        f"{optimizer}, {side}, round {number + 1}: {statistics.median(steps):.3f} s a step", flush=True
                    )
    rows = {optimizer: summarize(sides) for optimizer, sides in figures.items()}
    path = new_result("parallel_speed", arguments.results)
    facts = {"shape": arguments.shape, "tokens_per_step": arguments.tokens, "dtype": arguments.dtype}
    result = {"bench": "parallel_speed", "hardware": hardware(), "sprout": commit_of(ROOT), **facts, "sides": rows}
    save_results(path, {**result, "seconds": figures})
    for optimizer, sides in rows.items():
        for side, row in sides.items():
            print(f"{optimizer:>6}  {side:<26} {row['seconds']:.3f} s a step, {row['efficiency']:.0%} of the ideal")
    print(f"written: {path}")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a text to train on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--shape", default=SHAPE, help=f"model options, default: {SHAPE}")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, of all processes")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, folder: Path, side: str, optimizer: str) -> list[float]:
    """Seconds of each step of one run, after the first ones."""
    processes, threads, flags = SIDES[side]
    script = [str(ROOT / "train.py"), "shakespeare_char", f"--data={arguments.text.resolve()}", *flags]
    script += [f"--{part}" for part in arguments.shape.split(",")]
    script += [f"--tokens_per_step={arguments.tokens}", f"--dtype={arguments.dtype}", f"--threads={threads}"]
    script += ["--device=cpu", "--compile=false", "--micro_batch_size=4", "--dropout=0", f"--optimizer={optimizer}"]
    script += [f"--max_steps={arguments.steps}", "--warmup_steps=0", "--log_interval=1", "--eval_interval=1000000"]
    script += ["--eval_tokens=2", "--final_eval=false", "--sample_tokens=0", "--save_interval=1000000"]
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        script.append(f"--run={run_folder}")
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "--",
        ]
        command = [sys.executable, *script] if processes == 1 else [*torchrun, *script]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        events = [json.loads(line) for line in Path(run_folder, "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [event["timing"]["train_seconds"] for event in events if event["event"] == "step"]
    return [after - before for before, after in itertools.pairwise(times)][WARM_UP - 1 :]


def summarize(sides: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    """Of each side the median of its runs' medians, and its efficiency: the ideal step over this one, where the ideal
    uses as many cores as the side."""
    medians = {side: statistics.median(statistics.median(steps) for steps in runs) for side, runs in sides.items()}
    cores = {side: processes * threads for side, (processes, threads, _) in SIDES.items()}
    return {
        side: {"seconds": seconds, "efficiency": medians["one process"] / cores[side] / seconds}
        for side, seconds in medians.items()
    }


if __name__ == "__main__":
    run_script(main)
