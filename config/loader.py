"""From the command line to checked options: presets, `--key=value`, saved config.json files, `--help`.

Knows no particular option: common/option.py defines what an option is, config/__init__.py lists the sections.
value_files.py reads presets, advice.py says what to write instead of a wrong argument, help_text.py writes --help.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.option import (
    RETIRED,
    Option,
    build_section,
    check_option,
    no_such_option,
    option_names,
    options_of,
    show,
)
from config.advice import DASHES, flag_problem, quotes_problem, word_problem
from config.help_text import help_text
from config.hints import hint
from config.value_files import Setting, read_preset, read_saved
from errors import UserError, quote

T = TypeVar("T")
# modules in the folder of the presets
NOT_PRESETS = ("__init__", "advice", "chain", "cluster", "help_text", "hints", "loader", "planning", "restart",
               "resume", "start", "trying", "value_files")  # fmt: skip
HELP = ("--help", "-h", "-help")


# ---- What a script receives ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked options of one script.

    values: option name → value, section by section. origin: option name → "default", "preset NAME", "flag" or "plan".
    presets: names of the presets, in order. notes: lines to print for the user.
    """

    script: str
    values: dict[str, Any]
    origin: dict[str, str]
    presets: list[str]
    notes: list[str]
    loader: "Loader" = dataclasses.field(repr=False)

    def section(self, cls: type[T]) -> T:
        return build_section(cls, {name: self.values[name] for name in option_names(cls)})

    def flat(self) -> dict[str, Any]:
        return dict(self.values)


def replace(options: Options, /, **values: object) -> Options:
    """The options with some values replaced, which are checked; `origin` is unchanged. Raises UserError."""
    checked = {name: options.loader.check(name, value) for name, value in values.items()}
    changed = options.values | checked
    options.loader.check_rules(options.script, changed)
    return dataclasses.replace(options, values=changed, notes=list(options.notes))


def dump(options: Options, auto: Mapping[str, str]) -> dict[str, Any]:
    """The content of a run's config.json. auto: option name → reason, for values that `auto` resolved to."""
    assert auto.keys() <= options.flat().keys(), f"unknown options: {auto.keys() - options.flat().keys()}"
    return {"format": "sprout-config", "version": 1, "options": options.flat(), "auto": dict(auto)}


