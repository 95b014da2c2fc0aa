"""Faults of one process: kills at each call that changes the disk and at random times, signals in each phase, errors of
single calls, full disks, damaged checkpoints. A part of torture.py; torture_trials.py has what a trial is."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import train
from checkpoint import list_checkpoints
from model_folder import MANIFEST
from tests import inject
from tests.torture_trials import (
    FLAGS,
    INTERVAL,
    RESTARTS,
    ROOT,
    STEPS,
    Outcome,
    Row,
    check_output,
    compare,
    complete,
    forked,
    in_parallel,
    last_lines,
    spread,
    steps_lost,
    trial_folder,
)
from training import data, setup
from training.interrupt import STOPPED

NEWEST = f"step-{STEPS:08d}"


# ---- Kills -----------------------------------------------------------------------------------------------------------

KILLS = {  # a row → the calls
    "kill_write": ("write",), "kill_fsync": ("fsync",), "kill_rename": ("rename",), "kill_replace": ("replace",),
    "kill_mkdir": ("mkdir",), "kill_unlink": ("unlink", "remove"), "kill_rmdir": ("rmdir",),
}  # fmt: skip


def count_calls(home: Path) -> Counter[str]:
    """How often each call is made on the run's files, in an undisturbed run."""
    with trial_folder(home) as folder:

        @contextmanager
        def counted() -> Iterator[None]:
            with inject.counting(folder / "run") as counts:
                try:
                    yield
                finally:
                    (folder / "counts").write_text(repr(dict(counts)))

        ended = forked(folder, FLAGS, counted)
        if ended.code != 0:
            raise RuntimeError(f"the counted run ended with {ended.code}: {ended.output}")
        return Counter(eval((folder / "counts").read_text()))  # our own dict of names and numbers


@contextmanager
def killing(call: str, nth: int, when: str, under: Path) -> Iterator[None]:
    """SIGKILL at the nth call of a kind: "before" it, "after" it, or "in" a write, half of which is done."""
    count = Counter[str]()

    def hook(place: str, called: str, path: str, args: tuple[Any, ...]) -> None:
        count[place] += called == call
        if called != call or count[place] != nth or place != ("after" if when == "after" else "before"):
            return
        if when == "in":
            inject._real["write"](args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    with inject.watching(partial(hook, "before"), under, partial(hook, "after")):
        yield


def kill_at(home: Path, moment: tuple[str, int, str]) -> Outcome:
    outcome = Outcome()
    with trial_folder(home) as folder:
        ended = forked(folder, FLAGS, partial(killing, *moment, folder / "run"))
        if ended.code == 0:  # a thread made fewer calls this time
            return Outcome(counts=False)
        if ended.code != -signal.SIGKILL:
            outcome.problems.append(f"exit code {ended.code}: {last_lines(ended.output)}")
        outcome.lost = steps_lost(folder / "run")
        complete(folder, home / "base/run", outcome.problems)
    return outcome


def aimed_kills(name: str, home: Path, trials: int) -> Row:
    counts = count_calls(home)
    moments = [
        (call, nth, when)
        for call in KILLS[name]
        for nth in range(1, counts[call] + 1)
        for when in (("before", "after", "in") if call == "write" else ("before", "after"))
    ]
    chosen, row = spread(moments, trials), Row()
    for moment, outcome in zip(chosen, in_parallel(partial(kill_at, home), chosen), strict=True):
        row.add(f"{moment[2]} {moment[0]} {moment[1]}", outcome)
    return row


def kill_process(home: Path, delay: float) -> Outcome:
    """kill -9 of a real process, so long after its start."""
    outcome = Outcome()
    with trial_folder(home) as folder:
        with (folder / "output").open("wb") as output:
            command = [sys.executable, str(ROOT / "train.py"), *FLAGS]
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
            time.sleep(delay)
            process.kill()
            if process.wait() == 0:
                return Outcome(counts=False)
        outcome.lost = steps_lost(folder / "run")
        complete(folder, home / "base/run", outcome.problems)
    return outcome


def random_kills(name: str, home: Path, trials: int) -> Row:
    with trial_folder(home) as folder:
        began = time.monotonic()
        subprocess.run([sys.executable, str(ROOT / "train.py"), *FLAGS], cwd=folder, check=True, capture_output=True)
        took = time.monotonic() - began
    draw, row = random.Random(16), Row()
    delays = [took * draw.uniform(0.5, 1.0) for _ in range(trials)]  # before, nothing but imports
    for delay, outcome in zip(delays, in_parallel(partial(kill_process, home), delays), strict=True):
        row.add(f"after {delay:.2f} s", outcome)
    return row


# ---- Signals ---------------------------------------------------------------------------------------------------------

SIGNALS = {  # a row → the signal, and how often
    "sigterm": ("SIGTERM", 1), "sigint": ("SIGINT", 1), "sighup": ("SIGHUP", 1), "sigterm_twice": ("SIGTERM", 2),
    "sigint_twice": ("SIGINT", 2), "sighup_twice": ("SIGHUP", 2),
}  # fmt: skip
PHASES = ("start", "step", "evaluation", "save", "sampling", "end")


@contextmanager
def signaling(phase: str, number: int, times: int, under: Path) -> Iterator[None]:
    """The signal once the phase has begun."""
    sent = list[int]()

    def send() -> None:
        if not sent:
            sent.append(number)
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.02)

    def first(function: Callable[..., Any], calls: int = 1) -> Callable[..., Any]:
        count = Counter[str]()

        def wrapper(*args: Any, **named: Any) -> Any:
            count["calls"] += 1
            if count["calls"] == calls:
                send()
            return function(*args, **named)

        return wrapper

    def at_save(call: str, path: str, args: tuple[Any, ...]) -> None:
        if call == "fsync" and f"step-{2 * INTERVAL:08d}" in path:
            send()

    call = data.TrainBatches.__call__
    patches = {
        "start": lambda: mock.patch.object(setup, "build_model", first(setup.build_model)),
        "step": lambda: mock.patch.object(data.TrainBatches, "__call__", first(call, 7)),
        "evaluation": lambda: mock.patch.object(train, "evaluate", first(train.evaluate, 3)),
        "save": lambda: inject.watching(at_save, under),
        "sampling": lambda: mock.patch.object(train, "sample_texts", first(train.sample_texts, 3)),
        "end": lambda: mock.patch.object(train, "end_run", first(train.end_run)),
    }
    with patches[phase]():
        yield


