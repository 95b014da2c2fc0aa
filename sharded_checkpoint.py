"""Checkpoints that several ranks write together, each its own rows of the tensors. They differ from those of
checkpoint.py in this:

    RUN/checkpoints/step-00001000/
        model/                  config.json, sprout_tokenizer.json
        shards/                 00003.safetensors: what rank 3 holds, as model/NAME and optimizer/NAME (tensor_files.py)
        state.json, manifest.json (version 2)

Everything that reads a checkpoint reads these, too, on one machine and at any number of ranks.

The ranks go through the same phases. After each, all learn how it ended on the others, and go on or raise SaveFailed
together. A phase ends with `Team.gather`, whose errors (a rank was killed) pass through: the directory then keeps its
temporary name, or the checkpoint is complete. That name holds a number that no other attempt has, so that a rank which
outlives its attempt cannot write into the directory of the next one. Only rank 0 renames and removes anything.
"""

from __future__ import annotations

import copy
import os
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from checkpoint import (
    OURS,
    SaveFailed,
    Team,
    make_home,
    on_all_ranks,
    open_share,
    put_in_place,
    replaced_by,
    run_directories,
    try_discard,
)
from errors import UserError
from files import CHUNK, DamagedFile, json_bytes, require_space, sync_directory, try_remove_tree, write_parts
from model_folder import CONFIG, MANIFEST, SHARDED_VERSION, SHARDS, STATE, TOKENIZER, Adapter
from tensor_files import Part, TensorReader, rows_of, shard_bytes

T = TypeVar("T")


