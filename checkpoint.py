"""Checkpoints: written by train.py, read by everything else.

    RUN/checkpoints/step-00001000/
        model/                  model.safetensors, config.json, sprout_tokenizer.json: all that generation needs
        optimizer.safetensors   state.json
        manifest.json           bytes and crc32 of every other file, and a crc32 of itself; written last

A directory `step-N` is always complete: it gets that name by a rename. The writer also uses these names:
`step-N.writing` is unfinished, `step-N.removing` partly deleted, and `step-N.replaced` is the complete former
checkpoint of a step that is being saved again; it counts while there is no `step-N`. A kill at any moment leaves the
old state or the new one.

Files are data: their names are fixed here, nothing read is unpickled, executed or used as a path, and text from them is
shown by repr. This file stores tensors and JSON values; it knows neither the model, the optimizer nor their options.
Reading order: writing, finding, reading.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from errors import UserError
from files import MAX_JSON, DamagedFile, json_bytes, read_json, reading, sync_directory, write_file

VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS, CONFIG, TOKENIZER = ("model.safetensors", "config.json", "sprout_tokenizer.json")
MODEL_FILES = tuple(f"model/{name}" for name in (WEIGHTS, CONFIG, TOKENIZER))
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
FILES = {*MODEL_FILES, OPTIMIZER, STATE}
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
CHUNK = 1 << 20


class SaveFailed(UserError):
    """A checkpoint was not written; the earlier ones are unchanged. Training may continue and retry later."""


# ---- Writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    config: dict,
    tokenizer: dict,
    optimizer: dict[str, Tensor],
    state: dict,
) -> Path:
    """Writes checkpoints/step-N, verifies it and returns its path. The caller holds the RunLock.

    Then removes the checkpoints of later steps: open_latest skipped them as damaged, and the run resumed before them.
    Memory holds one serialized file at a time beside the tensors. Raises SaveFailed (disk full, …), with all earlier
    checkpoints unchanged, and ValueError on a NaN in the JSON values.
    """
    home = run_dir / "checkpoints"
    final = home / f"step-{step:08d}"
    temporary, replaced = final.with_name(final.name + ".writing"), final.with_name(final.name + ".replaced")
    contents: dict[str, bytes | dict[str, Tensor]] = {
        f"model/{WEIGHTS}": model,
        f"model/{CONFIG}": json_bytes(config),
        f"model/{TOKENIZER}": json_bytes(tokenizer),
        OPTIMIZER: optimizer,
        STATE: json_bytes({**state, "step": step}),
    }
    try:
        obsolete = [replaced, *(path for other, path in _complete_paths(run_dir) if other > step)]
        _discard(temporary)
        home.mkdir(parents=True, exist_ok=True)
        sync_directory(run_dir)
        _check_space(home, contents)
        _write_contents(temporary, contents)
        if final.exists():
            _discard(replaced)
            os.rename(final, replaced)
        try:
            os.rename(temporary, final)
            sync_directory(home)
            open_checkpoint(final)
        except (OSError, UserError):
            _discard(final)
            if replaced.exists():
                os.rename(replaced, final)
            raise
    except (OSError, UserError) as error:
        raise SaveFailed(
            f"the checkpoint of step {step} could not be saved in {home}: {error}. The earlier ones are unchanged"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _try_discard(obsolete)
    return final


def prune_checkpoints(run_dir: Path) -> None:
    """Removes all but the newest two checkpoints and the best one, and the leftovers of killed processes.

    The caller holds the RunLock. Whatever cannot be read or removed is kept, with a warning on standard error.
    """
    pattern = re.compile(r"step-\d{8,}(\.(writing|removing|replaced))?")
    try:
        checkpoints = list_checkpoints(run_dir)
        losses = _val_losses(checkpoints)
        keep = {*checkpoints[-2:], _best(losses)}
        keep |= set(checkpoints) - set(losses)  # unreadable ones: one of them may be the best
        _try_discard(path for path in _directories(run_dir) if path not in keep and pattern.fullmatch(path.name))
    except OSError as error:
        print(f"warning: old checkpoints could not be removed: {error}", file=sys.stderr)


def _check_space(home: Path, contents: dict[str, bytes | dict[str, Tensor]]) -> None:
    needed = CHUNK  # headers and the manifest
    for content in contents.values():
        needed += len(content) if isinstance(content, bytes) else sum(tensor.nbytes for tensor in content.values())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; free space on that disk",
        )


def _write_contents(directory: Path, contents: dict[str, bytes | dict[str, Tensor]]) -> None:
    """Writes and syncs all files, the manifest last. Checksums are of the bytes in memory, not of those read back."""
    (directory / "model").mkdir(parents=True)
    files = {}
    for name, content in contents.items():
        if isinstance(content, dict):
            content = save({key: tensor.detach().cpu().contiguous() for key, tensor in content.items()})
        write_file(directory / name, content)
        files[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    manifest = {"format": "sprout checkpoint", "version": VERSION, "files": files}
    write_file(directory / MANIFEST, json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))}))
    sync_directory(directory / "model")
    sync_directory(directory)


def _discard(path: Path) -> None:
    """Renames a directory, then deletes it: a partly deleted checkpoint never has the name of a complete one."""
    removing = path.with_name(path.name.partition(".")[0] + ".removing")
    if removing.exists():
        shutil.rmtree(removing)
    if path.exists():
        os.rename(path, removing)
        shutil.rmtree(removing)


def _try_discard(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            _discard(path)
        except OSError as error:  # costs disk space only
            print(f"warning: {path} could not be removed: {error}", file=sys.stderr)


# ---- Finding ---------------------------------------------------------------------------------------------------------


def _directories(run_dir: Path) -> list[Path]:
    return [path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir() and not path.is_symlink()]


def _complete_paths(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints, oldest first; `step-N.replaced` before `step-N`."""
    matches = [(re.fullmatch(r"step-(\d{8,})(\.replaced)?", path.name), path) for path in _directories(run_dir)]
    found = sorted((int(match[1]), match[2] is None, path) for match, path in matches if match)
    return [(step, path) for step, _, path in found]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, one per step, oldest first. Reads no file."""
    return list(dict(_complete_paths(run_dir)).values())


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """The checkpoint `latest`, `best` or `step-N` of a run. Raises UserError if there is none.

    best: the lowest val_loss in state.json; ties go to the earlier step; latest if none has a val_loss.
    """
    checkpoints = dict(_complete_paths(run_dir))
    if not checkpoints:
        if not run_dir.is_dir():
            kind = "is a file, not a run directory" if run_dir.exists() else "does not exist"
            raise UserError(f"the run {run_dir} {kind}; train first: python train.py --run={shlex.quote(str(run_dir))}")
        runs = sorted(str(path) for path in run_dir.iterdir() if path.is_dir() and _complete_paths(path))
        if runs:
            raise UserError(f"the directory {run_dir} is not a run; it contains these runs: {', '.join(runs)}")
        raise UserError(
            f"the run directory {run_dir} has no checkpoint yet; start a run: python train.py --run=NEW_NAME"
        )
    paths = list(checkpoints.values())
    if which == "latest":
        return paths[-1]
    if which == "best":
        return _best(_val_losses(paths)) or paths[-1]
    match = re.fullmatch(r"step-(\d{1,18})", which)
    if match and int(match[1]) in checkpoints:
        return checkpoints[int(match[1])]
    names = ", ".join(f"step-{step}" for step in checkpoints)
    raise UserError(f"--checkpoint={which!r} is not in {run_dir}; expected one of: best, latest, {names}")


def _val_losses(checkpoints: list[Path]) -> dict[Path, float | None]:
    """The val_loss of each checkpoint; unreadable ones are left out, with a warning on standard error."""
    losses: dict[Path, float | None] = {}
    for path in checkpoints:
        try:
            _check_files(path, [STATE])
            losses[path] = read_json(path / STATE).get("val_loss")
        except DamagedFile as error:
            print(f"warning: not considered as the best checkpoint: {error}", file=sys.stderr)
    return losses


def _best(losses: dict[Path, float | None]) -> Path | None:
    known = {path: loss for path, loss in losses.items() if isinstance(loss, (int, float))}
    return min(known, key=known.__getitem__, default=None)


def resolve_model_folder(path: Path, which: str = "best") -> Path:
    """The model folder of a run directory (of its checkpoint `which`), a checkpoint directory or a model folder."""
    folder = next((place for place in (path, path / "model") if (place / WEIGHTS).is_file()), None)
    if folder is not None and which != "best":
        raise UserError(f"--checkpoint={which} selects one of a run, but {path} is a single checkpoint; leave it out")
    if folder is not None:
        return folder
    if (path / MANIFEST).is_file():
        return path / "model"
    return find_checkpoint(path, which) / "model"


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    config: dict[str, Any]
    """The model's options, as saved."""
    tokenizer: dict[str, Any]

    def model_tensors(self) -> dict[str, Tensor]:
        _check_model_files(self.path)  # the files may have changed since open_model_folder
        return _read_tensors(self.path / WEIGHTS)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    model: ModelFolder
    state: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.model.config

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.model.tokenizer

    def model_tensors(self) -> dict[str, Tensor]:
        return self.model.model_tensors()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        _check_files(self.path, [OPTIMIZER])
        return _read_tensors(self.path / OPTIMIZER)


