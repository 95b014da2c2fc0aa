"""The one error that a person is meant to read, and how the scripts print it. Every layer may import this file; it imports nothing."""

import io
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend. The message says what was found, where, what was expected and what to do next."""


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main`; a UserError becomes `error: …` on standard error and exit code 2, Ctrl-C exit code 130; no traceback.

    A reader that closes standard output early (`| head`) ends the script quietly with exit code 1; characters that the console cannot show
    are shown as others.
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
