"""Which options a resumed run has: those stored in its checkpoint, with the flags that may change laid over them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import config
from common.option import without_retired
from errors import UserError


def resumed_options(asked: config.Options, stored: Mapping[str, Any]) -> config.Options:
    """`asked` is what the command line said beside --resume; `stored` the options in the checkpoint's state, by name.

    Flags for `fixed` options must repeat the stored value; a changed free option is noted in the result's `notes`. Raises
    UserError naming every fixed option that differs, with both values.
    """
    resume, stored = asked.flat()["resume"], without_retired(stored)
    fixed = config.fixed_names()
    changed, refused = {}, []
    if asked.presets:
        refused.append(f"{asked.presets[0]}: a resumed run has its own options; presets go with new runs")
    for name, value in asked.flat().items():
        if asked.origin[name] != "flag" or name == "resume" or value == stored.get(name):
            continue
        if name == "budget_minutes":
            refused.append(f"--budget_minutes={value}: a resumed run keeps its plan; say how long by --max_steps=N")
        elif name == "run":
            refused.append(f"--run={value}: a resumed run stays in its directory {resume}; leave --run out")
        elif name in fixed:
            refused.append(
                f"--{name}={value}: the run was started with {name}={stored.get(name)}, which a resumed run cannot change"
            )
        else:
            changed[name] = value
    if refused:
        raise UserError(
            "\n".join([*refused, f"start a new run, from these weights if you like: --init_from={shlex.quote(resume)}"])
        )
    merged = config.replace(asked, **{**stored, **changed, "resume": resume, "run": resume})
    changed.pop("eval_only", None)  # it changes nothing in the run
    merged.notes.extend(
        f"changed on resume: {name}={value} (was {stored.get(name)})" for name, value in changed.items()
    )
    return merged


def with_model_options(asked: config.Options, model_options: Mapping[str, Any]) -> config.Options:
    """`asked` with the model of --init_from. Presets give way to it; a flag that contradicts it is refused; dropout is free."""
    source = asked.flat()["init_from"]
    taken, refused = {}, []
    for name in ("tokenizer", "vocab_size", "split_pattern"):
        if asked.origin[name] == "flag":
            refused.append(
                f"--{name}={asked.flat()[name]}: the weights of --init_from={source} bring their tokenizer; leave the flag out"
            )
    for name, value in model_options.items():
        if name not in asked.origin or name == "dropout":
            continue
        if asked.origin[name] == "flag" and asked.flat()[name] != value:
            refused.append(
                f"--{name}={asked.flat()[name]}: the weights of --init_from={source} have {name}={value}; leave the flag out"
            )
        taken[name] = value
    if refused:
        raise UserError("\n".join(refused))
    return config.replace(asked, **taken)
