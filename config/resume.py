"""The options of a resumed run (stored ones, overridden by flags) and of a run that starts from another's weights."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import config
from common.option import without_retired
from errors import UserError


def resumed_options(asked: config.Options, stored: Mapping[str, Any]) -> config.Options:
    """Merges the options of the command line (`asked`) with those of the checkpoint's state (`stored`), by name.

    A flag for a fixed option must equal the stored value; a changed free option is added to the result's `notes`.
    Raises UserError naming every fixed option that differs, with both values.
    """
    resume, stored = asked.flat()["resume"], without_retired(stored)
    fixed = config.fixed_names()
    changed, refused = {}, []
    if asked.presets:
        refused.append(f"{asked.presets[0]}: a resumed run keeps its options; presets are for new runs")
    for name, value in asked.flat().items():
        if asked.origin[name] != "flag" or name == "resume" or value == stored.get(name):
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
    merged = config.replace(asked, **{**stored, **changed, "resume": resume, "run": resume})
    changed.pop("eval_only", None)  # does not change the run
    merged.notes.extend(
        f"changed on resume: {name}={value} (was {stored.get(name)})" for name, value in changed.items()
    )
    return merged


def with_model_options(asked: config.Options, model_options: Mapping[str, Any]) -> config.Options:
    """`asked` with the model options of --init_from, which override presets; dropout stays free.

    Raises UserError on a flag that differs from them.
    """
    source = asked.flat()["init_from"]
    taken, refused = {}, []
    for name in ("tokenizer", "vocab_size", "split_pattern"):
        if asked.origin[name] == "flag":
            refused.append(
                f"--{name}={asked.flat()[name]}: the weights of --init_from={source} have their own tokenizer; "
                "leave the flag out"
            )
    for name, value in model_options.items():
        if name not in asked.origin or name == "dropout":
            continue
        if asked.origin[name] == "flag" and asked.flat()[name] != value:
            refused.append(
                f"--{name}={asked.flat()[name]}: the weights of --init_from={source} have {name}={value}; "
                "leave the flag out"
            )
        taken[name] = value
    if refused:
        raise UserError("\n".join(refused))
    return config.replace(asked, **taken)
