"""The front doors of debugging: `plait.debug`, `plait.bisect` and `plait.first_bad_node`, called like `plait.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...ir import Graph
from ..api import for_inference
from ..export import capture_model, name_of
from ..options import Options
from . import bisect as bisection
from . import first_bad
from .bisect import Culprit
from .first_bad import BadNode
from .stepper import Debugger
from .subject import Build, Subject


def debug(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
    passes: Iterable[Any] | None = None,
) -> Debugger:
    """Capture a model and stop before the first pass; see `Debugger` for how to go on.

    Takes what `plait.compile` takes, or a `Graph` with flat inputs (None: random ones). Raises what `plait.compile` raises
    before it runs passes.
    """
    chosen = Options.of(options, passes=passes)
    if isinstance(model, Graph):
        return Debugger(Subject.of(model, example_inputs, options=chosen))
    for_inference(chosen)
    exported = capture_model(model, example_inputs, dynamic_shapes, training=chosen.training)
    return Debugger(Subject.of_exported(exported, chosen, name_of(model)), exported)


def bisect(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
    passes: Iterable[Any] | None = None,
    check: Callable[[Build], bool] | None = None,
) -> Culprit:
    """The one choice of a compilation (a firing of a rule, a generated node, a fusion, a reuse of memory) that makes a model
    wrong on its example inputs, which are compared with float64; `check(build)` says True for good instead.

    Raises NothingToFind for a model that is right.
    """
    return bisection.bisect(_subject(model, example_inputs, dynamic_shapes, options, passes), check)


def first_bad_node(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
    passes: Iterable[Any] | None = None,
) -> BadNode:
    """The first node of a compiled model that gives something wrong although what it reads is right.

    Fusion and memory stay as they are shipped. Raises NothingToFind for a model that is right.
    """
    return first_bad.first_bad_node(_subject(model, example_inputs, dynamic_shapes, options, passes))


def _subject(model: Any, inputs: Any, shapes: Any, options: Mapping[str, Any] | None, passes: Any) -> Subject:
    return Subject.of(model, inputs, dynamic_shapes=shapes, options=Options.of(options, passes=passes))