def open_checkpoint(path: Path) -> Checkpoint:
    """Checks the size and crc32 of every file and reads all but the tensors. Ignores other files. Raises UserError."""
    model = open_model_folder(path / "model")
    _check_files(path, [OPTIMIZER, STATE])
    _check_header(path / OPTIMIZER)
    state = read_json(path / STATE)
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise DamagedFile(path / STATE, f"step is {step!r}, expected an integer >= 0")
    return Checkpoint(path, step, model, state)


def open_latest(run_dir: Path) -> Checkpoint:
    """The newest intact checkpoint, for --resume; damaged ones are skipped with a warning on standard error."""
    find_checkpoint(run_dir, "latest")  # raises if there is none
    for _, path in reversed(_complete_paths(run_dir)):
        try:
            return open_checkpoint(path)
        except DamagedFile as error:
            print(f"WARNING: checkpoint skipped, an older one is tried: {error}", file=sys.stderr)
    raise UserError(
        f"every checkpoint in {run_dir} is damaged; restore one from a copy, or start again: python train.py --run=PATH"
    )


def open_model_folder(path: Path) -> ModelFolder:
    """Reads a model folder. Checks size and crc32 inside a checkpoint, elsewhere only the form. Raises UserError."""
    _check_model_files(path)
    _check_header(path / WEIGHTS)
    return ModelFolder(path, read_json(path / CONFIG), read_json(path / TOKENIZER))


