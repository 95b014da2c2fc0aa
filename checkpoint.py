"""Checkpoints: written by train.py, read by everything else.

    RUN/checkpoints/step-00001000/
        model/                  model.safetensors, config.json, sprout_tokenizer.json: all that generation needs
        optimizer.safetensors   state.json
        manifest.json           bytes and crc32 of every other file, and a crc32 of itself; written last
    RUN/base/                   of a run that trains adapters: the model folder of the weights that it keeps as they are

A directory `step-N` is always complete: it gets that name by a rename. The writer also uses these names:
`step-N.writing` (of several ranks `step-N.writing-NONCE`) is unfinished, `step-N.removing` partly deleted, and
`step-N.replaced` is the complete former checkpoint of a step that is being saved again; it counts while there is no
`step-N`. A kill at any moment leaves the old state or the new one. `set-aside/step-N` was skipped by a resume and is
not proven to be damaged: it could not be read, for example. Nothing counts or removes what is there.

Files are data: their names are fixed here, nothing read is unpickled, executed or used as a path, and text from them is
shown by repr. This file stores tensors and JSON values; it knows neither the model, the optimizer nor their options.
Reading order: several ranks (the checkpoints that they write are in sharded_checkpoint.py), writing, finding, reading.
"""

from __future__ import annotations

import copy
import difflib
import glob
import itertools
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from errors import UserError, quote
from files import (
    DamagedFile,
    UnreadableFile,
    json_bytes,
    make_directory,
    read_json,
    remove_tree,
    require_space,
    sync_directory,
    try_remove_tree,
    write_parts,
)
from model_folder import (
    CONFIG,
    FILES,
    MANIFEST,
    OPTIMIZER,
    SET_ASIDE,
    SHARDS,
    STATE,
    TOKENIZER,
    VERSION,
    WEIGHTS,
    Adapter,
    ModelFolder,
    check_files,
    checkpoint_of,
    open_tensors,
    open_without_base,
    reading_checkpoint,
    refuse_copy,
)
from state_file import StateFile, read_state
from tensor_files import TensorReader, bytes_needed, parts_of

OURS = re.compile(r"step-\d{8,}(\.(writing(-[0-9a-f]{8})?|removing|replaced))?")  # names of directories
PROVEN_STEPS = 100  # of training after a checkpoint without trouble: its weights were sound
MAX_REPEATS = 20  # of a reading, while a run in progress removes what is read
PAUSES = (0.1, 0.5, 2.0)  # seconds before a checkpoint that could not be read is tried again
T = TypeVar("T")


class SaveFailed(UserError):
    """A checkpoint was not written; the earlier ones are unchanged. Training may continue and retry later."""


# ---- Several ranks ---------------------------------------------------------------------------------------------------


class Team(Protocol):
    """The processes that train a model together, one of which calls. All call the same functions in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, small Python objects, in the order of the ranks, on every rank. Waits for all."""


def on_all_ranks(team: Team, action: Callable[[], Any]) -> tuple[list[Any], dict[int, Exception]]:
    """Runs an action on every rank and waits for all → their results, and the errors of those that failed, on each.

    Whatever an action raises, no other rank is left waiting: an error of the program is raised where it happened, and
    is a RuntimeError among the errors of the others."""
    result: Any = None
    error: Exception | None = None
    try:
        result = action()
    except (OSError, UserError, ValueError, MemoryError, torch.OutOfMemoryError) as caught:
        error = copy.copy(caught)  # without its traceback, which keeps tensors alive
    except BaseException as caught:
        team.gather((None, RuntimeError(f"rank {team.rank}: {type(caught).__name__}: {caught}")))
        raise
    outcomes = team.gather((result, error))
    failed = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
    return [result for result, _ in outcomes], failed


