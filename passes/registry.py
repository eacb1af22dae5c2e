"""Passes by name: option parsing and documentation, all derived from the dataclass that a pass is."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import BadPassOption, MissingPassOption, PassNotFound, UnknownPass, UnknownPassOption
from .base import PASSES, Pass

#: Where a class is imported from: `package.module:Class`.
PLACE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_<][\w.<>]*)")
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


@dataclass(frozen=True)
class OptionInfo:
    """One option of a pass: name, type in words, default (`MISSING` where it must be given), one line of docs."""

    name: str
    type: str
    default: Any
    doc: str

    @property
    def required(self) -> bool:
        """True where there is no default."""
        return self.default is MISSING


def find(name: str) -> type[Pass]:
    """The pass class of that name. Raises `UnknownPass` with near names."""
    if name not in PASSES:
        near = difflib.get_close_matches(name, PASSES, n=3, cutoff=0.4) or sorted(PASSES)[:3]
        raise UnknownPass(name=name, near=", ".join(near) or "none")
    return PASSES[name]


def imported(path: str) -> type[Pass]:
    """The pass class at `package.module:Class`; the current folder is searched too, as for the model on a command line.
    Raises PassNotFound."""
    match = PLACE.fullmatch(path)
    if match is None:
        raise PassNotFound(path=path, why="it is no place of a class, such as package.module:Class")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(match[1])
    except Exception as error:  # a module may raise anything while it is imported
        raise PassNotFound(path=path, why=f"{type(error).__name__}: {error}") from error
    for name in match[2].split("."):
        if not hasattr(found, name):
            inside = "it was defined inside a function" if "<locals>" in path else f"{match[1]} has no {match[2]}"
            raise PassNotFound(path=path, why=inside)
        found = getattr(found, name)
    if not isinstance(found, type) or not issubclass(found, Pass):
        raise PassNotFound(path=path, why="it is no pass")
    return found


def summary(cls: type[Pass]) -> str:
    """First line of the pass's docstring."""
    return (inspect.getdoc(cls) or "").split("\n")[0]


def describe(cls: type[Pass]) -> tuple[OptionInfo, ...]:
    """Options of a pass, in the order of declaration."""
    hints = get_type_hints(cls)
    return tuple(
        OptionInfo(f.name, type_words(hints[f.name]), _default(f), f.metadata.get("doc", ""))
        for f in dataclasses.fields(cls)
    )


def make(name: str, **options: Any) -> Pass:
    """A pass from its name and options; values may be typed or text, option names may use dashes.

    Raises `UnknownPass`, `UnknownPassOption`, `BadPassOption`, `MissingPassOption`.
    """
    return _made(find(name), name, options)


def _made(cls: type[Pass], name: str, options: Mapping[str, Any]) -> Pass:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for given, value in options.items():
        key = given.replace("-", "_")
        if key not in fields:
            raise UnknownPassOption(name=name, option=given, known=", ".join(fields) or "none")
        try:
            values[key] = convert(value, hints[key])
        except (ValueError, TypeError) as error:
            raise BadPassOption(name=name, option=key, expected=type_words(hints[key]), value=value) from error
    for key, f in fields.items():
        if key not in values and _default(f) is MISSING:
            raise MissingPassOption(name=name, option=key, expected=type_words(hints[key]), doc=f.metadata.get("doc", ""))
    return cls(**values)


def parse(text: str) -> Pass:
    """A pass as a command line writes it: `fold`, `fold:max_elements=16`, `p:layers=a+b,fast` (`+` joins a list, a bare
    name is true). One of your own goes by its place, `package.module:Class` or `package.module:Class:option=value`. Raises
    what `make` raises, and PassNotFound."""
    name, _, rest = text.partition(":")
    cls: type[Pass] | None = None
    place, _, options_of_it = rest.partition(":")
    if name.strip() not in PASSES and PLACE.fullmatch(f"{name}:{place}"):
        cls, rest = imported(f"{name}:{place}"), options_of_it
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, eq, value = part.partition("=")
        options[key.strip()] = value.strip() if eq else True
    return make(name.strip(), **options) if cls is None else _made(cls, cls.name, options)


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def type_words(kind: Any) -> str:
    """A type as users read it: `int`, `"a" or "b"`, `int or none`, `list of str`."""
    if kind is type(None):
        return "none"
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(a) for a in args)
    if origin is tuple:
        return f"list of {type_words(args[0])}"
    return getattr(kind, "__name__", str(kind))


def convert(value: Any, kind: Any) -> Any:
    """A value or its text as `kind`. Raises ValueError or TypeError where it does not fit."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        for a in args:
            if value == a or str(value) == str(a):
                return a
        raise ValueError(value)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is tuple:
        parts = value.split("+") if isinstance(value, str) else tuple(value)
        return tuple(convert(p, args[0]) for p in parts)
    if kind is bool:
        return _convert_bool(value)
    if kind in (int, float) and isinstance(value, bool):
        raise TypeError(value)
    if kind is int and isinstance(value, float):
        raise TypeError(value)
    if kind in (int, float):
        return kind(value)
    if kind is Any or isinstance(value, kind):
        return value
    raise TypeError(value)


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in members:
            return None
        raise ValueError(value)
    for member in members:
        if member is type(None):
            continue
        try:
            return convert(value, member)
        except (ValueError, TypeError):
            continue
    raise ValueError(value)


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(value)
