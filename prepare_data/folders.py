"""Dataset folders appear whole or not at all: they are made under a temporary name and renamed.

Temporary names hold the machine's name and the process id, by which a later run recognises what a dead one left. On Windows a process
cannot be asked whether it lives without harming it, so there such folders stay until someone deletes them.
"""

import os
import platform
import re
import shutil
import uuid
from pathlib import Path

from errors import UserError
from files import sync_directory

HOST = re.sub(r"\W", "_", platform.node())[:60]


def temporary(data_dir: Path, kind: str = "tmp") -> Path:
    folder = data_dir / f".{kind}-{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, final: Path) -> bool:
    """Gives a finished folder its name; False if another process was first."""
    try:
        os.rename(folder, final)
    except OSError:
        if final.exists():
            return False
        raise
    sync_directory(final.parent)
    return True


def replace(folder: Path, final: Path) -> None:
    """Like `publish`, in the place of the dataset there. What was there lies whole under one name or the other at every moment."""
    aside = temporary(final.parent, "old")
    os.rename(final, aside / final.name)
    try:
        os.rename(folder, final)
    finally:
        restore(aside)
    sync_directory(final.parent)


def restore(aside: Path) -> None:
    """Moves what was set aside back to its name if nothing took it, and removes the rest."""
    for kept in aside.iterdir():
        if not (aside.parent / kept.name).exists():
            os.rename(kept, aside.parent / kept.name)
    shutil.rmtree(aside, ignore_errors=True)


def clean(data_dir: Path) -> None:
    """Removes what dead runs on this machine left, and puts back what one of them had set aside."""
    for folder in data_dir.glob(f".*-{HOST}-*"):
        match = re.fullmatch(rf"\.(tmp|old)-{HOST}-(\d+)-[0-9a-f]{{8}}", folder.name)
        if match and not _alive(int(match[2])):
            if match[1] == "old":
                restore(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_name(name: str) -> str:
    """A dataset's name must be a plain, visible folder name."""
    if (
        not name
        or name.startswith((".", "-"))
        or name == "downloads"
        or re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
        or len(name.encode()) > 200
    ):
        rule = "expected a plain folder name of at most 200 bytes, not beginning with . or -, and not 'downloads'"
        raise UserError(f"--name={name!r} cannot name a dataset: {rule}")
    return name
