"""One process of the op-database run: reads tasks, runs samples, writes a record each.

Protocol, JSON lines. Standard input: `{"op": KEY, "every": bool, "skip": [indices]}`. Output, on the file descriptor that
was standard output at the start (what libraries print goes to standard error): `{"plan": [indices]}`, then for each sample
`{"start": i}` and `{"record": {…}}`, then `{"done": KEY}`. A parent that sees no line for long kills the process.
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.testing._internal import common_methods_invocations as database
from torch.utils._pytree import tree_leaves, tree_map

from .plait_seam import coverage, observe

SEED = 1234
DTYPE = torch.float32
MOST_DIFFERENT = 8

UNINITIALISED = "eager returns uninitialised memory"
# values are not compared, shapes and dtypes are
UNDEFINED_VALUES = {
    "empty": UNINITIALISED,
    "empty_like": UNINITIALISED,
    "empty_strided": UNINITIALISED,
    "empty_permuted": UNINITIALISED,
    "new_empty": UNINITIALISED,
    "new_empty_strided": UNINITIALISED,
}


def key(info: Any) -> str:
    """Name of an entry: the op, and its variant where it has one."""
    return info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")


def entries() -> dict[str, Any]:
    """Every entry of the database that runs in float32 on the CPU, by key."""
    # random ops come wrapped in a function that seeds, which Dynamo does not trace; both runs are seeded here instead
    database.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    return {key(i): i for i in database.op_db if DTYPE in i.supported_dtypes("cpu")}


def seed() -> None:
    """The same random state before sample generation, before eager, before the compiled call."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


def samples(info: Any) -> list[Any]:
    """All forward samples of an entry; the same list in every process."""
    seed()
    return list(info.sample_inputs("cpu", DTYPE, requires_grad=False))


def features(sample: Any) -> frozenset[str]:
    """What tells one sample from another: shapes, layouts, dtypes, types and values of arguments, their names."""
    found = set()
    for place, value in [("input", sample.input), *enumerate(sample.args), *sample.kwargs.items()]:
        for leaf in tree_leaves(value):
            if not isinstance(leaf, torch.Tensor):
                found |= {f"{place}:{type(leaf).__name__}", f"{place}={str(leaf)[:40]}"}
                continue
            sizes = tuple(leaf.shape)
            found |= {f"{place}:{leaf.ndim}d", f"{place}:{sizes}", f"{place}:{leaf.dtype}", f"{place}:{leaf.layout}"}
            found |= {f"{place}:empty"} if not leaf.numel() else set()
            found |= {f"{place}:size 1"} if 1 in sizes else set()
            strided = leaf.layout == torch.strided
            found |= {f"{place}:not contiguous"} if strided and not leaf.is_contiguous() else set()
        found.add(f"{place}:{type(value).__name__}")
    return frozenset(found)


def most_different(all_samples: list[Any], count: int) -> list[int]:
    """Indices of `count` samples: the first, then always the one whose features are furthest from those chosen (Jaccard)."""
    sets = [features(s) for s in all_samples]
    if len(sets) <= count:
        return list(range(len(sets)))

    def distance(a: frozenset[str], b: frozenset[str]) -> float:
        return 1 - len(a & b) / max(len(a | b), 1)

    chosen, nearest = [0], [distance(s, sets[0]) for s in sets]
    while len(chosen) < count:
        far = max(range(len(sets)), key=lambda i: (nearest[i], -i))
        chosen.append(far)
        nearest = [min(d, distance(s, sets[far])) for d, s in zip(nearest, sets, strict=True)]
    return sorted(chosen)


def call_of(info: Any) -> Callable[..., Any]:
    """The op as a function of (input, args, kwargs), so that Dynamo traces one frame around it."""
    fn = info.op

    def call(x: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return fn(x, *args, **kwargs)

    return call


def fresh_arguments(sample: Any) -> tuple[Any, tuple, dict[str, Any]]:
    """A deep copy, so that an in-place op cannot disturb the next run; strides and shared storage are kept."""
    given = (sample.input, sample.args, sample.kwargs)
    leaves = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor) and x.layout != torch.strided]
    return copy.deepcopy(given, {id(x): x.clone() for x in leaves})  # sparse tensors do not know how to be deep-copied


def describe(sample: Any) -> str:
    """The arguments of a sample on one line."""

    def short(x: Any) -> Any:
        return f"{str(x.dtype)[6:]}{list(x.shape)}" if isinstance(x, torch.Tensor) else x

    args = [str(tree_map(short, a)) for a in (sample.input, *sample.args)]
    return ", ".join(args + [f"{k}={tree_map(short, v)}" for k, v in sample.kwargs.items()])[:300]


