"""Whose run it is: paths and services in a state.json, config.json or dataset.json are used only where this user's
Sprout has written them.

A run that came from somewhere else may name any file of this machine as its text, and any service for its records. So
these files carry `signature`: HMAC-SHA256 over the values that are trusted, with a key of this user that never leaves
this machine. All else in these files needs no trust. A run that was copied to another machine, or whose user's data
folder was not kept, resumes, too: what it needs is then named on the command line (config/resume.py).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from files import json_bytes, plain_file, write_all

SERVICES: dict[str, Any] = {"wandb": None, "wandb_project": "sprout", "trackio": False, "trackio_project": "sprout"}
"""Options that send records elsewhere, and their values where none are sent."""
PATHS = ("data", "data_dir", "init_from", "teacher", "tokenizer")
TRUSTED = (*PATHS, *SERVICES)
KEY_BYTES = 32


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A state.json, config.json or dataset.json with its signature; without one where no key can be made or read."""
    key, content = _key(), {name: value for name, value in record.items() if name != "signature"}
    return content if key is None else content | {"signature": _sign(key, content)}


def is_own(record: Mapping[str, Any]) -> bool:
    """Whether this user's Sprout has written what is trusted in such a file."""
    key, signature = _key(), record.get("signature")
    if key is None or not isinstance(signature, str) or not signature.isascii():
        return False
    try:
        return hmac.compare_digest(signature, _sign(key, record))
    except (ValueError, TypeError, RecursionError):  # of a foreign file
        return False


def own_texts(state: Mapping[str, Any], *, only_kept: bool = False) -> list[dict[str, Any]]:
    """Name, path and fingerprint of the text of a run, and of those that it has mixed in, from its state.json. Without
    their paths where that is not this user's; a name is one folder in the data folder, or "". Anything else is left
    out."""
    kept = state.get("kept")
    entries = [] if only_kept else [state.get("dataset")]
    entries += kept if isinstance(kept, list) else []
    found = [dict(entry) for entry in entries if isinstance(entry, dict)]
    is_trusted = is_own(state)
    for entry in found:
        if not (is_trusted and isinstance(entry.get("path"), str)):
            entry.pop("path", None)
        entry["name"] = entry["name"] if is_plain_name(entry.get("name")) else ""
    return found


def is_plain_name(name: object) -> bool:
    """Whether a name is that of a folder in the data folder, and of no other place."""
    return isinstance(name, str) and bool(re.fullmatch(r"[^\W.][^/\\:\0]{0,254}", name)) and name.isprintable()


def _sign(key: bytes, record: Mapping[str, Any]) -> str:
    options = record.get("options")
    options = options if isinstance(options, dict) else {}
    dataset = record.get("dataset")
    content = {
        "options": {name: options.get(name) for name in TRUSTED},
        "dataset": dataset.get("path") if isinstance(dataset, dict) else None,
        "kept": record.get("kept"),
        "chain": record.get("chain"),
    }
    if "source" in record:  # of a dataset: what it was prepared from
        content["source"] = record["source"]
    return hmac.new(key, json_bytes(content), hashlib.sha256).hexdigest()


def key_files() -> Iterator[Path]:
    """Where the key of this user is, and where else, as long as the machine runs: in a container without a home."""
    import platformdirs  # takes a while

    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    home = platformdirs.user_data_path("sprout", appauthor=False)
    yield home / "key"
    yield Path(tempfile.gettempdir()) / f"sprout-{user}" / "key"  # raises OSError where there is no such folder


def _key() -> bytes | None:
    """The key of this user, which is made where there is none. None where that is not possible."""
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        for path in key_files():
            with suppress(OSError):
                return _read_key(path)
    return None


@cache
def _read_key(path: Path) -> bytes:
    """Raises OSError, which is not kept."""
    with suppress(FileNotFoundError):
        return _read(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{uuid.uuid4().hex[:16]}.writing")
    descriptor = plain_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, 0o600)
        write_all(descriptor, secrets.token_bytes(KEY_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        if hasattr(os, "link"):
            with suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
        elif not path.exists():
            os.rename(temporary, path)
    except OSError:  # no links here
        if not path.exists():
            os.rename(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return _read(path)


def _read(path: Path) -> bytes:
    """Raises OSError, also where others may have made the key."""
    status = os.lstat(path.parent)
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise OSError(f"{path.parent} belongs to another user, or others may write there")
    with open(path, "rb", opener=plain_file) as file:
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise OSError(f"{path}: {len(key)} bytes found, {KEY_BYTES} expected")
    return key
