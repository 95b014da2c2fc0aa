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
outlives its attempt cannot write into the directory of the next one.
"""

from __future__ import annotations

import copy
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from checkpoint import (
    OURS,
    SaveFailed,
    Team,
    obsolete_after,
    on_all_ranks,
    open_share,
    put_in_place,
    run_directories,
    take_back,
    try_discard,
)
from errors import UserError
from files import CHUNK, json_bytes, require_space, sync_directory, write_parts
from model_folder import CONFIG, MANIFEST, SHARDED_VERSION, SHARDS, STATE, TOKENIZER, Adapter
from tensor_files import Part, check_cover, rows_of, shard_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """A rank's file: its entry in the manifest, None where the rank holds nothing; and of each part in it dtype, whole
    shape, own shape and first row."""

    entry: dict[str, int] | None
    parts: dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]


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

    Raises on all ranks: SaveFailed, which names the ranks that could not write and why, with all earlier checkpoints
    unchanged; ValueError on a NaN in the JSON values and on rows that are missing or given twice.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f"{final.name}.writing-{uuid.uuid4().hex[:8]}")  # that of rank 0 counts
    parts = _own_parts(team.rank, model, optimizer)
    needed = CHUNK + sum(part.tensor.nbytes for part in parts.values())
    texts, obsolete = dict[str, bytes](), list[Path]()

    def begin() -> tuple[str, int]:
        if team.rank > 0:
            return temporary.name, needed
        texts.update(_texts(step, config, tokenizer, state, adapter))
        obsolete.extend(obsolete_after(run_dir, step))
        _make_temporary(run_dir, temporary)
        return temporary.name, needed + sum(map(len, texts.values()))

    def complete(written: list[Written]) -> None:
        if team.rank == 0:
            _complete(temporary, texts, written)
            put_in_place(temporary, final)

    try:
        begun = _together(team, final, begin)
        temporary = final.with_name(begun[0][0])
        _together(team, final, lambda: _check_place(temporary, sum(size for _, size in begun)))
        written = _together(team, final, lambda: _write_shard(temporary, team.rank, parts))
        _together(team, final, lambda: complete(written))
        _, failed = on_all_ranks(team, lambda: _verify(final, team))
        _together(team, final, lambda: _settle(team.rank, final, obsolete, bool(failed)))
        _raise_failed(failed, final)
    finally:
        if team.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


# ---- Phases ----------------------------------------------------------------------------------------------------------


def _make_temporary(run_dir: Path, temporary: Path) -> None:
    """Makes the directory in which all ranks write; removes those of killed attempts. Raises OSError."""
    left = [path for path in run_directories(run_dir) if OURS.fullmatch(path.name) and _is_unfinished(path)]
    try_discard(left)
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


def _write_shard(temporary: Path, rank: int, parts: Mapping[str, Part]) -> Written:
    described = {
        name: (part.tensor.dtype, tuple(part.shape), tuple(part.tensor.shape), part.start)
        for name, part in parts.items()
    }
    if not parts:
        return Written(None, {})
    entry = write_parts(_shard(temporary, rank), shard_bytes(parts))
    sync_directory(temporary / SHARDS)
    return Written(entry, described)


def _complete(temporary: Path, texts: Mapping[str, bytes], written: list[Written]) -> None:
    """Writes and syncs all other files, the manifest last. Raises OSError, UserError; ValueError where the parts do not
    fit together."""
    _check_parts(written)
    files = {}
    for rank, shard in enumerate(written):
        if shard.entry is None:
            continue
        path = _shard(temporary, rank)
        size = path.lstat().st_size if os.path.lexists(path) else None
        if size != shard.entry["bytes"]:
            problem = "does not see it" if size is None else f"sees {size} bytes of its {shard.entry['bytes']}"
            raise UserError(f"rank {rank} has written {path}, and rank 0 {problem}: all ranks need one file system")
        files[f"{SHARDS}/{path.name}"] = shard.entry
    files |= {name: write_parts(temporary / name, [text]) for name, text in texts.items()}
    manifest = {"format": "sprout checkpoint", "version": SHARDED_VERSION, "files": files}
    write_parts(temporary / MANIFEST, [json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))})])
    for directory in (temporary / SHARDS, temporary / "model", temporary):
        sync_directory(directory)


def _verify(final: Path, team: Team) -> None:
    open_share(final, team.rank, team.size)


def _settle(rank: int, final: Path, obsolete: list[Path], failed: bool) -> None:
    """What rank 0 does after the verification."""
    if rank == 0 and failed:
        take_back(final)
    elif rank == 0:
        try_discard(obsolete)


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


def _check_parts(written: list[Written]) -> None:
    """Raises ValueError where the parts of all ranks are not each row of each tensor once."""
    kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]()
    rows = dict[str, list[tuple[int, int]]]()
    for rank, shard in enumerate(written):
        for name, (dtype, whole, own, start) in shard.parts.items():
            if (
                own[1:] != whole[1:]
                or len(own) != len(whole)
                or kinds.setdefault(name, (dtype, whole)) != (dtype, whole)
            ):
                raise ValueError(f"{name}: rank {rank} has {own} of {whole}, {dtype}, others have {kinds.get(name)}")
            rows.setdefault(name, []).append((start, rows_of(own)))
    for name, (_, whole) in kinds.items():
        try:
            check_cover(rows[name], rows_of(whole))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


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
    """Runs a phase on every rank → the results of all. Raises on every rank where it fails on one."""
    results, failed = on_all_ranks(team, action)
    _raise_failed(failed, final)
    return results


def _raise_failed(failed: Mapping[int, Exception], final: Path) -> None:
    """failed: the errors by rank. An error of the program itself is raised as it is."""
    for error in failed.values():
        if not isinstance(error, OSError | UserError | MemoryError | torch.OutOfMemoryError):
            raise copy.copy(error)
    if not failed:
        return
    ranks = dict[str, list[int]]()
    for rank, error in failed.items():
        ranks.setdefault(str(error) or type(error).__name__, []).append(rank)
    reasons = "; ".join(f"{_named(some)}: {reason}" for reason, some in ranks.items())
    raise SaveFailed(
        f"the checkpoint of step {int(final.name.removeprefix('step-'))} could not be saved in {final.parent}:"
        f" {reasons}. The earlier ones are unchanged"
    )


def _named(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0, 1, 2 and 61 more`."""
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:3]))}{more}"
