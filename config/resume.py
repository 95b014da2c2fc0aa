"""The options of a resumed run (stored ones, overridden by flags) and of a run that starts from another's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import config
from checkpoint import Checkpoint
from common.option import option_names, show, without_retired
from common.options import HardwareOptions
from common.signature import SERVICES, is_plain_name, own_texts
from errors import UserError, quote
from model import GPTConfig
from model_folder import TOKENIZER as TOKENIZER_FILE
from parallel.processes import command
from prepare_data import PrepareOptions
from prepare_data.resolve import is_safe_name
from state_file import StateFile, wrong_entry
from training.budget import LENGTHENED
from training.options import TRACKERS

# Options of preparation that may differ where a resumed run's text is named again, as long as its tokens are the same.
WITH_DATA = {"data_dir", "encoding", "exclude", "follow_links"}
TOKENIZER = ("tokenizer", "vocab_size", "split_pattern")
OF_ONE_PROCESS = {"run", "resume", "from", "plan", "gpus", "gpu", "verbose", "eval_only"}  # these say nothing of a run
# Options that have an effect with some values of another one alone.
READ_WITH: dict[str, tuple[str, tuple[object, ...]]] = {
    "decay_steps": ("schedule", ("wsd",)), "min_learning_rate": ("schedule", ("cosine", "linear", "wsd")),
    "muon_learning_rate": ("optimizer", ("muon",)), "muon_momentum": ("optimizer", ("muon",)),
    "muon_steps": ("optimizer", ("muon",)), "momentum": ("optimizer", ("sgd",)),
    "beta1": ("optimizer", ("adamw", "muon")), "beta2": ("optimizer", ("adamw", "muon")),
    "adam_eps": ("optimizer", ("adamw", "muon")), "trackio_project": ("trackio", (True,)),
    "wandb_project": ("wandb", ("online", "offline")),
}  # fmt: skip
ON_A_CPU = {"cuda_graphs": "it is for CUDA", "deterministic": "a CPU always is"}
ON_COMPLETE = {"verbose", "eval_only", "data", "teacher", "teachers", *WITH_DATA}  # flags that a complete run accepts


def asked(options: config.Options) -> dict[str, Any]:
    """What a command asks of a run, as JSON values: the options that its flags and presets give."""
    given = {name for name, origin in options.origin.items() if origin not in ("default", "plan")} - OF_ONE_PROCESS
    return {name: list(value) if isinstance(value := options.values[name], tuple) else value for name in sorted(given)}


def from_json(options: config.Options, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint or run.json; those that an earlier version did not have get their defaults."""
    defaults = {name: options.loader.options[name].default for name in options.values}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in without_retired(stored).items()}
    return defaults | values


def same_place(one: str, other: str) -> bool:
    """Whether two paths name the same directory."""
    return os.path.realpath(one) == os.path.realpath(other)


def is_over(values: Mapping[str, Any], stored: Mapping[str, Any], step: int, progress: Mapping[str, Any]) -> bool:
    """Whether a run that is resumed with these options has nothing left to train. stored: its own; progress: of its
    checkpoint's state."""
    if progress.get("finished_step") != step or (values["budget_minutes"] and not stored.get("budget_minutes")):
        return False
    if values["max_steps"] is not None and step >= values["max_steps"]:
        return True
    patience, stale = values["patience"], progress.get("stale", 0)
    return patience is not None and values["max_steps"] == stored["max_steps"] and stale >= patience


def refuse_without_effect(
    options: config.Options, stored: Mapping[str, Any], step: int, progress: Mapping[str, Any], follows: bool
) -> None:
    """Raises UserError on flags that change nothing in a run that is resumed at `step`, with the reasons. options: as
    merged by resumed_options; follows: whether another run comes after this one, which takes flags over."""
    stored, values = from_json(options, stored), options.values
    changed = [name for name, origin in options.origin.items() if origin == "flag" and values[name] != stored[name]]
    changed = [name for name in changed if name not in ("run", "resume")]
    found = []
    if is_over(values, stored, step, progress) and not follows:
        found = [f"--{name}={show(values[name])}" for name in changed if name not in ON_COMPLETE]
        if found:
            complete = f"the run is complete at step {step}, and trains no further"
            raise UserError(f"{' and '.join(found)}: {complete}; {longer(values, step)}")
        return
    for name in changed:
        flag = f"--{name}={show(values[name])}"
        other, needed = READ_WITH.get(name, ("", ()))
        if other and values[other] not in needed:
            found.append(f"{flag} has no effect with {other}={show(values[other])}; leave it out")
        elif name in ON_A_CPU and values["device"] == "cpu":
            found.append(f"{flag} has no effect on a CPU: {ON_A_CPU[name]}; leave it out")
        elif name == "warmup_steps" and step >= max(values[name], stored[name]) and not has_warmup_later(values):
            found.append(f"{flag}: the run is at step {step}, after this warm-up and its own of {stored[name]} steps")
    if found:
        raise UserError("\n".join(found))


