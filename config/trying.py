"""--try=N: the trials of a plan's settings, one after another, each a process of train.py, and the run that continues
the best one. The rules are in training/tries.py.

RUN/tries holds what was decided and measured (tries.json) and for each trial N its options (N.json), its output (N.log)
and its run (N), which is resumed with more steps in the next round. The winner's run is moved to RUN and resumed there,
in this process, for the minutes that are left. The same command goes on where it was stopped, or killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import config
from checkpoint import list_checkpoints, open_latest
from common.hardware import choose_hardware, tune_allocator
from common.memory import release_memory
from common.option import show
from common.options import HardwareOptions, RunOptions
from common.run_directory import RunLock, claim_run, refuse_links, refuse_used_run
from common.run_state import RunState
from common.signature import PATHS, SERVICES, signed
from config.planning import Planning, open_dataset
from config.start import Start, read_start
from errors import UserError, quote
from files import make_directory, open_to_append, read_json, write_json
from json_types import Mismatch, conform
from parallel.processes import world_size
from prepare_data.shards import Dataset
from training import setup
from training import tries as rules
from training.interrupt import STOPPED, StopRequest
from training.metrics import METRICS, SAMPLES, log
from training.options import TrainOptions
from training.plan_lines import describe, show_time
from training.report import read_metrics
from training.state import Progress
from training.stored import read_progress
from training.tries import Result, Trial, TryPlan, choose_winner, show_changes

FOLDER, STATE = "tries", "tries.json"
# Of a trial, in the place of what the run that continues it has.
TRIAL = {"budget_minutes": None, "decay_steps": 1, "patience": None, "sample_tokens": 0, "final_samples": 0}
TRIAL |= {"final_eval": False, "save_interval": None, "wandb": None, "tensorboard": False, "trackio": False}
LENGTH = ("max_steps", "budget_minutes", "eval_interval")  # options that each process of a run has of its own


@dataclass
class Tries:
    """What is decided and measured, as stored in tries.json. command: the arguments; key: what they mean, and the text.
    minutes: the budget; seconds: what is used of it, less where the text is short. sizes: trials in each round; rounds:
    seconds of training in each that has begun, by the predicted cost of a step. reasons: of the plan, by option."""

    run: Path
    command: list[str]
    key: dict[str, Any]
    minutes: float
    seconds: float
    sizes: list[int]
    trials: list[Trial]
    reasons: dict[str, str]
    rounds: list[float] = field(default_factory=list)
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        return self.run / FOLDER

    @property
    def again(self) -> str:
        """The command that goes on."""
        return " ".join(["python train.py", *map(quote, self.command)])

    def save(self) -> None:
        """Raises UserError."""
        try:
            write_json(self.folder / STATE, {**asdict(self), "run": None, "format": "sprout-tries", "version": 1})
        except OSError as error:
            where = self.folder / STATE
            raise UserError(f"cannot write {where} ({error.strerror}); free disk space, then {self.again}") from error


def read_tries(run: Path) -> Tries:
    """Raises UserError where tries.json is damaged."""
    path = run / FOLDER / STATE
    values = read_json(path)
    try:
        if (kind := (values.pop("format"), values.pop("version"))) != ("sprout-tries", 1):
            raise TypeError(kind)
        tries: Tries = conform(Tries, {**values, "run": ""}, {"run": str})
        return replace(tries, run=run)
    except (KeyError, TypeError, Mismatch) as error:
        raise UserError(f"{path}: not in this version's format ({error}); name another run with --run=PATH") from error


def has_unfinished_tries(run: Path) -> bool:
    """Raises UserError where tries.json is damaged."""
    return (run / FOLDER / STATE).exists() and not read_tries(run).is_finished


# ---- The order of events ---------------------------------------------------------------------------------------------


def try_candidates(train: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The trials, then the run that continues the winner, by `train`. Exit codes and errors as those of train.py."""
    if world_size() > 1:
        raise UserError(
            f"--try runs its trials one after another in processes of its own, and torchrun has started"
            f" {world_size()}: run it without torchrun, or leave --try out"
        )
    with ExitStack() as stack:
        tries = open_tries(argv, stack)
        if tries is None:  # --plan
            return 0
        release_memory()  # of the measured steps, on a GPU
        with RunState([tries.run], tries.command) as told:
            with StopRequest() as stop:
                is_complete = run_rounds(tries, stop) and not stop()
            if not is_complete:
                log(f"stopped in the trials, which are saved; continue with: {tries.again}")
                told.code = STOPPED
                return STOPPED
            winner = choose_winner(tries.trials)
            if winner is None:
                tries.is_finished, why = True, f"trial 1: {tries.trials[0].out}"
                tries.save()
                raise UserError(f"all trials failed ({why}); their output is in {tries.folder}; train without --try")
        try:
            code = train(continue_winner(tries, winner))
            tries.is_finished = code == 0
            tries.save()
        finally:
            log("\n".join(["", *rules.describe_trials(tries.trials, winner)]))
            won = ": no other setting was clearly better than the plan" if winner.number == 1 else ""
            log(f"{tries.run} continues trial {winner.number}{won}; all logs and figures: {tries.folder}")
        return code