def mismatch(got: Any, expected: Any, *, values: bool) -> str:
    """Why `got` is not `expected` by `assert_close`'s defaults (NaN equals NaN); empty when it is."""
    ours, theirs = tree_leaves(got), tree_leaves(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} results instead of {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(b, torch.Tensor):
            plain = isinstance(b, bool | int | float | complex | str | torch.dtype | None)
            if type(a) is not type(b) or (plain and not (a == b or (a != a and b != b))):
                return f"result {i}: {a!r} instead of {b!r}"
            continue
        if not isinstance(a, torch.Tensor):
            return f"result {i}: {type(a).__name__} instead of a tensor"
        if not values:
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return f"result {i}: {a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
            continue
        try:
            torch.testing.assert_close(a, b, equal_nan=True)
        except AssertionError as refusal:
            return f"result {i}: {' '.join(str(refusal).split())}"
    return ""


def as_exact(call: Callable[..., Any], sample: Any, got: Any, expected: Any) -> bool:
    """Whether every result is as near to the same computation in float64 as eager's, by its largest error.

    For values that `assert_close` refuses because they cancelled: there eager's own last digits are noise.
    """
    wide = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.dtype == DTYPE else x, fresh_arguments(sample))
    seed()
    try:
        exact = [call(*wide), wide]
    except Exception:  # the op has no float64 form, so nothing speaks for the result
        return False
    for a, b, e in zip(*(tree_leaves(x) for x in (got, expected, exact)), strict=True):
        if not isinstance(b, torch.Tensor) or not mismatch(a, b, values=True):
            continue
        if b.dtype != DTYPE or a.shape != b.shape or not bool((a.isfinite() & b.isfinite() & e.isfinite()).all()):
            return False
        if (a - e).abs().max() > (b - e).abs().max():
            return False
    return True


def first_line(error: BaseException) -> str:
    """The type of an error and what it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"[:300]


def run_compiled(call: Callable[..., Any], sample: Any, backend: str) -> tuple[Any, Any, dict[str, Any]]:
    """(result, arguments after the call, coverage with runs); raises what compiling or running raises."""
    torch._dynamo.reset()
    given = fresh_arguments(sample)
    with observe(backend) as seen:
        seed()
        got = torch.compile(call, backend=seen.backend, fullgraph=True)(*given)
        return got, given, coverage(seen.graphs)


def classify(info: Any, sample: Any, backend: str) -> dict[str, Any]:
    """Class, reason and counts of one sample; see `op_db.py` for the classes."""
    call, given = call_of(info), fresh_arguments(sample)
    seed()
    try:
        expected = call(*given)
    except Exception as error:  # some ops of the database need a GPU
        return {"class": "not reached", "layer": "eager", "reason": f"eager raises {first_line(error)}"}
    values = info.name not in UNDEFINED_VALUES
    try:
        got, after, counts = run_compiled(call, sample, backend)
    except Exception as error:  # a backend may raise anything; which layer raised is found out next
        return _failure(call, sample, backend, error)
    why = mismatch([got, after], [expected, given], values=values)
    record = {k: counts[k] for k in ("graphs", "runs", "generated", "library", "fallback", "reasons")}
    if why:
        again = fresh_arguments(sample)
        seed()
        if mismatch([call(*again), again], [expected, given], values=True):
            record["values"], why = "not compared: eager differs from itself", ""
    elif not values:
        record["values"] = f"not compared: {UNDEFINED_VALUES[info.name]}"
    if why and values and as_exact(call, sample, [got, after], [expected, given]):
        record["values"], why = f"close, not equal; no further from float64 than eager: {info.name}", ""
    if why:
        return record | {"class": "silently wrong", "reason": why, "layer": _wrong_layer(call, sample, expected, given)}
    if not counts["runs"]:
        return record | {"class": "not reached", "reason": "dynamo left nothing to compile", "layer": "dynamo"}
    if backend != "plait":
        return record | {"class": "ran"}
    kind = "fallback" if counts["fallback"] else "library" if counts["library"] else "generated"
    return record | {"class": kind, "reason": "; ".join(counts["reasons"])[:300]}


def _failure(call: Callable[..., Any], sample: Any, backend: str, error: Exception) -> dict[str, Any]:
    """Raises in plait, or not reached because Dynamo or AOTAutograd raise without plait too."""
    for layer, stand_in in (("dynamo", "eager"), ("aot", "aot_eager")):
        if backend == stand_in:
            break
        try:
            run_compiled(call, sample, stand_in)
        except Exception as same:
            return {"class": "not reached", "layer": layer, "reason": first_line(same)}
    return {"class": "raises", "layer": backend, "reason": first_line(error)}


def _wrong_layer(call: Callable[..., Any], sample: Any, expected: Any, given: Any) -> str:
    """ "torch" when AOTAutograd's decompositions and functionalisation alone give a wrong answer too, else "backend"."""
    try:
        got, after, _ = run_compiled(call, sample, "aot_eager")
    except Exception:  # then they give no answer, and the wrong one is the backend's own
        return "backend"
    return "torch" if mismatch([got, after], [expected, given], values=True) else "backend"


def serve(backend: str) -> None:
    """Answer tasks until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = entries()
    for line in sys.stdin:
        task = json.loads(line)
        info = known[task["op"]]
        found = samples(info)
        plan = list(range(len(found))) if task["every"] else most_different(found, MOST_DIFFERENT)
        print(json.dumps({"plan": plan}), file=out)
        for i in plan:
            if i in task["skip"]:
                continue
            print(json.dumps({"start": i}), file=out)
            start = time.perf_counter()
            record = {"op": task["op"], "sample": i, "arguments": describe(found[i]), **classify(info, found[i], backend)}
            record["seconds"] = round(time.perf_counter() - start, 3)
            print(json.dumps({"record": record}), file=out)
        print(json.dumps({"done": task["op"]}), file=out)


if __name__ == "__main__":
    serve(sys.argv[1])
