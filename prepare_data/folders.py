"""Atomic publication of dataset folders: a folder is written under a temporary name and renamed when complete.

Owns the temporary names and the allowed dataset names; knows nothing of the files in a folder. A temporary name holds
the host name and the process id, so a later run can remove what a dead process left behind. Windows has no harmless way
to test whether a process is alive, so there such folders must be deleted by hand.
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
    """A new, empty folder in data_dir. `kind`: "tmp" for a dataset being written, "old" for one being replaced."""
    folder = data_dir / f".{kind}-{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, final: Path) -> bool:
    """Renames a complete folder to its final name. Returns False if that name exists already."""
    try:
        os.rename(folder, final)
    except OSError:
        if final.exists():
            return False
        raise
    sync_directory(final.parent)
    return True


def replace(folder: Path, final: Path) -> None:
    """Like `publish`, but replaces a dataset. At every moment the old one is complete under one of its two names."""
    old = temporary(final.parent, "old")
    os.rename(final, old / final.name)
    try:
        os.rename(folder, final)
    finally:
        restore(old)
    sync_directory(final.parent)


def restore(old: Path) -> None:
    """Moves the replaced dataset in `old` back if its name is free, and deletes it otherwise."""
    for dataset in old.iterdir():
        if not (old.parent / dataset.name).exists():
            os.rename(dataset, old.parent / dataset.name)
    shutil.rmtree(old, ignore_errors=True)


def clean(data_dir: Path) -> None:
    """Deletes temporary folders of this host's dead processes; restores a dataset that one of them was replacing."""
    for folder in data_dir.glob(f".*-{HOST}-*"):
        match = re.fullmatch(rf"\.(tmp|old)-{HOST}-(\d+)-[0-9a-f]{{8}}", folder.name)
        if match and not _is_alive(int(match[2])):
            if match[1] == "old":
                restore(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_name(name: str) -> str:
    """Returns the name if it can name a dataset: a plain, visible folder name. Raises UserError otherwise."""
    if (
        not name
        or name.startswith((".", "-"))
        or name == "downloads"
        or re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
        or len(name.encode()) > 200
    ):
        rule = "expected a folder name of at most 200 bytes that does not begin with . or - and is not 'downloads'"
        raise UserError(f"--name={name!r} cannot name a dataset: {rule}")
    return name
