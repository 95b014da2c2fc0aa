"""RUN/run_state.json: what became of a run, for schedulers, supervisors and processes that torchrun starts again.

    {"format": "sprout-run-state", "version": 1, "state": "running" | "done" | "stopped" | "failed",
     "resumable": whether `command` goes on without a change by a person, "step": the last one known,
     "saved_step": that of the last checkpoint, or null, "exit_code": of the process, null while it runs,
     "message": how it ended, "command": what to run next, or null, "launches": the torchrun processes, if any}

Rank 0 replaces it at the start, at saves and at the end. A process that is killed leaves "running" behind: with a free
lock that means killed. Where it cannot be written, training goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from common.memory import is_out_of_memory
from common.run_directory import is_lost
from errors import INTERRUPTED, NO_RESOURCES, STOPPED, UserError, quote
from files import DamagedFile, read_json, write_json
from parallel.processes import command, is_first, launches

STATE_FILE = "run_state.json"
FORMAT = {"format": "sprout-run-state", "version": 1}


class RunState:
    """A context from the moment a run is locked until it has ended, however it ends. runs: the directories that get
    the state; the first one is that of the run, others wait for it (--teachers). argv: the arguments of this process.
    saved: the step from which it is resumed. `steps`, which may be replaced, tells the current step and that of the
    last checkpoint. Without an exit code (`ended`) and an error it goes on elsewhere."""

    def __init__(self, runs: Sequence[Path], argv: Sequence[str], saved: int | None = None) -> None:
        self.runs, self.argv = runs, argv
        self.steps: Callable[[], tuple[int, int | None]] = lambda: (saved or 0, saved)
        self.code: int | None = None

    def __enter__(self) -> RunState:
        self.write("running", True, None, "")
        return self

    def saved(self) -> None:
        """A checkpoint has been written."""
        self.write("running", True, None, "")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.write(*outcome(error))
        elif self.code == STOPPED:
            self.write("stopped", True, self.code, "stopped by a signal")
        elif self.code is not None:
            self.write("done", False, self.code, "complete")

    def stopped(self, stop: Callable[[], bool]) -> bool:
        """Whether a signal ends the process now, which is noted. All processes call it."""
        if stop():
            self.code = STOPPED
        return self.code == STOPPED

    def ended(self, outcome: tuple[int, list[str]]) -> tuple[int, list[str]]:
        """Notes the exit code, the first part of what a run returns."""
        self.code = outcome[0]
        return outcome

    def write(self, state: str, may_go_on: bool, code: int | None, message: str) -> None:
        """Replaces the file in each of the directories; those that wait for the run are not done with it."""
        step, saved = self.steps()
        run = quote(str(self.runs[0]))
        following = f"{command()} --resume={run}" if saved is not None else self.again()
        following = f"python sample.py --run={run}" if state == "done" else following
        values = {"state": state, "resumable": may_go_on, "step": step, "saved_step": saved, "exit_code": code}
        values |= {"message": message[:2000], "command": following if may_go_on or state == "done" else None}
        for path in self.runs if state != "done" else self.runs[:1]:
            write_state(path, values)

    def again(self) -> str:
        return " ".join([command(), *map(quote, self.argv)])


@contextmanager
def telling_failure(run: Path) -> Iterator[None]:
    """A context for a run that this process is to begin or to go on with after another one: an error that comes before
    the run itself can tell what became of it."""
    try:
        yield
    except BaseException as error:
        if is_first() and (found := read_state(run)).get("state") == "running":
            state, may_go_on, code, message = outcome(error)
            found |= {"state": state, "resumable": may_go_on, "exit_code": code, "message": message[:2000]}
            write_state(run, found if may_go_on else found | {"command": None})
        raise


def outcome(error: BaseException) -> tuple[str, bool, int, str]:
    """The state of a run that ends with this error, whether the same command may go on, the exit code and the message.
    What is no mistake of a user may be a fault of the machine, which passes."""
    message = str(error) or type(error).__name__
    if isinstance(error, UserError):
        return "failed", error.may_retry, error.exit_code, message
    if isinstance(error, KeyboardInterrupt):
        return "stopped", True, INTERRUPTED, str(error) or "interrupted before there was anything to save"
    return "failed", True, NO_RESOURCES if is_out_of_memory(error) else 1, message


def write_state(run: Path, values: Mapping[str, Any]) -> None:
    """Replaces the file, in rank 0 alone. What fails is dropped: nothing depends on it."""
    if is_first() and not is_lost(run):
        with suppress(OSError, ValueError):
            write_json(run / STATE_FILE, {**FORMAT, **values, "launches": list(launches())})


def write_done(run: Path, step: int) -> None:
    """For a run that is found complete, in case that the process which ended it was killed before it could tell."""
    if read_state(run).get("state") != "done":
        command = f"python sample.py --run={quote(str(run))}"
        values = {"state": "done", "resumable": False, "step": step, "saved_step": step, "exit_code": 0}
        write_state(run, {**values, "message": "complete", "command": command})


def read_state(run: Path) -> dict[str, Any]:
    """The values of the file; none where it is missing, damaged or of another version."""
    try:
        found = read_json(run / STATE_FILE)
    except DamagedFile:
        return {}
    return found if {name: found.get(name) for name in FORMAT} == FORMAT else {}
