"""How a training run starts: from the command line to its options, and to the checkpoint or the weights that it starts
from.

`read_start` is the first call of train.py; `RunConfig` keeps the run's config.json up to date. They are here because
training/ must not import the option loader.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import config
from checkpoint import (
    Checkpoint,
    find_checkpoint,
    open_checkpoint,
    open_latest,
    resolve_run,
    run_of,
    saved_steps,
    set_later_aside,
    teacher_runs,
    with_checkpoint,
)
from common.option import option_names
from common.options import HardwareOptions, RunOptions
from common.run_directory import RunLock, keep_copies, refuse_used_run
from common.signature import is_own, signed
from common.stored_models import checked_config, open_checked
from config.hints import INIT_FROM
from config.resume import (
    asked,
    check_stored,
    note_unused_flags,
    refuse_without_effect,
    resumed_options,
    with_model_options,
    without_foreign_parts,
)
from errors import UserError, quote
from files import json_bytes, plain_file, write_json
from json_types import Argument
from model_folder import ModelFolder
from parallel.processes import Team, by_first, is_first, world_size
from prepare_data import PrepareOptions
from prepare_data.shards import Dataset
from state_file import build
from training.budget import LENGTHENED
from training.kept_text import KeptText
from training.metrics import Trouble, keep_and_tell, log
from training.options import EvalOptions, OptimizerOptions, TrainOptions

# Options of a command that the runs which follow do not take over: each has its own, the text is prepared, and the
# teacher brings the tokenizer.
OF_ONE_RUN = {"run", "data", "resume", "from", "seed", "teacher", "teachers", "budget_minutes", "plan"}
OF_ONE_RUN |= {*option_names(PrepareOptions)} - {"data_dir"}


@dataclass(frozen=True)
class Chain:
    """The runs that follow this one (--teachers), as its state.json holds them. run: directory of the last one, ""
    until it is made. arguments: of the next one's command; None: config.json of this one has its options, but for
    length: flags that its own course changes there. minutes: a time budget of this one and all that follow. teachers:
    weights from which the last one learns beside those of the runs from this one on."""

    run: Argument
    arguments: list[Argument] | None
    length: list[Argument]
    minutes: float | None
    teachers: list[Argument]


@dataclass(frozen=True)
class Start:
    """Resolved options and where the weights come from: `resumed` by --resume, `initial` by --init_from, else
    neither."""

    options: config.Options
    resumed: Checkpoint | None = None
    initial: ModelFolder | None = None
    teachers: list[ModelFolder] = field(default_factory=list)
    """Trained models to learn from, of --teacher."""
    handed_on: list[ModelFolder] = field(default_factory=list)
    """The same of a run that others follow: the last of them learns from these."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Reasons of the automatic choices that a resumed run keeps, by option."""
    argv: list[str] = field(default_factory=list)
    """The command line."""
    chain: Chain | None = None
    """What follows the run, where anything does."""
    began: float = field(default_factory=time.perf_counter)
    """Seconds on the clock of time.perf_counter."""

    @property
    def source(self) -> Checkpoint | ModelFolder | None:
        return self.resumed or self.initial

    @property
    def with_tokenizer(self) -> ModelFolder | None:
        """The model whose tokenizer a new run takes, if there is one."""
        return self.initial or next(iter([*self.teachers, *self.handed_on]), None)

    @property
    def hardware_options(self) -> HardwareOptions:
        """A number of threads that was chosen for another number of processes is chosen again."""
        options = self.options.section(HardwareOptions)
        if self.resumed is None or "threads" not in self.reasons:
            return options
        is_other = self.resumed.state["environment"].get("world_size", 1) != world_size()
        return replace(options, threads="auto") if is_other else options

    @property
    def stored(self) -> dict[str, Any] | None:
        """The options of a resumed run's checkpoint, by name."""
        return None if self.resumed is None else self.resumed.state["options"]

    @property
    def saved_step(self) -> int | None:
        """The step from which a run is resumed."""
        return None if self.resumed is None else self.resumed.step

    @property
    def log_lengths(self) -> dict[str, int]:
        """Bytes of a resumed run's logs at its checkpoint; none of a new run's."""
        return {} if self.resumed is None else self.resumed.state["logs"]

    def directories(self, run: Path) -> list[Path]:
        """That of the run, and of the last one of its chain, which waits for it."""
        return [run, *([Path(self.chain.run)] if self.chain is not None and self.chain.run else [])]

    def record(self, run: Path, options: config.Options, reasons: Mapping[str, str], kept: KeptText) -> RunConfig:
        """The record of the run, in which the weights of the teachers are named."""
        facts = kept.facts() | {"teachers": [teacher.weights_entry() for teacher in self.teachers]}
        facts |= {"chain": asdict(self.chain)} if self.chain is not None else {}
        values = {**kept.values, **self._absolute(options)}
        return RunConfig(run, config.replace(options, **values), {**reasons, **kept.reasons}, facts)

    def _absolute(self, options: config.Options) -> dict[str, str]:
        """The paths among the options that exist, so that config.json repeats the run from any directory. Those that a
        resumed run has stored may have been typed in another one."""
        names = ("data", "data_dir", "init_from")
        typed = {name: options.values[name] for name in names if self.resumed is None or name in self.flags}
        return {name: os.path.abspath(path) for name, path in typed.items() if path and os.path.exists(path)}

    @property
    def asked(self) -> dict[str, Any] | None:
        """What the command asks of the run, by which it is known when it is repeated; None of a run that --teachers
        has begun, since the command is that of the first one."""
        run = self.options.section(RunOptions).run
        before = [path.resolve() for path in teacher_runs(Path(run))] if run is not None else []
        runs = [run_of(teacher.path) for teacher in (*self.teachers, *self.handed_on)]
        if any(path is not None and path.resolve() in before for path in runs):
            return None
        return asked(config.load("train.py", self.argv))

    def default_name(self, dataset: Dataset) -> str:
        """The name of a new run without --run: that of its text where the user chose one or gave weights, else that
        of the preset."""
        if self.options.presets and "data" not in self.flags and self.initial is None:
            preset, file = self.options.presets[-1], [arg for arg in self.argv if not arg.startswith("-")][-1:]
            is_run = bool(file) and file[0].endswith(".json")
            return re.sub(r"-\d+$", "", preset) if is_run else preset  # runs/notes-1/config.json: notes-2
        text = re.sub(r"-[0-9a-f]{8}$", "", dataset.name)  # without the hash that resolve_data appends
        return re.sub(r"\s+", "_", text)

    @property
    def needs_plan(self) -> bool:
        """Whether a plan chooses the options that were not given."""
        return "plan" in self.options.origin.values()

    @property
    def chosen(self) -> set[str]:
        """Names of the options that flags or presets give: a plan obeys them."""
        return {name for name, origin in self.options.origin.items() if origin not in ("default", "plan")}

    @property
    def flags(self) -> set[str]:
        """Names of the options given on the command line."""
        return {name for name, origin in self.options.origin.items() if origin == "flag"}