def longer(values: Mapping[str, Any], step: int) -> str:
    """What trains a complete run further, or a longer one."""
    max_steps, resume = values["max_steps"], f"--resume={quote(values['resume'])}"
    if max_steps is not None and step < max_steps:
        return f"to train on although its val loss has stopped falling: {resume} --patience=none"
    more = f"{resume} --max_steps={2 * max(1, step)}"
    decayed = "" if values["schedule"] in LENGTHENED else " (its learning rate has decayed: README, --resume)"
    return f"to train longer: {more}{decayed}"


def has_warmup_later(values: Mapping[str, Any]) -> bool:
    """Whether the learning rates after the warm-up depend on its length: the curve of a decay begins there."""
    return values["schedule"] in ("cosine", "linear", "inverse_sqrt")


def without_foreign_parts(
    resumed: Checkpoint, options: config.Options, argv: Sequence[str]
) -> tuple[Checkpoint, list[str]]:
    """A checkpoint that this user's Sprout has not written here, with the paths and services of the command line and
    none of its own, and notes on what is left out. Raises UserError, with the whole command, where a path is needed
    that the command does not name."""
    stored, given = resumed.state["options"], {name for name, origin in options.origin.items() if origin == "flag"}
    run, recorded = resumed.path.parents[1], resumed.state["dataset"]
    text = next(iter(own_texts(resumed.state)), {"name": ""})
    data_dir = options.values["data_dir"]
    place, data = Path(data_dir) / (text["name"] or "-"), stored.get("data")
    missing = []
    if "data" not in given and not (place / "dataset.json").is_file():
        if not (is_safe_name(data) and recorded.get("path")):
            missing.append(f"--data={quote(str(recorded.get('path')))}")
    else:
        data = text["name"] or data
    if "teacher" not in given:
        missing += [f"--teacher={quote(str(path))}" for path in stored.get("teacher") or ()]
    if missing:
        flags = [arg for arg in argv if not arg.startswith("--resume=")]
        raise UserError(
            f"{run} was not made by you on this machine (or the key of Sprout in your data folder was not kept), so it"
            " does not choose which files are read. If they are the right ones, or with their paths here:\n"
            + " ".join([command(), f"--resume={quote(str(run))}", *map(quote, flags), *missing])
        )
    notes, changed = [], {**stored, "data": data, "data_dir": data_dir, "init_from": None, "teachers": 0}
    changed["follow_links"] = options.values["follow_links"]
    if not is_plain_name(stored.get("tokenizer")) or Path(stored["tokenizer"]).exists():
        changed["tokenizer"] = str(resumed.model.path / TOKENIZER_FILE)
    for name, value in SERVICES.items():
        if name not in given and stored.get(name, value) != value:
            changed[name] = value
            if not name.endswith("_project"):
                flag = f"--{name}={show(stored[name])}"
                notes.append(f"note: {name} is left off, since you did not make this run here: {flag} turns it on")
    if resumed.state.get("chain") is not None:
        again = f"{command()} {quote(str(run / 'config.json'))} --teacher={quote(str(run))} --seed=2"
        notes.append(f"note: the runs that follow this one are not begun; a model that learns from it: {again}")
    state = {name: value for name, value in resumed.state.items() if name != "chain"}
    state |= {"options": changed, "dataset": {**recorded, "path": str(place)}}
    return replace(resumed, state=StateFile(resumed.state.path, state)), notes


