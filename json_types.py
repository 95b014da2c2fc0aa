"""JSON values from outside, compared with types: what a file of another program or version may hold instead.

`conform` is the whole interface. Imports nothing of the project. pydantic's strict mode does much of the same; its
import takes a tenth of a second, for which every sample would wait, and its messages are not for users.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NoReturn, NotRequired, Required

MAX_INT = 2**63  # of 64 bits
Argument = Annotated[str, re.compile(r"[^\0]*")]  # a path, or another text that the system does not take with a NUL


class Mismatch(ValueError):
    """entry: where in the value, such as history[3].step; "" for all of it."""

    def __init__(self, problem: str, entry: str = "") -> None:
        super().__init__(f"{entry or 'it'} {problem}")
        self.problem, self.entry = problem, entry


def conform(hint: Any, value: Any, hints: Mapping[str, Any] | None = None) -> Any:
    """A JSON value as its type: the value itself, but an instance where that is a dataclass. Raises Mismatch.

    The types are int (from 0 to 2**63), float (any finite number), str, bool, None, lists, dictionaries by text,
    TypedDicts (further keys are ignored), dataclasses (further keys are an error), unions, and with Annotated a range
    of annotated_types or a pattern for the whole text. Any: numbers are finite, also inside.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _finite(value)
    if origin is Annotated:
        conform(args[0], value)
        return value if all(_fits(rule, value) for rule in args[1:]) else _refuse(hint, value)
    if origin in (typing.Union, types.UnionType):
        return _any_of(hint, args, value)
    if origin is list and isinstance(value, list):
        return [_inside(args[0], entry, f"[{number}]") for number, entry in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _inside(args[1], entry, _key(name)) for name, entry in value.items()}
    if isinstance(value, dict) and (typing.is_typeddict(hint) or dataclasses.is_dataclass(hint)):
        return _record(hint, value, hints or {})
    if hint is int and type(value) is int and 0 <= value < MAX_INT:
        return value
    if hint is float and type(value) in (int, float) and abs(value) < (MAX_INT if type(value) is int else math.inf):
        return value
    if (hint in (str, bool) and type(value) is hint) or (hint in (None, types.NoneType) and value is None):
        return value
    return _refuse(hint, value)


def _any_of(hint: Any, args: tuple[Any, ...], value: Any) -> Any:
    """Of the members of a union, the problem of the one of this kind is told: a list's entry, not the list."""
    problems = []
    for one in args:
        try:
            return conform(one, value)
        except Mismatch as error:
            problems.append(error)
    if inside := [error for error in problems if error.entry]:
        raise inside[0]
    return _refuse(hint, value)


def _record(hint: Any, value: dict[str, Any], hints: Mapping[str, Any]) -> Any:
    """A TypedDict or a dataclass."""
    known = {**{name: _unmarked(its) for name, its in _hints(hint).items()}, **hints}
    if typing.is_typeddict(hint):
        required = _required_keys(hint)
    else:
        unset = dataclasses.MISSING
        fields = [field for field in dataclasses.fields(hint) if field.default is field.default_factory is unset]
        required = frozenset(field.name for field in fields)
        if unknown := sorted(value.keys() - known.keys()):
            raise Mismatch("is not known to this version", _key(unknown[0])[1:])
    for name in sorted(required - value.keys()):
        raise Mismatch("is missing", name)
    found = {name: _inside(known[name], entry, _key(name)) for name, entry in value.items() if name in known}
    return value if typing.is_typeddict(hint) else hint(**found)


def _inside(hint: Any, value: Any, place: str) -> Any:
    try:
        return conform(hint, value)
    except Mismatch as error:
        dot = "." if error.entry[:1] not in ("", "[", ".") else ""
        raise Mismatch(error.problem, (place + dot + error.entry).removeprefix(".")) from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    """The annotations of a class. The names of annotated_types may be known to type checkers alone."""
    import annotated_types

    return typing.get_type_hints(cls, localns=vars(annotated_types), include_extras=True)


def _unmarked(hint: Any) -> Any:
    """Without the mark of a TypedDict's key."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) in (Required, NotRequired) else hint


@cache
def _required_keys(cls: Any) -> frozenset[str]:
    """Of a TypedDict. Where annotations are texts, __required_keys__ does not know the marks."""
    marks = {name: typing.get_origin(hint) for name, hint in _hints(cls).items()}
    required = {name for name in cls.__required_keys__ if marks[name] is not NotRequired}
    return frozenset(required | {name for name, mark in marks.items() if mark is Required})


def _fits(rule: Any, value: Any) -> bool:
    if isinstance(rule, re.Pattern):
        return rule.fullmatch(value) is not None
    bounds = {name: getattr(rule, name, None) for name in ("ge", "gt", "le", "lt")}
    return (
        (bounds["ge"] is None or value >= bounds["ge"])
        and (bounds["gt"] is None or value > bounds["gt"])
        and (bounds["le"] is None or value <= bounds["le"])
        and (bounds["lt"] is None or value < bounds["lt"])
    )


def _finite(value: Any) -> Any:
    """The value, where all numbers in it are finite: JSON has 1e999, which is read as infinity."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise Mismatch(f"holds {one!r}, expected finite numbers")
        left += one if isinstance(one, list) else one.values() if isinstance(one, dict) else ()
    return value


def _refuse(hint: Any, value: Any) -> NoReturn:
    raise Mismatch(f"is {_shown(value)}, expected {' or '.join(dict.fromkeys(_words(hint)))}")


def _words(hint: Any) -> Iterator[str]:
    """What a type is called in a message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for one in args:
            yield from _words(one)
    elif origin is Annotated:
        (word,) = _words(args[0])
        limits = [f"{sign} {limit}" for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
                  for rule in args[1:] if (limit := getattr(rule, name, None)) is not None]  # fmt: skip
        if any(isinstance(rule, re.Pattern) for rule in args[1:]):
            limits.append("without a NUL")
        yield " ".join([word.removesuffix(" >= 0") if limits else word, *limits])
    else:
        words: dict[Any, str] = {int: "an integer >= 0", float: "a finite number", str: "text", bool: "true or false"}
        words |= {None: "null", types.NoneType: "null", list: "a list"}
        yield words.get(origin or hint, "an object")


def _key(name: str) -> str:
    return f".{name}" if name.isascii() and name.isidentifier() else f"[{_shown(name)}]"


def _shown(value: Any) -> str:
    """A foreign value in a message, at most 60 characters of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; very deep nesting
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