def read_start(argv: Sequence[str], stack: ExitStack) -> Start:
    """Reads the command line and prints the notes on it. The directory of a resumed run is locked in `stack`, before
    its checkpoint is opened. Raises UserError."""
    start = _read_start(argv, stack)
    for note in start.options.notes:
        print(note)
    return start


def _read_start(argv: Sequence[str], stack: ExitStack) -> Start:
    options = config.load("train.py", argv)
    train, eval_only = options.section(TrainOptions), options.section(EvalOptions).eval_only
    if train.resume is not None and train.init_from is not None:
        raise UserError("--resume continues a run, --init_from starts a new one: give one of them")
    options = resolve_length(options)
    if train.resume is None and not eval_only:
        check_length(options, argv)
    if train.resume is None and train.from_ is not None:
        raise UserError(f"--from={train.from_} names a checkpoint of a run to go on from: add --resume=RUN")
    if train.resume is not None:
        run, which = resolve_run(Path(train.resume))
        options = replace(options, values=options.values | {"resume": str(run)})
        if not eval_only:
            by_first(lambda: stack.enter_context(RunLock(run)) and None)
        resumed, notes = open_resumed(run, train.from_ or which), list[str]()
        checked_config(resumed.model)
        check_stored(options, resumed.state)
        if not by_first(lambda: is_own(resumed.state)):
            resumed, notes = without_foreign_parts(resumed, options, argv)
        options = note_unused_flags(resumed_options(options, resumed.state["options"]))
        options.notes.extend(notes)
        max_steps = options.section(TrainOptions).max_steps
        if not eval_only:
            check_length(options, argv)
        if max_steps is not None and max_steps < resumed.step:
            raise UserError(f"--max_steps={max_steps}: {run} is already at step {resumed.step}; give a larger number")
        stored = resumed.state["auto"]
        reasons = {name: reason for name, reason in stored.items() if options.origin.get(name, "flag") != "flag"}
        teachers = [] if eval_only else same_teachers(resumed, options.section(TrainOptions).teacher)
        chain = same_chain(resumed, options, argv)
        if not eval_only:
            stored_options, progress = resumed.state["options"], resumed.state["progress"]
            refuse_without_effect(options, stored_options, resumed.step, progress, follows=chain is not None)
            by_first(partial(leave_later, run, resumed.step))
        return Start(options, resumed=resumed, teachers=teachers, reasons=reasons, argv=[*argv], chain=chain)
    if config.PLANNED in options.presets and not (train.init_from and options.origin["data"] == "flag"):
        raise UserError(
            f"{config.PLANNED} trains a model that exists on a text: python train.py {config.PLANNED} --init_from=MODEL"
            " --data=TEXT. MODEL is a run of yours, or a model folder that python -m interop import made"
        )
    if train.try_ is None:  # which may go on in a directory that is in use
        by_first(lambda: refuse_used_run(options.section(RunOptions).run))
    if train.init_from is not None:
        if train.init_from in INIT_FROM and not Path(train.init_from).exists():
            raise UserError(f"--init_from={train.init_from}: {INIT_FROM[train.init_from]}")
        initial, _ = with_checkpoint(Path(train.init_from), "best", open_checked)
        options = with_model_options(options, f"--init_from={train.init_from}", initial.config, initial.tokenizer)
        options = config.replace(options, lora_rank=None) if eval_only else options
        check_adapters(options)
        return with_teachers(Start(note_unused_flags(options), initial=initial, argv=[*argv]))
    if options.origin["keep_share"] == "flag" and train.keep_share is not None:
        raise UserError(
            f"--keep_share={train.keep_share}: only a run that starts from other weights has an old text to keep; "
            "add --init_from=RUN, or leave it out"
        )
    if eval_only:
        raise UserError("--eval_only=true needs weights to evaluate: add --resume=RUN or --init_from=RUN")
    return with_teachers(Start(options, argv=[*argv]))


