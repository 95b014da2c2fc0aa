"""One option: its declaration (type, range, default, help text) and the check of a value against it.

A section is a frozen dataclass in the package that it configures. Its fields have the types int, float, bool, str,
Literal[...] and unions of these with None, or tuple[str, ...] for a flag that may be repeated. Ranges are those of
annotated_types: Annotated[int, Ge(1)], Annotated[float, Interval(ge=0, lt=1)]. The string literal under a field is its
help text. config/ lists the sections and reads the values.

An option that a resumed run may not change is declared with `fixed(default)`. In a section with FREE_ON_RESUME, all
other options are fixed. `path(default)` declares the path of a file or folder, in which a leading ~ stands for the home
directory; `escaped(default)` a text in which a flag may write a line break as \\n.

A module that declares a section imports the names of annotated_types under `if TYPE_CHECKING:` only, with
`from __future__ import annotations`; options_of resolves them. So model.py and the benches run without the package.
Reading order: Option, options_of, check_option and section_from, the parsing of type hints.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import operator
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

from errors import UserError

if TYPE_CHECKING:
    from annotated_types import Interval

T = TypeVar("T")
# Removed options and their defaults. Files of earlier versions may hold them: they are skipped when read.
RETIRED: dict[str, object] = {"zero_init": False, "token_noise": 0.0, "students": 0}
NEAR = 0.68  # least similarity of a suggested name: --stream is no misspelling of --threads (0.62)
MAX_NAME, MAX_PATH = 255, 4095  # bytes; of Linux, and about those of other systems
MAX_INT = 2**63  # integers are below this: they are stored in 64 bits, by torch and numpy too


def fixed(default: Any, **marks: bool) -> Any:
    """The default of an option that a resumed run may not change. marks: path or escaped, as below."""
    return dataclasses.field(default=default, metadata={"resume": "fixed", **marks})


def path(default: Any) -> Any:
    """The default of an option that is a path."""
    return dataclasses.field(default=default, metadata={"path": True})


def escaped(default: Any) -> Any:
    """The default of a text (or of texts) in which flags may use the escapes of `unescape`."""
    return dataclasses.field(default=default, metadata={"escaped": True})


@dataclasses.dataclass(frozen=True)
class Option:
    """One declared option.

    kinds: the types that it accepts, of int, float, bool and str. choices: the words of its Literal. none: None is
    allowed. interval: the bounds of a number. fixed: a resumed run may not change it. path: the path of a file or
    folder. escaped: a text in which a flag may use escapes. repeatable: a tuple of texts.
    """

    name: str
    section: type
    default: Any
    kinds: frozenset[type]
    choices: tuple[str, ...]
    none: bool
    interval: Interval
    fixed: bool
    path: bool = False
    escaped: bool = False
    repeatable: bool = False

    @property
    def help(self) -> str:
        """The text under the field, as one line. It is read from the source only when it is shown."""
        text = _field_docstrings(self.section).get(self.name)
        assert text, f"{self.section.__name__}.{self.name} has no help text under it"
        return text

    @property
    def is_switch(self) -> bool:
        """Whether the name alone, as a flag, means true."""
        return bool in self.kinds

    def as_flags(self, value: Any) -> list[str]:
        """The flags that give the option this value."""
        if self.repeatable:
            return [f"--{self.name}={self._as_text(one)}" for one in value] or [f"--{self.name}=none"]
        return [f"--{self.name}={self._as_text(value)}"]

    def _as_text(self, value: Any) -> str:
        text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        if self.escaped:
            for char, escape in (("\\", "\\\\"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
                text = text.replace(char, escape)
        return text

    def parse(self, text: str) -> Any:
        """Parses and checks the text of a flag. Raises ValueError with what was expected."""
        word = text.lower()
        if self.repeatable:
            return () if word == "none" else (self._text(unescape(text) if self.escaped else text),)
        if text in self.choices:
            return text
        if self.none and word == "none":
            return None
        if str in self.kinds:
            return self.check(unescape(text) if self.escaped else text)
        if bool in self.kinds and word in ("true", "false"):
            return word == "true"
        for number in (int, float):
            try:
                return self.check(number(text))
            except ValueError:
                continue
        return self._refuse(text)

    def check(self, value: object) -> Any:
        """A Python value in the option's own type: 1 is accepted as a float and 1e3 as an int, True as neither.

        Raises ValueError with what was expected.
        """
        if value is None and self.none:
            return None
        if self.repeatable and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            return tuple(map(self._text, value))
        if isinstance(value, str) and (value in self.choices or str in self.kinds):
            return self._text(value)
        if isinstance(value, bool) and bool in self.kinds:
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and self._in_range(value):
            if int in self.kinds and abs(value) < MAX_INT and value == int(value):  # inf and nan are not below it
                return int(value)
            if float in self.kinds and abs(value) <= sys.float_info.max:
                return float(value)
        return self._refuse(value)

    def _text(self, text: str) -> str:
        """A text, of a path with ~ replaced. Raises ValueError where no file or none of our files can hold it."""
        if self.path:
            return expand_home(text)
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError("expected text, and this holds NUL, or a lone surrogate (a byte that is not UTF-8)")
        return text

    def _refuse(self, value: object) -> NoReturn:
        kinds = {int: f"a whole number {self.limits()}", float: f"a number {self.limits()}", str: "text"}
        if self.repeatable:
            raise ValueError("expected a list of texts")
        *others, last = [words.rstrip() for kind, words in kinds.items() if kind in self.kinds] + self._words()
        expected = f"expected {', '.join(others) + ' or ' if others else ''}{last}"
        if self.interval.lt is self.interval.le is None and _is_huge(value):
            is_int = int in self.kinds
            expected += ", and below 2**63: the 64 bits of an integer" if is_int else ", and below 1.8e308"
        raise ValueError(expected + did_you_mean(str(value), self.choices))

    def _words(self) -> list[str]:
        return ["true", "false"] * (bool in self.kinds) + list(self.choices) + ["none"] * self.none

    def usage(self) -> str:
        """What may follow the `=`, as shown by --help: INT|auto."""
        if self.repeatable:
            return "TEXT"
        kinds = {int: "INT", float: "FLOAT", str: "TEXT"}
        return "|".join([word for kind, word in kinds.items() if kind in self.kinds] + self._words())

    def limits(self) -> str:
        """The range in words: ">= 1" where one end is open, else "with 0 <= x < 1"."""
        bounds = self.interval
        low, above = (bounds.gt, ">") if bounds.ge is None else (bounds.ge, ">=")
        high, below = (bounds.lt, "<") if bounds.le is None else (bounds.le, "<=")
        low, high = _bound(low), _bound(high)
        if low and high:
            return f"with {low} {above.replace('>', '<')} x {below} {high}"
        return f"{above} {low}" if low else f"{below} {high}" if high else ""

    def _in_range(self, x: float) -> bool:
        comparisons = ("ge", operator.ge), ("gt", operator.gt), ("le", operator.le), ("lt", operator.lt)
        bounds = [(compare, getattr(self.interval, name)) for name, compare in comparisons]
        return all(bound is None or compare(x, bound) for compare, bound in bounds)


def options_of(section: type, derived: bool = False) -> Iterator[Option]:
    """The options of a section, in order; those of a section that it inherits from keep that one as their section.
    Derived fields are not options; `derived` includes them.

    Raises AssertionError on an incomplete declaration.
    """
    import annotated_types
    from annotated_types import Ge, Gt, Interval, Le, Lt

    hints = typing.get_type_hints(section, localns=vars(annotated_types), include_extras=True)
    free: set[str] | None = getattr(section, "FREE_ON_RESUME", None)  # all other options of the section are fixed
    for field in dataclasses.fields(section):
        where = f"{section.__name__}.{field.name}"
        assert field.default is not dataclasses.MISSING, f"{where} has no default"
        if field.metadata.get("derived") and not derived:
            continue
        parts = list(_parts(hints[field.name]))
        ranges = [part for part in parts if isinstance(part, Ge | Gt | Le | Lt | Interval)]
        kinds = [part for part in parts if part in (int, float, bool, str)]
        choices = [part for part in parts if isinstance(part, str)]
        none = any(part in (None, types.NoneType) for part in parts)
        repeatable = hints[field.name] == tuple[str, ...]
        assert repeatable or len(ranges) + len(kinds + choices) + none == len(parts), (
            f"{where}: no type for an option: {hints[field.name]}"
        )
        option = Option(
            option_name(field),
            next(owner for owner in section.__mro__ if field.name in inspect.get_annotations(owner)),
            field.default,
            kinds=frozenset(kinds),
            choices=tuple(choices),
            none=none,
            interval=Interval(**dataclasses.asdict(ranges[0])) if ranges else Interval(),
            fixed=field.metadata.get("resume") == "fixed" or (free is not None and field.name not in free),
            path=field.metadata.get("path", False),
            escaped=field.metadata.get("escaped", False),
            repeatable=repeatable,
        )
        assert option.check(option.default) == option.default, f"{where}: wrong default"
        yield option


def option_names(section: type) -> list[str]:
    """The names of a section's options: its fields, without derived ones."""
    return [option_name(field) for field in dataclasses.fields(section) if not field.metadata.get("derived")]


