"""Letter b: training steps in pieces against the whole one on two ranks: routing, results, gradients, losses of 50 steps.

Programs differ in gate, capacity and size, loads in how evenly tokens are spread (`exact_rank.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..runner import Outcome, Run
from .exact_rank import ALLOWED
from .jobs import result

GATES = ("switch", "top2", "top2-by-choice", "batch-prioritised")
FACTORS = (0.5, 1.25, 4.0)
SMALL = {"units": 12, "length": 5, "width": 16, "hidden": 24, "experts": 4}
LARGE = {"units": 32, "length": 64, "width": 128, "hidden": 512, "experts": 4}
LOADS = ("even", "uneven", "empty")
VARIANTS: Mapping[str, list[str]] = {
    **{f"step/{k}": [f"overlap-chunks:around=step,count={k}"] for k in range(1, 9)},
    **{f"layer/{k}": [f"overlap-chunks:around=layer,count={k}"] for k in (3, 8)},
    "all/5, dw": ["overlap-chunks:around=all,count=5", "overlap-dw"],
    "step/4, dw": ["overlap-chunks:around=step,count=4", "overlap-dw"],
}
"""Whole steps in pieces; layers in pieces of tokens, their gradients in pieces of rows; with weight gradients."""
EXCHANGES = {"whole": 0, **{name: 8 * int(name.split(",")[0].split("/")[1]) for name in VARIANTS}}
"""Exchanges that are started: two of each piece in the forward and two in the backward of two layers."""
LONGEST_S = 1800.0


def jobs(quick: bool) -> dict[str, dict[str, Any]]:
    """What is run, by name. A quick run takes one program, one load and three pieces."""
    same = {"sizes": SMALL, "seeds": 2, "loads": LOADS, "curve": 50}
    if quick:
        few = {"step/3": VARIANTS["step/3"]}
        return {"top2 1.25": {**same, "gate": "top2", "factor": 1.25, "variants": few, "loads": LOADS[1:2], "curve": 0}}
    found = {f"{g} {f:g}": {**same, "gate": g, "factor": f, "variants": VARIANTS} for g in GATES for f in FACTORS}
    few = {name: VARIANTS[name] for name in ("step/2", "step/8", "layer/8", "step/4, dw")}
    large = {**same, "sizes": LARGE, "seeds": 1, "variants": few}
    return found | {f"{g} 1.25 large": {**large, "gate": g, "factor": 1.25} for g in ("switch", "top2-by-choice")}


def measure(run: Run) -> Outcome:
    """All programs, each in processes of its own."""
    detail: dict[str, Any] = {}
    for name, job in jobs(run.quick).items():
        run.say(name)
        ranks = result("exact_rank", job, None, LONGEST_S, fresh=run.quick)
        rows = [{"rank": r, **row} for r, found in enumerate(ranks) for row in found["rows"]]
        detail[name] = {"rows": rows, "curves": [f["curves"] for f in ranks], "pieces": [f["pieces"] for f in ranks]}
    rows = [row for found in detail.values() for row in found["rows"]]
    curves = [c for found in detail.values() for one in found["curves"] for name, c in one.items() if name != "whole"]
    cut = [EXCHANGES[name] == n for found in detail.values() for one in found["pieces"] for name, n in one.items()]
    return judged(rows, curves, cut, detail)


def judged(rows: list[dict[str, Any]], curves: list[dict[str, Any]], cut: list[bool], detail: Any) -> Outcome:
    """The figure: how many comparisons are equal, and errors where gradients or losses may differ."""
    exact, floats = ([row for row in rows if row["exact"] is kind] for kind in (True, False))
    figure: dict[str, Any] = {
        "programs cut as asked": _of(cut),
        "routing, slots and drops equal": _of(row["routing"] for row in rows),
        "results equal": _of(row["forward"] for row in rows),
        "sums exact of integers": _of(row["as in float64"] for row in exact),
        "gradients equal, integers": _of(not row["differ"] for row in exact),
        "gradients equal, floats": _of(not row["differ"] for row in floats),
        "losses equal": _of(row["loss"] for row in rows),
        "worst error over the whole step's": f"{max(row['error'] for row in rows):.2f}",
    }
    holds = all(cut) and all(row["routing"] and row["forward"] and row["error"] <= ALLOWED for row in rows)
    holds = holds and all(row["as in float64"] and not row["differ"] for row in exact)
    if curves:
        figure["curves equal"] = _of(c["equal"] == c["steps"] for c in curves)
        figure["worst error of a curve over the whole step's"] = f"{max(c['error'] for c in curves):.2f}"
        holds = holds and all(c["equal"] == c["steps"] or c["error"] <= ALLOWED for c in curves)
    return Outcome(figure, holds, detail)


def _of(equal: Iterable[bool]) -> str:
    found = list(equal)
    return f"{sum(found)} of {len(found)}"
