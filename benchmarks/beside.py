"""plait beside OpenVINO and ONNX Runtime: five models, one sample, float32, weights frozen on every side.

    python -m benchmarks.beside MODEL

compares one model with the peers that are installed where it runs, and prints JSON. `measure` calls that in an environment
of its own, build/peers, which it makes from the extra `peers` and the constraints.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tests.generate.judge import judge
from tests.models import build, example

from .harness import Probe, geometric_mean, side_by_side
from .machine import ROOT
from .models import FULL, LENGTH, doubled, float64
from .runner import Run

MODELS = ("bert", "gpt2", "llama", "resnet", "vit")
PEERS = ("openvino", "onnxruntime")
ENVIRONMENT = ROOT / "build" / "peers"
#: Libraries' own threads wait for work by spinning for a while, on cores that the next candidate needs.
SETTLE_S = 0.003


def compare(name: str, *, rounds: int = 20, seconds: float = 12.0) -> dict[str, Any]:
    """Times of plait and its peers on one model, their speedups and verdicts against eager, seconds of compilation."""
    import plait
    from plait.compiler.peers import Task, chosen

    torch.manual_seed(0)
    model, given = build(name, FULL[name]), example(name, FULL[name], 1, LENGTH)
    task = Task(model, kwargs=given)
    calls: dict[str, Callable[[], Any]] = {}
    compile_s: dict[str, float] = {}

    def ours() -> Callable[[], Any]:
        compiled = plait.compile(model, given)
        return lambda: tree_leaves(compiled(**given))

    def wide() -> Any:
        with float64():
            return tree_leaves(copy.deepcopy(model).double()(**tree_map(doubled, given)))

    with torch.no_grad():
        expected = tree_leaves(model(**given))
        makers = {"plait": ours} | {p.name: (lambda p=p: p.ready(task)) for p in chosen(PEERS)}
        for who, make in makers.items():
            start = time.perf_counter()
            calls[who] = make()
            calls[who]()
            compile_s[who] = round(time.perf_counter() - start, 2)
        verdicts = {who: judge(call(), expected, wide).kind for who, call in calls.items()}
        timings = side_by_side(calls, rounds=rounds, seconds=seconds, probe=Probe(), settle=SETTLE_S)
    return {
        "verdict": verdicts,
        "time": timings.as_json("plait"),
        "compile_s": compile_s,
        "threads": task.threads,
        "speedup": {peer: round(timings.speedup("plait", peer).median, 3) for peer in PEERS},
        "at least": {peer: round(timings.at_least("plait", peer), 3) for peer in PEERS},
    }


def measure(run: Run) -> dict[str, Any]:
    """A row for each model; one that could not be measured holds the reason under "skipped"."""
    run.say("setting up OpenVINO and ONNX Runtime")
    try:
        python = environment()
    except RuntimeError as error:
        return {name: {"skipped": str(error)} for name in MODELS}
    rows: dict[str, Any] = {}
    for name in MODELS:
        run.say(f"{name} beside OpenVINO and ONNX Runtime")
        rows[name] = _row(python, name)
    return rows


def _row(python: Path, name: str) -> dict[str, Any]:
    done = subprocess.run([str(python), "-m", "benchmarks.beside", name], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": _last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> Path:
    """The Python of the peers' environment, which is made where it is not there or was made from other constraints.

    Raises RuntimeError with pip's last words.
    """
    wanted = hashlib.sha256(b"".join((ROOT / f).read_bytes() for f in ("constraints.txt", "pyproject.toml"))).hexdigest()
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "made-from"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    install = ["-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[peers,demo]"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], [str(python), *install]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"no environment with the peers: {_last_line(done.stderr)}")
    stamp.write_text(wanted)
    return python


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it ended without a word")


def figures(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric means of speedups, and models by name: where plait is behind a peer, and what was not measured, and why."""
    done = {name: row for name, row in rows.items() if "skipped" not in row}
    found: dict[str, Any] = {}
    for peer in PEERS if done else ():
        found[f"over {peer}"] = f"{geometric_mean([row['speedup'][peer] for row in done.values()]):.2f}x of {len(done)}"
    behind = [f"{n} ({row['speedup'][p]:.2f}x {p})" for n, row in done.items() for p in PEERS if row["speedup"][p] < 1.0]
    found["behind OpenVINO or ONNX Runtime"] = ", ".join(behind) or "none"
    disturbed = [name for name, row in done.items() if not row["time"]["trusted"]]
    if disturbed:
        found["disturbed, hence not to be trusted"] = ", ".join(disturbed)
    skipped = {row["skipped"] for row in rows.values() if "skipped" in row}
    if skipped:
        names = ", ".join(n for n in rows if n not in done)
        found["not compared with OpenVINO and ONNX Runtime"] = f"{names}: {'; '.join(sorted(skipped))}"
    return found


def ahead(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether plait was ahead of both peers on every model."""
    return all("skipped" not in row and min(row["speedup"].values()) >= 1.0 for row in rows.values())


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1])))
