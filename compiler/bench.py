"""`plait bench`: one model through plait and through peers by turns, after checking that all give the same answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .api import CompiledModel, compile
from .peers import Peer, Task
from .running import compare
from .timing import Alternated, alternate

OURS = "plait"
OUR_SETTINGS = "plait.compile, weights owned"


def bench(
    task: Task, peers: Sequence[Peer], options: Mapping[str, Any], *, seconds: float = 4.0
) -> tuple[dict[str, Any], CompiledModel]:
    """Times of plait and of each peer as plain data, and the compiled model.

    For each, under `contenders`: milliseconds per call (median, p10, p90), how many times plait's they are round by round,
    seconds of compilation, the largest difference from eager over all results and whether all lie within torch.testing's
    tolerances, and its settings. `seconds` is the time spent on timing. Raises what `plait.compile` raises, PeerRefused.
    """
    calls: dict[str, Callable[[], Sequence[Any]]] = {}
    compile_s: dict[str, float] = {}
    with torch.no_grad():
        expected = [x.clone() if isinstance(x, torch.Tensor) else x for x in _leaves(task)]
        start = time.perf_counter()
        ours = compile(task.model, task.kwargs or task.args, dynamic_shapes=task.dynamic_shapes, options=options)
        calls[OURS] = lambda: pytree.tree_leaves(ours(*task.args, **task.kwargs))
        calls[OURS]()
        compile_s[OURS] = time.perf_counter() - start
        for peer in peers:
            start = time.perf_counter()
            calls[peer.name] = peer.ready(task)
            compile_s[peer.name] = time.perf_counter() - start
        differences = {name: _largest(call(), expected) for name, call in calls.items()}
        timed = alternate(calls, seconds=seconds)
    settings = {OURS: OUR_SETTINGS} | {p.name: p.settings for p in peers}
    data = {
        "contenders": {
            name: _figures(timed, name)
            | {"compile_seconds": compile_s[name], "difference": differences[name], "settings": settings[name]}
            for name in calls
        },
        "rounds": timed.rounds,
        "threads": task.threads,
        "coverage": asdict(ours.coverage),
    }
    return data, ours


def _leaves(task: Task) -> list[Any]:
    return pytree.tree_leaves(task.eager(*task.args, **task.kwargs))


def _figures(timed: Alternated, name: str) -> dict[str, Any]:
    times, ratio = timed.seconds(name).scaled(1e3), timed.ratio(name, OURS)
    return {"milliseconds": asdict(times), "times_plait": asdict(ratio)}


def _largest(got: Sequence[Any], expected: Sequence[Any]) -> dict[str, Any]:
    """The largest difference over all tensors, and whether all are within torch.testing's tolerances."""
    compared = compare(*([x for x in results if isinstance(x, torch.Tensor)] for results in (got, expected)))
    return {"max_abs": max((c.max_abs for c in compared), default=0.0), "equal": all(c.equal for c in compared)}
