"""`make demo` from a fresh clone: the wall time of each part, the losses it reached, and its output.

    python bench/demo.py

Clones the committed state of this repository into a temporary folder; installs, prepares, trains and samples there.
Needs git, make and a package index. Writes to bench/results/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

from bench.hardware import Stopwatch, hardware, write_results  # noqa: E402
from errors import run_script  # noqa: E402

MILESTONES = (
    ("data:", "start"),
    ("prepared ", "prepare"),
    ("budget ", "measure the speed"),
)  # (start of a line, the part that ends with it)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Stopwatch() as watch:
        clone = Path(folder) / "sprout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        began = time.perf_counter()
        subprocess.run(["make", ".venv/.ready"], cwd=clone, check=True, stdout=subprocess.DEVNULL)
        parts = {"install": time.perf_counter() - began}
        began, pending, lines = time.perf_counter(), list(MILESTONES), []
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            ["make", "demo"], cwd=clone, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        ) as demo:
            assert demo.stdout is not None
            for line in demo.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip("\n"))
                if pending and line.startswith(pending[0][0]):
                    now = time.perf_counter()
                    parts[pending.pop(0)[1]], began = now - began, now
        remainder = time.perf_counter() - began
        metrics = [
            json.loads(line) for line in (clone / "runs/quickstart-1/metrics.jsonl").read_text("utf-8").splitlines()
        ]
        last = [event for event in metrics if event["event"] == "step"][-1]
        parts["train, evaluations and saves included"] = last["timing"]["seconds"]
        parts["last evaluations and samples"] = remainder - last["timing"]["seconds"]
    parts = {name: round(seconds, 1) for name, seconds in parts.items()}
    reached = {"steps": last["step"], "tokens": last["tokens"], "whole val split": metrics[-1]}
    figures = {**hardware(), "machine": watch.measured, "parts_seconds": parts, "reached": reached, "printed": lines}
    print(f"\n{parts}\nwritten: {write_results('demo', figures)}")


if __name__ == "__main__":
    run_script(main)
