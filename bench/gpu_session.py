"""Spends the minutes that a GPU is at hand: measures, tunes and tests everything of Sprout that only a GPU can show.

    python bench/gpu_session.py [--minutes=13] [--peer=PATH] [--text=FILE] [--out=DIR]
    python bench/gpu_session.py --parts=facts,tests                only these
    python bench/gpu_session.py --launches=RESULT.json --parts=train,generate     with launches tuned before
    python bench/gpu_session.py --report RESULT.json …             prints one final table of the parts in the results
    python bench/gpu_session.py --smoke                            tries everything out on a CPU, tiny

Needs torch, triton, numpy and a CUDA GPU; a part that needs more says so and is left out. peer: a checkout of nanoGPT;
text: tinyshakespeare. The parts are PARTS, in that order, each a bench of this folder that also runs alone. What `tune`
chooses is used by all parts after it, in their processes alone.

A part is a process with a time limit: its minimum, and its share of the time that is not promised to later parts. So
time that a part leaves goes to the later ones, and one that hangs or crashes takes nothing from them. At its limit it
gets SIGTERM, then it is killed with its children. DIR/DATE-gpu_session.json is replaced atomically every few seconds
with what there is; SIGTERM and Ctrl-C end the part and write, too. DIR/DATE-gpu_session.log has all that the parts
printed.

Reading order: PARTS, limits, run_part, main; then bench/gpu_part.py, bench/gpu_report.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

from errors import UserError, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()  # output cannot fail from here on: a closed terminal stops nothing

from bench.gpu import choose_device, read_launches, some  # noqa: E402
from bench.gpu_part import Output, end_group, outcome, results_in, start, wait  # noqa: E402
from bench.gpu_report import report  # noqa: E402
from bench.hardware import RESULTS, commit_of, new_result, save_results  # noqa: E402
from files import read_json  # noqa: E402

BEGIN = time.monotonic()


@dataclass(frozen=True)
class Part:
    """In its command OUT stands for a folder for its results, MINUTES for its time. minimum: seconds that earlier parts
    leave to it. share: of the time beyond all minimums. tuned: takes --launches. margin: seconds before its limit at
    which it is told to end; it finishes what it has begun."""

    command: list[str]
    minimum: float
    share: float
    tuned: bool = False
    margin: float = 12.0


def make_parts(options: argparse.Namespace) -> dict[str, Part]:
    """All parts in their order. On an H200 they took: facts 6 s, tests 89 to 101, attention 70, tune 55 to 64,
    attention_tuned 22 to 25, profile 81, small_steps about 30 before it compiles, train with nanoGPT 151, generate 40,
    short_run 30. Half of profile's is compiling, which `train` then need not do again for these two sides."""

    def bench(script: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "bench" / f"{script}.py"), "--out=OUT", *arguments]

    smoke, interpret = ["--smoke"] * options.smoke, ["--interpret"] * options.smoke
    speed = ["--quick", "--lengths=1024,4096,16384", "--head_sizes=64,128", "--minutes=MINUTES"]
    shape = "--shapes=tiny" if options.smoke else "--shapes=124m"
    peer = [] if options.peer is None else [f"--peer={options.peer}"]
    nanogpt = [argument.replace("--peer", "--peer-nanogpt") for argument in peer]
    text = [] if options.text is None else [f"--text={options.text}"]
    all_but_math = "--contenders=triton,flash,cudnn,efficient,flex,flex_flash"
    return {
        "facts": Part(bench("gpu_facts", *smoke), 20, 0),
        "tests": Part(tests_command(), 105, 2),
        "attention": Part(bench("attention", "--parts=speed", *speed, all_but_math, *interpret), 75, 1),
        "tune": Part(bench("tune_attention", "--dtypes=bfloat16", "--minutes=MINUTES", *interpret), 100, 1, margin=45),
        "attention_tuned": Part(
            bench("attention", "--parts=errors,speed", *speed, "--contenders=triton,flash,cudnn", *interpret),
            35,
            0.5,
            tuned=True,
        ),
        "profile": Part(bench("gpu_profile", "--minutes=MINUTES", *smoke), 115, 1, tuned=True),
        "small_steps": Part(bench("gpu_small_steps", "--minutes=MINUTES", *smoke), 40, 0.5),
        "train": Part(
            bench("train_speed", "--steps=8", "--rounds=5", "--minutes=MINUTES", *nanogpt, *smoke), 140, 2, tuned=True
        ),
        "generate": Part(bench("generate", shape, *peer), 45, 0.5, tuned=True),
        "short_run": Part(bench("short_run", "--minutes=MINUTES", *text, *smoke), 95, 3, tuned=True),
    }


