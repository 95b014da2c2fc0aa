"""From the command line to checked options: presets, `--key=value`, saved config.json files, `--help`.

Knows no particular option: common/option.py defines what an option is, config/__init__.py lists the sections.
Reading order: the files of values (read_preset, read_saved), Options (what a script receives), Loader.
"""

import ast
import dataclasses
import itertools
import json
import operator
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common.option import RETIRED, Option, check_option, did_you_mean, no_such_option, options_of, show, without_retired
from errors import UserError

T = TypeVar("T")
RUN_SPECIFIC = ("run", "resume", "wandb")  # not taken over from a saved config.json
NOT_PRESETS = ("__init__", "loader", "resume", "start")  # modules in the folder of the presets
HELP_WIDTH = 116
NO_BREAK = "\u00a0"  # a space at which textwrap does not wrap


# ---- Files of values -------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    where: str  # prefix of an error message: the flag, or file, line, name and value
    name: str
    value: Any


def read_preset(path: Path, shown: str, problems: list[str]) -> list[Setting]:
    """The `name = value` lines of a preset, which is never executed. Appends a line to `problems` for anything else."""
    try:
        body = ast.parse(path.read_bytes()).body
    except SyntaxError as error:
        problems.append(f"{shown}:{error.lineno or 1}: expected name = value ({error.msg})")
        return []
    except (OSError, ValueError, RecursionError, MemoryError) as error:
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


def read_saved(path: Path, shown: str, problems: list[str], notes: list[str]) -> list[Setting]:
    """The settings of a run's config.json; those that belong to that run alone are left out and named in `notes`."""
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{shown}: not valid JSON: {error}")
        return []
    if not isinstance(saved, dict) or saved.get("format") != "sprout-config" or saved.get("version") != 1:
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
    options = without_retired(options)
    left_out = [name for name in options if name in RUN_SPECIFIC or name in auto]
    if named := [name for name in left_out if options[name] is not None]:
        notes.append(
            f"{shown}: not taken over, because they belong to that run or were chosen automatically: {', '.join(named)}"
        )
    return [
        Setting(f"{shown}: {name} = {show(json.dumps(value))}", name, value)
        for name, value in options.items()
        if name not in left_out
    ]


# ---- What a script receives ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked options of one script.

    origin: option name → "default", "preset NAME" or "flag". presets: names of the presets, in order. notes: lines to
    print for the user.
    """

    script: str
    sections: dict[type, Any]
    origin: dict[str, str]
    presets: list[str]
    notes: list[str]
    loader: "Loader" = dataclasses.field(repr=False)

    def section(self, cls: type[T]) -> T:
        return self.sections[cls]

    def flat(self) -> dict[str, Any]:
        """Option name → value, section by section."""
        return {
            name: getattr(self.sections[option.section], name) for name, option in self.loader.own(self.script).items()
        }


def replace(options: Options, /, **values: object) -> Options:
    """The options with some values replaced, which are checked; `origin` is unchanged. Raises UserError."""
    checked = {name: options.loader.check(name, value) for name, value in values.items()}
    sections = options.loader.build(options.script, options.flat() | checked)
    return dataclasses.replace(options, sections=sections, notes=list(options.notes))


def dump(options: Options, auto: Mapping[str, str]) -> dict[str, Any]:
    """The content of a run's config.json. auto: option name → reason, for values that `auto` resolved to."""
    assert auto.keys() <= options.flat().keys(), f"unknown options: {auto.keys() - options.flat().keys()}"
    return {"format": "sprout-config", "version": 1, "options": options.flat(), "auto": dict(auto)}


# ---- From the command line to Options --------------------------------------------------------------------------------


