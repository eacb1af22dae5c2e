"""What happens when a compilation fails: the failure is written down as a bundle, and its message says how to go on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ... import config
from ...codegen.cache import default_root
from ...errors import PlaitError
from .failure import Failure, of_error

if TYPE_CHECKING:
    from ...ir import Graph
    from ...passes.base import CapturePoint, Step
    from ..options import Options
    from ..pipelines import Session
    from .subject import Level, Subject

log = logging.getLogger(__name__)

E = TypeVar("E", bound=PlaitError)


def reported(
    error: E,
    session: Session,
    graph: Graph,
    point: CapturePoint,
    inputs: Sequence[Any] | None,
    *,
    step: Step | None = None,
) -> E:
    """The error, its message extended by the bundle that was written and the commands to go on.

    The bundle holds `graph`, as it was before the pass that failed, and its inputs, by default random ones.
    """
    if not session.reports:
        return error
    from .interpret import random_inputs
    from .subject import Subject

    level: Level = "split" if point == "any" else point
    given = random_inputs(graph) if inputs is None else inputs
    subject = Subject(graph, tuple(given), session.options, level, session.name)
    return with_bundle(error, subject, of_error(error), session.options, step)


def with_bundle(error: E, subject: Subject, failure: Failure, options: Options, step: Step | None = None) -> E:
    """The error, its message extended by the bundle of a failing subject and the commands to go on. A bundle that cannot be
    written is logged: the failure itself matters more."""
    from .bundle import write_bundle
    from .stored import importable

    path = bundle_path(subject, failure, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bundle(path, subject, failure, step=step)
    except (OSError, PlaitError) as why:
        log.warning("the failure of %s is not written down: %s", subject.name, why)
        return error
    away = [p.name for p in subject.options.passes if not importable(p)]
    if away:
        move = f"move pass {', '.join(away)} out of the script or function it is defined in, into a module"
        error.add(f"written down in {path}; to replay it, {move}")
    else:
        error.add("to go on:", f"  plait replay {path}", f"  plait reduce {path}")
    return error


def bundle_path(subject: Subject, failure: Failure, options: Options) -> Path:
    """Where a failure's bundle goes: the same failure to the same file."""
    folder = options.dump_dir or config.current().debug_dir
    digest = hashlib.sha256(f"{subject.graph}{failure}{options}".encode()).hexdigest()
    name = f"{subject.name}_{subject.graph.name}_{failure.what.replace(' ', '')}_{digest[:8]}.zip"
    return (Path(folder) if folder else default_root() / "failures") / name
