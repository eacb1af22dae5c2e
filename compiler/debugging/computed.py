"""From a node of any graph of a compilation to the kernel that computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...codegen.compile import Trace
from ...codegen.items import AliasItem, CallItem, KernelItem
from ...ir import Arg, Graph, Node, Value
from ...ir.rewrite import became
from ...passes.base import Step


@dataclass(frozen=True)
class Computed:
    """What computes a value in the end.

    `kind` is "kernel" (a generated one: `name`, `source`), "library", "fallback" or "internal" (a call of the torch op
    `name`; `reason` says why), "view" (no work: `name` is the op), "constant", "input", or "nothing" (`reason` says why).
    `node` is the node that the value became, None where there is none; `others` are more kernels that compute it again.
    """

    kind: str
    name: str = ""
    source: str = ""
    reason: str = ""
    node: Node | None = None
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        again = f" (also in {', '.join(self.others)})" if self.others else ""
        said = f"{self.kind} {self.name}{again}" + (f": {self.reason}" if self.reason else "")
        return f"{said}\n{self.source}" if self.source else said


def computed(value: Value, later: Sequence[Step], traced: Trace) -> Computed:
    """What computes a value. `later` are the steps after the graph that it lies in."""
    now: Arg = value
    for step in later:
        if isinstance(now, Value):
            now = _follow(now, step.before, step.after, step.became)
    if isinstance(now, Value):
        opened = traced.opened.replaced
        now = _follow(now, traced.compiled.graph, traced.scheduled.graph, lambda v: became(v, opened))
    if now is None:
        return Computed("nothing", reason="nobody reads it: it was dropped")
    if not isinstance(now, Value):
        return Computed("constant", repr(now))
    return _item(now, traced)


def _follow(value: Value, before: Graph, after: Graph, became: Callable[[Value], Arg]) -> Arg:
    """What a value is in the next graph. One that went with the rewrite of what read it is part of that; None: dropped."""
    there = {*after.inputs, *after.producers}
    seen, todo = {value}, [value]
    while todo:
        v = todo.pop(0)
        new = became(v)
        if not isinstance(new, Value) or new in there:
            return new
        readers = [r for n in before.users.get(v, ()) for r in n.results]
        todo += [r for r in readers if r not in seen]
        seen.update(readers)
    return None


def _item(value: Value, traced: Trace) -> Computed:
    graph = traced.scheduled.graph
    node = graph.producers.get(value)
    if node is None:
        return Computed("input", value.hint)
    items = traced.scheduled.items
    kernels = list(
        dict.fromkeys(i.name for i in items if isinstance(i, KernelItem) and any(value in n.outputs for n in i.nodes))
    )
    if kernels:
        name, *others = kernels
        return Computed("kernel", name, traced.compiled.sources[name], node=node, others=tuple(others))
    for i in items:
        if isinstance(i, CallItem) and value in i.node.outputs:
            return Computed(i.kind, i.node.op.name, reason=i.reason, node=node)
    if node.op.name == "plait.constant":
        return Computed("constant", str(node.args[0]), node=node)
    root = next((i.of for i in items if isinstance(i, AliasItem) and i.value is value), None)
    if root is not None:
        return Computed("view", node.op.name, reason=f"the memory of {root.hint or 'another value'}", node=node)
    return Computed("nothing", reason="only its sizes matter", node=node)
