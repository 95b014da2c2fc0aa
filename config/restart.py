"""A command that is repeated: by torchrun, which starts processes again with the same arguments (--max-restarts), and
by schedulers and supervisors, with --resume=auto. It goes on with what it has begun before.

run.json tells which runs a torchrun has begun, and what a command asked of a run; run_state.json how a run ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import config
import state_file
from checkpoint import list_checkpoints, resolve_run, teacher_runs
from common.option import option_names, show
from common.options import RunOptions
from common.run_directory import RunLock, asked_before, note_asked, runs_of_this_launch
from common.run_state import read_state, write_done
from common.signature import PATHS, SERVICES
from config.resume import asked, from_json, is_over, longer, refuse_without_effect, resumed_options, same_place
from config.trying import has_unfinished_tries, try_candidates
from errors import FAILED, UserError, quote
from model_folder import STATE
from parallel.processes import by_first, command, is_first, launches
from prepare_data import PrepareOptions
from training.metrics import log
from training.options import EvalOptions, TrainOptions

Train = Callable[[Sequence[str]], int]
FOR_NEW_RUNS = {"init_from", "try", "budget_minutes"}  # options that a resumed run does not take, or not as the same


def begin_or_resume(train: Train, argv: Sequence[str]) -> int:
    """The exit code of train(argv), or of what continues that which this command has begun. Raises UserError."""
    if launches() and (code := by_first(partial(_ended_before, argv))) is not None:
        return code
    if config.AUTO in argv:
        argv = by_first(partial(_begun, argv))
        if not argv:
            return 0
    elif launches():
        argv = by_first(partial(_continued, argv))
    if config.load("train.py", argv).section(TrainOptions).try_ is not None:
        return try_candidates(train, argv)
    return train(argv)


# ---- Processes that torchrun starts again ----------------------------------------------------------------------------


def _runs_begun(argv: Sequence[str]) -> tuple[list[Path], Path | None]:
    """The runs that this torchrun has begun, oldest first, and the one that the command names."""
    options = config.load("train.py", argv)
    resume, run = options.section(TrainOptions).resume, options.section(RunOptions).run
    if resume not in (None, "auto"):  # which may have been followed by another run (--teachers)
        run = str(resolve_run(Path(resume))[0])
    return runs_of_this_launch(Path(run).parent if run else Path("runs")), Path(run) if run else None


def _ended_before(argv: Sequence[str]) -> int | None:
    """The exit code of the run that ended under this torchrun in a way that is no reason to start it again: a signal
    stopped it, or it failed by an error of the user. None where there is none."""
    begun, named = _runs_begun(argv)
    for run in reversed([*begun, *([named] if named else [])]):
        state = read_state(run)
        known = state.get("launches")
        if not isinstance(known, list) or set(launches()).isdisjoint(map(str, known)):
            continue
        if state.get("state") == "stopped" or (state.get("state") == "failed" and not state.get("resumable")):
            message = str(state.get("message")).partition("\n")[0]
            if is_first():
                why = f"torchrun has started again, but {run} is not to go on here: {message}"
                print(why, file=sys.stderr, flush=True)
            code = state.get("exit_code")
            return code if type(code) is int and 0 < code < 256 else FAILED
        return None
    return None


def _continued(argv: Sequence[str]) -> list[str]:
    options = config.load("train.py", argv)
    train = options.section(TrainOptions)
    if train.plan or train.try_ is not None or options.section(EvalOptions).eval_only:
        return [*argv]
    begun, _ = _runs_begun(argv)
    if saved := [path for path in begun if list_checkpoints(path)]:
        log(f"torchrun has started again; {saved[-1]} is resumed")
        named = [arg for arg in argv if arg.removeprefix("--").partition("=")[0] in (*PATHS, *SERVICES)]
        return [f"--resume={saved[-1]}", *(arg for arg in named if not arg.startswith("--init_from"))]
    if begun and train.resume is None:
        log("torchrun has started again")
        return [*argv, f"--run={begun[0]}"]
    return [*argv]


# ---- --resume=auto ---------------------------------------------------------------------------------------------------


def _begun(argv: Sequence[str]) -> list[str]:
    """The arguments that begin the run of a command with --resume=auto, or go on with it; none where it is complete,
    which is logged. Raises UserError."""
    options = config.load("train.py", argv)
    if options.values["from"] is not None:
        raise UserError(
            "--from names one checkpoint, and --resume=auto takes the last one: give --resume=RUN with --from"
        )
    run, argv = Path(str(options.section(RunOptions).run)), config.without_auto(argv)
    found = run if list_checkpoints(run) else next(iter(_teachers_of(run)), None)
    if options.values["plan"] or has_unfinished_tries(run) or found is None:
        return argv
    given, before = asked(options), asked_before(run)
    state = _last_state(found)
    stored = from_json(options, state.get("options", {}))
    known = stored if before is None else from_json(options, before)
    new = {name for name, value in from_json(options, given).items() if name in given and value != known[name]}
    if before is None:  # a run of an earlier version: what it has may have been chosen automatically
        new = {name for name in new - FOR_NEW_RUNS if options.values[name] != "auto"}
    refuse_other(run, new, options, known)
    if found == run and not options.values["eval_only"] and _is_complete(state, stored, options, new):
        step, values = state["step"], stored | {"resume": str(run)}
        log(f"{run} is complete at step {step}; next: python sample.py --run={quote(str(run))}; {longer(values, step)}")
        write_done(run, step)
        return []
    flags = [flag for name in sorted(new) for flag in options.loader.options[name].as_flags(options.values[name])]
    once = [f"--{name}=true" for name in ("verbose", "eval_only") if options.values[name]]
    argv = [f"--resume={found}", *flags, *once]
    if before is not None and new and state and not options.values["eval_only"]:
        merged = resumed_options(config.load("train.py", argv), state["options"])
        refuse_without_effect(merged, state["options"], state["step"], state["progress"], "chain" in state)
        with RunLock(run):
            note_asked(run, {**before, **{name: given[name] for name in new}})
    log(f"{found} is resumed")
    return argv


def _teachers_of(run: Path) -> list[Path]:
    """The runs that are trained before this one (--teachers), the newest first."""
    found = [(path, _last_state(path).get("chain")) for path in reversed(teacher_runs(run))]
    return [path for path, chain in found if isinstance(chain, dict) and same_place(str(chain.get("run")), str(run))]


def _last_state(run: Path) -> dict[str, Any]:
    """state.json of the last checkpoint; nothing where that is damaged, and the resume finds an older one or says what
    is wrong."""
    try:
        state = state_file.read_state(list_checkpoints(run)[-1] / STATE)
        for name in ("max_steps", "patience"):
            config.check(name, state["options"][name])
        numbers = state["step"], state["progress"].get("stale", 0)
        return state if all(type(number) is int for number in numbers) else {}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}


def _is_complete(state: dict[str, Any], stored: dict[str, Any], options: config.Options, new: set[str]) -> bool:
    """Whether the run has ended, also before its last step for lack of time, and the command neither lengthens it nor
    asks for another run. state: of its last checkpoint; stored: the options there."""
    others = {*config.fixed_names(), *option_names(PrepareOptions)}
    if not state or state["progress"].get("finished_step") != state["step"] or new & others:
        return False
    length = {name: options.values[name] for name in ("max_steps", "patience") if name in new}
    values = stored | length | {"budget_minutes": None}
    return not length or is_over(values, stored, state["step"], state["progress"])


def refuse_other(run: Path, new: set[str], options: config.Options, known: dict[str, Any]) -> None:
    """Raises UserError where a repeated command has another value of what a run is begun with."""
    for name in sorted(new & FOR_NEW_RUNS):
        more = ""
        if name == "budget_minutes":
            more = f"; for more time: {command()} --resume={quote(str(run))} --budget_minutes=MORE"
        flag = f"--{name}={show(options.values[name])}"
        raise UserError(f"{flag}: {run} was begun with {name}={show(known[name])}, and goes on with that{more}")