def _same_on_all_ranks(team: Team | None, action: Callable[[], T]) -> T:
    """The result of an action, which no other rank gets. Raises the same error on all ranks where it fails on any."""
    if team is None:
        return action()
    done = list[T]()
    _, failed = on_all_ranks(team, lambda: done.append(action()))
    for rank, error in failed.items():
        error, where = copy.copy(error), f" (found by rank {rank})" if len(failed) < team.size else ""
        if isinstance(error, DamagedFile):
            error.problem += where
        elif isinstance(error, UserError):
            error.args = (f"{error}{where}",)
        raise error
    return done[0]


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
    """Writes checkpoints/step-N, verifies it and returns its path. The caller holds the RunLock, and has set aside the
    checkpoints after the one from which it goes on (set_later_aside). With an adapter, `model` holds the adapters
    alone.

    A former checkpoint of this step, which the caller has written or read, is replaced. Beside the tensors, memory
    holds a copy of one at a time, of those on a GPU or not contiguous. Raises SaveFailed (disk full, …), with all
    earlier checkpoints unchanged, and ValueError on a NaN in the JSON values.
    """
    home = run_dir / "checkpoints"
    final = home / f"step-{step:08d}"
    temporary = final.with_name(final.name + ".writing")
    contents: dict[str, bytes | dict[str, Tensor]] = {
        f"model/{WEIGHTS}": model,
        f"model/{CONFIG}": json_bytes(config if adapter is None else {**config, "adapter": asdict(adapter)}),
        f"model/{TOKENIZER}": json_bytes(tokenizer),
        OPTIMIZER: optimizer,
        STATE: json_bytes({**state, "step": step}),
    }
    try:
        make_home(run_dir)
        _discard(temporary)
        sync_directory(run_dir)
        require_space(home, bytes_needed(contents))
        _write_contents(temporary, contents)
        open_checkpoint(temporary)
        put_in_place(temporary, final)
    except (OSError, UserError) as error:
        raise SaveFailed(
            f"the checkpoint of step {step} could not be saved in {home}: {error}. The earlier ones are unchanged"
        ) from error
    finally:
        try_remove_tree(temporary)
    try_discard([replaced_by(final)])
    return final


def make_home(run_dir: Path) -> None:
    """Makes RUN/checkpoints, and RUN where it was removed. Raises OSError, also for a link."""
    run_dir.mkdir(parents=True, exist_ok=True)
    make_directory(run_dir / "checkpoints")


def replaced_by(final: Path) -> Path:
    """Where the former checkpoint of a step is while, and until, the new one is in place."""
    return final.with_name(final.name + ".replaced")


def put_in_place(temporary: Path, final: Path) -> None:
    """Gives a verified checkpoint its name; a former one of that step gets another. Raises OSError, and then nothing
    has changed."""
    replaced = replaced_by(final)
    if os.path.lexists(final):
        _discard(replaced)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
        sync_directory(final.parent)
    except OSError:
        _discard(final)
        if os.path.lexists(replaced):
            os.rename(replaced, final)
        raise


def prune_checkpoints(run_dir: Path, keep_interval: int | None = None) -> None:
    """Removes checkpoints and the leftovers of killed processes. Kept are the newest two, the best one, those
    whose step is a multiple of `keep_interval`, the newest one that PROVEN_STEPS of training have followed, and the one
    that will be that next: a run that has diverged may have to go back as far.

    The caller holds the RunLock. Whatever cannot be read or removed is kept, with a warning on standard error.
    """
    try:
        checkpoints = dict(_complete_paths(run_dir))
        losses = _val_losses([*checkpoints.values()])
        keep = {_best(losses), *(checkpoints[step] for step in _steps_to_keep([*checkpoints], keep_interval))}
        keep |= set(checkpoints.values()) - set(losses)  # unreadable ones: one of them may be the best
        try_discard(path for path in run_directories(run_dir) if path not in keep and OURS.fullmatch(path.name))
    except OSError as error:
        print(f"warning: old checkpoints could not be removed: {error}", file=sys.stderr)


def _steps_to_keep(steps: list[int], keep_interval: int | None) -> set[int]:
    """Of the steps of checkpoints, ascending, those that are kept whatever their loss is."""
    keep = {*steps[-2:], *(step for step in steps if keep_interval is not None and step % keep_interval == 0)}
    proven = [step for step in steps if step <= steps[-1] - PROVEN_STEPS]
    return keep | {*proven[-1:], *steps[len(proven) : len(proven) + 1]}


