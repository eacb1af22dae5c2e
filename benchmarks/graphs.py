"""The rules that every graph keeps, counted over the test-suite; and the time of a large graph through the compiler."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from tests import generate
from tests.graphs import Checker

from .machine import ROOT
from .plait_seam import fresh
from .runner import Outcome, Run

NODES = 5000
BUDGET_S = 1.0
QUICK_SEEDS = range(6)


def rules(run: Run) -> Outcome:
    """Letter f: run the test-suite, which checks every graph its tests make, and take its count.

    A quick run takes the import rule's test, and the graphs of six generated programs.
    """
    if run.quick:
        return _rules_quick()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graphs.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-n", "2", f"--graphs={path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        counts = json.loads(path.read_text()) if path.exists() else {}
    tail = done.stdout.splitlines()[-30:]
    return Outcome({"exit code": done.returncode} | counts, done.returncode == 0 and bool(counts), tail)


def _rules_quick() -> Outcome:
    from plait.compiler.observe import observe

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_house.py"]
    house = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    checker, failures = Checker(Counter()), []
    for seed in QUICK_SEEDS:
        fresh()
        program = generate.program(seed)
        with torch.no_grad(), observe() as seen:
            torch.compile(program.fn, backend="plait", fullgraph=True, dynamic=program.dynamic)(*program.make_inputs())
        graphs = [g for record in seen.graphs for g in (record.captured, record.graph) if g is not None]
        failures += [why for g in graphs if (why := checker.check(g))]
    figure = {"import rule": "holds" if house.returncode == 0 else "broken", "failures": len(failures)} | checker.counts
    return Outcome(figure, house.returncode == 0 and not failures, failures)


def large_graph(nodes: int = NODES, *, dynamic: bool = False) -> torch.fx.GraphModule:
    """About `nodes` ATen nodes as AOTAutograd would hand them over: attention-like blocks with norms and views."""

    def block(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        n, s, d = x.shape
        h = F.layer_norm(x, (d,), b, b)
        q, k = (torch.addmm(b, h.view(n * s, d), w).view(n, s, 4, d // 4).transpose(1, 2) for _ in range(2))
        scores = torch.softmax(q @ k.transpose(-1, -2) / 4.0 + 1.0, -1)
        y = (scores @ k).transpose(1, 2).reshape(n, s, d)
        return x + F.gelu(y) * torch.sigmoid(h) - torch.tanh(y).mean(-1, keepdim=True)

    def repeated(count: int) -> torch.fx.GraphModule:
        def fn(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            for _ in range(count):
                x = block(x, w, b)
            return x

        given = torch.randn(2, 8, 16), torch.randn(16, 16), torch.randn(16)
        mode = "symbolic" if dynamic else "fake"
        return make_fx(torch.func.functionalize(fn), tracing_mode=mode)(*given)

    each = len(repeated(2).graph.nodes) - len(repeated(1).graph.nodes)
    return repeated(-(-nodes // each))


def large(run: Run) -> Outcome:
    """Letter g: import, standard pipeline and verifier on 5,000 nodes, static and dynamic sizes, three times."""
    from plait.compiler.options import Options
    from plait.compiler.pipelines import Session
    from plait.ir import from_fx, verify

    detail: dict[str, Any] = {}
    for kind in ("static",) if run.quick else ("static", "dynamic"):
        start = time.perf_counter()
        gm = large_graph(dynamic=kind == "dynamic")
        row: dict[str, Any] = {"nodes": len(gm.graph.nodes), "capture_s": round(time.perf_counter() - start, 3), "runs": []}
        for _ in range(3):
            marks = [time.perf_counter()]
            graph = from_fx(gm)
            marks.append(time.perf_counter())
            graph, steps = Session("large", Options.of()).run(graph, "split")
            marks.append(time.perf_counter())
            verify(graph)
            marks.append(time.perf_counter())
            parts = [round(b - a, 4) for a, b in itertools.pairwise(marks)]
            row["runs"].append(dict(zip(("import", "pipeline", "verify"), parts, strict=True)))
        row["passes"] = {s.pass_name: round(s.seconds, 4) for s in steps}
        row["first_s"] = round(sum(row["runs"][0].values()), 3)
        row["best_s"] = round(min(sum(r.values()) for r in row["runs"]), 3)
        detail[kind] = row
    figure: dict[str, Any] = {}
    for kind, row in detail.items():
        figure[kind] = f"{row['first_s']} s for {row['nodes']} nodes (best {row['best_s']} s, capture {row['capture_s']} s)"
    return Outcome(figure, all(row["first_s"] <= BUDGET_S for row in detail.values()), detail)
