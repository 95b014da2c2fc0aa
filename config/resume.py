"""The options of a resumed run (stored ones, overridden by flags) and of a run that starts from another's weights."""

from __future__ import annotations

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
from training.options import TRACKERS

# Options of preparation that may differ where a resumed run's text is named again, as long as its tokens are the same.
WITH_DATA = {"data_dir", "encoding", "exclude", "follow_links"}
TOKENIZER = ("tokenizer", "vocab_size", "split_pattern")


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
    stored = {name: tuple(v) if isinstance(v, list) else v for name, v in without_retired(stored).items()}  # from JSON
    fixed, preparation = config.fixed_names(), option_names(PrepareOptions)
    changed, refused, advice = {}, [], f"--init_from={quote(resume)} starts a new run from these weights"
    if options.presets:
        refused.append(f"{options.presets[0]}: a resumed run keeps its options; presets are for new runs")
    for name, value in options.flat().items():
        if options.origin[name] != "flag" or name == "resume" or value == stored.get(name):
            continue
        flag, was = f"--{name}={show(value)}", f"{name}={show(stored.get(name))}"
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
    merged = config.replace(options, **{**stored, **changed, "resume": resume, "run": resume})
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
