"""Which files of a folder or a glob are read, and what is left out and why.

A folder means all files below it, sorted by path. Left out, counted and named: hidden files and folders (names that
begin with a dot), symbolic links, what cannot be read, pipes and devices, kinds that are not text (kinds.py), folders
that Sprout wrote, and what --exclude names. A glob chooses files in the same way, except that it also follows links
to files that stay in its folder: its pattern names them.

Links are not followed because one that stays in the folder would read a text twice, and one that leads out of it would
read what nobody named. --follow_links follows those that lead out of it, each place once. What a user names may be a
link itself.
"""

import os
import re
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePath

from errors import UserError
from prepare_data.sources.kinds import SKIPPED_FOLDERS, reason_by_ending

HIDDEN = "hidden files and folders"
LINKS = "symbolic links within the folder, or to nothing"
OUTSIDE = "symbolic links that lead out of the folder (--follow_links follows them)"
TWICE = "symbolic links to what another one leads to"
UNREADABLE = "files and folders that this user may not read"
SPECIAL = "pipes, sockets and devices"
EMPTY = "empty files"
CACHES = "folders of packages and caches"
OWN = "folders that Sprout wrote"
EXCLUDED = "files and folders by --exclude"
FOLDERS = "folders that the glob matches (** instead of * enters folders)"