def open_resumed(run: Path, which: str | None) -> Checkpoint:
    """The checkpoint from which a run goes on: the newest intact one, or exactly the one that is named, best or step-N.
    Raises UserError."""
    if which is None:
        return open_latest(run, Team())
    return open_checkpoint(by_first(partial(find_checkpoint, run, which, "--from")), Team())


def leave_later(run: Path, step: int) -> None:
    """Sets aside the checkpoints of later steps than the one from which the run goes on, because it was named or the
    later ones cannot be used: they are no part of the run any more. Raises UserError."""
    if not any(other > step for other in saved_steps(run)):
        return
    keep_copies(run)
    aside = ", ".join(str(path) for path in set_later_aside(run, step))
    log(f"{run} goes on from step {step}; kept aside are {aside}, and the records so far in metrics.jsonl.old")


def with_teachers(start: Start) -> Start:
    """The start of a new run with the models of --teacher, whose tokenizer it takes. Raises UserError."""
    given, share = start.options.section(TrainOptions).teacher, start.options.section(TrainOptions).teacher_share
    may_follow = start.needs_plan or start.options.section(TrainOptions).teachers > 0
    if "teacher_share" in start.flags and not given and not may_follow:
        raise UserError(f"--teacher_share={share}: there is no teacher; add --teacher=RUN, or leave it out")
    teachers = [with_checkpoint(Path(path), "best", open_checked)[0] for path in given]
    models = [*([start.initial] if start.initial else []), *teachers]
    for model in models[1:]:
        if model.tokenizer != models[0].tokenizer:
            raise UserError(
                f"--teacher: {model.path} has another tokenizer than {models[0].path}, and a run learns from models"
                f" of its own tokenizer; a run with --teacher={quote(str(models[0].path))} takes that one's"
            )
    if not teachers:
        return start
    vocabulary = {"vocab_size": teachers[0].config.get("vocab_size")}
    options = with_model_options(start.options, f"--teacher={given[0]}", vocabulary, teachers[0].tokenizer)
    if options.section(TrainOptions).teachers > 0:
        return replace(start, options=config.replace(options, teacher=()), handed_on=teachers)
    options = config.replace(options, teacher=tuple(str(teacher.path.resolve()) for teacher in teachers))
    return replace(start, options=options, teachers=teachers)


