"""make torture: Sprout under faults, as one table: fault, trials, survived, steps lost, seconds.

    python tests/torture.py                            everything, about ten minutes on two cores
    python tests/torture.py --section=kills            one of the sections: --list names them and their faults
    python tests/torture.py kill_worker errno_EIO      some faults; --trials=5: how many of each, or inputs of a fuzz

What a trial is and when it counts as survived: torture_parallel.py (several processes, by torchrun) and
torture_trials.py (one process). The problems of trials that did not survive follow their row, and make the exit code 1.
Steps lost: trained, and not in the last checkpoint when the fault had ended the process. A further fault is an entry of
`FAULTS`; one of torchrun's, of torture_parallel.FAULTS.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a process with threads cannot be forked
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import torture_faults as faults
from tests import torture_parallel as parallel
from tests.torture_trials import JOBS, ROOT, Row, in_parallel, make_home

SEED = 16


@dataclass(frozen=True)
class Fault:
    """A row of the table. run: by its name, a folder of the section and the number of trials. trials: by default.
    missing: why it cannot be tried here, or None."""

    section: str
    run: Callable[[str, Path, int], Row]
    trials: int
    missing: Callable[[], str | None] = lambda: None


def by_torchrun(name: str, home: Path, trials: int) -> Row:
    row = Row()
    for _ in range(trials):
        result = parallel.attempt(name, parallel.prepare(home))
        row.trials += 1
        row.survived += not result.problems
        row.lost += [result.lost] if result.lost is not None else []
        row.problems += [*result.problems, *(result.output.splitlines()[-60:] if result.problems else [])]
    return row


def by_pytest(arguments: Sequence[str], name: str, home: Path, trials: int) -> Row:
    """A file of tests, each of which is a trial."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    row = Row(sum(counts.values()), counts.get("passed", 0))
    row.problems = done.stdout.splitlines()[-40:] if done.returncode else []
    return row


def by_fuzz(module: str, name: str, home: Path, trials: int) -> Row:
    """So many inputs, in as many processes as there are cores."""
    run = import_module(module).run
    parts = [(trials // JOBS + (i < trials % JOBS), SEED + i) for i in range(JOBS)]
    found = [problem for problems in in_parallel(lambda part: run(*part), parts) for problem in problems]
    return Row(trials, trials - len(found), [], found[:20])


def no_file(path: str) -> str | None:
    return None if (ROOT / path).is_file() else f"there is no {path}"


def make_faults() -> dict[str, Fault]:
    found = {name: Fault("kills", faults.aimed_kills, 24) for name in faults.KILLS}
    found["kill_at_random"] = Fault("kills", faults.random_kills, 10)
    found |= {name: Fault("signals", faults.signals, len(faults.PHASES)) for name in faults.SIGNALS}
    found |= {name: Fault("errors", faults.errors_of_calls, 24) for name in faults.ERRORS}
    found["limited_file_size"] = Fault("disks", faults.limited_sizes, 12)
    found["small_disk"] = Fault("disks", faults.full_disks, 6, faults.without_mounts)
    found |= {name: Fault("damage", faults.damaged, 40) for name in faults.DAMAGE}
    inside, readers = "tests/test_inside.py", ("tests/test_state_file.py", "-k", "edited or removes")
    found["hostile_folders"] = Fault("hostile", partial(by_pytest, [inside]), 1, partial(no_file, inside))
    found["edited_states"] = Fault("hostile", partial(by_pytest, readers), 1)
    for name, inputs in FUZZ.items():
        module = f"tests/fuzz_{name}.py"
        run = partial(by_fuzz, f"tests.fuzz_{name}")
        found[f"fuzz_{name}"] = Fault("fuzz", run, inputs, partial(no_file, module))
    found |= {name: Fault("torchrun", by_torchrun, 1, one.missing) for name, one in parallel.FAULTS.items()}
    return found


FUZZ = {"options": 80_000, "state": 60_000, "metrics": 50_000, "files": 50_000, "requests": 70_000, "models": 5_000}
FAULTS = make_faults()
SECTIONS = list(dict.fromkeys(fault.section for fault in FAULTS.values()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sprout under faults")
    parser.add_argument("faults", nargs="*", help="names of faults; all by default")
    parser.add_argument("--section", action="append", choices=SECTIONS, default=[], help="may be repeated")
    parser.add_argument("--trials", type=int, help="of each fault")
    parser.add_argument("--list", action="store_true", help="print the sections and their faults")
    given = parser.parse_args(argv)
    if unknown := set(given.faults) - set(FAULTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected any of: {', '.join(FAULTS)}")
    if given.list:
        for section in SECTIONS:
            print(f"{section}: {', '.join(name for name, fault in FAULTS.items() if fault.section == section)}")
        return 0
    chosen = {*given.faults, *(name for name in FAULTS if FAULTS[name].section in given.section)}
    names = [name for name in FAULTS if name in chosen or not (given.faults or given.section)]
    began = time.monotonic()
    print(f"{'fault':<20} {'trials':>7} {'survived':>8} {'steps lost':>10} {'seconds':>8}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture ") as home:
        clean = [print_row(name, FAULTS[name], Path(home), given.trials) for name in names]
    print(f"{time.monotonic() - began:.0f} s in all; {clean.count(False)} of {len(names)} faults with problems")
    return int(not all(clean))


def print_row(name: str, fault: Fault, home: Path, trials: int | None) -> bool:
    """Runs a fault, and prints its row. Returns whether all survived."""
    if (missing := fault.missing()) is not None:
        print(f"{name:<20} skipped: {missing}", flush=True)
        return True
    folder = home / ("torchrun" if fault.section == "torchrun" else "single")
    folder.mkdir(exist_ok=True)
    if fault.section in ("kills", "signals", "errors", "disks", "damage"):
        make_home(folder)
    began = time.monotonic()
    row = fault.run(name, folder, fault.trials if trials is None else trials)
    lost, seconds = shown(row.lost), f"{time.monotonic() - began:.1f}"
    print(f"{name:<20} {row.trials:>7,} {row.survived:>8,} {lost:>10} {seconds:>8}", flush=True)
    for problem in row.problems:
        print(f"    {problem}", flush=True)
    return row.survived == row.trials and not row.problems


def shown(values: Iterable[int]) -> str:
    known = sorted(values)
    if not known:
        return "-"
    return f"{known[0]}" if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


if __name__ == "__main__":
    sys.exit(main())