@dataclass
class Listing:
    base: Path
    """The folder that was named or that a glob searches; or the file that was named."""
    files: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Reason → paths, relative to the folder."""
    unused: list[str] = field(default_factory=list)
    """Patterns of --exclude that match nothing."""
    follow_links: bool = False
    followed: list[str] = field(default_factory=list)
    """Where the links lead that are followed."""

    def skip(self, reason: str, path: PurePath | str) -> None:
        self.skipped.setdefault(reason, []).append(readable(path))

    def refused_link(self, path: Path) -> str | None:
        """Why a symbolic link is not followed; None where it is, as far as links are concerned."""
        target, base = os.path.realpath(path), os.path.realpath(self.base)
        if _is_in(target, base) or not os.path.exists(target):
            return LINKS
        if not self.follow_links:
            return OUTSIDE
        if any(_is_in(target, other) or _is_in(other, target) for other in [base, *self.followed]):
            return TWICE
        self.followed.append(target)
        return None

    def notes(self) -> list[str]:
        """One line for each reason: how many, and the first three."""
        lines = [f"skipped {reason}: {first_three(names)}" for reason, names in self.skipped.items()]
        return lines + [f"--exclude={pattern} matches nothing" for pattern in self.unused]


def readable(path: PurePath | str) -> str:
    """A path for messages on one line: control characters and bytes that are not UTF-8 become U+FFFD."""
    return re.sub("[\x00-\x1f\x7f-\x9f]", "\ufffd", os.fsencode(path).decode("utf-8", "replace"))


def first_three(names: Collection[str]) -> str:
    """How many there are, and the first three."""
    return f"{len(names):,} ({', '.join(list(names)[:3])}{', …' if len(names) > 3 else ''})"


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def list_files(source: str, exclude: Sequence[str] = (), follow_links: bool = False) -> Listing:
    """The files of a path or a glob; no files and nothing skipped if it names nothing. Raises UserError for a folder
    that cannot be read."""
    listing = Listing(Path(source), unused=list(exclude), follow_links=follow_links)
    if os.path.isdir(source):
        _walk(listing, None, exclude)
    elif os.path.exists(source):
        path = Path(source)
        if _excluded(listing, exclude, path, PurePath(path.name)):
            listing.skip(EXCLUDED, path.name)
        else:
            listing.files.append(path)
    else:
        parts = Path(source).parts
        plain = next((i for i, part in enumerate(parts) if set("*?[") & set(part)), len(parts))
        if plain < len(parts) and os.path.isdir(base := Path(*parts[:plain])):
            listing.base = base
            _walk(listing, parts[plain:], exclude)
    return listing


def _walk(listing: Listing, pattern: tuple[str, ...] | None, exclude: Sequence[str]) -> None:
    base = listing.base

    def unreadable(error: OSError) -> None:
        if not isinstance(error, PermissionError) or Path(error.filename) == base:
            raise UserError(f"{readable(error.filename)}: cannot be read ({error.strerror})")
        listing.skip(UNREADABLE, Path(error.filename).relative_to(base))

    for folder, names, files in os.walk(base, onerror=unreadable, followlinks=listing.follow_links):
        inside = PurePath(folder).relative_to(base)
        kept = []
        for name in sorted(names):
            relative = inside / name
            if pattern and not _may_hold_matches(relative.parts, pattern):
                if _matches(relative.parts, pattern) and not name.startswith("."):
                    listing.skip(FOLDERS, relative)
            elif reason := _skipped_folder(listing, exclude, base, relative):
                listing.skip(reason, relative)
            else:
                kept.append(name)
        names[:] = kept
        for name in sorted(files):
            relative = inside / name
            if pattern and not _matches(relative.parts, pattern):
                continue
            if reason := _skipped_file(listing, exclude, base, relative, pattern):
                listing.skip(reason, relative)
            else:
                listing.files.append(base / relative)
    listing.files.sort(key=lambda file: file.relative_to(base).as_posix())


def _skipped_folder(listing: Listing, exclude: Sequence[str], base: Path, relative: PurePath) -> str | None:
    path = base / relative
    if _excluded(listing, exclude, path, relative):
        return EXCLUDED
    if path.name.startswith("."):
        return HIDDEN
    if (path.is_symlink() or _is_junction(path)) and (reason := listing.refused_link(path)):
        return reason
    if path.name in SKIPPED_FOLDERS:
        return CACHES
    if os.path.isfile(path / "dataset.json") or os.path.isfile(path / "metrics.jsonl"):
        return OWN
    return None


def _is_junction(path: Path) -> bool:
    """Of Windows."""
    tag = getattr(os.lstat(path), "st_reparse_tag", 0)
    return tag == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)


def _skipped_file(
    listing: Listing, exclude: Sequence[str], base: Path, relative: PurePath, pattern: tuple[str, ...] | None
) -> str | None:
    path = base / relative
    if _excluded(listing, exclude, path, relative):
        return EXCLUDED
    if path.name.startswith(".") and not (pattern and pattern[-1].startswith(".")):
        return HIDDEN
    if (
        path.is_symlink()
        and (reason := listing.refused_link(path))
        and not (reason == LINKS and pattern and path.is_file())
    ):
        return reason
    if reason := reason_by_ending(path.name):
        return reason
    try:
        status = path.stat()
    except OSError:
        return UNREADABLE
    if not stat.S_ISREG(status.st_mode):
        return SPECIAL
    if not os.access(path, os.R_OK):
        return UNREADABLE
    return None if status.st_size else EMPTY


def _excluded(listing: Listing, exclude: Sequence[str], path: Path, relative: PurePath) -> bool:
    """Whether a pattern of --exclude matches: the name, the path in the folder, the path as messages show it, or the
    absolute path. A name with brackets also matches itself."""
    names = {relative.name, relative.as_posix(), path.as_posix(), Path(os.path.abspath(path)).as_posix()}
    found = False
    for pattern in exclude:
        wanted = pattern.removeprefix("./").rstrip("/")
        for name in names:
            if wanted == name or fnmatch(name, wanted):
                found = True
                if pattern in listing.unused:
                    listing.unused.remove(pattern)
    return found


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob whose ** stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(parts)
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _may_hold_matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a file below this folder can match the glob."""
    deep = pattern.index("**") if "**" in pattern else None
    if deep is None and len(parts) >= len(pattern):
        return False
    return all(fnmatch(part, wanted) for part, wanted in zip(parts, pattern[:deep], strict=False))
