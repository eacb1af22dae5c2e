"""The typed options of one compilation, shared by `torch.compile(options=...)`, `plait.compile` and the command line.

    torch.compile(model, backend="plait", options={"verify": "structure", "passes": ["fold:max_elements=16"]})
    torch.compile(model, backend="plait", options={"fold.max_elements": 16, "disable_passes": ["share"]})

What is not given here comes from the environment or from `plait.config`, see there.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from .. import config
from ..errors import BadOption, BadPassOption, UnknownMode, UnknownOption, UnknownPassOption
from ..passes import registry
from ..passes.base import PASSES, Pass
from ..runtime import collectives

collectives.follow(lambda: config.current().collective_timeout_s)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

SPECIALISE = ("off", "measured")


def option(default: Any, *, doc: str) -> Any:
    """A field of `Options`: its default and one line of docs."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Options:
    """How to compile. `Options.of` reads them from a user's mapping; every field has one line of docs, see `describe`."""

    mode: str = option("default", doc="default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs")
    passes: tuple[Pass, ...] = option((), doc="passes besides the ground passes: objects, names, `name:option=value`")
    disable_passes: tuple[str, ...] = option((), doc="names of passes to leave out")
    pass_options: tuple[tuple[str, str, Any], ...] = option((), doc="options of passes, written `pass.option` as a key")
    keep_ops: tuple[str, ...] = option((), doc="ops not to decompose, such as `aten.hardswish`")
    verify: str = option("off", doc="off, structure (once, at the end) or each-pass (structure and numerics)")
    fallback: str = option("allow", doc="allow, or error: refuse to run ops in torch that no kernel was generated for")
    strict_kernels: bool = option(False, doc="refuse to run quantized layers in torch that no kernel was generated for")
    calibration: Any = field(
        default=(),
        metadata={"doc": "what passes such as `awq` look at: batches, or a file of them; none: the example inputs"},
    )
    freeze: bool = option(False, doc="inference only: treat parameters as constants; writes through `.data` are not seen")
    recompute: str = option(
        "torch", doc="what the backward computes again: torch (its min-cut), cost (plait's, by times) or none; tags win"
    )
    training: bool = option(False, doc="plait.compile: take training mode as it is; batch norm updates, dropout draws")
    bucket_mb: float = option(4.0, doc="plait.train_step: megabytes of gradients that ranks average in one collective")
    print_after: tuple[str, ...] = option((), doc="passes after which the graph is printed to stderr, or `all`")
    dump_dir: str | None = option(None, doc="folder for the graph after each pass, kernel sources and coverage")
    max_rel_err: float | None = option(
        None, doc="relative error that approximate passes may cause together; one that would overdraw is undone and named"
    )
    compile_budget_s: float | None = option(
        None,
        doc="seconds for generating and building, 0: at once; what takes longer goes on behind calls that run op by op, see "
        "`plait.wait`; none: wait for all of it",
    )
    specialise: str = option(
        "off",
        doc="off, or measured: compile static variants for sizes that come again and again, keep those that are faster",
    )
    profile: str | None = option(
        None,
        doc="file of measured nodes and collectives that overlap passes go by; what it lacks is measured and added; none: "
        "collectives are measured anew in each process",
    )
    bisect_limit: int | None = option(
        None, doc="how many choices (firings, generated nodes, fusions, reuses of memory) are allowed; none: all"
    )

    @staticmethod
    def of(
        options: Mapping[str, Any] | None = None, mode: str | None = None, passes: Iterable[Any] | None = None
    ) -> Options:
        """Options from a user's mapping, `mode` and `passes`, over the settings of `plait.config`.

        Raises UnknownOption with the nearest key, BadOption, UnknownMode, and what `passes.registry.make` raises.
        """
        settings = config.current()
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name in _HINTS}
        tuned: list[tuple[str, str, Any]] = []
        for key, value in (options or {}).items():
            owner, dot, name = key.partition(".")
            if dot and owner in PASSES:
                tuned.append(_pass_option(owner, name.replace("-", "_"), value))
            elif key not in _HINTS or key == "pass_options":
                raise _unknown(key)
            else:
                values[key] = _convert(key, value)
        if mode is not None:
            values["mode"] = mode
        if values.get("mode", "default") not in MODES:
            raise UnknownMode(mode=values["mode"], known=", ".join(MODES))
        values["passes"] = (*values.get("passes", ()), *_passes(passes or ()))
        values["pass_options"] = tuple(tuned)
        own = {p.name for p in values["passes"]}
        for name in {*values["disable_passes"]} - own | {*values["print_after"]} - own.union(_PRINTABLE):
            registry.find(name)
        _check_ranges(values)
        return Options(**values)

    @property
    def tune(self) -> bool:
        """True where kernels are to be chosen by measurement."""
        return self.mode.startswith("max-autotune")

    def apply(self, one: Pass) -> Pass:
        """A pass of a standard pipeline with the options that were given for it."""
        given = {option: value for name, option, value in self.pass_options if name == one.name}
        return registry.make(one.name, **{**one.options(), **given}) if given else one