PARTS = (
    "facts", "tests", "attention", "tune", "attention_tuned", "profile", "small_steps", "train", "generate", "short_run"
)  # fmt: skip


def tests_command() -> list[str]:
    """Only the files that have such tests: others may need packages that are missing here. -vv: a line a test. -rs: why
    some were skipped. Side by side, since compiling takes most of their time."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    found = [str(path) for path in files if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))]
    options = "-m gpu -vv -rs --continue-on-collection-errors --tb=short -p no:cacheprovider -o faulthandler_timeout=60"
    workers = min(12, max(2, (os.cpu_count() or 2) * 3 // 4))  # each also has processes that compile
    side_by_side = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", *options.split(), *side_by_side, *found]


def limit(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are still to be run, of the seconds that are left."""
    first, minimums = parts[0], sum(part.minimum for part in parts)
    if left <= minimums:
        return max(0.0, left) * first.minimum / minimums
    shares = sum(part.share for part in parts)
    return first.minimum + (left - minimums) * (first.share / shares if shares else 1.0)


# ---- A part ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """SIGTERM or Ctrl-C; `number` of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_stopped(number: int, frame: FrameType | None) -> None:
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # what is left to do takes seconds
    raise Stopped(number)


# ---- The session -----------------------------------------------------------------------------------------------------