def _unnamed(
    script: str, argv: Sequence[str], origin: Mapping[str, str], to_be_named: Mapping[str, list[str]]
) -> list[str]:
    """The problem of paths that a foreign config.json gives and the command line does not, with the command that does.
    A text that is named needs no data folder."""
    if script != "train.py":
        return []
    given = {name for name, source in origin.items() if source == "flag"}
    given |= {"data_dir"} if "data" in given else set()
    flags = [flag for name, flags in to_be_named.items() if name not in given for flag in flags]
    if not flags:
        return []
    command = " ".join([_command(script), *map(quote, argv), *flags])
    return [
        "the saved options were not written by you on this machine (or the key of Sprout in your data folder was not"
        f" kept), so they do not choose which files are read. If they are the right ones: {command}"
    ]


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
                if option.section is not section:  # inherited from another section of the list
                    continue
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

    def _check_setting(self, script: str, setting: Setting, is_flag: bool) -> Any:
        """The value of a setting in its option's type. Raises ValueError."""
        if setting.name not in self.options:
            advice = None if setting.name in RETIRED else hint(script, setting.name, str(setting.value))
            advice = advice and advice.replace("write --", "write ")
            raise ValueError(f"no such option; {advice}" if advice else no_such_option(setting.name, self.options))
        option = self.options[setting.name]
        if not is_flag:
            return option.check(setting.value)
        if advice := quotes_problem(option, setting.value):
            raise ValueError(advice)
        return option.parse(setting.value)

    def load(
        self, script: str, argv: Sequence[str], *, default_preset: str | None = None,
        complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Options:  # fmt: skip
        """Reads presets and flags from left to right; the last one wins, and repeatable flags add up. complete: from
        the values that are given to those of other options, which then have the origin "plan".

        Raises one UserError with all problems. --help prints and exits with 0.
        """
        own, args = self.own(script), list(argv)
        values, origin = {name: option.default for name, option in own.items()}, dict.fromkeys(own, "default")
        presets, notes, problems, refused = list[str](), list[str](), list[str](), set[str]()
        to_be_named = dict[str, list[str]]()
        wants_help = args == ["help"] or not set(HELP).isdisjoint(args)
        if wants_help:  # shows the values of the presets that precede it
            words = itertools.takewhile(lambda arg: arg not in HELP and args != ["help"], args)
            args = [arg for arg in words if not is_flag(arg)]
        elif default_preset and not any(self._find(arg) for arg in args):
            args.insert(0, default_preset)
        while args:
            arg, known_problems = args.pop(0), len(problems)
            if is_flag(arg):
                settings, source = self._flag(script, arg, args, problems), "flag"
            elif path := self._find(arg):
                settings = self._preset(path, arg, problems, notes, to_be_named)
                presets.append(path.resolve().parent.name if path.suffix == ".json" else path.stem)
                source = f"preset {presets[-1]}"
                if len(problems) > known_problems:
                    refused |= own.keys()
            else:
                settings, source = [], ""
                problems.append(word_problem(script, arg, args, own, list(self.presets())))
                refused |= own.keys()
            for setting in settings:
                name, value = setting.name, setting.value
                try:
                    value = self._check_setting(script, setting, source == "flag")
                except ValueError as error:
                    problems.append(f"{setting.where}: {error}")
                    refused.add(name)
                if name in own:
                    repeated = own[name].repeatable and source == origin[name] == "flag"
                    added = repeated and name not in refused and value != ()
                    values[name], origin[name] = values[name] + value if added else value, source
        problems += _unnamed(script, argv, origin, to_be_named)
        if wants_help and not problems:
            print(self.help(script, values, presets))
            raise SystemExit(0)
        if complete and problems:
            refused |= own.keys()
        elif complete:
            chosen = complete({name: value for name, value in values.items() if origin[name] != "default"})
            values, origin = values | chosen, origin | dict.fromkeys(chosen, "plan")
        if values.get("resume") is not None:  # the rules wait for the run's own options
            refused |= {name for name in own if own[name].section is not own["resume"].section}
        self.check_rules(script, values, problems, refused)
        return Options(script, values, origin, presets, notes, self)

    def check_rules(
        self, script: str, values: Mapping[str, Any], problems: Sequence[str] = (), refused: Iterable[str] = ()
    ) -> None:
        """Checks the rules of each section, which concern several options; not those of a section with a refused value.

        Raises UserError with the given problems and those that the sections report.
        """
        found = list(problems)
        for cls in self.scripts[script]:
            fields = {name: value for name, value in values.items() if self.options[name].section is cls}
            if fields.keys().isdisjoint(refused):
                try:
                    section: Any = build_section(cls, fields)
                except ValueError as error:  # GPTConfig raises, because it is also built without this loader
                    found += str(error).split("; ")
                else:
                    found += section.problems() if hasattr(cls, "problems") else []
        if found:
            head = [f"{len(found)} problems with the options"] if len(found) > 1 else []
            raise UserError("\n  ".join(head + found) + f"\n`{_command(script)} --help` lists the options")

    def _flag(self, script: str, arg: str, rest: list[str], problems: list[str]) -> list[Setting]:
        """The setting of one flag; appends to `problems` if it is wrong. rest: the arguments after it."""
        own = self.own(script)
        name, equals, text = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and name in own:
            if equals and (text or not rest or self._is_argument(rest[0])):
                return [Setting(show(arg), name, text)]
            if not equals and own[name].is_switch and not (rest and rest[0].lower() in ("true", "false", "=")):
                return [Setting(show(arg), name, "true")]
        options = {script: own} | {other: self.own(other) for other in self.scripts}
        problems.append(flag_problem(script, arg, rest, options, self._find))
        return []

    def _is_argument(self, arg: str) -> bool:
        """Whether the argument is a flag or a preset, and not the value of the flag before it."""
        return is_flag(arg) or self._find(arg) is not None

    def has_preset(self, argv: Sequence[str], besides: str = "") -> bool:
        """Whether arguments name presets, others than `besides`."""
        return any(self._find(arg) for arg in argv if not is_flag(arg) and arg != besides)

    def _find(self, arg: str) -> Path | None:
        """The file of a preset or saved config that an argument names."""
        if not arg.endswith((".py", ".json")):
            return self.presets().get(arg)
        places = (Path(os.path.expanduser(arg)), self.root / arg)
        return next((place for place in places if place.is_file()), None)

    def _preset(
        self, path: Path, arg: str, problems: list[str], notes: list[str], to_be_named: dict[str, list[str]]
    ) -> list[Setting]:
        if path.suffix == ".json":
            return read_saved(path, arg, problems, notes, to_be_named)
        return read_preset(path, arg if arg.endswith(".py") else f"config/{arg}.py", problems)

    def help(self, script: str, values: Mapping[str, Any], presets: Sequence[str] = ()) -> str:
        """The text of --help."""
        own = self.own(script).values()
        sections = {
            title: [option for option in own if option.section is cls]
            for title, cls in self.sections.items()
            if cls in self.scripts[script]
        }
        return help_text(self.usage[script], self.presets(), sections, values, presets)


def is_flag(arg: str) -> bool:
    return arg[:1] in tuple(DASHES)


def _command(script: str) -> str:
    return f"python {script}" if script.endswith(".py") else f"python -m {script}"
