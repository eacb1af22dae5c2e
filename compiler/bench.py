"""`plait bench`: one model in eager, through Inductor and through plait, after checking that all give the same answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .api import compile
from .running import compare
from .source import Source
from .timing import alternate


def bench(source: Source, options: Mapping[str, Any], *, inductor: bool = True, seconds: float = 4.0) -> dict[str, Any]:
    """Median milliseconds per call, seconds of compilation and differences from eager of each contender, as plain data.

    Inductor compiles with empty caches. `seconds` is the time spent on timing. Raises what `plait.compile` raises.
    """
    from torch._inductor.utils import fresh_cache

    eager = source.eager()
    start = time.perf_counter()
    ours = compile(source.model, source.inputs, dynamic_shapes=source.dynamic_shapes, options=options)
    with torch.no_grad(), fresh_cache():
        calls: dict[str, Callable[..., Any]] = {"eager": eager, "plait": ours}
        expected = pytree.tree_leaves(eager(*source.inputs))
        ours(*source.inputs)
        compile_s = {"plait": time.perf_counter() - start}
        if inductor:
            calls["inductor"] = torch.compile(eager, dynamic=bool(source.dynamic_shapes))
            start = time.perf_counter()
            calls["inductor"](*source.inputs)
            compile_s["inductor"] = time.perf_counter() - start
        differences = {name: _largest(call, source.inputs, expected) for name, call in calls.items() if name != "eager"}
        medians = alternate({name: (lambda f=f: f(*source.inputs)) for name, f in calls.items()}, seconds=seconds)
    coverage = asdict(ours.coverage)
    return {
        "source": source.name,
        "milliseconds": {name: s * 1e3 for name, s in medians.items()},
        "speedup": {name: medians[name] / medians["plait"] for name in medians if name != "plait"},
        "compile_seconds": compile_s,
        "differences": differences,
        "coverage": coverage,
        "threads": torch.get_num_threads(),
    }


def _largest(call: Callable[..., Any], inputs: Sequence[Any], expected: Sequence[Any]) -> dict[str, Any]:
    """The largest difference over all results, and whether all are within torch.testing's tolerances."""
    compared = compare(pytree.tree_leaves(call(*inputs)), expected)
    return {"max_abs": max((c.max_abs for c in compared), default=0.0), "equal": all(c.equal for c in compared)}