def resumed_options(options: config.Options, stored: Mapping[str, Any]) -> config.Options:
    """Merges the options of the command line (`options`) with those of the checkpoint's state (`stored`), by name.

    A flag for a fixed option must equal the stored value, and so must one of preparation, because the run's text is
    prepared already; a changed free option is added to the result's `notes`. Raises UserError naming every flag that
    would have no effect or make another run, with both values.
    """
    resume = options.flat()["resume"]
    stored = from_json(options, stored)
    fixed, preparation = config.fixed_names(), option_names(PrepareOptions)
    changed, refused, advice = {}, [], f"--init_from={quote(resume)} starts a new run from these weights"
    if options.presets:
        refused.append(f"{options.presets[0]}: a resumed run keeps its options; presets are for new runs")
    for name, value in options.flat().items():
        if options.origin[name] != "flag" or name in ("resume", "from") or value == stored.get(name):
            continue
        flag, was = f"--{name}={show(value)}", f"{name}={show(stored.get(name))}"
        if name == "run" and same_place(value, resume):
            continue
        if name == "run":
            refused.append(f"{flag}: a resumed run stays in its directory {resume}; leave out --run")
        elif name in preparation and name in WITH_DATA:
            if options.origin["data"] == "flag":
                changed[name] = value
            else:
                refused.append(f"{flag}: the run's text was prepared with {was}; leave the flag out, or add --data")
        elif name in preparation:
            refused.append(f"{flag}: the run's text was prepared with {was}; leave the flag out")
            advice = f"for a text that is prepared in another way, start a new run: leave out --resume={quote(resume)}"
        elif name in fixed:
            refused.append(f"{flag}: the run was started with {was}, which a resumed run cannot change")
        else:
            changed[name] = value
    if refused:
        raise UserError("\n".join([*refused, advice]))
    merged = config.replace(options, **{**stored, **changed, "resume": resume, "from": None, "run": resume})
    if changed and not changed.get("eval_only"):
        values = [f"{name}={show(value)} (was {show(stored.get(name))})" for name, value in changed.items()]
        merged.notes.append(f"changed on resume: {', '.join(values)}")
    return merged


def check_stored(options: config.Options, state: StateFile) -> None:
    """Checks names, types, ranges and rules of the options in a state, but not whether other programs that they ask for
    are there. Raises WrongEntry."""
    stored = {name: tuple(v) if isinstance(v, list) else v for name, v in without_retired(state["options"]).items()}
    if "max_steps" not in stored:
        raise wrong_entry(state.path, "options.max_steps", "is missing")
    try:
        for name in stored.keys() & TRACKERS:
            options.loader.check(name, stored.pop(name))
        config.replace(options, **{**stored, "resume": options.values["resume"]})
    except UserError as error:
        problem = str(error).partition("\n`")[0]  # without the line that names --help
        raise wrong_entry(state.path, "options", f"cannot be used: {problem}") from None


def note_unused_flags(options: config.Options) -> config.Options:
    """With --eval_only, adds a note that names the flags which concern training alone."""
    used = {"resume", "init_from", "data", "eval_only", "micro_batch_size", *option_names(HardwareOptions)}
    used |= {*option_names(PrepareOptions), *option_names(GPTConfig)} - {"dropout"}
    unused = [f"--{name}" for name, origin in options.origin.items() if origin == "flag" and name not in used]
    if options.values["eval_only"] and unused:
        options.notes.append(f"note: {', '.join(unused)}: no effect with --eval_only")
    return options


def with_model_options(
    options: config.Options, source: str, model_options: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> config.Options:
    """`options` with the model options and the tokenizer of --init_from, which override presets; dropout may differ,
    and the context be shorter.
    source: the flag and its value. With model_options of the vocabulary alone the tokenizer is all that is taken.

    Raises UserError on a flag that differs from them.
    """
    own = {"tokenizer": tokenizer.get("name")}
    if own["tokenizer"] == "bpe":  # the options of other tokenizers have no meaning
        own |= {"vocab_size": model_options.get("vocab_size"), "split_pattern": tokenizer.get("pattern")}
    values = own | {name: model_options[name] for name in option_names(GPTConfig) if name in model_options}
    values.pop("dropout", None)
    if options.origin["block_size"] == "flag" and options.flat()["block_size"] < values.get("block_size", 0):
        values.pop("block_size")  # a shorter one is cut from the weights'
    refused = []
    for name in dict.fromkeys([*TOKENIZER, *values]):
        value = options.flat()[name]
        if options.origin[name] == "flag" and (name not in values or value != values[name]):
            has = "their own tokenizer" if name in TOKENIZER else f"{name}={show(values[name])}"
            refused.append(f"--{name}={show(value)}: the weights of {source} have {has}; leave the flag out")
    if refused:
        raise UserError("\n".join(refused))
    return config.replace(options, **values)
