"""What the faults of torture.py that need no torchrun have in common: train.py in a forked process, the run with which
others are compared, and what a trial has to show.

The parent imports everything and starts no thread, so that a trial costs a fork and not the seconds of a new
interpreter. A trial survives if the process ends as its fault expects, without a traceback, and the same command or
--resume then completes the run with the records and the weights of an undisturbed one, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from checkpoint import list_checkpoints  # noqa: E402
from errors import UserError, run_script, start_script  # noqa: E402
from tests.torture_parallel import contents, records  # noqa: E402

T, R = TypeVar("T"), TypeVar("R")

STEPS, INTERVAL = 12, 4
FLAGS = (
    "debug", "--n_layer=1", "--threads=1", "--dtype=float32", "--compile=false", f"--max_steps={STEPS}",
    f"--eval_interval={INTERVAL}", "--eval_tokens=1000", "--sample_tokens=5", "--final_samples=1", "--log_interval=1",
    "--tokens_per_step=256", "--dropout=0.1", "--ema_half_life=0.5", "--data=text.txt", "--run=run",
)  # fmt: skip
RESTARTS = (ROOT / "common" / "run_state.py").exists()  # a run without a checkpoint may be started again
SECONDS = 60  # that a process may take, on a busy machine
JOBS = min(4, os.cpu_count() or 1)


@dataclass
class Outcome:
    """Of one trial. lost: steps. counts: whether the fault happened at all."""

    problems: list[str] = field(default_factory=list)
    lost: int | None = None
    counts: bool = True


@dataclass
class Row:
    """Of the table. problems: of the trials that did not survive."""

    trials: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: Outcome) -> None:
        if not outcome.counts:
            return
        self.trials += 1
        self.survived += not outcome.problems
        self.lost += [outcome.lost] if outcome.lost is not None else []
        self.problems += [f"{name}: {problem}" for problem in outcome.problems]


# ---- A process -------------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """code: as of subprocess, negative for a signal; None where it did not end in time and was killed."""

    code: int | None
    output: str
    seconds: float


def forked(
    folder: Path, argv: Sequence[str], fault: Callable[[], AbstractContextManager[object]] = nullcontext,
    seconds: float = SECONDS,
) -> Ended:  # fmt: skip
    """train.py with these arguments in a fork of this process, in a folder, within the context of the fault."""
    output, began = folder / "output", time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _become_script(folder, output)
            with fault():
                try:
                    run_script(lambda: train.main([*argv]))
                except SystemExit as ended:
                    code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        finally:
            with suppress(ValueError):
                if sys.exc_info()[0] is not None:
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
            os._exit(code)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > began + seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(None, output.read_text("utf-8", "replace"), seconds)
        time.sleep(0.002)
    return Ended(code, output.read_text("utf-8", "replace"), time.monotonic() - began)


def _become_script(folder: Path, output: Path) -> None:
    """A forked process gets the streams, signals and the folder of a script of its own."""
    os.setsid()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    start_script()


# ---- The undisturbed run ---------------------------------------------------------------------------------------------


def make_home(home: Path) -> Path:
    """A folder with a text, prepared, and the undisturbed run, `base/run`."""
    base = home / "base"
    if not base.exists():
        base.mkdir(parents=True)
        words = ("the", "moon", "draws", "two", "trees", "and", "water", "sees", "a", "cat")
        text = "".join(" ".join(words[(i * j + j) % 10] for j in range(7)) + ".\n" for i in range(900))
        (base / "text.txt").write_text(text, encoding="utf-8")
        ended = forked(base, FLAGS)
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed run ended with {ended.code}:\n{ended.output}")
    return home


@contextmanager
def trial_folder(home: Path, with_run: bool = False) -> Iterator[Path]:
    """A folder like that of the undisturbed run; without the run itself, or with a copy."""
    folder = home / f"trial {os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("text.txt", "data", *(["run"] if with_run else [])):
        source = home / "base" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def steps_lost(run: Path) -> int | None:
    """Steps that were trained and are not in the last checkpoint."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    except OSError:
        return None
    trained = [0]
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            trained += [entry["step"]] if entry["event"] == "step" else []
    saved = [int(path.name[5:13]) for path in list_checkpoints(run)]
    return max(0, max(trained) - max(saved, default=0))


def complete(folder: Path, base: Path, problems: list[str], *, same_records: bool = True) -> None:
    """Goes on with what a fault has left, and compares it with the undisturbed run."""
    run = folder / "run"
    if list_checkpoints(run):
        argv = ["--resume=run"]
    else:
        argv = [*FLAGS]
        if not RESTARTS:
            shutil.rmtree(run, ignore_errors=True)
    ended = forked(folder, argv)
    if ended.code != 0:
        problems.append(f"{argv[0]} does not complete the run (exit code {ended.code}): {last_lines(ended.output)}")
        return
    compare(run, base, problems, same_records=same_records)


def compare(run: Path, base: Path, problems: list[str], *, same_records: bool = True) -> None:
    try:
        if same_records and records(run) != records(base):
            problems.append("other records than those of an undisturbed run")
        if contents(run) != contents(base):
            problems.append("other weights than those of an undisturbed run")
    except (OSError, ValueError, IndexError, UserError) as error:
        problems.append(f"the run cannot be compared: {error!r}")


def last_lines(output: str, count: int = 3) -> str:
    return " / ".join(output.strip().splitlines()[-count:])


def check_output(ended: Ended, problems: list[str]) -> None:
    if ended.code is None:
        problems.append(f"did not end within {SECONDS} s")
    if "Traceback" in ended.output:
        problems.append(f"a traceback: {last_lines(ended.output)}")


# ---- Many trials -----------------------------------------------------------------------------------------------------


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of them, evenly."""
    if len(items) <= count:
        return [*items]
    return [items[i * len(items) // count] for i in range(count)]


def in_parallel(action: Callable[[Any], R], items: Sequence[Any]) -> list[R]:
    """The results, by as many forks of this process as it has cores."""
    global _action
    _action = action
    if len(items) <= 1 or JOBS == 1:
        return [action(item) for item in items]
    with get_context("fork").Pool(min(JOBS, len(items))) as pool:
        return pool.map(_call, items, chunksize=1)


_action: Callable[[Any], Any] = lambda item: None  # noqa: E731 - what a fork of in_parallel calls


def _call(item: Any) -> Any:
    return _action(item)