def same_teachers(resumed: Checkpoint, paths: Sequence[str]) -> list[ModelFolder]:
    """The teachers of a resumed run, where they are now. Raises UserError where they are gone, or are others."""
    recorded = resumed.state.get("teachers", [])
    if len(paths) != len(recorded):
        raise UserError(
            f"--teacher: {len(paths)} given, and the run was started with {len(recorded)}, which a resumed run cannot"
            " change; leave the flag out"
        )
    found = []
    for path, entry in zip(paths, recorded, strict=True):
        why = "resuming needs the same teacher; restore it from a copy, or name where it is now with --teacher=PATH"
        if not Path(path).exists():
            raise UserError(f"--teacher={path}, from which this run learns, is gone: {why}")
        teacher, _ = with_checkpoint(Path(path), "best", open_checked)
        if teacher.weights_entry() != entry:
            raise UserError(f"--teacher={path}, from which this run learns, has other weights than before: {why}")
        found.append(teacher)
    return found


def same_chain(resumed: Checkpoint, options: config.Options, argv: Sequence[str]) -> Chain | None:
    """What follows a resumed run: the flags of the command are passed on. Raises UserError for a larger --teachers than
    the run was started with."""
    teachers = options.section(TrainOptions).teachers
    recorded = resumed.state["options"].get("teachers", 0)
    if teachers > recorded:
        raise UserError(
            f"--teachers={teachers}: this run was started with {recorded}, and a resumed one can only have fewer; a new"
            f" run learns from it with --teacher={quote(str(resumed.path.parents[1]))}"
        )
    if teachers == 0:
        return None
    chain = build(Chain, resumed.state, "chain")
    if chain.arguments is None:
        return chain
    more = [
        arg for arg in passed_on(argv, options) if not arg.startswith(("--max_steps=", "--decay_steps="))
    ]  # of this run
    return replace(chain, arguments=[*chain.arguments, *more])


def passed_on(argv: Sequence[str], options: config.Options) -> list[str]:
    """The flags of a command line that the next run takes over, with absolute paths: a resumed run may be in another
    folder."""
    found = []
    for arg in argv:
        name = arg.removeprefix("--").partition("=")[0]
        value = options.values[name]
        if name in ("init_from", "data_dir") and value is not None:
            arg = f"--{name}={Path(value).absolute()}"
        found += [arg] * (name not in OF_ONE_RUN)
    return found


def resolve_length(options: config.Options) -> config.Options:
    """--max_steps and --budget_minutes both set the length: a flag overrides a preset, two flags are an error; but
    --max_steps=none leaves it to the other flag."""
    train = options.section(TrainOptions)
    if train.budget_minutes is None or options.origin["max_steps"] != "flag":
        return options
    if options.origin["budget_minutes"] != "flag":
        return config.replace(options, budget_minutes=None)
    if train.max_steps is not None:
        raise UserError("--max_steps and --budget_minutes both set the length of the run: give one of them")
    return options


