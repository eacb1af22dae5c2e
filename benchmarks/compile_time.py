"""What compiling takes: cold and warm, in processes of their own, plait beside Inductor; and loading an artifact.

    python -m benchmarks.compile_time MODEL BACKEND

compiles one model as BACKEND and prints seconds as JSON: the whole first call, and the backend's own part, after Dynamo and
AOTAutograd have handed over. Cold is with empty caches on disk, warm a second process that finds them filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.models import MODELS, build, example

from .harness import geometric_mean
from .machine import ROOT
from .models import FULL, LENGTH
from .runner import Outcome, Run

BACKENDS = ("plait", "inductor")
GOALS = {"own part, cold": 6.0, "whole, cold": 2.0, "whole, warm": 2.0}
LOAD_S, LOAD_BYTES = 0.5, 100 << 20


def measure(run: Run) -> Outcome | None:
    """Letter d. A quick run compiles gpt2 by plait alone."""
    if run.quick:
        found = cold_and_warm("gpt2", "plait")
        figure = {f"{what}, {when}": f"{s:.1f} s" for when, parts in found.items() for what, s in parts.items()}
        return Outcome(figure, True, found)
    rows: dict[str, Any] = {}
    for name in MODELS:
        run.say(name)
        rows[name] = {backend: cold_and_warm(name, backend) for backend in BACKENDS}
    ratios = {what: [_ratio(row, what) for row in rows.values()] for what in GOALS}
    figure = {what: f"{median(found):.1f}x less than Inductor" for what, found in ratios.items()}
    figure |= {f"{what}, geometric mean": f"{geometric_mean(found):.1f}x" for what, found in ratios.items()}
    holds = all(median(ratios[what]) >= goal for what, goal in GOALS.items())
    seconds = artifact_load()
    figure["artifact of 100 MiB loads in"] = f"{seconds:.2f} s"
    return Outcome(figure, holds and seconds <= LOAD_S, rows)


def _ratio(row: dict[str, Any], what: str) -> float:
    part, when = what.split(", ")
    return row["inductor"][when][part] / max(row["plait"][when][part], 1e-3)


def cold_and_warm(name: str, backend: str) -> dict[str, dict[str, float]]:
    """Seconds of the first call of a model in two processes that share caches, empty at first."""
    with tempfile.TemporaryDirectory(prefix="plait-bench-") as folder:
        caches = {"PLAIT_CACHE_DIR": f"{folder}/plait", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        return {when: _in_process(name, backend, caches) for when in ("cold", "warm")}


def _in_process(name: str, backend: str, caches: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compile_time", name, backend]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def first_call(name: str, backend: str) -> dict[str, float]:
    """Seconds of the first call of a model, whole and in the backend, in this process."""
    model, given = build(name, FULL[name]), example(name, FULL[name], 1, LENGTH)
    spent: list[float] = []
    with torch.no_grad(), _timed(backend, spent) as timed:
        compiled = torch.compile(model, backend=timed, dynamic=False)
        start = time.perf_counter()
        compiled(**given)
        whole = time.perf_counter() - start
    return {"whole": round(whole, 3), "own part": round(sum(spent), 3)}


@contextmanager
def _timed(backend: str, spent: list[float]) -> Iterator[Any]:
    """A backend whose own part, what it does with graphs below autograd, adds to `spent`."""

    def timing(fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return timed

    if backend == "inductor":
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        inner: Any = timing(compile_fx_inner)
        yield lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner)
        return
    from unittest import mock

    from plait.compiler import backend as ours

    with mock.patch.object(ours._Compilation, "compile", timing(ours._Compilation.compile)):
        yield "plait"


LOAD = """
import sys, time, torch
start = time.perf_counter()
import plait
model = plait.load(sys.argv[1])
print(time.perf_counter() - start)
"""


def artifact_load() -> float:
    """Seconds from `import plait` to a loaded model of 100 MiB, torch imported before; the median of five processes."""
    import plait

    width = 1024
    layers = [torch.nn.Linear(width, width) for _ in range(LOAD_BYTES // (4 * width * width))]
    with tempfile.TemporaryDirectory(prefix="plait-bench-") as folder:
        path = Path(folder) / "large.plait"
        plait.compile(torch.nn.Sequential(*layers).eval(), (torch.randn(4, width),)).save(path)
        command = [sys.executable, "-c", LOAD, str(path)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(5)]
    return median(float(done.stdout.splitlines()[-1]) for done in runs)


if __name__ == "__main__":
    print(json.dumps(first_call(sys.argv[1], sys.argv[2])))
