"""Run directories: who may write in one, and which run is the newest. checkpoints/ belongs to checkpoint.py.

`run.json` holds {"ordinal": N}, a number above those of its sibling runs when it was started: the newest run is found
without a clock or file times. Under torchrun it also holds "launches": the torchrun processes that have started it.
"asked": the options that its command gave, by which a repeated command (--resume=auto) is known.
`lock` is the file whose OS lock the writing process holds. What of these is removed or renamed meanwhile, `keep_place`
makes again.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from checkpoint import list_checkpoints
from errors import InUse, OutOfResources, UserError, quote
from files import DamagedFile, is_plain_directory, plain_file, read_json, replace_file, write_json
from model_folder import BASE
from parallel.processes import launches

FILES = {"run.json", "lock", "config.json", "metrics.jsonl", "samples.txt", "checkpoints", "wandb", BASE}  # of a run
FILES |= {"tensorboard", "report.html", "loss.png", "run.json.writing", "config.json.writing", "run_state.json"}
FOLDERS = ("checkpoints", "tensorboard", "wandb", BASE, "tries")  # of a run, and never links
MAX_RUN_JSON = 1 << 20  # bytes
RECORDS = ("metrics.jsonl", "samples.txt")
OLD = ".old"  # what the name of a record ends in, once its run began anew
FILES |= {name + OLD for name in RECORDS} | {"rollbacks.json"}


def claim_run(
    run: str | None, default_name: str, runs_dir: Path = Path("runs"), asked: Mapping[str, Any] | None = None
) -> Path:
    """Creates a run's directory and returns it: `run`, or else RUNS_DIR/DEFAULT_NAME-N with the next number. asked: the
    options that the command gave; None: those that run.json has already.

    A run there that ended before its first checkpoint begins anew; its records are kept under other names. Raises
    UserError where the directory holds a run already or is not writable. Processes that claim at the same time get
    different numbers, but may get the same ordinal; newest_run then takes the last by name.
    """
    refuse_used_run(run)
    home = Path(run).parent if run else runs_dir
    try:
        home.mkdir(parents=True, exist_ok=True)
        path = Path(run) if run else _make_numbered(runs_dir, default_name)
        path.mkdir(exist_ok=True)
        _keep_records(path)
        ordinal = 1 + max((_ordinal(sibling) for sibling in home.iterdir()), default=0)
        launched = {"launches": launches()} if launches() else {}
        known = asked_before(path) if asked is None else asked
        write_json(path / "run.json", {"ordinal": ordinal, **launched, **({} if known is None else {"asked": known})})
    except OSError as error:
        kind = OutOfResources if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE) else UserError
        raise kind(
            f"cannot write in the run directory {run or home}: {error}; name another one with --run=PATH"
        ) from error
    return path


def refuse_used_run(run: str | None, runs_dir: Path = Path("runs")) -> None:
    """Raises UserError if a new run cannot use the directory `run` (None: one in `runs_dir`): it holds a run, or files
    that are not a run's, or cannot be made.

    A run that ended before its first checkpoint has nothing that could be resumed: it may be started again, also where
    the trials of --try were still being prepared.
    """
    path = runs_dir if run is None else Path(run)
    try:
        found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else None
        exists = os.path.lexists(path) or path.is_dir()
        home = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"--run={path}: {error.strerror}; name another directory") from error
    if (exists and found is None) or not home.is_dir():
        raise UserError(f"--run={path}: {path if exists else home} is not a directory; name a new one")
    if not os.access(home, os.W_OK | os.X_OK):
        raise UserError(f"--run={path}: {home} is not writable; name a directory in another place")
    if run is None or found is None:
        return
    resume = f"continue it with --resume={quote(run)}, or name a new directory"
    if list_checkpoints(path):
        raise UserError(f"--run={run} holds a run already (checkpoints is there); {resume}")
    known = FILES if _ordinal(path) else set[str]()
    if known and not (path / "tries" / "tries.json").exists():
        known = known | {"tries"}
    if others := [name for name in found if name not in known and not _is_ignored(name)]:
        listed = ", ".join(others[:3]) + ", …" * (len(others) > 3)
        raise UserError(
            f"--run={run}: a run needs a directory of its own, and this one holds other files ({listed}); "
            f"name a new one, for example --run={quote(str(path / 'run-1'))}"
        )
    if "lock" in found:
        with RunLock(path):  # raises if a process is writing there
            pass


def _keep_records(path: Path) -> None:
    """Gives the records of a run that begins anew other names, and says so; one generation is kept. Raises OSError."""
    if not any(os.path.lexists(path / name) for name in (*RECORDS, "config.json", "tries")):
        return
    (path / "rollbacks.json").unlink(missing_ok=True)
    kept = [name for name in RECORDS if (path / name).is_file() and (path / name).stat().st_size]
    for name in kept:
        os.replace(path / name, path / (name + OLD))
    records = f"; its former records are now {' and '.join(name + OLD for name in kept)}" if kept else ""
    print(f"{path} ended before its first checkpoint, and begins anew{records}")


def keep_copies(path: Path) -> None:
    """Copies the records of a run that goes on from an earlier checkpoint, which cuts them. What fails is dropped."""
    for name in RECORDS:
        with suppress(OSError), open(path / name, "rb", opener=plain_file) as file:
            replace_file(path / (name + OLD), file.read())


def asked_before(path: Path) -> dict[str, Any] | None:
    """The options that the command of a run gave, as JSON values; None where run.json does not know."""
    try:
        asked = read_json(path / "run.json").get("asked")
    except DamagedFile:
        return None
    return asked if isinstance(asked, dict) else None


def note_asked(path: Path, asked: Mapping[str, Any]) -> None:
    """Replaces these options. The caller holds the RunLock. What fails is dropped."""
    with suppress(OSError, DamagedFile):
        write_json(path / "run.json", {**read_json(path / "run.json"), "asked": asked})


def _is_ignored(name: str) -> bool:
    """Hidden files, and the output of the command itself (`> notes/out.log`)."""
    return name.startswith(".") or name.endswith((".log", ".out", ".err"))


def _read_bytes(path: Path, limit: int) -> bytes:
    """Nothing where the file is larger, or cannot be read."""
    try:
        with open(path, "rb", opener=plain_file) as file:
            return found if len(found := file.read(limit + 1)) <= limit else b""
    except OSError:
        return b""


def _make_numbered(runs_dir: Path, name: str) -> Path:
    pattern = re.compile(re.escape(name) + r"-(\d{1,9})")
    taken = [int(match[1]) for path in runs_dir.iterdir() if (match := pattern.fullmatch(path.name))]
    for number in itertools.count(1 + max(taken, default=0)):
        path = runs_dir / f"{name}-{number}"
        try:
            path.mkdir()
        except FileExistsError:  # taken by another process, or by a name that differs in case only
            continue
        return path
    raise AssertionError


def _ordinal(run: Path) -> int:
    try:
        ordinal = read_json(run / "run.json").get("ordinal")
    except DamagedFile:  # not made by claim_run: counts as the oldest
        return 0
    return ordinal if type(ordinal) is int else 0


def is_of_this_launch(run: Path) -> bool:
    """Whether the run was started under the torchrun that has started this process."""
    try:
        found = read_json(run / "run.json").get("launches")
    except DamagedFile:
        return False
    return isinstance(found, list) and not set(launches()).isdisjoint(map(str, found))


def runs_of_this_launch(runs_dir: Path) -> list[Path]:
    """In the order of their start."""
    found = [path for path in runs_dir.iterdir() if is_of_this_launch(path)] if runs_dir.is_dir() else []
    return sorted(found, key=_ordinal)


def newest_run(runs_dir: Path) -> Path:
    """The run started last of those with a checkpoint. Raises UserError if there is none."""
    runs = [path for path in runs_dir.iterdir() if list_checkpoints(path)] if runs_dir.is_dir() else []
    if not runs:
        raise UserError(f"no run with a checkpoint in {runs_dir}; train one first: python train.py")
    return max(runs, key=lambda run: (_ordinal(run), run.name))


class RunLock:
    """Context manager: one writer per run directory. The system releases the lock when the process ends, killed or not.

    Raises UserError where another process holds the lock, the directory is not writable, its file system cannot lock,
    or one of FOLDERS is a link. The file is not removed; only the lock on it counts. filelock's FileLock is not used:
    on a file system without locks it falls back to a marker file, which outlives a killed process.
    """

    held: ClassVar[dict[Path, RunLock]] = {}
    """Of this process, by directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / "lock"

    def __enter__(self) -> RunLock:
        refuse_links(self.run_dir)
        try:
            self._file = plain_file(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(
                f"cannot write in the run directory {self.run_dir} (lock: {error.strerror});"
                " check its path and permissions"
            ) from error
        try:
            locked = _lock(self._file)
        except OSError as error:
            os.close(self._file)
            raise UserError(
                f"{self.run_dir}: its file system cannot lock files ({error}); "
                "name a directory on another one with --run=PATH"
            ) from error
        if not locked:
            os.close(self._file)
            raise InUse(
                f"{self.run_dir}: another process is writing there; wait for it or stop it, "
                "or name another directory with --run=PATH"
            )
        try:
            self._identity = _identity(self.run_dir)
            self._has_identities = _is_open(self._file, self.path)  # some network file systems number files anew
        except OSError as error:
            os.close(self._file)
            raise UserError(f"cannot read the run directory {self.run_dir}: {error}; check its permissions") from error
        self._run_json = _read_bytes(self.run_dir / "run.json", MAX_RUN_JSON)
        self.held[self.run_dir] = self
        return self

    def __exit__(self, *exc: object) -> None:
        self.held.pop(self.run_dir, None)
        with suppress(OSError):
            os.close(self._file)

    def keep_place(self) -> list[str]:
        """Makes the directory, its lock and run.json again where they were removed or renamed. Returns what was, in
        words. Raises UserError where another process has taken the place; OSError."""
        if not self._has_identities:
            return []
        identity = _identity(self.run_dir)
        if identity is not None and _is_open(self._file, self.path):
            return []
        if os.path.lexists(self.path):
            raise UserError(
                f"{self.run_dir}: its lock is no longer that of this process: another one has written there since. This"
                " one stops and writes nothing more there; what it trained after its last checkpoint is lost. Continue"
                f" with --resume={quote(str(self.run_dir))} when nothing else is writing there"
            )
        is_gone = identity != self._identity
        self.run_dir.mkdir(parents=True, exist_ok=True)
        file = plain_file(self.path, os.O_RDWR | os.O_CREAT)
        if not _lock(file):
            os.close(file)
            return self.keep_place()  # taken at this moment
        os.close(self._file)
        self._file, self._identity = file, _identity(self.run_dir)
        if self._run_json and not os.path.lexists(self.run_dir / "run.json"):
            replace_file(self.run_dir / "run.json", self._run_json)
        return ["the directory"] if is_gone else ["its lock"]


def keep_place(run_dir: Path) -> list[str]:
    """See RunLock.keep_place; nothing where this process holds no lock there."""
    lock = RunLock.held.get(run_dir)
    return lock.keep_place() if lock is not None else []


def is_lost(run_dir: Path) -> bool:
    """Whether this process held the lock of a directory that another one has taken since."""
    lock = RunLock.held.get(run_dir)
    try:
        return lock is not None and os.path.lexists(lock.path) and not _is_open(lock._file, lock.path)
    except OSError:
        return False


def refuse_links(run_dir: Path, *others: str) -> None:
    """Raises UserError where one of FOLDERS, or another folder in the run, is a link: what is written there would be
    outside of the run. Not for what the system does not tell."""
    for name in (*FOLDERS, *others):
        path, is_plain = run_dir / name, True
        with suppress(OSError):
            is_plain = not os.path.isdir(path) or is_plain_directory(path)
        if os.path.islink(path) or not is_plain:
            raise UserError(
                f"{path} is a link, and a run writes nothing outside its directory; move what it leads to in its"
                f" place, or remove it. The run directory itself may be a link"
            )


def _lock(descriptor: int) -> bool:
    from filelock import lock_descriptor  # takes a while; sample.py needs no lock

    return lock_descriptor(descriptor, blocking=False)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_open(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino) == _identity(path)