def option_name(field: dataclasses.Field[Any]) -> str:
    """The name of the option that a field declares: without the _ of a field that is a word of Python (try_)."""
    return field.name.removesuffix("_")


def build_section(section: type[T], values: Mapping[str, Any]) -> T:
    """The section of values by option name; missing ones get their defaults, others are ignored. Raises ValueError."""
    names = {option_name(field): field.name for field in dataclasses.fields(typing.cast(Any, section))}
    return section(**{names[name]: value for name, value in values.items() if name in names})


def check_option(options: Mapping[str, Option], name: str, value: object) -> Any:
    """A Python value in the type of the option `name`. Raises UserError if it does not fit."""
    try:
        if name not in options:
            raise ValueError(no_such_option(name, options))
        return options[name].check(value)
    except ValueError as error:
        raise UserError(f"{name} = {show(repr(value))}: {error}") from None


def section_from(section: type[T], values: Mapping[str, Any]) -> T:
    """The section of stored values, such as a checkpoint's model/config.json.

    Missing options get their defaults, retired ones are skipped. Raises ValueError on unknown names, wrong types and
    values out of range.
    """
    known, values = {option.name: option for option in options_of(section, derived=True)}, without_retired(values)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"unknown options {unknown}; this version of Sprout knows {sorted(known)}")
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = known[name].check(value)
        except ValueError as error:
            raise ValueError(f"{name}={show(repr(value))}: {error}") from None
    return build_section(section, checked)


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values without those of retired options."""
    return {name: value for name, value in values.items() if name not in RETIRED}


def _parts(hint: Any) -> Iterator[Any]:
    """The parts of a type: plain types, None, the words of a Literal, the metadata of an Annotated."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from args
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            yield from _parts(arg)
    elif origin is Literal:
        yield from args
    else:
        yield hint


