"""Suites of measurements: run them, merge with stored results, print a table, write JSON.

A suite has letters. A full run of a letter yields its figure, and `--store` keeps it in `results/SUITE.json` with the
commit. `--quick` re-measures a stated sample of each letter and takes the full figure from there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import commit, machine, versions

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_SECONDS = 50.0  # from here to the end; starting up takes some seconds before
VERDICTS = {True: "holds", False: "FAILS", None: "-----"}


@dataclass(frozen=True)
class Outcome:
    """A measured figure (short: text, a number or a flat dict), whether it meets the goal, and the rows behind it."""

    figure: Any
    holds: bool
    detail: Any = None


@dataclass(frozen=True)
class Letter:
    """One thing that a suite shows. `sample` says what `--quick` re-measures (empty: nothing, the stored figure stands).

    `seconds` is about what the sample takes: `--quick` skips it when the time left is shorter.
    `optional` letters are measured only when asked for by name.
    """

    key: str
    about: str
    goal: str
    measure: Callable[[Run], Outcome | None]  # None: there was no time
    sample: str = ""
    seconds: float = 10.0
    optional: bool = False


@dataclass(frozen=True)
class Suite:
    """A named set of letters."""

    name: str
    about: str
    letters: tuple[Letter, ...]


@dataclass
class Run:
    """One invocation: the backend under test, options, and where progress goes (stderr, on a terminal only)."""

    backend: str = "plait"
    quick: bool = False
    every: bool = False  # all samples of the op database instead of the most different ones
    shards: int = 0
    deadline: float = float("inf")
    notes: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Progress, on a terminal only."""
        if sys.stderr.isatty():
            print(f"  {text}", file=sys.stderr, flush=True)

    @property
    def left(self) -> float:
        """Seconds until a quick run must end."""
        return self.deadline - time.monotonic()


def run_suite(suite: Suite, run: Run, letters: Iterable[str] | None = None) -> dict[str, Any]:
    """Measure the letters (all that are not optional unless named) and return the report, with a `summary` per letter."""
    if run.quick:
        run.deadline = time.monotonic() + QUICK_SECONDS
    wanted = set(letters) if letters else None
    before, summary, detail = stored(suite.name), {}, {}
    for letter in suite.letters:
        kept = before.get(letter.key)
        if wanted is not None and letter.key not in wanted:
            summary[letter.key] = _entry(letter, kept, None)
            continue
        fits = not run.quick or (bool(letter.sample) and run.left > letter.seconds)
        skip = not fits or (letter.optional and wanted is None)
        run.say(f"{suite.name}.{letter.key}: {'stored' if skip else 'measuring'}: {letter.about}")
        outcome = None if skip else letter.measure(run)
        summary[letter.key] = _entry(letter, kept, outcome, sampled=run.quick)
        if outcome is not None:
            detail[letter.key] = outcome.detail
    return {
        "suite": suite.name,
        "backend": run.backend,
        "quick": run.quick,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "summary": summary,
        "detail": detail,
        "notes": run.notes,
    }


def _entry(
    letter: Letter, kept: Mapping[str, Any] | None, outcome: Outcome | None, *, sampled: bool = False
) -> dict[str, Any]:
    """What the summary says of one letter: the full figure, now or stored; for a quick run the sample beside it."""
    entry: dict[str, Any] = {
        "about": letter.about,
        "figure": None,
        "goal": letter.goal,
        "holds": None,
        "when": "never measured",
    }
    if kept is not None:
        entry |= {"figure": kept["figure"], "holds": kept["holds"], "when": f"stored@{kept['commit']}"}
    if outcome is None:
        return entry
    if not sampled:
        return entry | {"figure": outcome.figure, "holds": outcome.holds, "when": "now"}
    sample = {"what": letter.sample, "figure": outcome.figure, "holds": outcome.holds, "when": "now"}
    if kept is None:
        entry |= {"figure": outcome.figure, "holds": outcome.holds, "when": "now"}
    return entry | {"sample": sample, "holds": bool(entry["holds"] and outcome.holds)}


def stored(name: str) -> dict[str, Any]:
    """Letter to kept result: figure, holds, commit, machine, versions, detail."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["letters"] if path.exists() else {}


def store(report: Mapping[str, Any]) -> Path:
    """Keep what a full run measured now; letters that it did not measure stay as they were."""
    if report["quick"]:
        raise SystemExit("a quick run is a sample and is never stored; leave out --quick or --store")
    letters = stored(report["suite"])
    for key, entry in report["summary"].items():
        if entry["when"] == "now":
            same = {k: report[k] for k in ("commit", "backend", "machine", "versions")}
            letters[key] = same | {k: entry[k] for k in ("figure", "goal", "holds")} | {"detail": report["detail"].get(key)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{report['suite']}.json"
    path.write_text(json.dumps({"letters": dict(sorted(letters.items()))}, indent=1, default=str) + "\n")
    return path


def table(report: Mapping[str, Any]) -> str:
    """The summary as text: one line per letter, then the sample of a quick run."""
    lines = [f"{report['suite']} ({report['backend']}, {report['commit']}, {report['machine']['processor']})"]
    for key, entry in report["summary"].items():
        lines.append(f"{key}  {VERDICTS[entry['holds']]}  {entry['about']}")
        lines.append(f"     {_short(entry['figure'])}   goal: {entry['goal']}   ({entry['when']})")
        if "sample" in entry:
            lines.append(f"     now, {entry['sample']['what']}: {_short(entry['sample']['figure'])}")
    return "\n".join(lines)


def _short(figure: Any) -> str:
    if isinstance(figure, Mapping):
        return ", ".join(f"{k} {v}" for k, v in figure.items())
    return str(figure)
