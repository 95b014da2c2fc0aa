"""UserError, the error meant for the user, and run_script, which prints it. Imports nothing of the project."""

import io
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix. The message names what was found, where, what was expected and what to do."""


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its return value, without a traceback for UserError and Ctrl-C.

    A UserError is printed to standard error as `error: …`, exit code 2. Ctrl-C: exit code 130. A closed standard output
    (`| head`): exit code 1, silently. Characters that the console cannot encode are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit would fail
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
