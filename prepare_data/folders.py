"""Atomic publication of dataset folders: a folder is written under a temporary name and renamed when complete.

Owns the temporary names and what can name a dataset; knows nothing of the files in a folder. A temporary name holds
the host name and the process id, so a later run can remove what a dead process left behind. Windows has no harmless way
to test whether a process is alive, so there such folders must be deleted by hand.
"""

import os
import platform
import re
import shutil
import unicodedata
import uuid
from pathlib import Path

from errors import UserError, quote
from files import sync_directory

MAX_NAME = 200  # bytes
FORBIDDEN = '/\\:*?"<>|'
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"}  # of Windows, with any ending
DEVICES |= {port + digit for port in ("com", "lpt") for digit in "123456789¹²³"}
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


def safe_name(name: str, max_bytes: int = MAX_NAME) -> str:
    """The nearest name that can name a dataset on every system; `name` itself if it can."""
    marked = "".join("\0" if character in FORBIDDEN or _is_invisible(character) else character for character in name)
    marked = re.sub(r"^[\s\0.~-]+|[\s\0.]+$", "", marked)
    if marked.lower() == "downloads" or marked.lower().partition(".")[0].rstrip() in DEVICES:
        marked = f"text_{marked}"
    cut = marked.encode()[:max_bytes].decode(errors="ignore")
    return re.sub(r"\0+", "_", re.sub(r"[\s\0.]+$", "", cut)) or "text"


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")  # Cs: a byte of a name that is not UTF-8


def check_name(name: str) -> str:
    """Returns the name that a user gave if it can name a dataset. Raises UserError otherwise."""
    if name != safe_name(name):
        raise UserError(
            f"--name={name!r} cannot name a dataset: expected a folder name that every system accepts, at most"
            f" {MAX_NAME} bytes, without {FORBIDDEN}, that does not begin with . - or ~ or end with a dot or a space,"
            f" and is not 'downloads'; try --name={quote(safe_name(name))}"
        )
    return name
