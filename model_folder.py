"""Model folders: config.json, sprout_tokenizer.json and model.safetensors, alone or as model/ of a checkpoint, whose
manifest is here, too.

A model.safetensors of adapters (training/lora.py) holds X.lora_a (r, in) and X.lora_b (out, r) for each adapted matrix
X.weight (out, in) of the base; config.json then has the entry "adapter", with the rank, the scale, and bytes and crc32
of the base, RUN/base. `ModelFolder.model_tensors` merges them, so that no other reader sees a difference.

This file stores tensors and JSON values; it knows neither the model nor its options. Reading order: reading, writing,
the manifest of a checkpoint.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from files import (
    CHUNK,
    MAX_CONFIG,
    MAX_JSON,
    MAX_TOKENIZER,
    TOKENIZER_SPARE,
    DamagedFile,
    check_size,
    compare,
    json_bytes,
    make_directory,
    plain_file,
    read_json,
    reading,
    remove_tree,
    require_space,
    size_and_crc,
    sync_directory,
    try_remove_tree,
    write_parts,
)
from state_file import StateFile, read_state
from tensor_files import TensorReader, bytes_needed, parts_of, read_header

VERSION, SHARDED_VERSION = 1, 2  # of a manifest: of whole files, and of one shard for each rank
MANIFEST, MAX_MANIFEST = "manifest.json", 2**22  # bytes: some ten thousand ranks
WEIGHTS, CONFIG, TOKENIZER = ("model.safetensors", "config.json", "sprout_tokenizer.json")
MODEL_FILES = tuple(f"model/{name}" for name in (WEIGHTS, CONFIG, TOKENIZER))
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
FILES = {*MODEL_FILES, OPTIMIZER, STATE}
SHARDS = "shards"
SHARDED_FILES = {f"model/{CONFIG}", f"model/{TOKENIZER}", STATE}  # and the shards
SHARD = re.compile(rf"{SHARDS}/[0-9]{{5,9}}\.safetensors")
KINDS = {"model": f"model/{WEIGHTS}", "optimizer": OPTIMIZER}  # of tensors; in shards the prefix of their names
BASE, SET_ASIDE = "base", "set-aside"
LORA_A, LORA_B = ".lora_a", ".lora_b"


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What config.json says of adapters. base: bytes and crc32 of the weights that they belong to."""

    rank: int
    scale: float
    base: dict[str, int]


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
            return TensorReader({weights: self.adapter.base}).tensors()
        except DamagedFile as error:
            error.advice = f"Restore it from a copy: {self.path} holds adapters of it"
            raise

    def base(self) -> Path:
        """The folder of the adapters' base. Raises UserError outside a run."""
        checkpoints = Path(os.path.abspath(self.path)).parent.parent
        checkpoints = checkpoints.parent if checkpoints.name == SET_ASIDE else checkpoints
        base = checkpoints.parent / BASE
        if checkpoints.name != "checkpoints" or not base.is_dir():
            raise UserError(
                f"{self.path} holds adapters, without the weights that they belong to: those are in the folder {BASE}"
                f" of their run, RUN/{BASE}. Name the run itself, or make a whole model of it, which can be copied:"
                " python -m interop export RUN --to=model"
            )
        return base

    def frozen_header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each weight without adapters. Raises DamagedFile."""
        return self.header() if self.adapter is None else TensorReader({self.base() / WEIGHTS: None}).layout

    def header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of its file, or of its shards."""
        return self.reader().layout

    def own_tensors(self) -> dict[str, Tensor]:
        """Reads the tensors of its file or shards: the weights, or the adapters."""
        with reading_checkpoint(self.path.absolute().parent):
            return self.reader().tensors()

    def reader(self) -> TensorReader:
        """Reads rows of its own tensors: the weights, or the adapters. Checks the headers alone; what opens a
        checkpoint or its model folder has compared the checksums."""
        with reading_checkpoint(self.path.absolute().parent):
            checkpoint = checkpoint_of(self.path)
            return (
                TensorReader({self.path / WEIGHTS: None}) if checkpoint is None else open_tensors(checkpoint, "model")
            )

    @property
    def weights_file(self) -> Path | None:
        """The file of its own tensors; None where they are in shards."""
        checkpoint = checkpoint_of(self.path)
        return self.path / WEIGHTS if checkpoint is None or KINDS["model"] in manifest_files(checkpoint) else None

    def weights_entry(self) -> dict[str, Any]:
        """Bytes and crc32 of the file of the weights, as it is now, in shards those that such a file would have; of
        adapters also those of their base."""
        whole = self.weights_file
        entry: dict[str, Any] = dict(size_and_crc(whole) if whole is not None else self.reader().entry())
        return entry if self.adapter is None else entry | {"base": self.adapter.base}

    def state(self) -> StateFile | None:
        """The state.json of the checkpoint that this is part of, with how these weights came about. None elsewhere.
        Raises DamagedFile, and WrongEntry."""
        with reading_checkpoint(self.path.absolute().parent):
            checkpoint = checkpoint_of(self.path)
            if checkpoint is None:
                return None
            check_files(checkpoint, [STATE])
            return read_state(checkpoint / STATE)


