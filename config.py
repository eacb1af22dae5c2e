"""Settings that hold for the whole process, each documented, typed and with its environment variable.

Precedence: arguments of a call > `options` > environment `PLAIT_*` > what `configure` and `patch` set > the defaults here.

    plait.config.configure(verify="structure")          # for the process
    with plait.config.patch(disable_passes=("fold",)):  # for a block, in this thread or task
        ...
    plait.config.current().verify

`options` of `torch.compile` and `plait.compile` have the same names for what can be set per compilation.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .errors import BadSetting, UnknownSetting

Parse = Callable[[str], Any]


def _words(text: str) -> tuple[str, ...]:
    return tuple(w.strip() for w in text.split(",") if w.strip())


def _whole(text: str) -> int | None:
    return int(text) if text else None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e9:
        raise ValueError(text)
    return seconds


def _one_of(*allowed: str) -> Parse:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(text)
        return text

    return parse


def setting(default: Any, *, env: str, parse: Parse, expected: str, doc: str) -> Any:
    """A field of `Config`: its default, its environment variable, how text becomes a value, and one line of docs."""
    return field(default=default, metadata={"env": env, "parse": parse, "expected": expected, "doc": doc})


VERIFY = ("off", "structure", "each-pass")
FALLBACK = ("allow", "error")


@dataclass(frozen=True, slots=True)
class Config:
    """The settings; `describe` lists them with their environment variables."""

    verify: str = setting(
        "off", env="PLAIT_VERIFY", parse=_one_of(*VERIFY), expected=" or ".join(VERIFY),
        doc="check graphs: their structure once after the last pass, or structure and numerics after each pass",
    )  # fmt: skip
    fallback: str = setting(
        "allow", env="PLAIT_FALLBACK", parse=_one_of(*FALLBACK), expected=" or ".join(FALLBACK),
        doc="what happens to ops without a kernel: run by torch and listed in the coverage, or an error",
    )  # fmt: skip
    disable_passes: tuple[str, ...] = setting(
        (), env="PLAIT_DISABLE_PASSES", parse=_words, expected="names of passes, separated by commas",
        doc="passes that are left out of every pipeline",
    )  # fmt: skip
    print_after: tuple[str, ...] = setting(
        (), env="PLAIT_PRINT_AFTER", parse=_words, expected="names of passes or `all`, separated by commas",
        doc="passes after which the graph's text is printed to stderr",
    )  # fmt: skip
    dump_dir: str | None = setting(
        None, env="PLAIT_DUMP_DIR", parse=str, expected="a folder",
        doc="where the graph's text after each pass, the kernels' sources and the coverage are written",
    )  # fmt: skip
    debug_dir: str | None = setting(
        None, env="PLAIT_DEBUG_DIR", parse=str, expected="a folder",
        doc="where failures are written down as bundles, if dump_dir is not set; none: in the user's cache folder",
    )  # fmt: skip
    bisect_limit: int | None = setting(
        None, env="PLAIT_BISECT_LIMIT", parse=_whole, expected="a whole number",
        doc="how many choices are allowed in a compilation (firings, generated nodes, fusions, reuses of memory); none: all",
    )  # fmt: skip
    collective_timeout_s: float = setting(
        300.0, env="PLAIT_COLLECTIVE_TIMEOUT_S", parse=_seconds, expected="a number of seconds above 0",
        doc="how long a collective may wait for other ranks; artifacts that run without the compiler ask the variable alone",
    )  # fmt: skip
    cache_dir: str | None = setting(
        None, env="PLAIT_CACHE_DIR", parse=str, expected="a folder",
        doc="where built kernels and compiled graphs are kept; none: the user's cache folder",
    )  # fmt: skip


_FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_process: dict[str, Any] = {}
_scoped: ContextVar[Mapping[str, Any]] = ContextVar("plait_config")


def _checked(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes with lists as tuples. Raises UnknownSetting, BadSetting."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.0)[0]
            raise UnknownSetting(name=name, near=near, known=", ".join(_FIELDS))
        default, info = _FIELDS[name].default, _FIELDS[name].metadata
        if value != default:
            text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            try:
                value = info["parse"](text)
            except ValueError as error:
                raise BadSetting(name=name, expected=info["expected"], value=value) from error
        found[name] = value
    return found


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, f in _FIELDS.items():
        text = os.environ.get(f.metadata["env"])
        if text is None:
            continue
        try:
            found[name] = f.metadata["parse"](text)
        except ValueError as error:
            raise BadSetting(name=f.metadata["env"], expected=f.metadata["expected"], value=text) from error
    return found


def current() -> Config:
    """The settings that hold here and now. Raises BadSetting for an ill-formed environment variable."""
    return Config(**{**_process, **_scoped.get({}), **_environment()})


def configure(**changes: Any) -> None:
    """Change settings for the process. Raises UnknownSetting, BadSetting."""
    _process.update(_checked(changes))


@contextmanager
def patch(**changes: Any) -> Iterator[None]:
    """Change settings for a block, in this thread or task. Raises UnknownSetting, BadSetting."""
    token = _scoped.set({**_scoped.get({}), **_checked(changes)})
    try:
        yield
    finally:
        _scoped.reset(token)


def describe() -> tuple[tuple[str, str, Any, str], ...]:
    """(name, environment variable, default, one line of docs) of every setting."""
    return tuple((f.name, f.metadata["env"], f.default, f.metadata["doc"]) for f in _FIELDS.values())
