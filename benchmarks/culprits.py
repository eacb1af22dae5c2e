"""Finding planted faults: how many bisection, the search for the first bad node, and reduction get right, and how fast."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plait.compiler.debugging.bisect import bisect
from plait.compiler.debugging.first_bad import first_bad_node
from plait.compiler.debugging.reduce import reduce

from .machine import ROOT
from .plants import PLANTS, Plant, subject
from .runner import Outcome, Run

LIMIT_S = 60.0
NODES_LEFT = 5
GOALS = {"bisect": 38, "first bad node": 36, "reduce": 36}
QUICK = ("gradient of a product", "relu of nothing", "dropped token", "kernel of a backward")
SEED = 0
EXAMPLE = Path("examples/find_the_culprit.py")


def plants(run: Run) -> Outcome | None:
    """Letter a. A quick run takes a rewrite, a gradient, a kernel and a dropped token in the two small programs."""
    chosen = [p for p in PLANTS if p.name in QUICK] if run.quick else PLANTS
    rows = {}
    for plant in chosen:
        if run.quick and rows and run.left < 10:
            break
        run.say(plant.name)
        rows[plant.name] = search(plant)
    if not rows:
        return None
    figure: dict[str, Any] = {"plants": len(rows), "seed": SEED}
    for way in GOALS:
        right = [r[way] for r in rows.values() if r[way]["right"] and r[way]["seconds"] <= LIMIT_S]
        figure[way] = (
            f"{len(right)} right within {LIMIT_S:.0f} s, slowest {max(r[way]['seconds'] for r in rows.values()):.0f} s"
        )
    counts = {w: sum(r[w]["right"] and r[w]["seconds"] <= LIMIT_S for r in rows.values()) for w in GOALS}
    missing = len(PLANTS) - len(rows)
    return Outcome(figure, all(counts[w] + missing >= GOALS[w] for w in GOALS), rows)


def search(plant: Plant, seed: int = SEED) -> dict[str, Any]:
    """All three ways on one plant: whether each is right, its seconds, and what it said first."""
    subject(plant.program)  # made before the clock starts, and before the fault is at work
    with plant.planted(seed) as made:
        return {
            "program": plant.program,
            "bisect": _timed(lambda: (found := bisect(made.subject), made.found_by(found))),
            "first bad node": _timed(lambda: (found := first_bad_node(made.subject), made.is_at(found))),
            "reduce": _timed(lambda: (found := reduce(made.subject, seconds=LIMIT_S - 5), found.nodes <= NODES_LEFT)),
        }


def _timed(way: Callable[[], tuple[Any, bool]]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found, right = way()
        said = str(found).split("\n")[0]
    except Exception as error:  # a way that breaks has not found it
        right, said = False, f"{type(error).__name__}: {error}".split("\n")[0]
    return {"right": bool(right), "seconds": round(time.perf_counter() - start, 1), "said": said[:300]}


def overhead(run: Run) -> Outcome:
    """Letter b: what history, provenance and numbered choices add to the time of compiling when nobody looks."""
    from .debug_overhead import measure

    found = measure(rounds=3 if run.quick else 15)
    return Outcome(f"{100 * found['share']:.1f} % of the compile time", found["share"] <= 0.10, found)


def walk(run: Run) -> Outcome:
    """Letter c: the example that goes from a wrong number to the guilty line."""
    done = subprocess.run([sys.executable, str(EXAMPLE)], cwd=ROOT, capture_output=True, text=True)
    return Outcome({"exit code": done.returncode, "lines printed": len(done.stdout.splitlines())}, done.returncode == 0,
                   done.stdout.splitlines())  # fmt: skip