def open_tries(argv: Sequence[str], stack: ExitStack) -> Tries | None:
    """Those that the same command has begun, else new ones, locked in `stack`. With --plan shows these and returns
    None."""
    start = read_start(argv, stack)
    run, train = start.options.section(RunOptions).run, start.options.section(TrainOptions)
    if run is None or not has_unfinished_tries(Path(run)):
        refuse_used_run(run)
    tune_allocator()
    hardware = choose_hardware(start.options.section(HardwareOptions))
    compiles = start.options.values["compile"] if "compile" in start.flags else False
    planning = Planning(replace(start, options=config.replace(start.options, compile=compiles)), hardware)
    dataset = open_dataset(start, planning, hardware)
    key = {name: start.options.values[name] for name in sorted(start.flags - {"run", "plan", "verbose"})}
    key = json.loads(json.dumps({**key, "fingerprint": dataset.fingerprint}))
    if not train.plan and (tries := find_unfinished(run, key, stack)):
        return tries
    facts = planning.facts(dataset)
    plan = rules.plan_tries(facts, planning.given, train.try_ or 0)
    lines = describe(plan.plan, facts, plan.given, start.flags)
    print("\n".join([*lines, *describe_tries(plan, train.try_ or 0, is_full=train.plan)]))
    return None if train.plan else begin(start, planning, dataset, plan, key, stack)


def find_unfinished(run: str | None, key: dict[str, Any], stack: ExitStack) -> Tries | None:
    """The tries of the run (None: one in runs/) that have this key and have not ended. Raises UserError where those of
    the run have another one, or are in use."""
    for home in sorted(Path("runs").glob("*")) if run is None else [Path(run)]:
        try:
            if not (home / FOLDER / STATE).exists() or (found := read_tries(home)).is_finished:
                continue
            if found.key != key:
                raise UserError(
                    f"--run={run}: its trials were begun by another command or on another text; go on with them:"
                    f" {found.again}; or name another directory"
                )
            refuse_links(home, *(f"{FOLDER}/{trial.number}" for trial in found.trials))
            stack.enter_context(RunLock(found.folder))
        except UserError:
            if run is not None:
                raise
            continue
        print(f"going on with the trials of {home}; to begin anew, name another directory with --run=PATH")
        return read_tries(home)
    return None


def describe_tries(plan: TryPlan, number: int, *, is_full: bool) -> list[str]:
    count, seconds, sizes = len(plan.candidates), plan.seconds, plan.sizes
    each = show_time(rules.SHARE * seconds / len(sizes))
    only = " (no more differ here)" if count < number else ""
    rest = show_time((1 - rules.SHARE) * seconds)
    in_rounds = f"rounds of {' and '.join(map(str, sizes))} trials, about {each} a round"
    in_rounds = in_rounds if len(sizes) > 1 else f"one round of about {each}"
    lines = [f"tries: {count} settings{only} in {in_rounds}; the best one goes on for about {rest}"]
    shown = enumerate(plan.candidates if is_full else [], 1)
    return lines + [f"  {i:>2}  {show_changes(candidate.changes)}" for i, candidate in shown]