def open_model_folder(path: Path, *, check_weights: bool = True) -> ModelFolder:
    """Reads a model folder. Checks size and crc32 inside a checkpoint, elsewhere only the form. Raises UserError.

    check_weights=False: only their header is checked here; model_tensors, if called next, checks the rest anyway.
    """
    folder = open_without_base(path, check_weights)
    if folder.adapter is not None:
        folder.base()
    return folder


def open_without_base(path: Path, check_weights: bool = True, rank: int = 0, size: int = 1) -> ModelFolder:
    """The same; whether the base of adapters is there is not checked. rank, size: of several that open the same
    checkpoint, each checks its share of the large files."""
    with reading_checkpoint(path.absolute().parent):
        checkpoint = checkpoint_of(path)
        if checkpoint is None:
            refuse_copy(path)
            read_header(path / WEIGHTS)
        else:
            files = manifest_files(checkpoint)
            large = sorted(name for name in files if name.endswith(".safetensors") and name != OPTIMIZER)
            share = large[(rank - 1) % size :: size] if check_weights else []
            check_files(checkpoint, [f"model/{CONFIG}", f"model/{TOKENIZER}", *share])
            open_tensors(checkpoint, "model")
        config = read_json(path / CONFIG, MAX_CONFIG)
        adapter = _adapter(path / CONFIG, config.pop("adapter", None))
        tokenizer = read_json(path / TOKENIZER, MAX_TOKENIZER, TOKENIZER_SPARE)
        return ModelFolder(path, config, tokenizer, adapter)


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


# ---- Writing ---------------------------------------------------------------------------------------------------------


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
        remove_tree(temporary)
        require_space(path.parent, bytes_needed(contents))
        temporary.mkdir()
        for name, content in contents.items():
            write_parts(temporary / name, parts_of(content))
        sync_directory(temporary)
        if path.exists():
            raise UserError(f"{path} exists; remove it, or give another folder")
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from error
    finally:
        try_remove_tree(temporary)
        for folder in parents:
            with suppress(OSError):  # not empty
                folder.rmdir()


def save_base(run: Path, source: ModelFolder, weights: dict[str, Tensor], config: dict) -> dict[str, int]:
    """Writes RUN/base, before the first checkpoint of a run, which is locked → bytes and crc32 of its weights: the
    files of `source`, as hard links where that is possible, or weights and config of the run's model, where those of
    the source are others: adapters, shards, or for a longer context. Raises UserError."""
    base = run / BASE
    remove_base(run)
    shapes = {name: [*tensor.shape] for name, tensor in weights.items()}
    theirs = {name: [*shape] for name, (_, shape) in source.header().items()}
    if source.adapter is not None or source.weights_file is None or shapes != theirs:
        write_model_folder(base, weights, config, source.tokenizer, {})
        return size_and_crc(base / WEIGHTS)
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
        try_remove_tree(temporary)
    found = size_and_crc(base / WEIGHTS)
    if (checkpoint := checkpoint_of(source.path)) is not None:
        compare(source.path / WEIGHTS, found, manifest_files(checkpoint)[f"model/{WEIGHTS}"])
    return found


class HeldBase:
    """The files of RUN/base, open while the run trains: what is removed meanwhile is written again from them."""

    def __init__(self, run: Path) -> None:
        """Raises DamagedFile."""
        self.run, self.folder, self._files = run, run / BASE, dict[str, BufferedReader]()
        with ExitStack() as stack:
            for name in (WEIGHTS, CONFIG, TOKENIZER):
                with reading(self.folder / name):
                    self._files[name] = stack.enter_context(open(self.folder / name, "rb", opener=plain_file))
            self._opened = stack.pop_all()

    def restore(self) -> list[str]:
        """Writes again what is missing, and returns its names. Raises OSError."""
        missing = [name for name in self._files if not os.path.lexists(self.folder / name)]
        temporary = self.run / f".{BASE}.writing"
        try:
            for name in missing:
                make_directory(temporary)
                self._files[name].seek(0)
                require_space(temporary, os.fstat(self._files[name].fileno()).st_size)
                write_parts(temporary / name, iter(partial(self._files[name].read, CHUNK), b""))
                make_directory(self.folder)
                os.rename(temporary / name, self.folder / name)
            if missing:
                sync_directory(self.folder)
        finally:
            try_remove_tree(temporary)
        return missing

    def close(self) -> None:
        self._opened.close()


