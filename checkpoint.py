"""Checkpoints: written by train.py, read by everything else.

    RUN/checkpoints/step-00001000/
        model/                  model.safetensors, config.json, sprout_tokenizer.json: all that generation needs
        optimizer.safetensors   state.json
        manifest.json           bytes and crc32 of every other file, and a crc32 of itself; written last
    RUN/base/                   of a run that trains adapters: the model folder of the weights that it keeps as they are

A model.safetensors of adapters (training/lora.py) holds X.lora_a (r, in) and X.lora_b (out, r) for each adapted matrix
X.weight (out, in) of the base; config.json then has the entry "adapter", with the rank, the scale, and bytes and crc32
of the base. `ModelFolder.model_tensors` merges them, so that no other reader sees a difference.

A directory `step-N` is always complete: it gets that name by a rename. The writer also uses these names:
`step-N.writing` is unfinished, `step-N.removing` partly deleted, and `step-N.replaced` is the complete former
checkpoint of a step that is being saved again; it counts while there is no `step-N`. A kill at any moment leaves the
old state or the new one.

Files are data: their names are fixed here, nothing read is unpickled, executed or used as a path, and text from them is
shown by repr. This file stores tensors and JSON values; it knows neither the model, the optimizer nor their options.
Reading order: writing, finding, reading.
"""

from __future__ import annotations

import difflib
import errno
import glob
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import UserError, quote
from files import MAX_JSON, DamagedFile, json_bytes, read_json, reading, sync_directory, write_parts

VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS, CONFIG, TOKENIZER = ("model.safetensors", "config.json", "sprout_tokenizer.json")
MODEL_FILES = tuple(f"model/{name}" for name in (WEIGHTS, CONFIG, TOKENIZER))
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
FILES = {*MODEL_FILES, OPTIMIZER, STATE}
BASE = "base"
LORA_A, LORA_B = ".lora_a", ".lora_b"
DTYPES = {  # safetensors' names; a file holds the tensors in the order of these dtypes, then by name
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CHUNK = 1 << 20


class SaveFailed(UserError):
    """A checkpoint was not written; the earlier ones are unchanged. Training may continue and retry later."""


@dataclass(frozen=True)
class Adapter:
    """What config.json says of adapters. base: bytes and crc32 of the weights that they belong to."""

    rank: int
    scale: float
    base: dict[str, int]


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
    adapter: Adapter | None = None,
) -> Path:
    """Writes checkpoints/step-N, verifies it and returns its path. The caller holds the RunLock. With an adapter,
    `model` holds the adapters alone.

    Then removes the checkpoints of later steps: open_latest skipped them as damaged, and the run resumed before them.
    Beside the tensors, memory holds a copy of one at a time, of those on a GPU or not contiguous. Raises SaveFailed
    (disk full, …), with all earlier checkpoints unchanged, and ValueError on a NaN in the JSON values.
    """
    home = run_dir / "checkpoints"
    final = home / f"step-{step:08d}"
    temporary, replaced = final.with_name(final.name + ".writing"), final.with_name(final.name + ".replaced")
    contents: dict[str, bytes | dict[str, Tensor]] = {
        f"model/{WEIGHTS}": model,
        f"model/{CONFIG}": json_bytes(config if adapter is None else {**config, "adapter": asdict(adapter)}),
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


def write_model_folder(
    path: Path, model: dict[str, Tensor], config: dict, tokenizer: dict, others: Mapping[str, dict]
) -> None:
    """Writes a model folder that is not part of a checkpoint, under a temporary name first. others: further JSON files,
    by name without .json. Raises UserError where it exists, or cannot be written, and then leaves nothing behind."""
    contents: dict[str, bytes | dict[str, Tensor]] = {
        WEIGHTS: model, CONFIG: json_bytes(config), TOKENIZER: json_bytes(tokenizer),
    }  # fmt: skip
    contents |= {f"{name}.json": json_bytes(value) for name, value in others.items()}
    temporary = path.with_name(f".{path.name}.writing")
    parents = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _check_space(path.parent, contents)
        temporary.mkdir()
        for name, content in contents.items():
            write_parts(temporary / name, [content] if isinstance(content, bytes) else _safetensors(content))
        sync_directory(temporary)
        if path.exists():
            raise UserError(f"{path} exists; remove it, or give another folder")
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in parents:
            with suppress(OSError):  # not empty
                folder.rmdir()


def save_base(run: Path, source: ModelFolder, weights: dict[str, Tensor], config: dict) -> dict[str, int]:
    """Writes RUN/base, before the first checkpoint of a run, which is locked → bytes and crc32 of its weights: the
    files of `source`, as hard links where that is possible, or weights and config of the run's model, where those of
    the source are others: adapters, or for a longer context. Raises UserError."""
    base = run / BASE
    remove_base(run)
    shapes = {name: [*tensor.shape] for name, tensor in weights.items()}
    if source.adapter is not None or shapes != {name: shape for name, (_, shape) in source.header().items()}:
        write_model_folder(base, weights, config, source.tokenizer, {})
        return _size_and_crc(base / WEIGHTS)
    temporary = base.with_name(f".{BASE}.writing")
    try:
        temporary.mkdir()
        for name in (WEIGHTS, CONFIG, TOKENIZER):
            with reading(source.path / name):
                _link_or_copy(source.path / name, temporary / name)
        sync_directory(temporary)
        os.rename(temporary, base)
        sync_directory(run)
    except OSError as error:
        raise UserError(f"{base} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = _size_and_crc(base / WEIGHTS)
    if (checkpoint := _checkpoint_of(source.path)) is not None:
        _compare(source.path / WEIGHTS, found, _manifest_files(checkpoint)[f"model/{WEIGHTS}"])
    return found


def remove_base(run: Path) -> None:
    """Removes RUN/base of a run that ended before its first checkpoint: its three files and nothing else. Raises
    UserError where it holds others."""
    if (run / BASE).is_symlink():
        raise UserError(f"{run / BASE} is a link, and not of this run; remove it, or name another run with --run=PATH")
    try:
        shutil.rmtree(run / f".{BASE}.writing", ignore_errors=True)
        for name in (WEIGHTS, CONFIG, TOKENIZER):
            (run / BASE / name).unlink(missing_ok=True)
        if (run / BASE).exists():
            (run / BASE).rmdir()
    except OSError as error:
        raise UserError(f"{run / BASE} could not be removed: {error}; name another run with --run=PATH") from error


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # another disk, or a file system without links
        _check_space(target.parent, {}, source.stat().st_size)
        shutil.copyfile(source, target, follow_symlinks=False)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())


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


def _check_space(home: Path, contents: dict[str, bytes | dict[str, Tensor]], more: int = 0) -> None:
    needed = CHUNK + more  # headers and the manifest
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
    files = {
        name: write_parts(directory / name, [content] if isinstance(content, bytes) else _safetensors(content))
        for name, content in contents.items()
    }
    manifest = {"format": "sprout checkpoint", "version": VERSION, "files": files}
    write_parts(directory / MANIFEST, [json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))})])
    sync_directory(directory / "model")
    sync_directory(directory)


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes that safetensors.torch.save returns, part by part: header length, header, and the tensors one by one.

    The library itself needs all tensors on the CPU and contiguous at once, and keeps their checksum to itself.
    """
    ranks = {dtype: (rank, name) for rank, (name, dtype) in enumerate(DTYPES.items())}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype][0], name))
    header, end = {}, 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": ranks[tensor.dtype][1], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for name in names:
        yield _bytes_of(tensors[name].detach().cpu().contiguous())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as the file has it: little-endian."""
    assert sys.byteorder == "little"
    return tensor.view(-1).view(torch.uint8).numpy().data


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


def teacher_runs(run: Path) -> list[Path]:
    """The runs RUN-teacher, RUN-teacher-2 … beside a run that have a checkpoint, in this order."""
    beside = run.parent.glob(f"{glob.escape(run.name)}-teacher*")
    return [path for path in sorted(beside, key=lambda path: (len(path.name), path.name)) if list_checkpoints(path)]


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """The checkpoint `latest`, `best` or `step-N` of a run. Raises UserError if there is none.

    best: the lowest val_loss in state.json; ties go to the earlier step; latest if none has a val_loss.
    """
    checkpoints = dict(_complete_paths(run_dir))
    if not checkpoints:
        raise UserError(_no_checkpoint(run_dir))
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