_HINTS = get_type_hints(Options)
_PRINTABLE = ("all", "lower")  # what `print_after` takes besides the names of passes


def _check_ranges(values: Mapping[str, Any]) -> None:
    """Raise BadOption for a number that means nothing."""
    error, limit = values.get("max_rel_err"), values.get("bisect_limit")
    if error is not None and not (math.isfinite(error) and error >= 0):
        raise BadOption(name="max_rel_err", expected="a number from 0 on", value=error)
    budget = values.get("compile_budget_s")
    if budget is not None and not (math.isfinite(budget) and budget >= 0):
        raise BadOption(name="compile_budget_s", expected="a number from 0 on", value=budget)
    bucket = values.get("bucket_mb")
    if bucket is not None and not (math.isfinite(bucket) and bucket >= 0):
        raise BadOption(name="bucket_mb", expected="a number from 0 on", value=bucket)
    if limit is not None and limit < 0:
        raise BadOption(name="bisect_limit", expected="a number from 0 on", value=limit)


def describe() -> tuple[tuple[str, Any, str], ...]:
    """(name, default, one line of docs) of every option."""
    return tuple((f.name, f.default, f.metadata["doc"]) for f in dataclasses.fields(Options) if f.name != "pass_options")


def _unknown(key: str) -> UnknownOption:
    known = [name for name, _, _ in describe()]
    dotted = [f"{p}.{o.name}" for p, cls in PASSES.items() for o in registry.describe(cls)]
    near = difflib.get_close_matches(key, [*known, *dotted], n=1, cutoff=0.0)[0]
    return UnknownOption(name=key, near=near, known=", ".join(known))


def _pass_option(owner: str, name: str, value: Any) -> tuple[str, str, Any]:
    hints = get_type_hints(PASSES[owner])
    infos = {info.name: info for info in registry.describe(PASSES[owner])}
    if name not in infos:
        raise UnknownPassOption(name=owner, option=name, known=", ".join(infos) or "none")
    try:
        return owner, name, registry.convert(value, hints[name])
    except (ValueError, TypeError) as error:
        raise BadPassOption(name=owner, option=name, expected=infos[name].type, value=value) from error


def _passes(given: Any) -> tuple[Pass, ...]:
    """Passes from objects, names, `name:option=value` texts, or `{"name": ..., option: value}`."""
    found: list[Pass] = []
    for one in (given,) if isinstance(given, str | Pass | Mapping) else given:
        if isinstance(one, Pass):
            found.append(one)
        elif isinstance(one, str):
            found.append(registry.parse(one))
        elif isinstance(one, Mapping) and "name" in one:
            found.append(registry.make(one["name"], **{k: v for k, v in one.items() if k != "name"}))
        else:
            raise BadOption(name="passes", expected="passes, their names, or mappings with a name", value=one)
    return tuple(found)


RECOMPUTE = ("torch", "cost", "none")
_CHOICES = {"verify": config.VERIFY, "fallback": config.FALLBACK, "specialise": SPECIALISE, "recompute": RECOMPUTE}


def _convert(key: str, value: Any) -> Any:
    if key == "passes":
        return _passes(value)
    if key == "calibration":
        return value
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise BadOption(name=key, expected=" or ".join(_CHOICES[key]), value=value)
        return value
    kind = _HINTS[key]
    if isinstance(value, str) and kind == tuple[str, ...]:
        value = [w.strip() for w in value.split(",") if w.strip()]
    try:
        return registry.convert(value, kind)
    except (ValueError, TypeError) as error:
        raise BadOption(name=key, expected=registry.type_words(kind), value=value) from error