def set_later_aside(run_dir: Path, step: int) -> list[Path]:
    """Moves the checkpoints of later steps than that from which a run goes on to checkpoints/set-aside, where nothing
    looks for them: one that could not be read may be sound, and what is saved from now on has another past. Returns
    where they are. The caller holds the RunLock. Raises UserError where that fails."""
    try:
        return [_set_aside(path) for other, path in _complete_paths(run_dir) if other > step]
    except OSError as error:
        raise UserError(f"the checkpoints after step {step} of {run_dir} could not be set aside: {error}") from error


def _set_aside(path: Path) -> Path:
    folder = path.parent / SET_ASIDE
    make_directory(folder)
    names = (path.name + f"-{n}" * (n > 1) for n in itertools.count(1))
    aside = next(folder / name for name in names if not os.path.lexists(folder / name))
    os.rename(path, aside)
    sync_directory(path.parent)
    return aside


def discard_later(run_dir: Path, step: int) -> None:
    """Removes the checkpoints of later steps, which have led to a divergence; the best one by val loss is set aside,
    where it is among them. The caller holds the RunLock. What fails is a warning on standard error."""
    later = [path for other, path in _complete_paths(run_dir) if other > step]
    best = _best(_val_losses(list_checkpoints(run_dir))) if later else None
    try_discard(path for path in later if path != best)
    try:
        if best in later:
            _set_aside(best)
    except OSError as error:  # costs disk space only
        print(f"warning: {best} could not be set aside: {error}", file=sys.stderr)


def _write_contents(directory: Path, contents: dict[str, bytes | dict[str, Tensor]]) -> None:
    """Writes and syncs all files, the manifest last. Checksums are of the bytes in memory, not of those read back."""
    (directory / "model").mkdir(parents=True)
    files = {name: write_parts(directory / name, parts_of(content)) for name, content in contents.items()}
    manifest = {"format": "sprout checkpoint", "version": VERSION, "files": files}
    write_parts(directory / MANIFEST, [json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))})])
    sync_directory(directory / "model")
    sync_directory(directory)


def _discard(path: Path) -> None:
    """Renames a directory, then deletes it: a partly deleted checkpoint never has the name of a complete one. Of a link
    the link alone."""
    removing = path.with_name(path.name.partition(".")[0] + ".removing")
    remove_tree(removing)
    if os.path.lexists(path):
        os.rename(path, removing)
        remove_tree(removing)