def signal_in(home: Path, name: str, phase: str) -> Outcome:
    outcome, (signal_name, times) = Outcome(), SIGNALS[name]
    number = int(getattr(signal, signal_name))
    with trial_folder(home) as folder:
        ended = forked(folder, FLAGS, partial(signaling, phase, number, times, folder / "run"))
        check_output(ended, outcome.problems)
        outcome.lost = steps_lost(folder / "run")
        allowed = {STOPPED, 128 + number, -number, *([0] if phase == "end" else [])}
        saves = times == 1 and phase not in ("start", "end") and (RESTARTS or signal_name != "SIGHUP")
        if ended.code not in ({STOPPED} if saves else allowed):
            outcome.problems.append(f"exit code {ended.code}: {last_lines(ended.output)}")
        if saves and outcome.lost:
            outcome.problems.append(f"{outcome.lost} steps lost")
        complete(folder, home / "base/run", outcome.problems)
    return outcome


def signals(name: str, home: Path, trials: int) -> Row:
    phases, row = spread(PHASES, trials), Row()
    for phase, outcome in zip(phases, in_parallel(partial(signal_in, home, name), phases), strict=True):
        row.add(phase, outcome)
    return row


# ---- Errors of single calls, full disks ------------------------------------------------------------------------------

ERRORS = {f"errno_{name}": getattr(errno, name) for name in ("ENOSPC", "EIO", "EACCES", "EMFILE", "EROFS")}
FAILING = ("file", "open", "read", "scandir", "listdir", "stat", "fstat", "close", *sorted(inject.WRITES))


def judge(home: Path, folder: Path, ended: Any, outcome: Outcome) -> None:
    """A process that was to go on, or to end in one message. What could not be logged is missing in the records."""
    check_output(ended, outcome.problems)
    if ended.code is not None and ended.code < 0:
        outcome.problems.append(f"exit code {ended.code}")
    outcome.lost = steps_lost(folder / "run")
    if ended.code == 0:
        compare(folder / "run", home / "base/run", outcome.problems, same_records=False)
    else:
        complete(folder, home / "base/run", outcome.problems, same_records=False)


def fail_call(home: Path, moment: tuple[str, int, int]) -> Outcome:
    call, nth, number = moment
    outcome = Outcome()
    with trial_folder(home) as folder:

        @contextmanager
        def fault() -> Iterator[None]:
            with inject.failing(call, nth, number, folder / "run") as failed:
                try:
                    yield
                finally:
                    (folder / "failed").write_text("\n".join(failed))

        ended = forked(folder, FLAGS, fault)
        if not (folder / "failed").read_text():
            return Outcome(counts=False)
        judge(home, folder, ended, outcome)
    return outcome