def begin(
    start: Start, planning: Planning, dataset: Dataset, plan: TryPlan, key: dict[str, Any], stack: ExitStack
) -> Tries:
    """Makes and locks RUN/tries, with the options of each trial. Raises UserError."""
    trials, dumped = list[Trial](), list[dict[str, Any]]()
    short = {**TRIAL, "compile": planning.options.values["compile"], "eval_tokens": plan.eval_tokens}
    for number, candidate in enumerate(plan.candidates, 1):
        options = planning.with_values(dataset, candidate.values)
        again = {"data": str(dataset.folder), "compile": start.options.values["compile"], "plan": False, "try": None}
        options = config.replace(options, **again)
        train, block_size = options.section(TrainOptions), options.values["block_size"]
        setup.check_size(dataset, planning.data, train, block_size, start.argv)
        trial = config.replace(options, **short)
        changed = [name for name in short if name not in LENGTH and options.values[name] != trial.values[name]]
        later = {name: options.values[name] for name in (*LENGTH, *changed)}
        trials.append(Trial(number, candidate.changes, later, candidate.step_seconds))
        dumped.append(signed(config.dump(trial, {})))
    run = claim_run(start.options.section(RunOptions).run, start.default_name(dataset), asked=start.asked)
    minutes, command = start.options.section(TrainOptions).budget_minutes, [a for a in start.argv if a != "--plan"]
    reasons = planning.reasons | plan.plan.reasons
    tries = Tries(run, command, key, minutes or 0.0, plan.seconds, plan.sizes, trials, reasons)
    try:
        make_directory(tries.folder)
        stack.enter_context(RunLock(tries.folder))
        for trial_number, content in enumerate(dumped, 1):
            write_json(tries.folder / f"{trial_number}.json", content)
    except OSError as error:
        raise UserError(f"cannot write in {tries.folder}: {error.strerror}") from error
    tries.save()
    log(f"run: {run}; Ctrl-C stops it and saves, the same command goes on")
    return tries


# ---- The trials ------------------------------------------------------------------------------------------------------


def run_rounds(tries: Tries, stop: Callable[[], bool]) -> bool:
    """Runs what is left of the trials. Returns whether all are done; otherwise a signal came."""
    for number in range(len(tries.sizes)):
        part = rules.taking_part(tries.trials, tries.sizes, number)
        if number and len(part) < 2:
            break
        if number == len(tries.rounds):
            tries.rounds.append(rules.next_round(tries.trials, tries.seconds, tries.rounds, tries.sizes))
            tries.save()
        for trial in part:
            if trial.out is None and len(trial.results) == number:
                if stop() or not run_trial(tries, trial, number, stop):
                    return False
                done = f"out: {trial.out}"
                if trial.out is None:
                    result = trial.results[-1]
                    done = f"{result.bits_per_byte:.4f} bits per byte after {result.steps:,} steps"
                log(f"round {number + 1}, trial {trial.number} ({show_changes(trial.changes)}): {done}")
    return True


def run_trial(tries: Tries, trial: Trial, number: int, stop: Callable[[], bool]) -> bool:
    """Trains a trial up to its steps of a round. Returns whether it came to an end, good or bad; that is saved."""
    folder, output = tries.folder / str(trial.number), tries.folder / f"{trial.number}.log"
    saved = list_checkpoints(folder)
    before = int(saved[-1].name.rpartition("-")[2]) if saved else 0
    done = trial.results[-1].steps if trial.results else 0
    steps = done + max(1, int(tries.rounds[number] / trial.step_seconds))
    argv = [f"--resume={folder}"]
    if folder.exists():
        with RunLock(folder):  # raises where a process goes on whose parent was killed
            pass
    if not saved:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed before its first checkpoint
        argv = [str((tries.folder / f"{trial.number}.json").absolute()), f"--run={folder}"]
    started = time.perf_counter()
    try:
        code = run_process([*argv, f"--max_steps={steps}", f"--eval_interval={steps}"], output, stop)
    except OSError as error:
        raise UserError(
            f"trial {trial.number} does not start ({error}); free memory or disk, then {tries.again}"
        ) from error
    trial.seconds += time.perf_counter() - started
    if code == 0:
        trial.results.append(read_result(folder, steps, steps - before))
    elif code != STOPPED and not stop():
        trial.out = find_reason(code, output)
    tries.save()
    return code == 0 or trial.out is not None