def try_discard(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            _discard(path)
        except OSError as error:  # costs disk space only
            print(f"warning: {path} could not be removed: {error}", file=sys.stderr)


# ---- Finding ---------------------------------------------------------------------------------------------------------


def run_directories(run_dir: Path) -> list[Path]:
    """The directories in RUN/checkpoints; not links."""
    return [path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir() and not path.is_symlink()]


def _complete_paths(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints, oldest first; `step-N.replaced` before `step-N`."""
    matches = [(re.fullmatch(r"step-(\d{8,})(\.replaced)?", path.name), path) for path in run_directories(run_dir)]
    found = sorted((int(match[1]), match[2] is None, path) for match, path in matches if match)
    return [(step, path) for step, _, path in found]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, one per step, oldest first. Reads no file."""
    return list(dict(_complete_paths(run_dir)).values())


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, ascending. Reads no file."""
    return [*dict(_complete_paths(run_dir))]


def teacher_runs(run: Path) -> list[Path]:
    """The runs RUN-teacher, RUN-teacher-2 … beside a run that have a checkpoint, in this order."""
    beside = run.parent.glob(f"{glob.escape(run.name)}-teacher*")
    return [path for path in sorted(beside, key=lambda path: (len(path.name), path.name)) if list_checkpoints(path)]


def find_checkpoint(run_dir: Path, which: str, flag: str = "--checkpoint") -> Path:
    """The checkpoint `latest`, `best` or `step-N` of a run. Raises UserError if there is none. flag: that names it.

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
    raise UserError(f"{flag}={which!r} is not in {run_dir}; expected one of: best, latest, {names}")


def with_checkpoint(path: Path, which: str, action: Callable[[Path], T]) -> T:
    """The result of an action on the model folder of a run's checkpoint, as `resolve_model_folder` finds it.

    A run in progress may remove a checkpoint while the action reads it: then the action is repeated, silently, with the
    one that is found next. Raises what the action raises on a checkpoint that is still there.
    """
    for _ in range(MAX_REPEATS):
        mark: object = None
        try:
            folder = resolve_model_folder(path, which)
            mark = _identity(folder.parent)
            return action(folder)
        except UserError:
            is_gone = which in ("best", "latest") if mark is None else _identity(folder.parent) != mark
            if not is_gone or not list_checkpoints(path):
                raise
        time.sleep(0.01)
    return action(resolve_model_folder(path, which))


def _identity(directory: Path) -> object:
    """Of the directory that has this name now; None where there is none."""
    with suppress(OSError):
        status = os.stat(directory)
        return status.st_dev, status.st_ino
    return None


def _no_checkpoint(path: Path) -> str:
    """Why `path` is no run with a checkpoint, and what to type instead."""
    if run_of(path) is None and (runs := _runs_in(path)):
        return f"the directory {path} is not a run; it contains these runs: {_listed(runs)}"
    if (
        run_of(path) is None
        and (path / CONFIG).is_file()
        and any((path / name).is_file() for name in (WEIGHTS, TOKENIZER))
    ):
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


def resolve_run(path: Path) -> tuple[Path, str | None]:
    """The run that `path` names for --resume, its directory or a file in it; and where that is a checkpoint, or in one,
    but not in the last one, its name, `step-N`. Raises UserError."""
    run = run_of(path) if path.exists() else None
    if run is None:
        raise UserError(_no_checkpoint(path))
    try:
        inside = path.resolve().relative_to(run.resolve()).parts
    except ValueError:  # a link in the run
        raise UserError(
            f"--resume={path} leads out of {run}, by a link; name the run: --resume={quote(str(run))}"
        ) from None
    if len(inside) < 2 or (run / inside[0] / inside[1]).resolve() == list_checkpoints(run)[-1].resolve():
        return run, None
    steps = [step for step, other in _complete_paths(run) if other.name == inside[1]]
    if not steps:
        raise UserError(f"--resume={path} is in no checkpoint of {run}; resume the run: --resume={quote(str(run))}")
    return run, f"step-{steps[0]}"


def _val_losses(checkpoints: list[Path]) -> dict[Path, float | None]:
    """The val_loss of each checkpoint; unreadable ones are left out, with a warning on standard error."""
    losses: dict[Path, float | None] = {}
    for path in checkpoints:
        try:
            with reading_checkpoint(path):
                check_files(path, [STATE])
                losses[path] = read_state(path / STATE).get("val_loss")
        except UserError as error:  # damaged, or of another version
            if not path.exists():  # a run in progress has removed it
                continue
            print(f"warning: not considered as the best checkpoint: {error}", file=sys.stderr)
    return losses


def _best(losses: dict[Path, float | None]) -> Path | None:
    known = {path: loss for path, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__, default=None)


def resolve_model_folder(path: Path, which: str = "best") -> Path:
    """The model folder of a run directory (of its checkpoint `which`), a checkpoint directory or a model folder; a file
    of one stands for it. Raises UserError."""
    if _is_foreign(path):
        command = f"python -m interop import {quote(str(path))}" + " --pt" * (path.suffix == ".pt")
        raise UserError(f"{path} is a model of another program, which has to be imported first: {command}")
    if path.is_file() and path.name in {MANIFEST, *(os.path.basename(name) for name in FILES)}:
        path = path.parent
    elif path.is_file() and path.parent.name == SHARDS and (path.parent.parent / MANIFEST).is_file():
        path = path.parent.parent
    if checkpoint_of(path) is None:
        refuse_copy(path)
    folder = next((place for place in (path, path / "model") if _is_model_folder(place)), None)
    if folder is not None and which != "best":
        raise UserError(f"--checkpoint={which} selects one of a run, but {path} is a single checkpoint; leave it out")
    if folder is not None:
        return folder
    if (path / MANIFEST).is_file():
        return path / "model"
    return find_checkpoint(path, which) / "model"


def _is_model_folder(path: Path) -> bool:
    return (path / WEIGHTS).is_file() or checkpoint_of(path) is not None


def _is_foreign(path: Path) -> bool:
    """Whether the file or folder is a model of transformers, llama.cpp or nanoGPT, as far as its name or its
    config.json tells."""
    if path.is_file():
        return path.suffix in (".gguf", ".pt")
    with suppress(DamagedFile):
        return not (path / TOKENIZER).exists() and "model_type" in read_json(path / CONFIG)
    return False


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    model: ModelFolder
    state: StateFile

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
        with reading_checkpoint(self.path):
            return self.reader("optimizer").tensors()

    def reader(self, kind: str) -> TensorReader:
        """Reads rows of the tensors of a kind, "model" (of a run of adapters those) or "optimizer", whoever wrote them.
        Checks the headers alone; `open_checkpoint` has compared the checksums."""
        with reading_checkpoint(self.path):
            return open_tensors(self.path, kind)


def open_checkpoint(path: Path, team: Team | None = None) -> Checkpoint:
    """Checks the size and crc32 of every file and reads all but the tensors. Ignores other files. Raises UserError.

    team: all its ranks call this at once, and share the work of the checksums; all raise the same error then."""
    rank, size = (0, 1) if team is None else (team.rank, team.size)
    return _same_on_all_ranks(team, lambda: open_share(path, rank, size))


def open_share(path: Path, rank: int, size: int) -> Checkpoint:
    """open_checkpoint as one of `size` ranks, each of which compares its share of the large files' checksums."""
    model = open_without_base(path / "model", rank=rank, size=size)
    with reading_checkpoint(path):
        is_whole = model.weights_file is not None
        check_files(path, [STATE, *([OPTIMIZER] if is_whole and rank == 0 else [])])
        open_tensors(path, "optimizer")
        state = read_state(path / STATE)
    return Checkpoint(path, state["step"], model, state)


def _open_patiently(path: Path, team: Team | None) -> Checkpoint:
    """open_checkpoint, tried again after PAUSES where it could not be read."""
    for seconds in PAUSES:
        try:
            return open_checkpoint(path, team)
        except UnreadableFile as error:
            if team is None or team.rank == 0:
                print(f"{error.path}: {error.problem}; trying again", file=sys.stderr, flush=True)
            time.sleep(seconds)
    return open_checkpoint(path, team)


def open_latest(run_dir: Path, team: Team | None = None) -> Checkpoint:
    """The newest intact checkpoint, for --resume; damaged ones are skipped with a warning on standard error.

    A run in progress may remove checkpoints meanwhile, so they are listed again after each that cannot be opened.
    team: all its ranks call this at once, as in open_checkpoint; they open what rank 0 finds.
    """
    _same_on_all_ranks(team, lambda: find_checkpoint(run_dir, "latest"))  # raises if there is none
    skipped = set[str]()
    while True:
        names = _same_on_all_ranks(
            team, lambda: [path.name for _, path in _complete_paths(run_dir) if path.name not in skipped]
        )
        names = names if team is None else team.gather(names[-1:])[0]
        if not names:
            break
        path = run_dir / "checkpoints" / names[-1]
        try:
            return _open_patiently(path, team)
        except DamagedFile as error:
            skipped.add(path.name)
            if (team is None or team.rank == 0) and path.exists():
                print(f"WARNING: checkpoint skipped, an older one is tried: {error}", file=sys.stderr)
    raise UserError(
        f"every checkpoint in {run_dir} is damaged; restore one from a copy, or start again: python train.py --run=PATH"
    )
