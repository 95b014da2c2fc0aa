"""The files that options are read from: presets (`name = value` lines) and the config.json of a run.

Nothing in them is executed. Knows no particular option, but the names of those that belong to one run alone.
"""

import ast
import json
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.option import RETIRED, show, without_retired
from common.signature import PATHS, is_own, is_plain_name
from errors import quote
from files import MAX_CONFIG, DamagedFile, read_json, read_text
from prepare_data import SOURCES, PrepareOptions
from training.options import TRACKERS

MAX_PRESET = 2**16  # bytes
RUN_SPECIFIC = ("run", "resume", "teachers", *TRACKERS)  # not taken over from a saved config.json
# Nor these where they were chosen automatically: they suit that machine. What a plan has chosen is taken over.
MACHINE_SPECIFIC = ("device", "dtype", "threads", "attention", "micro_batch_size", "compile")


class Setting(NamedTuple):
    where: str  # prefix of an error message: the flag, or file, line, name and value
    name: str
    value: Any


def read_preset(path: Path, shown: str, problems: list[str]) -> list[Setting]:
    """The `name = value` lines of a preset, which is never executed. Appends a line to `problems` for anything else."""
    try:
        body = ast.parse(read_text(path.resolve(), MAX_PRESET)).body
    except SyntaxError as error:
        problems.append(f"{shown}:{error.lineno or 1}: expected name = value ({error.msg})")
        return []
    except DamagedFile as error:
        problems.append(f"{shown}: cannot be read as a preset: {error.problem}")
        return []
    except (ValueError, RecursionError, MemoryError) as error:
        problems.append(f"{shown}: cannot be read as a preset: {error}")
        return []
    settings = []
    for node in body:
        where = f"{shown}:{node.lineno}"
        if (
            node is body[0]
            and isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            continue  # the docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            problems.append(f"{where}: expected name = value; a preset holds nothing else")
            continue
        name = node.targets[0].id
        try:
            value = _evaluate(node.value)
            settings.append(Setting(f"{where}: {name} = {show(repr(value))}", name, value))
        except (ValueError, ArithmeticError, RecursionError) as error:
            problems.append(f"{where}: {name}: {error}")
    return settings


_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _evaluate(node: ast.expr) -> Any:
    """A literal, a list of literals, or arithmetic on numbers below 2**63.

    Raises ValueError or ArithmeticError on anything else.
    """
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool | int | float | str)):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_evaluate(element) for element in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(_evaluate(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _number(_evaluate(node.left)), _number(_evaluate(node.right))
        if isinstance(node.op, ast.Pow) and abs(right) > 63:
            raise ValueError("a power above 63 is too large")
        return _number(_ARITHMETIC[type(node.op)](left, right))
    raise ValueError("expected a literal, or arithmetic on numbers with + - * / // % **")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        raise ValueError("arithmetic takes numbers below 2**63")
    return value


def read_saved(
    path: Path, shown: str, problems: list[str], notes: list[str], to_be_named: dict[str, list[str]]
) -> list[Setting]:
    """The settings of a run's config.json; those that belong to that run alone are left out and named in `notes`.
    to_be_named gets the paths of a run that this user has not made here, as flags, by option."""
    try:
        saved = read_json(path.resolve(), MAX_CONFIG)
    except DamagedFile as error:
        problems.append(f"{shown}: {error.problem}")
        return []
    if saved.get("format") != "sprout-config" or saved.get("version") != 1:
        problems.append(
            f'{shown}: not the config.json of a run: expected an object with "format": "sprout-config" and "version": 1'
        )
        return []
    options, auto = saved.get("options"), saved.get("auto")
    if not isinstance(options, dict) or not isinstance(auto, dict):
        problems.append(f'{shown}: damaged: expected "options" and "auto" to be objects')
        return []
    notes += [
        f"{shown}: {name} = {show(json.dumps(options[name]))} left out: this version has no such option"
        for name, default in RETIRED.items()
        if options.get(name, default) != default
    ]
    if not is_own(saved):
        foreign = {name: options[name] for name in PATHS if name in options and not _is_safe(name, options[name])}
        for name, value in foreign.items():
            values = value if isinstance(value, list) else [value]
            to_be_named[name] = [f"--{name}={quote(str(one))}" for one in values]
        options = {name: value for name, value in options.items() if name not in (*foreign, "follow_links")}
    options = without_retired(options)
    left_out = [name for name in options if name in RUN_SPECIFIC or (name in auto and name in MACHINE_SPECIFIC)]
    if named := [
        name for name in left_out if options[name] is not None and (options[name] or name in MACHINE_SPECIFIC)
    ]:
        notes.append(
            f"{shown}: not taken over, because they belong to that run or were chosen automatically: {', '.join(named)}"
        )
    return [
        Setting(f"{shown}: {name} = {show(json.dumps(value))}", name, value)
        for name, value in options.items()
        if name not in left_out
    ]


def _is_safe(name: str, value: object) -> bool:
    """Whether a path in a foreign config.json leads to nothing of this user that is not in the data folder."""
    if name == "data_dir":
        return value == PrepareOptions.data_dir
    if not value or name not in ("data", "tokenizer"):
        return not value
    is_known = name == "tokenizer" or value in SOURCES or (Path(PrepareOptions.data_dir) / str(value)).is_dir()
    return is_plain_name(value) and is_known and not os.path.lexists(str(value))