def check_length(options: config.Options, argv: Sequence[str]) -> None:
    """Raises UserError on a length that never ends, and on a --patience that cannot end the run, with the command of
    `argv` changed so that it works."""
    train, schedule = options.section(TrainOptions), options.section(OptimizerOptions).schedule
    interval, patience, end = options.section(EvalOptions).eval_interval, train.patience, train.max_steps
    command = " ".join(["python train.py", *map(quote, argv)])
    if train.budget_minutes is not None:
        return
    if end is None:
        missing = [] if patience is not None else ["--patience=5"]
        missing += [] if schedule in LENGTHENED else ["--schedule=wsd"]
        rules = {
            "--patience=5": "--max_steps=none has no end without --patience=N",
            "--schedule=wsd": f"--max_steps=none and --schedule={schedule}: its learning rate falls until a known step",
        }
        if missing:
            reasons = "; ".join(rules[flag] for flag in missing)
            raise UserError(f"{reasons}. Give --max_steps a number, or: {' '.join([command, *missing])}")
    elif patience is not None and options.origin["patience"] == "flag" and patience * interval >= end:
        took = f"--patience={patience} takes {patience * interval:,} steps at least (--eval_interval={interval})"
        usable = (end - 1) // patience
        advice = f"evaluate more often: {command} --eval_interval={usable // 2 or 1}" if usable else "leave it out"
        raise UserError(f"{took}, and the run has {end:,}: it has no effect; {advice}")


def check_adapters(options: config.Options) -> None:
    """Raises UserError where adapters are to be trained by Muon."""
    rank = options.section(TrainOptions).lora_rank
    if rank is not None and options.section(OptimizerOptions).optimizer == "muon":
        raise UserError(
            f"--lora_rank={rank}: adapters are trained by AdamW or SGD, while muon orthogonalizes the update of a whole"
            " matrix; add --optimizer=adamw, with a learning rate for it, such as --learning_rate=1e-3"
        )


class RunConfig:
    """The options of a run as they are now, with the reasons of the automatic choices, and its config.json. others:
    further facts for a checkpoint."""

    def __init__(
        self, run: Path, options: config.Options, reasons: Mapping[str, str], others: Mapping[str, Any]
    ) -> None:
        self.path, self.options, self.reasons, self.others = run / "config.json", options, dict(reasons), others
        self._trouble = Trouble(self.path)

    def change(self, **values: object) -> None:
        """Changes options, and rewrites config.json. A disk that fails is reported, and tried again at the next save; a
        checkpoint's state holds them too."""
        self.options = config.replace(self.options, **values)
        self._write()

    def facts(self) -> dict[str, Any]:
        """Options, reasons and the other facts, for a checkpoint's state.json. Writes config.json where it is not
        there as it should be."""
        if is_first() and (self._trouble.is_there or not self._is_written()):
            self._write()
        return {"options": self.options.flat(), "auto": self.reasons, **self.others}

    def __enter__(self) -> RunConfig:
        return self

    def __exit__(self, *exc: object) -> None:
        """Tells whether config.json is not what it should be."""
        if self._trouble.is_there:
            print(f"not saved: {self.path}; the checkpoints hold the same options", file=sys.stderr, flush=True)

    def _is_written(self) -> bool:
        """Whether the file is there as it should be."""
        try:
            with open(self.path, "rb", opener=plain_file) as file:
                return file.read() == json_bytes(self._content())
        except OSError:
            return False

    def _content(self) -> dict[str, Any]:
        return signed(config.dump(self.options, self.reasons))

    def _write(self) -> None:
        if not is_first():
            return
        try:
            keep_and_tell(self.path.parent)
            write_json(self.path, self._content())
            self._trouble.ends()
        except OSError as error:
            self._trouble.begins(error)
