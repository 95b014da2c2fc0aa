"""UserError, the error meant for the user; how a script starts (start_script) and ends (run_script): its standard
streams, Ctrl-C and the exit codes, of which those below are all but 0 (complete) and 1 (Python's, for a traceback).
"""

import errno
import gc
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from terminal import symbols_on_terminals

FAILED = 2  # an error of the user: the same command fails again
LOST = 69  # a process has lost contact with another one: the same command goes on (EX_UNAVAILABLE of sysexits.h)
NO_RESOURCES = 71  # the disk or the memory is full: the same command goes on once some is free (EX_OSERR)
IN_USE = 73  # another process writes in the run: the same command goes on after that has ended (EX_CANTCREAT)
STOPPED = 75  # a signal stopped the run, which is saved and can be resumed (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C before there was anything to save: 128 + SIGINT, as shells have it


class UserError(Exception):
    """An error that the user can fix. The message names what was found, where, what was expected and what to do.
    exit_code: of a script that ends with it. may_retry: whether the same command may do better another time."""

    exit_code, may_retry = FAILED, False


class InUse(UserError):
    """Another process writes there."""

    exit_code, may_retry = IN_USE, True


class OutOfResources(UserError):
    """The disk or the memory is full."""

    exit_code, may_retry = NO_RESOURCES, True


def quote(text: str) -> str:
    """A text as a user types it in a shell, on one line; for the commands that messages name."""
    for char, escape in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(char, escape)
    import shlex  # here, like subprocess: until start_script has been called Ctrl-C would end in a traceback

    if os.name == "nt":
        import subprocess

        return subprocess.list2cmdline([text])
    quoted = shlex.quote(text)
    return quoted if quoted == text or set(text) & set('"$`\\!') else f'"{text}"'


class OutputClosed(BrokenPipeError):
    """The reader of standard output is gone (`| head`)."""


def start_script(*, prints_result: bool = False) -> None:
    """The first call of a script, before the imports that take seconds.

    From here on output cannot fail: what standard output and standard error do not take (a closed pipe or terminal, a
    full disk) is dropped. prints_result: what the script prints is all that it makes, so the first failure of standard
    output raises OutputClosed or UserError. Streams that are closed are opened on os.devnull; otherwise the next file
    to be opened would get their descriptors, and with them what is written to standard error. Ctrl-C exits at once. The
    garbage collector rests until run_script: while modules are imported it would find nothing, in a tenth of the time.
    """
    gc.disable()
    sys.tracebacklimit = 1000  # Python's default; a script sets 0 before it imports this file
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free descriptor, this one
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115 - None where it was closed
    sys.stdout = _guarded(sys.stdout or open(1, "w", encoding="utf-8"), drops=not prints_result)  # noqa: SIM115
    sys.stderr = _guarded(sys.stderr or open(2, "w", encoding="utf-8"), drops=True)  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored, for example
        signal.signal(signal.SIGINT, _exit_at_once)


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its return value, without a traceback for UserError and Ctrl-C.

    A UserError is printed to standard error as `error: …`, and has its exit code. Ctrl-C: exit code 130. A reader that
    closed the pipe has all that it wanted: exit code 0, silently. Characters that the console cannot encode are
    replaced; a terminal gets control characters as symbols.
    """
    gc.freeze()  # what the imports made stays
    gc.enable()
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt: files are closed and removed
    with symbols_on_terminals():
        try:
            try:
                code: Any = main()
            except SystemExit as ended:  # --help
                code = ended.code
            sys.stdout.flush()
        except KeyboardInterrupt:
            _report("interrupted")
            code = INTERRUPTED
        except OutputClosed:
            code = 0
        except UserError as error:
            _report(f"error: {error}")
            code = error.exit_code
    for name in ("SIGINT", "SIGHUP"):  # the exit itself is not to be interrupted
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(code)


def _report(message: str) -> None:
    """Prints how the script ends: of the processes that torchrun has started on this machine, which all have the same
    to tell as long as they have not joined, one alone. The others wait, since torchrun ends all with the first one."""
    if _is_follower():
        time.sleep(5)
    else:
        print(message, file=sys.stderr, flush=True)


def _is_follower() -> bool:
    return os.environ.get("LOCAL_RANK", "0") != "0"


class _Output(io.RawIOBase):
    """A standard stream whose failures do no harm. drops: what cannot be written is dropped; otherwise the first
    failure is raised, and what comes after it is dropped."""

    def __init__(self, stream: io.TextIOWrapper, drops: bool) -> None:
        self._stream = stream  # keeps its descriptor open
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer between them
        self._drops = drops

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            while (count := self._raw.write(data)) is None:  # a descriptor that another program made non-blocking
                select.select([], [self._raw], [])
            return int(count)
        except OSError as error:
            if not self._drops:
                self._drops = True
                if error.errno in (errno.EPIPE, errno.EINVAL):  # EINVAL: a closed pipe on Windows
                    raise OutputClosed from error
                raise UserError(
                    f"standard output cannot be written ({error.strerror}); write to another file or disk"
                ) from error
            return len(data)


def _guarded(stream: Any, drops: bool) -> Any:
    """The text stream on an _Output, with its encoding and line ends. A stream without a descriptor is returned."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw, unbuffered = _Output(stream, drops), stream.write_through
    buffer: Any = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=True, write_through=unbuffered)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        _is_follower() or os.write(2, b"interrupted\n")  # print is not safe inside a signal handler
    os._exit(INTERRUPTED)