MAX_LOG = 1 << 26  # bytes of a trial's output that are copied where the file has a second name


def run_process(argv: Sequence[str], output: Path, stop: Callable[[], bool]) -> int:
    """The exit code of train.py, whose output is appended to a file. It gets signals from here alone, one at most."""
    group: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    is_asked = False
    with os.fdopen(open_to_append(output, MAX_LOG), "r+b") as file:
        file.seek(0, os.SEEK_END)
        command = [sys.executable, str(config.ROOT / "train.py"), *argv]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **group)
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.2)
            if stop() and not is_asked:
                is_asked = True
                if sys.platform == "win32":
                    process.send_signal(signal.CTRL_BREAK_EVENT)
                else:
                    process.send_signal(signal.SIGTERM)


def read_result(folder: Path, steps: int, made: int) -> Result:
    """The best evaluation of a trial that has come to `steps`, `made` of them in its last process."""
    state, logged = open_latest(folder).state, read_metrics(folder)["step"]
    progress, nats = read_progress(Progress, state), state["val_loss"]
    loss = min((entry["val_loss"] for entry in progress.history), default=None)
    seconds = logged[-1].get("timing", {}).get("seconds") if logged else None
    if not (loss and nats and state.get("val_bits_per_byte") and seconds):
        raise UserError(f"{folder}: the loss or the time of its last step is not recorded; delete it and try again")
    return Result(steps, loss, loss * state["val_bits_per_byte"] / nats, progress.best, made, seconds)


def find_reason(code: int, output: Path) -> str:
    """Why a process failed, in one line."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + ", perhaps for lack of memory" * (code == -9)
    lines = output.read_text("utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (errors or lines or [f"exit code {code}"])[-1]
    return reason if len(reason) <= 100 else f"{reason[:97]}..."


# ---- The winner ------------------------------------------------------------------------------------------------------


def continue_winner(tries: Tries, winner: Trial) -> list[str]:
    """Moves the winner's run to RUN, and deletes the checkpoints of the others. Returns the arguments of train.py that
    continue it. Raises UserError."""
    run, source = tries.run, tries.folder / str(winner.number)
    if not list_checkpoints(run):
        try:
            for name in ("config.json", METRICS, SAMPLES, "checkpoints"):
                if (source / name).exists():
                    os.replace(source / name, run / name)
        except OSError as error:
            raise UserError(f"cannot move {source} to {run} ({error.strerror}); then {tries.again}") from error
    shutil.rmtree(source, ignore_errors=True)
    for trial in tries.trials:
        shutil.rmtree(tries.folder / str(trial.number) / "checkpoints", ignore_errors=True)
    steps, argv = winner.results[-1].steps, [f"--resume={run}"]
    if open_latest(run).state["options"].get("max_steps") != steps:
        return argv  # it has been continued already
    best = f"trial {winner.number} ({show_changes(winner.changes)})"
    log(f"\nthe best is {best}: it goes on in {run}; the checkpoints of the other trials are deleted")
    later, left = dict(winner.later), max(60 * tries.minutes - rules.spent(tries.trials), 6 * tries.minutes)
    max_steps, minutes = later.pop("max_steps"), later.pop("budget_minutes")
    if open_latest(run).state["options"]["schedule"] != "wsd":
        later.pop("decay_steps", None)  # without effect
    if minutes is None and (max_steps - steps) * winner.step_seconds < left:
        argv.append(f"--max_steps={max_steps}")
    else:
        argv.append(f"--budget_minutes={left / 60:.3g}")
    later = {
        name: value for name, value in later.items() if name not in (*PATHS, *SERVICES)
    }  # tries.json is not signed
    return argv + [f"--{name}={show(value)}" for name, value in sorted(later.items())]
