"""A short training run of train.py as a user starts it: val loss over time, the time to a loss, speed, samples.

    python bench/short_run.py --text=FILE      shakespeare_char_best on tinyshakespeare: seconds to a val loss of 1.47
    python bench/short_run.py                  quickstart on Python's standard library, which needs no download
    python bench/short_run.py --smoke          tries this script out with the debug preset

Without --text the run has a time budget: what --minutes leaves, at most MAX_BUDGET seconds. With --text it has the
preset's length, and a signal stops it when the time is up. `seconds` of an evaluation are those from the start of
train.py, with imports, compiling, evaluations and samples; `train_seconds` are train.py's own, without the last two.
Data and run are written to a temporary folder. Needs the packages of train.py (PACKAGES): where one is missing, a line
says so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402

from bench.gpu import card, use_launches  # noqa: E402
from bench.hardware import RESULTS, commit_of, hardware, new_result, save_results  # noqa: E402
from errors import UserError, run_script  # noqa: E402

PACKAGES = ("annotated_types", "platformdirs", "safetensors", "filelock", "tiktoken", "tqdm")
GOAL = 1.47  # nats a character on tinyshakespeare: nanoGPT's best, by its README
AFTER = 20.0  # seconds after a time budget, for the last evaluation and the samples
MAX_BUDGET = 120.0  # seconds
EVALUATION = re.compile(r"step (\d+): (?:whole val split: )?val loss ([\d.]+)")
SAMPLE_BYTES = 4000  # of the end of samples.txt go into the result


def missing() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def prepare(text: Path | None, folder: Path, smoke: bool) -> list[str]:
    """Prepares the dataset in the folder → the arguments of train.py. Raises UserError."""
    if smoke:
        (folder / "text.txt").write_text("Tom has a cat. It runs to the sea.\n" * 500, encoding="utf-8")
        return ["debug", f"--data={folder / 'text.txt'}", f"--data_dir={folder}", "--max_steps=10", "--eval_interval=5"]
    from bench.peer import prepare_ours, run_process

    if text is not None:
        prepare_ours(text, folder)
        return ["shakespeare_char_best", f"--data={folder / 'shakespeare'}"]
    tokenizer = "bpe" if importlib.util.find_spec("rustbpe") else "bytes"
    options = [f"--tokenizer={tokenizer}", f"--data_dir={folder}"] + ["--vocab_size=2048"] * (tokenizer == "bpe")
    run_process([sys.executable, "-m", "prepare_data", "python_stdlib", *options], ROOT)
    return ["quickstart", f"--data={folder / 'python_stdlib'}"]


def train(command: list[str], seconds: float) -> dict[str, Any]:
    """Runs train.py and prints its evaluations. After `seconds` it gets SIGTERM, on which it saves and ends."""
    evaluations: list[dict[str, float]] = []
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.terminate)
        timer.start()
        for line in process.stdout:
            if found := EVALUATION.match(line):
                at = round(time.perf_counter() - began, 2)
                evaluations.append({"step": int(found[1]), "val_loss": float(found[2]), "seconds": at})
            if found or line.startswith(("model:", "device", "stopped")):
                print(line, end="", flush=True)
        timer.cancel()
    took = round(time.perf_counter() - began, 1)
    return {"evaluations": evaluations, "exit_code": process.returncode, "seconds": took}


def records(run: Path) -> dict[str, Any]:
    """From the run's files: train.py's own seconds of the evaluations, the speed, the samples."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run / "metrics.jsonl").exists() else []
    events = [json.loads(line) for line in lines]
    speeds = [event["timing"] for event in events if event["event"] == "step"]
    samples = (run / "samples.txt").read_text(encoding="utf-8") if (run / "samples.txt").exists() else ""
    own = {event["step"]: event["timing"]["train_seconds"] for event in events if event["event"] == "eval"}
    return {"train_seconds": own, "last_speed": speeds[-1] if speeds else None, "samples": samples[-SAMPLE_BYTES:]}


def summarize(result: dict[str, Any], is_shakespeare: bool) -> dict[str, Any]:
    """The result with the best val loss and, on tinyshakespeare, the seconds after which GOAL was reached, or None."""
    evaluations = result["evaluations"]
    best = min((evaluation["val_loss"] for evaluation in evaluations), default=None)
    goal = {}
    if is_shakespeare:
        reached = [evaluation["seconds"] for evaluation in evaluations if evaluation["val_loss"] <= GOAL]
        goal = {f"seconds_to_{GOAL}": reached[0] if reached else None}
    return {**result, "best_val_loss": best, **goal}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--text", type=Path, help="a file of tinyshakespeare")
    parser.add_argument("--minutes", type=float, default=2.0, help="time for everything")
    parser.add_argument("--launches", type=Path, help="use the launches of this result of bench/tune_attention.py")
    parser.add_argument("--smoke", action="store_true", help="the debug preset, for a few steps")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help="what follows are arguments of train.py")
    arguments = parser.parse_args(argv)
    if arguments.train is not None:  # the process that trains
        import train as script

        use_launches(arguments.launches, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return script.main(arguments.train)
    end = time.monotonic() + 60 * arguments.minutes
    if absent := missing():
        print(f"left out: train.py needs {', '.join(absent)} here: pip install -r requirements.txt")
        return 0
    if arguments.text is not None and not arguments.text.is_file():
        raise UserError(f"--text={arguments.text}: no such file; expected tinyshakespeare as a text file")
    from prepare_data.sources.shakespeare import SHA256

    is_shakespeare = arguments.text is not None and hashlib.sha256(arguments.text.read_bytes()).hexdigest() == SHA256
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        command = [*prepare(arguments.text, folder, arguments.smoke), f"--run={folder / 'run'}"]
        left = end - time.monotonic()
        if arguments.text is None and not arguments.smoke:
            command.append(f"--budget_minutes={min(MAX_BUDGET, max(15.0, left - AFTER)) / 60:.2f}")
        launches = [] if arguments.launches is None else [f"--launches={arguments.launches.resolve()}"]
        process = [sys.executable, str(Path(__file__).resolve()), *launches, "--train", *command]
        result = train(process, max(5.0, left - 5.0))
        result = summarize({**result, **records(folder / "run")}, is_shakespeare)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {
        "bench": "short_run",
        "commit": commit_of(ROOT),
        "hardware": {**hardware(), **card(device)},
        "command": ["train.py", *(argument.replace(name, "FOLDER") for argument in command)],
        "text": "tinyshakespeare" if is_shakespeare else arguments.text and arguments.text.name,
        **result,
    }
    path = new_result("short_run", arguments.out)
    save_results(path, figures)
    print(f"best val loss {result['best_val_loss']}, {result['seconds']} s in all; written: {path}")
    return 0 if result["exit_code"] in (0, 75) else 1


if __name__ == "__main__":
    run_script(main)