@cache
def _field_docstrings(section: type) -> dict[str, str]:
    """The string literal under each field, as one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id.removesuffix("_")] = " ".join(ast.literal_eval(below.value).split())
    return found


def no_such_option(name: str, names: Iterable[str], flag: str = "") -> str:
    """The message for an unknown option: that it was removed, or the nearest of `names`."""
    if name in RETIRED:
        return f"this option was removed; {'see --teachers' if name == 'students' else 'leave it out'}"
    return f"no such option{did_you_mean(name, names, flag)}"


def did_you_mean(name: str, names: Iterable[str], flag: str = "") -> str:
    name, names = name.replace("-", "_").lower(), list(names)
    parts = [known for known in names if name in known.split("_")]  # --vocab, --minutes
    near = parts if len(parts) == 1 else difflib.get_close_matches(name, names, 1, cutoff=NEAR)
    return f"; did you mean {flag}{near[0]}?" if near else ""


def show(value: object) -> str:
    """A value as typed after `=`, for --help and messages; cut to 60 characters."""
    if isinstance(value, tuple):
        return " and ".join(map(show, value)) or "none"
    text = str(value)
    if value is None or isinstance(value, bool):
        text = text.lower()
    elif isinstance(value, float):
        text = text.replace("e-0", "e-")
    elif isinstance(value, int) and abs(value) >= 100_000:
        text = f"{value:_}"
    if not text or not text.isprintable() or text != text.strip():
        text = repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def expand_home(text: str) -> str:
    """A path with ~ or ~user at its start replaced; shells do this only at the start of a word. Raises ValueError, also
    where no file can have that name."""
    check_path(text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(text):
        raise ValueError(f"there is no home directory of that name; for a folder named {text[:30]} write ./{text[:30]}")
    return expanded


def check_path(text: str) -> None:
    """Raises ValueError where no file can have that path."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("expected a path, and this holds a lone surrogate, which is no character") from None
    if b"\0" in data:
        raise ValueError("expected a path, and this holds a NUL character")
    longest = max(map(len, data.replace(b"\\", b"/").split(b"/")))
    if longest > MAX_NAME or len(data) > MAX_PATH:
        found = f"a name of {longest:,} bytes" if longest > MAX_NAME else f"{len(data):,} bytes"
        allowed = f"names of at most {MAX_NAME} bytes and {MAX_PATH:,} in all"
        raise ValueError(f"expected a path, with {allowed}; found {found}")


def _is_huge(value: object) -> bool:
    """Whether a value, perhaps the text of one, is a number from 2**63 on."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return float(value) >= MAX_INT
    except (ValueError, OverflowError):
        return isinstance(value, int)


def _bound(number: Any) -> str:
    """A bound of a range as text: 2**63 for the limit of integers; "" for none."""
    if number is None:
        return ""
    return "2**63" if number == MAX_INT else show(number)


def unescape(text: str) -> str:
    r"""Replaces \n, \r, \t and \\ in a command-line text with the characters that they stand for."""
    known = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: known[match[1]], text)
