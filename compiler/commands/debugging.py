"""Commands that look into failures: which choice is to blame, what is left of the program, and what to send to others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..terminal import emit, progress, size
from .shared import choices_of_passes, common, inputs_of_source, options_of, writable

if TYPE_CHECKING:
    from ..debugging.bisect import Culprit
    from ..debugging.failure import Failure
    from ..debugging.subject import Subject
    from ..export import Exported

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Given:
    """What a command is given: a failing program, and its failure where a bundle names it."""

    subject: Subject
    failure: Failure | None = None
    exported: Exported | None = None

    def failing(self) -> Failure:
        """The failure, found out where it is not known. Raises NothingToFind."""
        from ...errors import NothingToFind
        from ..debugging.subject import failure_apart

        found = self.failure or failure_apart(self.subject)
        if found is None:
            raise NothingToFind(name=self.subject.name)
        return found


def source_or_bundle(command: F) -> F:
    """The argument SRC and the options of how to capture and compile it."""
    return click.argument("src", metavar="SRC|BUNDLE.zip")(inputs_of_source(choices_of_passes(command)))


def _load(src: str, **how: Any) -> _Given:
    """The program that SRC names, or that a bundle holds, which brings its inputs and options along."""
    from ..debugging.bundle import read_bundle
    from ..debugging.subject import Subject
    from ..source import load

    if src.endswith(".zip"):
        if any(how[name] for name in ("shapes", "dynamic", "passes", "disabled", "settings")) or how["seed"]:
            raise click.UsageError("a bundle brings its inputs and options along")
        bundle = read_bundle(src)
        return _Given(bundle.subject(), bundle.failure)
    from ..export import export, from_exported
    from ..options import Options

    source = load(src, how["shapes"], how["dynamic"], seed=how["seed"])
    options = Options.of(options_of(how["passes"], how["disabled"], how["settings"]))
    exported = from_exported(export(source.model, source.inputs, source.dynamic_shapes), training=options.training)
    inputs = tuple(exported.inputs or ())
    return _Given(Subject(exported.graph, inputs, replace(options, verify="off"), "forward", _name(src)), exported=exported)


def _name(src: str) -> str:
    return src.rpartition(":")[2].rpartition("/")[2].removesuffix(".pt2")


def _data(failure: Failure | None) -> dict[str, Any] | None:
    return None if failure is None else asdict(failure)


def _write(output: str, subject: Subject, failure: Failure, weights: bool) -> dict[str, Any]:
    """Write a bundle and try it out."""
    from ..debugging.bundle import read_bundle, write_bundle

    path = write_bundle(output, subject, failure, weights=weights)
    with progress("replaying"):
        again = read_bundle(path).replay().same
    return {"bundle": str(path), "bytes": path.stat().st_size, "replays": again}


def _told(wrote: dict[str, Any]) -> str:
    shows = (
        "the failure shows again from it" if wrote["replays"] else "the failure does not show again from it: try --weights"
    )
    return f"wrote {wrote['bundle']} ({size(wrote['bytes'])}); {shows}"


_weights = click.option(
    "--weights", is_flag=True, help="Store weights and large inputs; else others of their kind are made."
)


@click.command()
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), callback=writable, help="Write what is left to this bundle."
)
@click.option("--seconds", default=60.0, show_default=True, help="Time to spend.")
@_weights
@source_or_bundle
@common
def reduce(src: str, output: str | None, seconds: float, weights: bool, as_json: bool, **how: Any) -> None:
    """Shrink a program that fails while the same failure persists; dynamic sizes are kept.

    Exit code 1 where it does not fail, 6 where it fails otherwise than its bundle says.
    """
    from ..debugging.reduce import reduce as reduce_subject

    with progress("loading"):
        given = _load(src, **how)
    with progress("reducing"):
        found = reduce_subject(given.subject, given.failing(), seconds=seconds)
    wrote = _write(output, found.subject, found.failure, weights) if output else {}
    data = {
        "source": src, **wrote, "before": found.before, "nodes": found.nodes, "tried": found.tried,
        "seconds": round(found.seconds, 3), "left": found.left, "level": found.subject.level,
        "failure": _data(found.failure), "graph": str(found.subject.graph),
    }  # fmt: skip
    emit(data, as_json, lambda: f"{found}\n{_told(wrote)}" if wrote else str(found))


@click.command()
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False), callback=writable, help="The bundle to write."
)
@_weights
@source_or_bundle
@common
def bundle(src: str, output: str, weights: bool, as_json: bool, **how: Any) -> None:
    """Write a program that fails into one file, to be replayed elsewhere. Exit code 1 where it does not fail."""
    with progress("loading"):
        given = _load(src, **how)
    with progress("compiling"):
        failure = given.failing()
    wrote = _write(output, given.subject, failure, weights)
    emit({"source": src, **wrote, "failure": _data(failure)}, as_json, lambda: f"{failure}\n{_told(wrote)}")


@click.command()
@click.argument("file", metavar="BUNDLE.zip")
@common
def replay(file: str, as_json: bool) -> None:
    """Compile and run what a bundle holds.

    Exit code 0 where it does not fail any more, 1 where the same failure shows, 6 for another one.
    """
    from ..debugging.bundle import read_bundle

    with progress("loading"):
        read = read_bundle(file)
    with progress("compiling"):
        done = read.replay()
    outcome = "gone" if done.found is None else "same" if done.same else "other"
    emit({"outcome": outcome, "expected": _data(done.expected), "found": _data(done.found)}, as_json, lambda: str(done))
    sys.exit({"gone": 0, "same": 1, "other": 6}[outcome])


@click.command()
@click.option("--check", "command", metavar="CMD", help="Judge artifacts: {} is replaced by the path, exit 0 is good.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Candidates to judge at once.")
@source_or_bundle
@common
def bisect(src: str, command: str | None, jobs: int, as_json: bool, **how: Any) -> None:
    """Find the one choice of a compilation that makes a program fail, by default measured against float64.

    Exit code 1 where it does not fail.

    \b
    plait bisect models.vit:make
    plait bisect models.lm:make --check "python judge.py {}" --jobs 4
    """
    with progress("loading"):
        given = _load(src, **how)
    with progress("bisecting"):
        found = _bisected(given, command, jobs)
    chosen = found.decision
    data = {
        "source": src, "choice": chosen.index if chosen else None, "total": found.total, "runs": found.runs,
        "stage": chosen.stage if chosen else None, "rule": chosen.rule if chosen else None,
        "op": chosen.node.op.name if chosen and chosen.node else None,
        "at": chosen.node.loc.short if chosen and chosen.node else None,
        "failure": _data(found.failure), "diff": found.diff,
    }  # fmt: skip
    emit(data, as_json, lambda: str(found))


def _bisected(given: _Given, command: str | None, jobs: int) -> Culprit:
    from ..debugging.bisect import bisect as bisect_subject
    from ..debugging.check import Check
    from ..debugging.forked import Died, Forks, apart
    from ..debugging.subject import Build

    subject = given.subject
    check: Callable[[Build], bool] | None = None
    failure = None
    if command is not None:
        check = Check.of(subject, command, given.exported)
    else:
        failure = given.failing()
        if failure.kind == "crashes":
            check = lambda build: not isinstance(apart(lambda: subject.run(build)), Died)  # noqa: E731
    pool = Forks(jobs) if jobs > 1 else None
    found = bisect_subject(subject, check, pool=pool, ways=jobs)
    return found if check is None or failure is None else replace(found, failure=failure)
