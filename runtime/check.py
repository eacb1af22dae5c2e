"""The static checker: proves that a plan is safe to run, or says why not.

It proves that every name exists, that values are written before they are read and read before they are overwritten, that
views and arena values lie inside their memory, that two arena values which share bytes are never alive together, that steps
on different streams which touch the same memory are ordered by waits, that collectives are waited for and what they are
given stays as it is until then, and that nothing in the arena leaves the call. Writes are tracked per value, not per
element: a value that is computed in parts, which are views of it, counts as written where they cover it. Sizes that depend
on symbols count as ordered only where `proof.py` proves it.

This module holds the entry, names and symbols; `dataflow.py` what happens in which order; `overlap.py` the memory;
`extents.py` which bytes values take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import UnsafePlan
from . import sizes
from .calls import call_templates, template_parts
from .dataflow import Dataflow
from .layout import Layout, argument_values, step_values
from .overlap import memory_problems
from .plan import Call, KernelSpec, Launch, Plan, SizeExpr, ValueSpec


def check(plan: Plan) -> None:
    """Raise UnsafePlan with the first reason why `plan` must not run; OpNotAvailable for an op that torch lacks."""
    for why in problems(plan):
        raise UnsafePlan(why=why)


def problems(plan: Plan) -> Iterator[str]:
    """All reasons why `plan` must not run, those of its regions included. Later checks need the earlier ones to pass."""
    found = [*_value_names(plan), *_step_names(plan)]
    if not found:
        try:
            layout = Layout(plan)
            for id in layout.specs:
                layout.place(id)
        except UnsafePlan as error:
            yield str(error.fields["why"])
            return
        flow = Dataflow(layout)
        found = [*_inputs(layout), *_symbols(layout), *flow.problems]
        if not found:
            found = list(memory_problems(layout, flow))
    yield from found
    for name, region in plan.regions:
        yield from (f"region {name}: {why}" for why in problems(region))


def _value_names(plan: Plan) -> Iterator[str]:
    """Values, symbols and outputs whose references do not exist or do not fit."""
    specs = {v.id: v for v in plan.values}
    named = {"value": [v.id for v in plan.values], "kernel": [k.name for k in plan.kernels]}
    named |= {"region": [name for name, _ in plan.regions]}
    named |= {"symbol": [*(s.name for s in plan.symbols), *(name for name, _ in plan.sizes)]}
    for kind, names in named.items():
        yield from (f"{kind} {name} is defined twice" for name, count in Counter(names).items() if count > 1)
    for v in plan.values:
        if len(v.shape) != len(v.strides):
            yield f"value {v.id} has {len(v.shape)} sizes and {len(v.strides)} strides"
        if v.storage == "view" and v.ref not in specs:
            yield f"value {v.id} is a view of {v.ref}, which does not exist"
        if v.storage == "input":
            spec = plan.inputs[v.ref] if isinstance(v.ref, int) and 0 <= v.ref < len(plan.inputs) else None
            if spec is None or spec.kind != "tensor":
                yield f"value {v.id} is input {v.ref}, which is not a tensor of the plan"
    for s in plan.symbols:
        if s.input >= 0:
            yield from _symbol_source(plan, s.name, s.input, s.dim)
    for o in plan.outputs:
        if o.kind == "value" and o.ref not in specs:
            yield f"an output is value {o.ref}, which does not exist"
        if o.kind == "size" and o.expr is None:
            yield "an output is a size without an expression"


def _symbol_source(plan: Plan, name: str, number: int, dim: int | None) -> Iterator[str]:
    if number >= len(plan.inputs):
        yield f"symbol {name} is bound by input {number}, which does not exist"
    elif dim is None and plan.inputs[number].kind not in ("int", "bool"):
        yield f"symbol {name} is bound by input {number}, which is of kind {plan.inputs[number].kind}"
    elif dim is not None and not 0 <= dim < len(plan.inputs[number].shape):
        yield f"symbol {name} is bound by dimension {dim} of input {number}, which does not exist"


def _step_names(plan: Plan) -> Iterator[str]:
    """Steps whose values, kernels, regions or waits do not exist."""
    ids = {v.id for v in plan.values}
    kernels = {k.name: k for k in plan.kernels}
    regions = {name for name, _ in plan.regions}
    for number, step in enumerate(plan.steps):
        for id in step_values(step):
            if id not in ids:
                yield f"step {number} uses value {id}, which does not exist"
        if isinstance(step, Launch):
            yield from _launch_names(number, step, kernels)
        else:
            for name in template_parts(call_templates(step), "g"):
                if name not in regions:
                    yield f"step {number} uses the region {name!r}, which does not exist"


def _launch_names(number: int, step: Launch, kernels: Mapping[str, KernelSpec]) -> Iterator[str]:
    kernel = kernels.get(step.kernel)
    if kernel is None:
        yield f"step {number} launches the kernel {step.kernel!r}, which does not exist"
    elif len(kernel.access) != len(step.buffers):
        yield f"step {number} gives {len(step.buffers)} buffers to kernel {step.kernel}, which has {len(kernel.access)}"
    for w in step.waits:
        if not 0 <= w < number:
            yield f"step {number} waits for step {w}, which does not come before it"


def _inputs(layout: Layout) -> Iterator[str]:
    """Inputs over sizes that other inputs do not bind, or that are addressed as they may not lie in memory."""
    bound = {s.name for s in layout.plan.symbols if s.input >= 0}
    for spec in layout.plan.inputs:
        exprs = [e for e in (*spec.shape, *(spec.strides or ()), spec.expr) if isinstance(e, (int, str, list))]
        for name in sorted({name for e in exprs for name in sizes.symbols(e)} - bound):
            yield f"input {spec.name} needs the symbol {name}, which no input binds"
    addressed = {layout.place(b)[0] for s in layout.plan.steps if isinstance(s, Launch) for b in s.buffers}
    addressed |= {layout.place(v.id)[0] for v in layout.plan.values if v.storage == "view"}
    for v in layout.plan.values:
        if v.storage != "input":
            continue
        spec = layout.plan.inputs[layout.index[v.id]]
        if (v.dtype, tuple(v.shape)) != (spec.dtype, tuple(spec.shape)):
            yield f"value {v.id} and input {spec.name} differ in dtype or shape"
        if v.id not in addressed:
            continue
        if spec.strides is None:
            yield f"value {v.id} is addressed, but input {spec.name} may have any strides"
        elif tuple(v.strides) != tuple(spec.strides):
            yield f"value {v.id} and input {spec.name} differ in strides"


def _symbols(layout: Layout) -> Iterator[str]:
    """Steps and outputs that need the value of a symbol before it is bound."""

    def late(exprs: tuple[SizeExpr, ...], stage: int, who: str) -> Iterator[str]:
        for name in dict.fromkeys(name for e in exprs for name in sizes.symbols(e)):
            if name not in layout.stages:
                yield f"{who} needs the symbol {name}, which nothing binds"
            elif layout.stages[name] > stage:
                yield f"{who} needs the symbol {name} before step {layout.stages[name] - 1} binds it"

    def geometry(v: ValueSpec) -> tuple[SizeExpr, ...]:
        own = (*v.shape, *v.strides, v.offset)
        return (*own, *geometry(layout.specs[v.ref])) if v.storage == "view" else own  # type: ignore[index]

    plan = layout.plan
    for number, step in enumerate(plan.steps):
        if isinstance(step, Launch):
            exprs, ids = tuple(step.sizes), list(step.buffers)
        else:
            exprs, ids = tuple(template_parts(call_templates(step), "e")), _placed(layout, step)
        for id in dict.fromkeys(ids):
            exprs += geometry(layout.specs[id])
        yield from late(exprs, number, f"step {number}")
    yield from late((plan.arena,), 0, "the arena")
    end = len(plan.steps)
    for o in plan.outputs:
        exprs = (o.expr,) if o.kind == "size" and o.expr is not None else ()
        if o.kind == "value" and layout.specs[o.ref].storage in ("view", "fresh"):  # type: ignore[index]
            exprs = geometry(layout.specs[o.ref])  # type: ignore[index]
        yield from late(exprs, end, "an output")
    for expr, message in plan.asserts:
        yield from late((expr,), end, f"the assertion {message!r}")


def _placed(layout: Layout, step: Call) -> list[int]:
    """The values of a call whose tensors are made from the plan's sizes."""
    outs = [o for o in step.outs if o is not None]
    touched = [*argument_values(step), *outs]
    return [id for id in touched if layout.specs[id].storage in ("view", "arena", "fresh")]