def save_sharded_checkpoint(
    run_dir: Path,
    step: int,
    team: Team,
    *,
    model: Mapping[str, Part],
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    optimizer: Mapping[str, Part],
    state: dict[str, Any],
    adapter: Adapter | None = None,
) -> Path:
    """Writes checkpoints/step-N, verifies it and returns its path, as save_checkpoint does. All ranks call this at
    once with the parts that they hold; rank 0 holds the RunLock, and its config, tokenizer, state and adapter count.
    Together the parts are each row of each tensor once; tensors without dimensions are taken from rank 0.

    Raises on all ranks SaveFailed, which names the ranks that failed and why (also where rows are missing, or given
    twice), with all earlier checkpoints unchanged, and ValueError on a NaN in the JSON values.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f"{final.name}.writing-{uuid.uuid4().hex[:8]}")  # that of rank 0 counts
    parts, texts = dict[str, Part](), dict[str, bytes]()

    def begin() -> tuple[str, int]:
        parts.update(_own_parts(team.rank, model, optimizer))
        if team.rank == 0:
            texts.update(_texts(step, config, tokenizer, state, adapter))
            _make_temporary(run_dir, temporary)
        size = sum(part.tensor.nbytes for part in parts.values()) + sum(map(len, texts.values()))
        return temporary.name, CHUNK + size

    def complete() -> None:
        if team.rank == 0:
            _complete(temporary, texts, entries)

    def verify() -> None:
        open_share(temporary, team.rank, team.size)

    def end() -> None:
        if team.rank == 0:
            put_in_place(temporary, final)
            try_discard([replaced_by(final)])

    try:
        begun = _together(team, final, begin)
        temporary = final.with_name(begun[0][0])
        _together(team, final, lambda: _check_place(temporary, sum(size for _, size in begun)))
        entries = _together(team, final, lambda: _write_shard(temporary, team.rank, parts))
        for phase in (complete, verify, end):
            _together(team, final, phase)
    finally:
        if team.rank == 0:
            try_remove_tree(temporary)
    return final


# ---- Phases ----------------------------------------------------------------------------------------------------------


def _make_temporary(run_dir: Path, temporary: Path) -> None:
    """Makes the directory in which all ranks write; removes those of killed attempts. Raises OSError."""
    left = [path for path in run_directories(run_dir) if OURS.fullmatch(path.name) and _is_unfinished(path)]
    try_discard(left)
    make_home(run_dir)
    for name in ("model", SHARDS):
        (temporary / name).mkdir(parents=True)
    sync_directory(run_dir)


def _is_unfinished(path: Path) -> bool:
    return path.suffix.startswith((".writing", ".removing"))


def _check_place(temporary: Path, needed: int) -> None:
    """needed: bytes of all ranks. Raises UserError, OSError."""
    if not (temporary / SHARDS).is_dir():
        raise UserError(f"it does not see {temporary}, which rank 0 made: all ranks need one file system")
    require_space(temporary, needed)


def _write_shard(temporary: Path, rank: int, parts: Mapping[str, Part]) -> dict[str, int] | None:
    """Writes what a rank holds → its entry in the manifest; None where that is nothing. Raises OSError."""
    if not parts:
        return None
    entry = write_parts(_shard(temporary, rank), shard_bytes(parts))
    sync_directory(temporary / SHARDS)
    return entry


def _complete(temporary: Path, texts: Mapping[str, bytes], entries: Sequence[dict[str, int] | None]) -> None:
    """Writes and syncs all other files, the manifest last. entries: of the ranks' files. Raises OSError; UserError
    where a file is not there, or the parts are not each row of each tensor once."""
    shards = {_shard(temporary, rank): entry for rank, entry in enumerate(entries) if entry is not None}
    for path, entry in shards.items():
        size = path.lstat().st_size if os.path.lexists(path) else None
        if size != entry["bytes"]:
            problem = "does not see it" if size is None else f"sees {size} of its {entry['bytes']} bytes"
            raise UserError(f"rank {int(path.stem)} has written {path} and rank 0 {problem}: all need one file system")
    try:
        TensorReader(shards, "")
    except DamagedFile as error:
        raise UserError(f"the parts do not fit together: {error.problem}") from error
    files = {f"{SHARDS}/{path.name}": entry for path, entry in shards.items()}
    files |= {name: write_parts(temporary / name, [text]) for name, text in texts.items()}
    manifest = {"format": "sprout checkpoint", "version": SHARDED_VERSION, "files": files}
    write_parts(temporary / MANIFEST, [json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))})])
    for directory in (temporary / SHARDS, temporary / "model", temporary):
        sync_directory(directory)


# ---- Parts -----------------------------------------------------------------------------------------------------------


def _own_parts(rank: int, model: Mapping[str, Part], optimizer: Mapping[str, Part]) -> dict[str, Part]:
    """The parts that a rank writes, by their names in the file: not those without rows. Tensors without dimensions,
    and those that have no rows at all, are written by rank 0."""
    named = {f"model/{name}": part for name, part in model.items()}
    named |= {f"optimizer/{name}": part for name, part in optimizer.items()}
    return {
        name: part
        for name, part in named.items()
        if (rows_of(part.tensor.shape) if part.shape and rows_of(part.shape) else rank == 0)
    }


def _texts(
    step: int, config: dict[str, Any], tokenizer: dict[str, Any], state: dict[str, Any], adapter: Adapter | None
) -> dict[str, bytes]:
    return {
        f"model/{CONFIG}": json_bytes(config if adapter is None else {**config, "adapter": asdict(adapter)}),
        f"model/{TOKENIZER}": json_bytes(tokenizer),
        STATE: json_bytes({**state, "step": step}),
    }


def _shard(directory: Path, rank: int) -> Path:
    return directory / SHARDS / f"{rank:05d}.safetensors"


# ---- Errors ----------------------------------------------------------------------------------------------------------


def _together(team: Team, final: Path, action: Callable[[], T]) -> list[T]:
    """Runs a phase on every rank → the results of all. Where it fails on one, it raises on all: SaveFailed, or an error
    of the program itself as it is."""
    results, failed = on_all_ranks(team, action)
    if not failed:
        return results
    ranks = dict[str, list[int]]()
    for rank, error in failed.items():
        if not isinstance(error, OSError | UserError | MemoryError | torch.OutOfMemoryError):
            raise copy.copy(error)
        reason = f"{error.path}: {error.problem}" if isinstance(error, DamagedFile) else str(error)
        ranks.setdefault(reason or type(error).__name__, []).append(rank)
    reasons = "; ".join(f"{_named(some)}: {reason}" for reason, some in ranks.items())
    raise SaveFailed(
        f"the checkpoint of step {int(final.name.removeprefix('step-'))} could not be saved in {final.parent}:"
        f" {reasons}. The earlier ones are unchanged"
    )


def _named(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0, 1, 2 and 61 more`."""
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:3]))}{more}"
