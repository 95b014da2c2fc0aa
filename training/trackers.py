"""Other programs that show a run's records, each on request: Weights & Biases, TensorBoard, trackio.

A tracker has three methods (`Tracker`); `Trackers` calls those that the options ask for. Their packages are imported
only then. metrics.jsonl has everything that they get, so a tracker that fails is reported in one line and turned off.

Where a run that was killed is resumed, a tracker holds records of steps after the checkpoint, which are made again.
TensorBoard's and trackio's are dropped there, as those of metrics.jsonl; Weights & Biases ignores the new ones.
"""

from __future__ import annotations

import hashlib
import io
import os
import socket
import sqlite3
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from errors import UserError
from files import make_directory, plain_file, write_all
from terminal import Unchanged
from training.options import LoggingOptions, missing_package

Value = float | str | None  # str: a text; None: not known


class Tracker(Protocol):
    """Where else records go. Every method may raise OSError and `errors`."""

    name: str
    errors: tuple[type[Exception], ...]

    def start(self, first_step: int) -> None:
        """Opens it. first_step: where the records begin that this process makes; those it has from there on, of a
        process that was killed, are dropped."""

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Records values by name. A name may come once for each step."""

    def finish(self) -> None:
        """Writes what is left, and closes it."""


class Trackers:
    """The trackers of a run. settings: its options by name. Raises UserError where a package is missing, or
    Weights & Biases has no API key."""

    def __init__(self, run: Path, options: LoggingOptions, settings: Mapping[str, Any]) -> None:
        self._asked: list[Tracker] = []
        self._running: list[Tracker] = []
        if options.wandb is not None:
            self._asked.append(WandbLog(run, options.wandb, options.wandb_project, settings))
        if options.tensorboard:
            self._asked.append(TensorBoardLog(run))
        if options.trackio:
            self._asked.append(TrackioLog(run, options.trackio_project, settings))

    def start(self, first_step: int) -> None:
        """See Tracker.start."""
        self._running = [*self._asked]
        self._each("did not start", lambda tracker: tracker.start(first_step))

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """See Tracker.log."""
        self._each("failed", lambda tracker: tracker.log(values, step))

    def finish(self) -> None:
        """Closes those that were started."""
        self._each("failed", lambda tracker: tracker.finish())

    def _each(self, what: str, action: Callable[[Tracker], None]) -> None:
        for tracker in [*self._running]:
            errors: tuple[type[Exception], ...] = (OSError, *tracker.errors)
            try:
                action(tracker)
            except errors as error:
                print(f"{tracker.name} {what} ({error}); metrics.jsonl has everything", file=sys.stderr, flush=True)
                self._running.remove(tracker)


class WandbLog:
    """Weights & Biases. Never prompts: without an API key, `online` raises a UserError."""

    name = "wandb"

    def __init__(self, run: Path, mode: str, project: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(missing_package("wandb")) from None
        if mode == "online" and not wandb.api.api_key:
            raise UserError(
                "--wandb=online: no API key on this machine; run `wandb login` once, or use --wandb=offline"
            )
        self.errors: tuple[type[Exception], ...] = (wandb.errors.Error,)
        self._folder = run / "wandb"
        self._options = {"project": project, "name": run.name, "mode": mode, "dir": run, "config": dict(settings)}
        self._options |= {"id": _identity(run), "resume": "allow"}
        self._init: Callable[..., Any] = wandb.init

    def start(self, first_step: int) -> None:
        folder = self._folder
        make_directory(folder)
        inside = os.path.realpath(folder) + os.sep
        odd = [path for path in folder.iterdir() if not (os.path.realpath(path) + os.sep).startswith(inside)]
        odd += [folder / "settings"] * os.path.lexists(folder / "settings")  # it would name the server
        if odd:
            raise OSError(f"{odd[0]} is not of this run: remove it")
        with redirect_stderr(Unchanged(sys.stderr)):  # it prints in colors
            self._run = self._init(**self._options)

    def log(self, values: Mapping[str, Value], step: int) -> None:
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        if numbers:  # the final evaluation takes the place of the last one: there is one value for each step
            self._run.log({name.replace("final/", "val/"): value for name, value in numbers.items()}, step=step)

    def finish(self) -> None:
        with redirect_stderr(Unchanged(sys.stderr)):
            self._run.finish()


class TensorBoardLog:
    """Event files in RUN/tensorboard, one for each process of the run. They are written here, record by record, because
    SummaryWriter writes in a thread of its own, where a full disk ends in a traceback."""

    name = "tensorboard"
    errors: tuple[type[Exception], ...] = ()

    def __init__(self, run: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2
            from torch.utils.tensorboard import RecordWriter, summary
        except ImportError:
            raise UserError(missing_package("tensorboard")) from None
        self._folder, self._events, self._summary, self._record_writer = (
            run / "tensorboard",
            event_pb2,
            summary,
            RecordWriter,
        )

    def start(self, first_step: int) -> None:
        make_directory(self._folder)
        # TensorBoard finds "tfevents" in the name, and reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = _Records(self._folder / name)
        self._writer = self._record_writer(self._file)
        self._write(file_version="brain.Event:2")
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=first_step, session_log=start)  # drops the records from this step on

    def log(self, values: Mapping[str, Value], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, str):  # shown as Markdown: indented, its lines stay as they are
                self._write(step=step, summary=self._summary.text(name, textwrap.indent(value, "    ", lambda _: True)))
            elif value is not None:
                self._write(step=step, summary=self._summary.scalar(name, value))

    def finish(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())


class _Records:
    """A new file that gets each record at once, so that a killed run loses nothing."""

    def __init__(self, path: Path) -> None:
        self._descriptor = plain_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(self, data: bytes) -> int:
        return write_all(self._descriptor, data)

    def close(self) -> None:
        os.close(self._descriptor)


class TrackioLog:
    """trackio's database on this machine, in its own folder (TRACKIO_DIR), where `trackio show` finds all runs.

    Its Run is used and not its init, which would follow TRACKIO_SPACE_ID to the network. Nothing is sent, served or
    shown. A thread of trackio writes twice a second: a failure is known when the next values come, and a killed process
    loses half a second of records, which are missing where its last checkpoint was saved in that time.
    """

    name = "trackio"
    errors: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self, run: Path, project: str, settings: Mapping[str, Any]) -> None:
        try:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = True  # where a token is stored, a Run would ask the Hub for the user's name
            import trackio
        except ImportError:
            raise UserError(missing_package("trackio")) from None
        self._trackio, self._project, self._name, self._id = trackio, project, run.name, _identity(run)
        self._settings = dict(settings)

    def start(self, first_step: int) -> None:
        storage = self._trackio.SQLiteStorage
        path = storage.get_project_db_path(self._project)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with closing(sqlite3.connect(storage.init_db(self._project), timeout=30)) as database, database:
                database.execute("DELETE FROM metrics WHERE run_id = ? AND step >= ?", (self._id, first_step))
        self._run = self._trackio.Run(
            url=None, client=None, project=self._project, name=self._name, run_id=self._id, config=self._settings
        )
        self._failures: list[str] = []
        self._run._warn_once = lambda _, message: self._failures.append(message)  # where it would give a warning

    def log(self, values: Mapping[str, Value], step: int) -> None:
        if numbers := {name: value for name, value in values.items() if isinstance(value, int | float)}:
            self._run.log(numbers, step=step)
        self._raise_failure()

    def finish(self) -> None:
        with redirect_stdout(io.StringIO()):  # "Uploading logs": to the database
            self._run.finish()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failures:
            raise OSError(self._failures[0])


def _identity(run: Path) -> str:
    """An id for the run in a directory, the same when it is resumed."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