class Session:
    """The result, where it is written, and the launches in force."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder, self.launches = folder, options.launches
        try:
            self.path = new_result("gpu_session", options.out)
            self.log_path = self.path.with_suffix(".log")
            self.log = self.log_path.open("ab", buffering=0)  # the parts write to it, too
        except OSError as error:
            raise UserError(f"--out={options.out}: cannot be written ({error.strerror}); name another folder") from None
        self.parts: dict[str, dict[str, Any]] = {}
        self.result = {
            "bench": "gpu_session",
            "date": datetime.date.today().isoformat(),
            "commit": options.commit or commit_of(ROOT),
            "minutes": options.minutes,
            "smoke": options.smoke,
            "parts": self.parts,
        }

    def save(self) -> None:
        save_results(self.path, self.result)

    def run(self, name: str, part: Part, seconds: float) -> None:
        """Runs a part for at most that long. What it has written so far is saved every few seconds."""
        folder = self.folder / name
        folder.mkdir()
        minutes = max(1.0, seconds - part.margin) / 60
        places = {"--out=OUT": f"--out={folder}", "--minutes=MINUTES": f"--minutes={minutes:.3f}"}
        command = [places.get(argument, argument) for argument in part.command]
        if part.tuned and self.launches is not None:
            command.append(f"--launches={self.launches}")
        print(f"\n==== {name}, at most {seconds:.0f} s", flush=True)
        start_of_log = self.log_path.stat().st_size
        self.log.write(f"\n==== {name}: {' '.join(command)}\n".encode())
        began, row = time.monotonic(), self.parts.setdefault(name, {"status": "running"})
        process = start(command, self.log)
        assert process.stdout is not None
        output = Output(process.stdout, self.log)
        output.start()
        try:
            is_late = wait(process, began + seconds, lambda: self.collect(row, folder, output))
            output.join(1.0)
            row |= outcome(process.returncode, is_late, output, self.log_path, start_of_log)
        except Stopped:
            end_group(process, at_once=True)
            row["status"] = "stopped"
            raise
        finally:
            row |= {"seconds": round(time.monotonic() - began, 1), "limit_seconds": round(seconds)}
            self.collect(row, folder, output)
        why = f": {row['why']}" if "why" in row else ""
        print(f"---- {name}: {row['status']} after {row['seconds']:.0f} s{why}", flush=True)

    def collect(self, row: dict[str, Any], folder: Path, output: Output) -> None:
        if found := results_in(folder):
            row["result"] = found
        if output.tests:
            row["tests"] = output.tests
        self.save()

    def use_tuned(self) -> None:
        """Lets the following parts use what the part `tune` chose, if that can be read."""
        paths = sorted((self.folder / "tune").glob("*.json"))
        try:
            rows = read_launches(paths[-1])[1] if paths else {}
        except UserError as error:
            print(error)
            rows = {}
        if not rows:
            print("nothing was tuned: the launches stay as they were")
        else:
            print(f"in force from here on: the tuned rows of {', '.join(rows)}")
            self.launches = paths[-1]


def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    if options.report is not None:
        found = [read_json(path) for path in options.report]
        print(report(found[0] | {"parts": {name: row for one in found for name, row in one["parts"].items()}}), end="")
        return 0
    choose_device("bench/gpu_session.py", "--smoke", options.smoke)
    end = BEGIN + 60 * options.minutes
    all_parts = make_parts(options)
    parts = {name: all_parts[name] for name in options.parts}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, raise_stopped)
    code = 0
    with tempfile.TemporaryDirectory(prefix="gpu-session-", ignore_cleanup_errors=True) as folder:
        session = Session(options, Path(folder))
        print(f"{options.minutes:g} minutes for {', '.join(parts)}; written: {session.path} and .log", flush=True)
        try:
            for place, name in enumerate(parts):
                if name == "tests" and importlib.util.find_spec("pytest") is None:
                    session.parts[name] = {"status": "left out", "why": "pytest is not installed"}
                    print("\n==== tests: left out, pytest is not installed")
                    continue
                session.run(name, parts[name], limit(list(parts.values())[place:], end - time.monotonic()))
                if name == "tune":
                    session.use_tuned()
        except Stopped as stopped:
            print(f"\nstopped by {signal.Signals(stopped.number).name}", flush=True)
            code = 128 + stopped.number
        session.save()
        print("\n" + report(session.result) + f"\nwritten: {session.path}", flush=True)
        if not options.smoke:
            print("what to do with it: bench/NOTES.md, When a GPU is at hand", flush=True)
    return code


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=13.0, help="time for everything (default 13)")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the result (default: bench/results)")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, to be measured beside")
    parser.add_argument("--text", type=Path, help="tinyshakespeare as a text file, for the short run")
    parser.add_argument("--launches", type=Path, help="a result with tuned launches, for the parts after `tune`")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="RESULT", help="print the table of results, and measure nothing"
    )
    parser.add_argument("--smoke", action="store_true", help="try everything out on a CPU, tiny")
    options = parser.parse_args(argv)
    chosen = some(options.parts, PARTS, PARTS, "parts")
    options.parts = [name for name in PARTS if name in chosen]
    if options.minutes <= 0:
        raise UserError(f"--minutes={options.minutes:g}: expected more than 0")
    if options.peer is not None and not (options.peer / "model.py").is_file():
        raise UserError(f"--peer={options.peer}: no model.py there; expected a checkout of nanoGPT")
    for name in ("text", "launches"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise UserError(f"--{name}={path}: no such file")
    if options.launches is not None:
        read_launches(options.launches)
    for name in ("peer", "text", "launches"):  # parts run in the project's folder
        path = getattr(options, name)
        setattr(options, name, path and path.resolve())
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="gpu-session-smoke-")) if options.smoke else RESULTS
    return options


if __name__ == "__main__":
    run_script(main)