def errors_of_calls(name: str, home: Path, trials: int) -> Row:
    counts, row = count_calls(home), Row()
    calls = [call for call in FAILING if counts[call]]
    each = max(1, trials // max(1, len(calls)))
    chosen = [(call, nth, ERRORS[name]) for call in calls for nth in spread(range(1, counts[call] + 1), each)]
    chosen = spread(chosen, trials)
    for moment, outcome in zip(chosen, in_parallel(partial(fail_call, home), chosen), strict=True):
        row.add(f"{moment[0]} {moment[1]}", outcome)
    return row


def limit_size(home: Path, limit: int) -> Outcome:
    """No file may become larger than so many bytes."""
    outcome = Outcome()

    @contextmanager
    def fault() -> Iterator[None]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        yield

    with trial_folder(home) as folder:
        ended = forked(folder, FLAGS, fault)
        if ended.code != 0 and not ended.output:  # the message itself did not fit
            ended.output = "no output"
        judge(home, folder, ended, outcome)
    return outcome


def limited_sizes(name: str, home: Path, trials: int) -> Row:
    files = sorted(path.stat().st_size for path in (home / "base/run").rglob("*") if path.is_file())
    limits = sorted({0, 1, *(size + change for size in files for change in (-1, 0)), files[-1] // 2} - {-1})
    chosen, row = spread(limits, trials), Row()
    for limit, outcome in zip(chosen, in_parallel(partial(limit_size, home), chosen), strict=True):
        row.add(f"{limit} bytes", outcome)
    return row


ON_SMALL_DISK = """
mount -t tmpfs -o size="$1" tmpfs run || exit 99
shift
"$@"; code=$?
cp -a run "run left" && exit $code
"""


def fill_disk(home: Path, size: int) -> Outcome:
    """The run is on a disk of so many bytes, whose content is then copied to one with room."""
    outcome = Outcome()
    with trial_folder(home) as folder:
        (folder / "run").mkdir()
        shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_SMALL_DISK, "sh", str(size)]
        done = subprocess.run([*shell, sys.executable, str(ROOT / "train.py"), *FLAGS], cwd=folder, capture_output=True)
        ended = mock.Mock(code=done.returncode, output=(done.stdout + done.stderr).decode("utf-8", "replace"))
        (folder / "run").rmdir()
        os.rename(folder / "run left", folder / "run")
        judge(home, folder, ended, outcome)
    return outcome


def full_disks(name: str, home: Path, trials: int) -> Row:
    whole = sum(path.stat().st_size for path in (home / "base/run").rglob("*") if path.is_file())
    sizes, row = [2 * whole * (i + 1) // trials // 4096 * 4096 + 8192 for i in range(trials)], Row()
    for size, outcome in zip(sizes, in_parallel(partial(fill_disk, home), sizes), strict=True):
        row.add(f"{size} bytes", outcome)
    return row


def without_mounts() -> str | None:
    """Why no disk can be mounted here; None where it can."""
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not installed"
    trial = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return None if done.returncode == 0 else f"this system mounts no tmpfs in a user namespace: {done.stderr.strip()}"


# ---- Damage ----------------------------------------------------------------------------------------------------------

DAMAGE = ("damage_cut", "damage_bit", "damage_removed", "damage_swapped")


def damages(name: str, checkpoint: Path) -> list[tuple[str, str, int]]:
    """(kind, file, place) of all damages of a kind."""
    found = []
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        file, size = str(path.relative_to(checkpoint)), path.stat().st_size
        places = {0}
        if name == "damage_cut":
            is_json = path.suffix == ".json"  # whose last byte is a line break, which means nothing
            places = {0, 7, 8, min(60, size // 4), size // 2, size - 1 - is_json}
        elif name == "damage_bit":
            places = {0, 8, size // 3, size // 2, size - 3}
        found += [(name, file, place) for place in sorted(places)]
    return found


def damage(path: Path, kind: str, place: int, other: Path) -> None:
    content = bytearray(path.read_bytes())
    if kind == "damage_cut":
        path.write_bytes(content[:place])
    elif kind == "damage_bit":
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
    elif kind == "damage_removed":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())


def resume_damaged(home: Path, what: tuple[str, str, int]) -> Outcome:
    kind, file, place = what
    outcome = Outcome()
    with trial_folder(home, with_run=True) as folder:
        run = folder / "run"
        *_, before, last = list_checkpoints(run)
        if kind == "damage_swapped" and (before / file).read_bytes() == (last / file).read_bytes():
            return Outcome(counts=False)
        damage(last / file, kind, place, before / file)
        ended = forked(folder, ["--resume=run"])
        check_output(ended, outcome.problems)
        if ended.code != 0 or f"resumed run/checkpoints/{before.name}" not in ended.output:
            outcome.problems.append(f"not resumed from the checkpoint before: {last_lines(ended.output)}")
        elif f"{NEWEST}/{'' if file == MANIFEST else file}" not in ended.output and MANIFEST not in ended.output:
            outcome.problems.append("the damaged file is not named")
        outcome.lost = STEPS - int(before.name[5:])
        compare(run, home / "base/run", outcome.problems)
    return outcome


def damaged(name: str, home: Path, trials: int) -> Row:
    chosen, row = spread(damages(name, home / "base/run/checkpoints" / NEWEST), trials), Row()
    for what, outcome in zip(chosen, in_parallel(partial(resume_damaged, home), chosen), strict=True):
        row.add(f"{what[1]} at {what[2]}", outcome)
    return row