class Loader:
    """Loads the options of a project.

    sections: title in --help → section. scripts: script → its sections. usage: script → the first lines of --help.
    root/config/*.py are the presets.
    """

    def __init__(
        self, sections: Mapping[str, type], scripts: Mapping[str, Sequence[type]], usage: Mapping[str, str], root: Path
    ):
        self.sections, self.scripts, self.usage, self.root = sections, scripts, usage, root
        self.options: dict[str, Option] = {}
        for section in sections.values():
            for option in options_of(section):
                assert option.name not in self.options, (
                    f"{option.name} is declared twice, the second time in {section.__name__}"
                )
                self.options[option.name] = option

    def own(self, script: str) -> dict[str, Option]:
        """The options of one script, in order."""
        return {
            name: option
            for cls in self.scripts[script]
            for name, option in self.options.items()
            if option.section is cls
        }

    def presets(self) -> dict[str, Path]:
        """Name → file."""
        return {path.stem: path for path in sorted((self.root / "config").glob("*.py")) if path.stem not in NOT_PRESETS}

    def check(self, name: str, value: object) -> Any:
        """A Python value in the type of the option `name`. Raises UserError if it does not fit."""
        return check_option(self.options, name, value)

    def _option(self, name: str) -> Option:
        if name not in self.options:
            raise ValueError(no_such_option(name, self.options))
        return self.options[name]

    def load(self, script: str, argv: Sequence[str], *, default_preset: str | None = None) -> Options:
        """Reads presets and flags from left to right; the last one wins, and repeatable flags add up.

        Raises one UserError with all problems. --help prints and exits with 0.
        """
        own, args = self.own(script), list(argv)
        values, origin = {name: option.default for name, option in own.items()}, dict.fromkeys(own, "default")
        presets, notes, problems, refused = list[str](), list[str](), list[str](), set[str]()
        wants_help = "--help" in args or "-h" in args
        if wants_help:  # shows the values of the presets that precede it
            args = [
                arg
                for arg in itertools.takewhile(lambda arg: arg not in ("--help", "-h"), args)
                if not arg.startswith("-")
            ]
        elif default_preset and all(arg.startswith("-") for arg in args):
            args.insert(0, default_preset)
        while args:
            arg, known_problems = args.pop(0), len(problems)
            is_flag = arg.startswith("-")
            if is_flag:
                settings, source = self._flag(script, arg, args, problems), "flag"
            else:
                settings = self._preset(script, arg, problems, notes)
                presets.append(Path(arg).resolve().parent.name if arg.endswith(".json") else Path(arg).stem)
                source = f"preset {presets[-1]}"
                if len(problems) > known_problems:
                    refused |= own.keys()
            for where, name, value in settings:
                try:
                    value = self._option(name).parse(value) if is_flag else self._option(name).check(value)
                except ValueError as error:
                    problems.append(f"{where}: {error}")
                    refused.add(name)
                if name in own:
                    added = (
                        is_flag
                        and own[name].repeatable
                        and origin[name] == "flag"
                        and name not in refused
                        and value != ()
                    )
                    values[name], origin[name] = values[name] + value if added else value, source
        if wants_help and not problems:
            print(self.help(script, values, presets))
            raise SystemExit(0)
        return Options(script, self.build(script, values, problems, refused), origin, presets, notes, self)

    def build(
        self, script: str, values: Mapping[str, Any], problems: Sequence[str] = (), refused: Iterable[str] = ()
    ) -> dict[type, Any]:
        """The sections of a script.

        Raises UserError with the given problems and those that the sections report; sections with a refused value are
        not built.
        """
        sections, found = {}, list(problems)
        for cls in self.scripts[script]:
            fields = {name: value for name, value in values.items() if self.options[name].section is cls}
            if fields.keys().isdisjoint(refused):
                try:
                    sections[cls] = cls(**fields)
                except ValueError as error:  # GPTConfig raises, because it is also built without this loader
                    found += str(error).split("; ")
                else:
                    found += sections[cls].problems() if hasattr(cls, "problems") else []
        if found:
            head = [f"{len(found)} problems with the options"] if len(found) > 1 else []
            raise UserError("\n  ".join(head + found) + f"\n`{_command(script)} --help` lists the options")
        return sections

    def _flag(self, script: str, arg: str, rest: list[str], problems: list[str]) -> list[Setting]:
        """The setting of one flag; appends to `problems` if it is wrong. `rest`: the arguments after it."""
        name, equals, text = arg.removeprefix("--").partition("=")
        own = self.own(script)
        is_switch = name in own and bool in own[name].kinds and arg.startswith("--")
        if (
            is_switch and not equals and not (rest and rest[0].lower() in ("true", "false"))
        ):  # a switch alone means true
            return [Setting(show(arg), name, "true")]
        if not equals and rest and not rest[0].startswith("-") and not self._find(rest[0]):
            text = rest.pop(0)  # `--name value`: refused below, with the form to write
        if name in own and equals:
            return [Setting(show(arg), name, text)]
        if name in own:
            why = f"write --{name}={show(text) if text else own[name].usage()}"
        elif scripts := [other for other in self.scripts if name in self.own(other)]:
            why = f"belongs to {' and '.join(scripts)}, not to {script}"
        else:
            near = own if did_you_mean(name, own) else self.options
            why = no_such_option(name, near, "--")
        problems.append(f"{show(arg)}: {why}")
        return []

    def _find(self, arg: str) -> Path | None:
        if not arg.endswith((".py", ".json")):
            return self.presets().get(arg)
        return next((base / arg for base in (Path(), self.root) if os.path.isfile(base / arg)), None)

    def _preset(self, script: str, arg: str, problems: list[str], notes: list[str]) -> list[Setting]:
        """The settings of a preset or saved config; appends to `problems` if there is none of that name."""
        path, own = self._find(arg), self.own(script)
        if path and path.suffix == ".json":
            return read_saved(path, arg, problems, notes)
        if path:
            return read_preset(path, arg if arg.endswith(".py") else f"config/{arg}.py", problems)
        if "=" in arg and arg.partition("=")[0].isidentifier():
            why = f"write --{show(arg)}"
        elif os.path.exists(arg):
            flags = ("resume", "run") if os.path.exists(os.path.join(arg, "config.json")) else ("data", "input")
            why = "not a preset" + next((f"; write --{flag}={show(arg)}" for flag in flags if flag in own), "")
        else:
            names = self.presets()
            why = "no such preset" + (did_you_mean(Path(arg).stem, names) or f"; there are {', '.join(names)}")
        problems.append(f"{show(arg)}: {why}")
        return []

    # ---- --help

    def help(self, script: str, values: Mapping[str, Any], presets: Sequence[str] = ()) -> str:
        """The text of --help: usage, presets, and every option with its value and meaning."""
        own = self.own(script)
        left = min(max(len(f"--{name}={option.usage()}") for name, option in own.items()), 28)
        middle = min(max(len(show(value)) for value in values.values()), 13)
        lines = [self.usage[script].strip(), "", "presets"]
        for name, path in self.presets().items():
            lines += _columns([name], [left], _first_line(path))
        lines += ["", f"options, with {'the values of ' + ' and '.join(presets) if presets else 'their defaults'}"]
        for title, cls in self.sections.items():
            if cls in self.scripts[script]:
                lines += ["", title]
                for name, option in own.items():
                    if option.section is cls:
                        limits = option.limits().removeprefix("with ").replace(" ", NO_BREAK)
                        meaning = f"{option.help} ({limits})" if limits else option.help
                        lines += _columns([f"--{name}={option.usage()}", show(values[name])], [left, middle], meaning)
        return "\n".join(lines)


def _columns(cells: Sequence[str], widths: Sequence[int], text: str) -> Iterator[str]:
    """Lines with cells of these widths, then the wrapped text. A cell that is too wide ends its line."""
    line, start = "  ", 2
    for cell, width in zip(cells, widths, strict=True):
        line, start = line.ljust(start) + cell, start + width + 2
        if len(cell) > width:
            yield line
            line = ""
    wrapped = textwrap.wrap(
        text, HELP_WIDTH, initial_indent=line.ljust(start), subsequent_indent=" " * start, break_on_hyphens=False
    )
    yield from (part.replace(NO_BREAK, " ") for part in wrapped or [line])


def _first_line(preset: Path) -> str:
    try:
        return (ast.get_docstring(ast.parse(preset.read_bytes())) or "").partition("\n")[0]
    except (SyntaxError, ValueError):
        return "(unreadable)"


def _command(script: str) -> str:
    return f"python {script}" if script.endswith(".py") else f"python -m {script}"
