"""The options of a resumed run (stored ones, overridden by flags) and of a run that starts from another's weights."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import config
from common.option import without_retired
from errors import UserError


def resumed_options(options: config.Options, stored: Mapping[str, Any]) -> config.Options:
    """Merges the options of the command line (`options`) with those of the checkpoint's state (`stored`), by name.

    A flag for a fixed option must equal the stored value; a changed free option is added to the result's `notes`.
    Raises UserError naming every fixed option that differs, with both values.
    """
    resume, stored = options.flat()["resume"], without_retired(stored)
    fixed = config.fixed_names()
    changed, refused = {}, []
    if options.presets:
        refused.append(f"{options.presets[0]}: a resumed run keeps its options; presets are for new runs")
    for name, value in options.flat().items():
        if options.origin[name] != "flag" or name == "resume" or value == stored.get(name):
            continue
        if name == "budget_minutes":
            refused.append(f"--budget_minutes={value}: a resumed run keeps its plan; set its length with --max_steps=N")
        elif name == "run":
            refused.append(f"--run={value}: a resumed run stays in its directory {resume}; leave out --run")
        elif name in fixed:
            refused.append(
                f"--{name}={value}: the run was started with {name}={stored.get(name)}, "
                "which a resumed run cannot change"
            )
        else:
            changed[name] = value
    if refused:
        advice = f"start a new run instead, from these weights if needed: --init_from={shlex.quote(resume)}"
        raise UserError("\n".join([*refused, advice]))
    merged = config.replace(options, **{**stored, **changed, "resume": resume, "run": resume})
    changed.pop("eval_only", None)  # does not change the run
    merged.notes.extend(
        f"changed on resume: {name}={value} (was {stored.get(name)})" for name, value in changed.items()
    )
    return merged


def with_model_options(options: config.Options, model_options: Mapping[str, Any]) -> config.Options:
    """`options` with the model options of --init_from, which override presets; dropout may differ.

    Raises UserError on a flag that differs from them.
    """
    source = options.flat()["init_from"]
    values, refused = {}, []
    for name in ("tokenizer", "vocab_size", "split_pattern"):
        if options.origin[name] == "flag":
            refused.append(
                f"--{name}={options.flat()[name]}: the weights of --init_from={source} have their own tokenizer; "
                "leave the flag out"
            )
    for name, value in model_options.items():
        if name not in options.origin or name == "dropout":
            continue
        if options.origin[name] == "flag" and options.flat()[name] != value:
            refused.append(
                f"--{name}={options.flat()[name]}: the weights of --init_from={source} have {name}={value}; "
                "leave the flag out"
            )
        values[name] = value
    if refused:
        raise UserError("\n".join(refused))
    return config.replace(options, **values)