def _check_model_files(path: Path) -> None:
    checkpoint, name = os.path.split(os.path.abspath(path))
    if name == "model" and os.path.exists(os.path.join(checkpoint, MANIFEST)):
        _check_files(Path(checkpoint), MODEL_FILES)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Not memory-mapped: a truncated file would raise SIGBUS."""
    _check_header(path)
    try:
        with reading(path):
            return load(path.read_bytes())
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: a shape such as (0, 2**62, 2**62)
        raise DamagedFile(path, f"damaged ({error})") from error


def _check_files(directory: Path, names: Iterable[str]) -> None:
    """Compares the size and crc32 of each file with the manifest. Raises DamagedFile; UserError for another version."""
    path = directory / MANIFEST
    manifest = read_json(path)
    checksum, files, version = manifest.pop("crc32", None), manifest.get("files"), manifest.get("version")
    try:
        intact = checksum == zlib.crc32(json_bytes(manifest)) and manifest.get("format") == "sprout checkpoint"
    except (ValueError, RecursionError):  # infinity or deep nesting: a foreign file
        intact = False
    if not intact:
        raise DamagedFile(path, "not an intact manifest of a checkpoint")
    if version != VERSION:
        raise UserError(
            f"{path}: format version {version!r} found, {VERSION} expected; open it with the Sprout that wrote it"
        )
    if not isinstance(files, dict) or set(files) != FILES:
        raise DamagedFile(path, f"must list {sorted(FILES)} and nothing else; it lists {str(files)[:200]!r}")
    for name in names:
        if (found := _size_and_crc(directory / name)) != files[name]:
            expected = files[name] if isinstance(files[name], dict) else {}
            problem = f"{found['bytes']} bytes, {str(expected.get('bytes'))[:30]} expected"
            if found["bytes"] == expected.get("bytes"):
                problem = f"damaged: its crc32 is {found['crc32']:08x}, which is not the one in the manifest"
            raise DamagedFile(directory / name, problem)


def _size_and_crc(path: Path) -> dict[str, int]:
    """A file's entry in the manifest."""
    crc = 0
    with reading(path) as size, open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def _check_header(path: Path) -> None:
    """Checks a safetensors file: header length (8 bytes), header, data. The library checks that shapes fit the data."""
    with reading(path) as size, open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_JSON, size - 8):
        raise DamagedFile(path, f"its header length of {length} bytes is impossible in a file of {size} bytes")
    try:
        with safe_open(path, framework="pt") as tensors:
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise DamagedFile(path, f"damaged ({error})") from error
    for name, dtype in dtypes.items():
        if len(name) > 256 or not name.isprintable() or dtype not in DTYPES:
            raise DamagedFile(path, f"tensor {name[:300]!r} of dtype {dtype!r}: Sprout writes no such name or dtype")
