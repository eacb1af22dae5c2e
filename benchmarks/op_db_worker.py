"""One process of the op-database run: reads tasks, runs samples, writes a record each.

Protocol, JSON lines. Standard input: `{"op": KEY, "every": bool, "most": count, "skip": [indices]}`. Output, on the file
descriptor that was standard output at the start (what libraries print goes to standard error): `{"plan": [indices]}`, then
for each sample `{"start": i}` and `{"record": {…}}`, then `{"done": KEY}`. A parent that sees no line for long kills the
process.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.testing._internal import common_methods_invocations as database
from torch.utils._pytree import tree_leaves, tree_map

from .plait_seam import coverage, observe

SEED = 1234
DTYPE = torch.float32
NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}
DRAWS = 8  # of moved inputs, where a result is not equal to eager's

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


def samples(info: Any, *, backward: bool = False) -> list[Any]:
    """All samples of an entry, with inputs that want gradients for `backward`; the same list in every process."""
    seed()
    return list(info.sample_inputs("cpu", DTYPE, requires_grad=backward))


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

    chosen, nearest = [0], [-1.0, *(distance(s, sets[0]) for s in sets[1:])]
    while len(chosen) < count:
        far = max(range(len(sets)), key=lambda i: (nearest[i], -i))
        chosen.append(far)
        nearest = [min(d, distance(s, sets[far])) for d, s in zip(nearest, sets, strict=True)]
        nearest[far] = -1.0  # not again, also where all that is left looks alike
    return sorted(chosen)


def call_of(info: Any) -> Callable[..., Any]:
    """The op as a function of (input, args, kwargs), so that Dynamo traces one frame around it."""
    fn = info.op

    def call(x: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return fn(x, *args, **kwargs)

    return call


def fresh_arguments(sample: Any) -> tuple[Any, tuple, dict[str, Any]]:
    """A deep copy, so that an in-place op cannot disturb the next run; strides and shared storage are kept. Tensors that
    want gradients become leaves."""
    given = tree_map(_leaf, (sample.input, sample.args, sample.kwargs))
    sparse = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor) and x.layout != torch.strided]
    return copy.deepcopy(given, {id(x): x.clone() for x in sparse})  # these do not know how to be deep-copied


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


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


@dataclass(frozen=True)
class Case:
    """One sample of an op. What is compared is its results and its arguments after the call; for `backward`, results that
    depend on the inputs and the gradients of these for fixed random cotangents."""

    call: Callable[..., Any]
    sample: Any
    backward: bool

    @staticmethod
    def of(info: Any, sample: Any, *, backward: bool) -> Case:
        """The case of an entry's sample."""
        return Case(call_of(info), sample, backward)

    def compared(self, call: Callable[..., Any], given: tuple[Any, tuple, dict[str, Any]]) -> Any:
        """Run `call` (the op itself, or compiled) on arguments; what eager and compiled must agree on."""
        seed()
        results = call(*given)
        if not self.backward:
            return [results, given]
        # where a result is defined up to a sign or a phase only, the database gives the function of it that is unique
        results = tree_leaves(self.sample.output_process_fn_grad(results))
        outs = [x for x in results if isinstance(x, torch.Tensor) and x.requires_grad]
        inputs = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor) and x.requires_grad]
        if not outs or not inputs:
            raise NotDifferentiable("no result depends on an input that wants a gradient")
        fixed = torch.Generator().manual_seed(SEED)
        cotangents = [torch.randn(x.shape, generator=fixed, dtype=NARROW.get(x.dtype, x.dtype)).to(x.dtype) for x in outs]
        # a gradient of None is one of zeros
        gradients = torch.autograd.grad(outs, inputs, cotangents, allow_unused=True, materialize_grads=True)
        return [[x.detach() for x in outs], gradients]

    def eager(self) -> Any:
        """What eager gives."""
        return self.compared(self.call, fresh_arguments(self.sample))

    def compiled(self, backend: str, *, fullgraph: bool = True) -> tuple[Any, dict[str, Any]]:
        """(what the compiled call gives, coverage with runs); raises what compiling or running raises."""
        torch._dynamo.reset()
        with observe(backend) as seen:
            compiled = torch.compile(self.call, backend=seen.backend, fullgraph=fullgraph)
            got = self.compared(compiled, fresh_arguments(self.sample))
            return got, coverage(seen.graphs)

    def exactly(self, moved: torch.Generator | None = None) -> Any:
        """The same computation in float64; on inputs each `moved` by up to half of its last digit as float32."""

        def wide(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or x.dtype != DTYPE:
                return x
            y = x.detach().double()
            if moved is not None:
                y = y * (1.0 + (torch.rand(y.shape, generator=moved, dtype=y.dtype) - 0.5) * torch.finfo(DTYPE).eps)
            return y.requires_grad_(x.requires_grad)

        return self.compared(self.call, tree_map(wide, fresh_arguments(self.sample)))


class NotDifferentiable(Exception):
    """Eager gives nothing that can be differentiated."""


def as_exact(case: Case, got: Any, expected: Any) -> bool:
    """Whether every result is as near to the same computation in float64 as float32 can be expected to come.

    Its largest error is no larger than eager's, or than twice what the answer moves by with half of the inputs' last digits.

    For values that `assert_close` refuses because they cancelled: there eager's own last digits are noise.
    """
    fixed = torch.Generator().manual_seed(SEED)
    try:
        exact = case.exactly()
        moved = [tree_leaves(case.exactly(fixed)) for _ in range(DRAWS)]
    except Exception:  # the op has no float64 form, so nothing speaks for the result
        return False
    for i, (a, b, e) in enumerate(zip(*(tree_leaves(x) for x in (got, expected, exact)), strict=True)):
        if not isinstance(b, torch.Tensor) or not mismatch(a, b, values=True):
            continue
        if b.dtype != DTYPE or a.shape != b.shape or not bool((a.isfinite() & b.isfinite() & e.isfinite()).all()):
            return False
        allowed = max((b - e).abs().max(), 2 * max((draw[i] - e).abs().max() for draw in moved))
        if (a - e).abs().max() > allowed:
            return False
    return True


def first_line(error: BaseException) -> str:
    """The type of an error and what it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"[:300]


def classify(info: Any, sample: Any, backend: str, *, backward: bool = False) -> dict[str, Any]:
    """Class, reason and counts of one sample; see `op_db.py` for the classes."""
    case = Case.of(info, sample, backward=backward)
    if backward and not info.supports_autograd:
        return {"class": "not differentiable", "reason": "the database says so"}
    try:
        expected = case.eager()
    except NotDifferentiable as why:
        return {"class": "not differentiable", "reason": str(why)}
    except Exception as error:  # some ops of the database need a GPU
        return {"class": "eager raises", "reason": first_line(error)}
    try:
        got, counts = case.compiled(backend)
        broken = None
    except Exception as error:  # a backend may raise anything; which layer raised is found out next
        failure = _failure(case, backend, error)
        if failure["class"] == "raises":
            return failure
        try:  # Dynamo may take it in pieces, as it does where the user does not ask for one graph
            got, counts = case.compiled(backend, fullgraph=False)
        except Exception:
            return failure
        broken = failure
    return _judged(info, case, backend, got, expected, counts, broken)


def _judged(
    info: Any, case: Case, backend: str, got: Any, expected: Any, counts: dict[str, Any], broken: dict[str, Any] | None
) -> dict[str, Any]:
    """The record of a sample that ran. `broken` is the record of its refusal as one graph."""
    values = info.name not in UNDEFINED_VALUES
    why = mismatch(got, expected, values=values)
    record = {k: counts[k] for k in ("graphs", "runs", "generated", "library", "fallback", "reasons")}
    if why:
        if mismatch(case.eager(), expected, values=True):
            record["values"], why = "not compared: eager differs from itself", ""
    elif not values:
        record["values"] = f"not compared: {UNDEFINED_VALUES[info.name]}"
    if why and values and as_exact(case, got, expected):
        record["values"], why = f"close, not equal; as near to float64 as float32 can be: {info.name}", ""
    if why:
        return record | {"class": "silently wrong", "reason": why, "layer": _wrong_layer(case, expected)}
    if case.backward and backend == "plait" and not counts["backward runs"]:
        record["gradients"] = "by autograd alone"  # results are views of inputs, which torch replays in front of autograd
    if not counts["runs"]:
        return record | (broken or {"class": "not reached", "layer": "dynamo", "reason": "dynamo left nothing to compile"})
    if backend != "plait":
        return record | {"class": "ran"}
    if broken:
        return record | {"class": "fallback", "reason": f"in pieces, with eager between them: {broken['reason']}"[:300]}
    kind = "fallback" if counts["fallback"] else "library" if counts["library"] else "generated"
    return record | {"class": kind, "reason": "; ".join(counts["reasons"])[:300]}


def _failure(case: Case, backend: str, error: Exception) -> dict[str, Any]:
    """Raises in plait, or not reached because Dynamo or AOTAutograd raise without plait too."""
    for layer, stand_in in (("dynamo", "eager"), ("aot", "aot_eager")):
        if backend == stand_in:
            break
        try:
            case.compiled(stand_in)
        except Exception as same:
            return {"class": "not reached", "layer": layer, "reason": first_line(same)}
    return {"class": "raises", "layer": backend, "reason": first_line(error)}


def _wrong_layer(case: Case, expected: Any) -> str:
    """ "torch" when AOTAutograd's decompositions and functionalisation alone give a wrong answer too, else "backend"."""
    try:
        got, _ = case.compiled("aot_eager")
    except Exception:  # then they give no answer, and the wrong one is the backend's own
        return "backend"
    return "torch" if mismatch(got, expected, values=True) else "backend"


class _Lowered(Exception):
    """Raised in place of Inductor's code generation."""


@contextlib.contextmanager
def lowering_only() -> Iterator[list[Any]]:
    """Let Inductor lower graphs and stop before it generates code; yields the operations of every graph lowered."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    operations: list[Any] = []

    def stop(graph: Any) -> Any:
        operations.append(list(graph.operations))
        raise _Lowered

    with (
        config.patch(force_disable_caches=True, compile_threads=1),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
    ):
        yield operations


def classify_lowering(info: Any, sample: Any) -> dict[str, Any]:
    """Whether Inductor lowers a sample without an ATen fallback (templates and libraries for matmuls and convolutions are
    none): generated, else fallback with the kernels, or not reached."""
    case = Case.of(info, sample, backward=False)
    try:
        case.eager()
    except Exception as error:
        return {"class": "eager raises", "reason": first_line(error)}
    with lowering_only() as graphs:
        try:
            _, counts = case.compiled("inductor")
        except Exception as error:
            if not graphs:
                return {"class": "not reached", "layer": "dynamo", "reason": first_line(error)}
        else:
            if not counts["runs"]:
                return {"class": "not reached", "layer": "dynamo", "reason": "dynamo left nothing to compile"}
    kernels = [x for operations in graphs for x in operations if _is_fallback(x)]
    names = sorted({str(getattr(x, "op_overload", None) or type(x).__name__) for x in kernels})
    return {"class": "fallback" if names else "generated", "reason": "; ".join(names)}


def _is_fallback(operation: Any) -> bool:
    from torch._inductor import ir

    return isinstance(operation, ir.FallbackKernel) or "Fallback" in type(operation).__name__


def serve(backend: str, mode: str) -> None:
    """Answer tasks until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = entries()
    backward = mode == "backward"
    for line in sys.stdin:
        task = json.loads(line)
        info = known[task["op"]]
        found = samples(info, backward=backward)
        plan = list(range(len(found))) if task["every"] else most_different(found, task["most"])
        print(json.dumps({"plan": plan}), file=out)
        for i in plan:
            if i in task["skip"]:
                continue
            print(json.dumps({"start": i}), file=out)
            start = time.perf_counter()
            record = {"op": task["op"], "sample": i, "arguments": describe(found[i])}
            if mode == "lowering":
                record |= classify_lowering(info, found[i])
            else:
                record |= classify(info, found[i], backend, backward=backward)
            record["seconds"] = round(time.perf_counter() - start, 3)
            print(json.dumps({"record": record}), file=out)
        print(json.dumps({"done": task["op"]}), file=out)


if __name__ == "__main__":
    serve(*sys.argv[1:3])
