"""Generated programs under the backend: how many are equal to eager, close, wrong, or raise."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from tests import generate

from .runner import Outcome, Run

COUNT, MANY = 200, 2000
SHRINK_BUDGET = 30
RESERVE_S = 12.0  # what a quick run leaves to the letters that follow


def measure(run: Run) -> Outcome | None:
    """Seeds 0 to 199. A quick run takes every twentieth, as many as time allows."""
    return check(run, range(0, COUNT, 20) if run.quick else range(COUNT))


def many(run: Run) -> Outcome | None:
    """Seeds 0 to 1999. A quick run takes every two hundredth, as many as time allows."""
    return check(run, range(0, MANY, 200) if run.quick else range(MANY))


def check(run: Run, seeds: range) -> Outcome | None:
    """The programs of some seeds under the backend."""

    def compile(program: generate.Program) -> Any:
        torch._dynamo.reset()
        return torch.compile(program.fn, backend=run.backend, fullgraph=True, dynamic=program.dynamic)

    tally: Counter[str] = Counter()
    detail: dict[str, Any] = {"seeds": [seeds.start, seeds.stop, seeds.step], "close": {}, "failures": []}
    for seed in seeds:
        if run.left < RESERVE_S:
            break
        program = generate.program(seed)
        result = generate.check(program, compile)
        tally[result.kind] += 1
        run.say(f"seed {seed}: {result.kind}")
        if result.kind == "close":
            detail["close"][seed] = result.detail
        if not result.fine:
            if not run.quick:
                kind = result.kind
                program = generate.shrink(
                    program, lambda p, kind=kind: generate.check(p, compile).kind == kind, budget=SHRINK_BUDGET
                )
                result = generate.check(program, compile)
            detail["failures"].append(generate.reproduction(program, result, run.backend))
    if not tally:
        return None
    figure = {"programs": tally.total()} | {k: tally[k] for k in ("equal", "close", "raises", "wrong")}
    return Outcome(figure, not tally["wrong"] and not tally["raises"], detail)
