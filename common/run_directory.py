"""Run directories: who may write in one, and which is the newest. What lies in checkpoints/ belongs to checkpoint.py.

`run.json` holds {"ordinal": N}, a number above those that its sibling runs had when it was started, so that "the newest run" depends on no
clock and no mtime. `lock` is the file whose OS lock the writing process holds.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import sys
from pathlib import Path

from checkpoint import list_checkpoints
from errors import UserError
from files import DamagedFile, read_json, write_json


def claim_run(run: str | None, preset: str, runs_dir: Path = Path("runs")) -> Path:
    """Creates a run's directory: `run`, or else RUNS_DIR/PRESET-N with the next number. Raises UserError where it is used or not writable.

    Processes that claim at the same instant get different numbers, but perhaps the same ordinal; newest_run then goes by name.
    """
    refuse_used_run(run)
    home = Path(run).parent if run else runs_dir
    try:
        home.mkdir(parents=True, exist_ok=True)
        path = Path(run) if run else _make_numbered(runs_dir, preset)
        path.mkdir(exist_ok=True)
        ordinal = 1 + max((_ordinal(sibling) for sibling in home.iterdir()), default=0)
        write_json(path / "run.json", {"ordinal": ordinal})
    except OSError as error:
        raise UserError(
            f"cannot write in the run directory {run or home}: {error}; name another one with --run=PATH"
        ) from error
    return path


def refuse_used_run(run: str | None) -> None:
    """Raises UserError where the directory of a new run holds one already."""
    used = [name for name in ("config.json", "metrics.jsonl", "checkpoints") if run and (Path(run) / name).exists()]
    if used:
        raise UserError(
            f"--run={run} holds a run already ({used[0]} is there); go on with it by --resume={run}, or name a new directory"
        )


def _make_numbered(runs_dir: Path, preset: str) -> Path:
    pattern = re.compile(re.escape(preset) + r"-(\d{1,9})")
    taken = [int(match[1]) for path in runs_dir.iterdir() if (match := pattern.fullmatch(path.name))]
    for number in itertools.count(1 + max(taken, default=0)):
        path = runs_dir / f"{preset}-{number}"
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster, or the name differs in case only
            continue
        return path
    raise AssertionError


def _ordinal(run: Path) -> int:
    try:
        ordinal = read_json(run / "run.json").get("ordinal")
    except DamagedFile:  # not made by claim_run: older than all that were
        return 0
    return ordinal if type(ordinal) is int else 0


def newest_run(runs_dir: Path) -> Path:
    """The run with a checkpoint that was started last. Raises UserError where there is none."""
    runs = [path for path in runs_dir.iterdir() if list_checkpoints(path)] if runs_dir.is_dir() else []
    if not runs:
        raise UserError(f"no run with a checkpoint in {runs_dir}; train one first: python train.py")
    return max(runs, key=lambda run: (_ordinal(run), run.name))


class RunLock:
    """Context manager: one writer per run directory. The system drops the lock when the process ends, however it ends.

    The file stays behind; only a lock on it means something. Raises UserError where another process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __enter__(self) -> RunLock:
        try:
            self.file = open(self.run_dir / "lock", "ab")
        except OSError as error:
            raise UserError(
                f"cannot write in the run directory {self.run_dir}: {error}; check its path and permissions"
            ) from error
        try:
            _lock(self.file.fileno())
        except OSError as error:
            self.file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                text = f"{self.run_dir}: another process is writing there; wait for it or stop it, or name another directory with --run=PATH"
            else:
                text = f"{self.run_dir}: its file system cannot lock files ({error}); name a directory on another one with --run=PATH"
            raise UserError(text) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