def _no_checkpoint(path: Path) -> str:
    """Why `path` is no run with a checkpoint, and what to type instead."""
    if run_of(path) is None and (runs := _runs_in(path)):
        return f"the directory {path} is not a run; it contains these runs: {_listed(runs)}"
    if run_of(path) is None and (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        again = quote(str(path))
        return f"{path} is a model folder, which cannot be resumed; a new run from its weights: --init_from={again}"
    if hint := run_hint(path):
        return f"{path} {'is not a run' if path.exists() else 'does not exist'}{hint}"
    name = quote(str(path))
    if not path.exists() and path.parts[:1] == ("models",):
        return f"the model folder {path} does not exist; it is made by: python -m interop import MODEL --out={name}"
    if not path.is_dir():
        kind = "is a file, not a run directory" if path.exists() else "does not exist"
        return f"the run {path} {kind}; train first: python train.py --run={name if not path.exists() else 'NEW_NAME'}"
    if (path / "tries").is_dir():
        return f"the settings of the run {path} are still being tried: repeat the command with --try that began it"
    if teachers := teacher_runs(path):
        resume = f"python train.py --resume={quote(str(teachers[-1]))}"
        return f"the run {path} has no checkpoint yet; {teachers[-1]}, from which it learns, goes on to it: {resume}"
    if (path / CONFIG).is_file():
        again = quote(str(path / CONFIG))
        return (
            f"the run {path} has no checkpoint, so it cannot be resumed; unless it is just starting, "
            f"start it again: python train.py {again}"
        )
    return f"the run directory {path} has no checkpoint yet; start a run: python train.py --run=NEW_NAME"


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _complete_paths(path)) if folder.is_dir() else []


def _listed(runs: list[Path]) -> str:
    return ", ".join(map(str, runs[:5])) + f" and {len(runs) - 5} more" * (len(runs) > 5)


def run_of(path: Path) -> Path | None:
    """The run with a checkpoint that `path` is, or is in: a checkpoint, its model folder, a file of the run."""
    for place in (path, *path.parents, *path.absolute().parents):
        if _complete_paths(place):
            return place
    return None