def remove_base(run: Path) -> None:
    """Removes RUN/base of a run that ended before its first checkpoint: its three files and nothing else. Raises
    UserError where it holds others."""
    if (run / BASE).is_symlink():
        raise UserError(f"{run / BASE} is a link, and not of this run; remove it, or name another run with --run=PATH")
    try:
        remove_tree(run / f".{BASE}.writing")
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
        require_space(target.parent, source.stat().st_size)
        with open(source, "rb", opener=plain_file) as file:
            write_parts(target, iter(lambda: file.read(CHUNK), b""))


# ---- The manifest of a checkpoint ------------------------------------------------------------------------------------


def open_tensors(checkpoint: Path, kind: str) -> TensorReader:
    """The tensors of a checkpoint. kind: one of KINDS. Checks the headers, and of shards that they fit together; reads
    all of them. Raises DamagedFile; UserError for another version."""
    files = manifest_files(checkpoint)
    if KINDS[kind] in files:
        return TensorReader({checkpoint / KINDS[kind]: files[KINDS[kind]]})
    shards = sorted(name for name in files if SHARD.fullmatch(name))
    return TensorReader({checkpoint / name: files[name] for name in shards}, f"{kind}/")


def refuse_copy(path: Path) -> None:
    """Raises UserError for the model/ of a sharded checkpoint, copied without its weights."""
    if (path / CONFIG).is_file() and (path / TOKENIZER).is_file() and not os.path.lexists(path / WEIGHTS):
        raise UserError(
            f"{path} has no {WEIGHTS}. In a run that several processes have trained, it has none: the weights are in"
            f" {SHARDS} beside it. Name the run itself, or make a whole model of it, which can be copied:"
            " python -m interop export RUN --to=model"
        )


def checkpoint_of(model_folder: Path) -> Path | None:
    """The checkpoint that a model folder is part of; None for a copy elsewhere."""
    checkpoint, name = os.path.split(os.path.abspath(model_folder))
    return Path(checkpoint) if name == "model" and os.path.exists(os.path.join(checkpoint, MANIFEST)) else None


@contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """Gives a DamagedFile of this checkpoint the advice that belongs to it. Nothing changes for a folder elsewhere."""
    try:
        yield
    except DamagedFile as error:
        if re.fullmatch(r"step-\d{8,}", path.name):
            error.advice = "Restore it from a copy, or use another checkpoint (sample.py --checkpoint=step-N)"
            if not path.exists():
                error.advice = "A run in progress has removed this checkpoint meanwhile; run the same command again"
        raise


def check_files(directory: Path, names: Iterable[str]) -> None:
    """Compares the size and crc32 of each file with the manifest. Raises DamagedFile; UserError for another version."""
    files = manifest_files(directory)
    limits = {STATE: MAX_JSON, f"model/{CONFIG}": MAX_CONFIG, f"model/{TOKENIZER}": MAX_TOKENIZER}
    for name in names:
        check_size(directory / name, files[name], limits.get(name, math.inf))
        if name.endswith(".safetensors"):
            read_header(directory / name)  # which tells the size, too
        compare(directory / name, size_and_crc(directory / name), files[name])


def manifest_files(directory: Path) -> dict[str, object]:
    """The manifest's entries: one for each of FILES, or of SHARDED_FILES and the shards. Raises DamagedFile; UserError
    for another version."""
    path = directory / MANIFEST
    manifest = read_json(path, MAX_MANIFEST)
    checksum, files, version = manifest.pop("crc32", None), manifest.get("files"), manifest.get("version")
    try:
        intact = checksum == zlib.crc32(json_bytes(manifest)) and manifest.get("format") == "sprout checkpoint"
    except (ValueError, RecursionError):  # infinity or deep nesting: a foreign file
        intact = False
    if not intact:
        raise DamagedFile(path, "not an intact manifest of a checkpoint")
    if version not in (VERSION, SHARDED_VERSION):
        raise UserError(
            f"{path}: format version {version!r} found, {VERSION} or {SHARDED_VERSION} expected; open it with the"
            " Sprout that wrote it"
        )
    whole = version == VERSION
    names = {*files} if isinstance(files, dict) else set()
    if names - {name for name in names if not whole and SHARD.fullmatch(name)} != (FILES if whole else SHARDED_FILES):
        known = sorted(FILES) if whole else [*sorted(SHARDED_FILES), f"{SHARDS}/NUMBER.safetensors"]
        raise DamagedFile(path, f"must list {known} and nothing else; it lists {str(files)[:200]!r}")
    assert isinstance(files, dict)
    return files