def run_hint(path: Path) -> str:
    """`; its run is RUN`, or the runs in a folder, or `; did you mean RUN?` with a run of that name or a similar one;
    else nothing."""
    if (run := run_of(path)) is not None:
        return f"; its run is {run}"
    if runs := _runs_in(path):
        return f"; it contains these runs: {_listed(runs)}"
    known = {run.name.lower(): run for folder in (path.parent, Path("runs")) for run in _runs_in(folder)}
    near = difflib.get_close_matches(path.absolute().name.lower(), known, 1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def resolve_run(path: Path) -> Path:
    """The run that `path` names for --resume: its directory, or its last checkpoint or a file in either. Raises
    UserError."""
    run = run_of(path) if path.exists() else None
    if run is None:
        raise UserError(_no_checkpoint(path))
    inside = path.resolve().relative_to(run.resolve()).parts
    if len(inside) > 1 and (run / inside[0] / inside[1]).resolve() != list_checkpoints(run)[-1].resolve():
        checkpoint = quote(str(run / inside[0] / inside[1]))
        raise UserError(
            f"--resume={path} is not the last checkpoint of {run}, and a run continues from its last one: "
            f"--resume={quote(str(run))}. For a new run from these weights: --init_from={checkpoint}"
        )
    return run


def _val_losses(checkpoints: list[Path]) -> dict[Path, float | None]:
    """The val_loss of each checkpoint; unreadable ones are left out, with a warning on standard error."""
    losses: dict[Path, float | None] = {}
    for path in checkpoints:
        try:
            with _reading_checkpoint(path):
                _check_files(path, [STATE])
                losses[path] = read_json(path / STATE).get("val_loss")
        except DamagedFile as error:
            print(f"warning: not considered as the best checkpoint: {error}", file=sys.stderr)
    return losses


def _best(losses: dict[Path, float | None]) -> Path | None:
    known = {path: loss for path, loss in losses.items() if isinstance(loss, (int, float))}
    return min(known, key=known.__getitem__, default=None)


def resolve_model_folder(path: Path, which: str = "best") -> Path:
    """The model folder of a run directory (of its checkpoint `which`), a checkpoint directory or a model folder; a file
    of one stands for it. Raises UserError."""
    if _is_foreign(path):
        command = f"python -m interop import {quote(str(path))}" + " --pt" * (path.suffix == ".pt")
        raise UserError(f"{path} is a model of another program, which has to be imported first: {command}")
    if path.is_file() and path.name in {MANIFEST, *(os.path.basename(name) for name in FILES)}:
        path = path.parent
    folder = next((place for place in (path, path / "model") if (place / WEIGHTS).is_file()), None)
    if folder is not None and which != "best":
        raise UserError(f"--checkpoint={which} selects one of a run, but {path} is a single checkpoint; leave it out")
    if folder is not None:
        return folder
    if (path / MANIFEST).is_file():
        return path / "model"
    return find_checkpoint(path, which) / "model"


def _is_foreign(path: Path) -> bool:
    """Whether the file or folder is a model of transformers, llama.cpp or nanoGPT, as far as its name or its
    config.json tells."""
    if path.is_file():
        return path.suffix in (".gguf", ".pt")
    with suppress(DamagedFile):
        return not (path / TOKENIZER).exists() and "model_type" in read_json(path / CONFIG)
    return False


# ---- Reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def _reading_checkpoint(path: Path) -> Iterator[None]:
    """Gives a DamagedFile of this checkpoint the advice that belongs to it. Nothing changes for a folder elsewhere."""
    try:
        yield
    except DamagedFile as error:
        if re.fullmatch(r"step-\d{8,}", path.name):
            error.advice = "Restore it from a copy, or use another checkpoint (sample.py --checkpoint=step-N)"
            if not path.exists():
                error.advice = "A run in progress has removed this checkpoint meanwhile; run the same command again"
        raise


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    config: dict[str, Any]
    """The model's options, as saved."""
    tokenizer: dict[str, Any]
    adapter: Adapter | None = None
    """Where model.safetensors holds adapters."""

    def model_tensors(self) -> dict[str, Tensor]:
        """Reads the weights, those of adapters merged with their base. Raises DamagedFile, inside a checkpoint also
        where they are not those of its manifest."""
        if self.adapter is None:
            return self.own_tensors()
        adapters = self.own_tensors()
        try:
            return merge(self.frozen_tensors(), adapters, self.adapter.scale)
        except ValueError as error:
            raise DamagedFile(self.path / WEIGHTS, str(error)) from error

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The weights without adapters. Raises DamagedFile where the base is not the one of the adapters."""
        if self.adapter is None:
            return self.own_tensors()
        weights = self.base() / WEIGHTS
        try:
            return _read_tensors(weights, self.adapter.base)
        except DamagedFile as error:
            error.advice = f"Restore it from a copy: {self.path} holds adapters of it"
            raise

    def base(self) -> Path:
        """The folder of the adapters' base. Raises UserError outside a run."""
        checkpoints = Path(os.path.abspath(self.path)).parent.parent
        base = checkpoints.parent / BASE
        if checkpoints.name != "checkpoints" or not base.is_dir():
            raise UserError(
                f"{self.path} holds adapters, without the weights that they belong to: those are in the folder {BASE}"
                f" of their run, RUN/{BASE}. Name the run itself, or make a whole model of it, which can be copied:"
                " python -m interop export RUN --to=hf"
            )
        return base

    def header(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of each tensor of its file."""
        return _check_header(self.path / WEIGHTS)

    def own_tensors(self) -> dict[str, Tensor]:
        """Reads the tensors of its file: the weights, or the adapters."""
        with _reading_checkpoint(self.path.absolute().parent):
            checkpoint = _checkpoint_of(self.path)
            expected = None if checkpoint is None else _manifest_files(checkpoint)[f"model/{WEIGHTS}"]
            return _read_tensors(self.path / WEIGHTS, expected)

    def weights_entry(self) -> dict[str, Any]:
        """Bytes and crc32 of the file of the weights, as it is now; of adapters also those of their base."""
        entry: dict[str, Any] = dict(_size_and_crc(self.path / WEIGHTS))
        return entry if self.adapter is None else entry | {"base": self.adapter.base}

    def state(self) -> dict[str, Any] | None:
        """The state.json of the checkpoint that this is part of, with how these weights came about. None elsewhere."""
        with _reading_checkpoint(self.path.absolute().parent):
            checkpoint = _checkpoint_of(self.path)
            if checkpoint is None:
                return None
            _check_files(checkpoint, [STATE])
            return read_json(checkpoint / STATE)


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

    def frozen_tensors(self) -> dict[str, Tensor]:
        return self.model.frozen_tensors()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        with _reading_checkpoint(self.path):
            return _read_tensors(self.path / OPTIMIZER, _manifest_files(self.path)[OPTIMIZER])


def open_checkpoint(path: Path) -> Checkpoint:
    """Checks the size and crc32 of every file and reads all but the tensors. Ignores other files. Raises UserError."""
    model = _open_model_folder(path / "model")
    with _reading_checkpoint(path):
        _check_files(path, [OPTIMIZER, STATE])
        _check_header(path / OPTIMIZER)
        state = read_json(path / STATE)
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise DamagedFile(path / STATE, f"step is {step!r}, expected an integer >= 0")
    return Checkpoint(path, step, model, state)


def open_latest(run_dir: Path) -> Checkpoint:
    """The newest intact checkpoint, for --resume; damaged ones are skipped with a warning on standard error.

    A run in progress may remove checkpoints meanwhile, so they are listed again after each that cannot be opened.
    """
    find_checkpoint(run_dir, "latest")  # raises if there is none
    skipped = set[Path]()
    while paths := [path for _, path in _complete_paths(run_dir) if path not in skipped]:
        try:
            return open_checkpoint(paths[-1])
        except DamagedFile as error:
            skipped.add(paths[-1])
            if paths[-1].exists():
                print(f"WARNING: checkpoint skipped, an older one is tried: {error}", file=sys.stderr)
    raise UserError(
        f"every checkpoint in {run_dir} is damaged; restore one from a copy, or start again: python train.py --run=PATH"
    )


def open_model_folder(path: Path, *, check_weights: bool = True) -> ModelFolder:
    """Reads a model folder. Checks size and crc32 inside a checkpoint, elsewhere only the form. Raises UserError.

    check_weights=False: only their header is checked here; model_tensors, if called next, checks the rest anyway.
    """
    folder = _open_model_folder(path, check_weights)
    if folder.adapter is not None:
        folder.base()
    return folder


def _open_model_folder(path: Path, check_weights: bool = True) -> ModelFolder:
    """The same; whether the base of adapters is there is not checked."""
    with _reading_checkpoint(path.absolute().parent):
        checkpoint = _checkpoint_of(path)
        if checkpoint is not None:
            _check_files(checkpoint, [name for name in MODEL_FILES if check_weights or not name.endswith(WEIGHTS)])
        _check_header(path / WEIGHTS)
        config = read_json(path / CONFIG)
        adapter = _adapter(path / CONFIG, config.pop("adapter", None))
        return ModelFolder(path, config, read_json(path / TOKENIZER), adapter)


def _adapter(path: Path, entry: object) -> Adapter | None:
    """The entry of a model's config. Raises DamagedFile."""
    if entry is None:
        return None
    values: dict[str, Any] = entry if isinstance(entry, dict) else {}
    rank, scale, base = (values.get(name) for name in ("rank", "scale", "base"))
    if not (
        {*values} == {"rank", "scale", "base"}
        and (type(rank) is int and rank >= 1)
        and (isinstance(scale, float) and math.isfinite(scale))
        and (isinstance(base, dict) and {*base} == {"bytes", "crc32"} and all(type(n) is int for n in base.values()))
    ):
        raise DamagedFile(path, f"its adapter is {str(entry)[:200]!r}")
    return Adapter(**values)


def merge(weights: dict[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale · B·A for each adapted matrix W, in float32 or wider. Empties `weights`, so that one matrix at a time
    exists twice at most. Raises ValueError where they do not fit."""
    merged = {}
    names = {name.removesuffix(LORA_A) for name in adapters if name.endswith(LORA_A)}
    if {*adapters} != {name + end for name in names for end in (LORA_A, LORA_B)}:
        raise ValueError("it does not hold adapters alone")
    if missing := sorted(name for name in names if f"{name}.weight" not in weights):
        raise ValueError(f"it adapts {missing[0]!r}, which its base does not have")
    for name in list(weights):
        weight, layer = weights.pop(name), name.removesuffix(".weight")
        if layer in names and name != layer:
            a, b = adapters[layer + LORA_A], adapters[layer + LORA_B]
            if weight.dim() != 2 or (len(b), *a.shape[1:]) != weight.shape or b.shape[1:] != a.shape[:1]:
                raise ValueError(f"the adapter of {layer!r} does not fit its matrix of {tuple(weight.shape)}")
            dtype = torch.promote_types(weight.dtype, torch.float32)
            weight = torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)
        merged[name] = weight
    return merged


def _checkpoint_of(model_folder: Path) -> Path | None:
    """The checkpoint that a model folder is part of; None for a copy elsewhere."""
    checkpoint, name = os.path.split(os.path.abspath(model_folder))
    return Path(checkpoint) if name == "model" and os.path.exists(os.path.join(checkpoint, MANIFEST)) else None


def _read_tensors(path: Path, expected: object = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. expected: its entry in the manifest; None: not checked.

    Each tensor is read once, into its own memory. Not memory-mapped: a truncated file would raise SIGBUS.
    """
    layout, tensors = _check_header(path), {}
    try:
        with reading(path) as size, open(path, "rb") as file:
            length = file.read(8)
            crc = zlib.crc32(file.read(int.from_bytes(length, "little")), zlib.crc32(length))
            for name, (dtype, shape) in layout.items():
                tensors[name] = torch.empty(shape, dtype=dtype)
                data = _bytes_of(tensors[name])
                if file.readinto(data) < len(data):
                    raise DamagedFile(path, f"it ends in tensor {name!r}")
                crc = zlib.crc32(data, crc)
    except RuntimeError as error:  # a shape such as (0, 2**62, 2**62)
        raise DamagedFile(path, f"damaged ({error})") from error
    if expected is not None:
        _compare(path, {"bytes": size, "crc32": crc}, expected)
    return tensors


def _check_files(directory: Path, names: Iterable[str]) -> None:
    """Compares the size and crc32 of each file with the manifest. Raises DamagedFile; UserError for another version."""
    files = _manifest_files(directory)
    for name in names:
        _compare(directory / name, _size_and_crc(directory / name), files[name])


def _compare(path: Path, found: dict[str, int], entry: object) -> None:
    """Raises DamagedFile where a file's size or crc32 is not that of its entry in the manifest."""
    if found == entry:
        return
    expected = entry if isinstance(entry, dict) else {}
    problem = f"{found['bytes']} bytes, {str(expected.get('bytes'))[:30]} expected"
    if found["bytes"] == expected.get("bytes"):
        problem = f"damaged: its crc32 is {found['crc32']:08x}, which is not the one that was recorded"
    raise DamagedFile(path, problem)


def _manifest_files(directory: Path) -> dict[str, object]:
    """The manifest's entries, one for each of FILES. Raises DamagedFile; UserError for another version."""
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
    return files


def _size_and_crc(path: Path) -> dict[str, int]:
    """A file's entry in the manifest."""
    crc = 0
    with reading(path) as size, open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def _check_header(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Checks a safetensors file: header length (8 bytes), header, data. The library checks that the tensors fill the
    data without a gap. Returns dtype and shape of each, in the order of the data."""
    with reading(path) as size, open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_JSON, size - 8):
        raise DamagedFile(path, f"its header length of {length} bytes is impossible in a file of {size} bytes")
    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise DamagedFile(path, f"damaged ({error})") from error
    for name, (dtype, _) in found.items():
        if len(name) > 256 or not name.isprintable() or dtype not in DTYPES:
            raise DamagedFile(path, f"tensor {name[:300]!r} of dtype {dtype!r}: Sprout writes no such name or dtype")
    return {name: (DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}
