"""The first bad node: binary search over the cuts of the plan as it is shipped, then inside the kernel that was found.

Nothing is marked as an output that is not one, so fusion and memory stay as they are in the program that went wrong. A cut
after step k runs the plan's first k steps and copies what later steps still read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...codegen.compile import CodegenOptions, CompiledGraph, Trace, compile_graph, trace
from ...codegen.items import AliasItem, CallItem, KernelItem
from ...errors import NothingToFind
from ...ir import Arg, Graph, Node, TensorType, Value
from ...ir.rewrite import became
from ...ir.verify import around
from ...passes.base import Step
from ...runtime.plan import Call, OutputSpec, Plan
from ..decisions import Decisions
from .changed import misplaced
from .compare import Wrong, wrong
from .interpret import replay
from .subject import Build, Subject, run_compiled

CONTEXT = 10
_UNINITIALISED = ("aten.empty", "aten.new_empty")


@dataclass(frozen=True)
class BadNode:
    """The first node that gives something wrong although what it reads is right.

    `stage` is the pass that left it so, "expand" where opening a composite op did, "kernel" for a generated kernel, "call"
    for a call of a torch op, "memory" where a step overwrote a value that is still read (`node` made that value, `kernel` is
    the step that overwrote it). `rules` are those that rewrote the node. `graph` is the graph it lies in, `runs` how many
    partial runs the search took. Where a rule put a value that was there already in the place of another one, `instead` is
    its name, and `node` is the one whose place it took, in the graph before.
    """

    node: Node
    stage: str
    wrong: Wrong | str
    graph: Graph
    kernel: str = ""
    runs: int = 0
    instead: str = ""
    rule: str = ""

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that made the node from others, or replaced it."""
        inside = [r for region in self.node.regions for n in region.nodes for r in n.loc.rules]
        own = (self.rule,) if self.rule else ()
        return tuple(dict.fromkeys((*self.node.loc.rules, *inside, *own)))

    def context(self, lines: int = CONTEXT) -> str:
        """The node among the lines around it."""
        return around(self.graph, self.graph.nodes.index(self.node), lines)

    def __str__(self) -> str:
        if self.instead:
            how = f"{self.node.op.name}, which {self.rule or self.stage} replaced by {self.instead} in pass {self.stage}"
            return "\n".join([f"{how}: {self.wrong} ({self.runs} runs)", *self._frame(), self.context()])
        by = f", made by {', '.join(self.rules)}" if self.rules else ""
        inside = f" in kernel {self.kernel}" if self.kernel else ""
        said = [f"{self.node.op.name} after {self.stage}{by}{inside}: {self.wrong} ({self.runs} runs)"]
        return "\n".join([*said, *self._frame(), self.context()])

    def _frame(self) -> list[str]:
        if self.node.loc.frame is None:
            return []
        file, line, code = self.node.loc.frame
        return [f"  {file}:{line}: {code}"]


@dataclass(frozen=True)
class _References:
    """What values should be: by eager's kernels, and in float64."""

    eager: dict[Value, Any]
    exact: dict[Value, Any]

    @staticmethod
    def of(graph: Graph, inputs: Sequence[Any]) -> _References:
        unset = _unset(graph)
        runs = (replay(graph, inputs, wide=wide).values for wide in (False, True))
        return _References(*({v: t for v, t in values.items() if v not in unset} for values in runs))

    def follow(self, replaced: Mapping[Value, Arg]) -> None:
        """Let what took a value's place be what that value was."""
        for old in replaced:
            new = became(old, replaced)
            if isinstance(new, Value) and old in self.eager and new.type == old.type:
                self.eager.setdefault(new, self.eager[old])
                self.exact.setdefault(new, self.exact[old])

    def extend(self, graph: Graph, inputs: Sequence[Any]) -> None:
        """Let values of which nothing is known be what they are in a graph that was found to be right."""
        if any(v not in self.eager for node in graph.nodes for v in node.results):
            here = _References.of(graph, inputs)
            self.eager.update((v, t) for v, t in here.eager.items() if v not in self.eager)
            self.exact.update((v, t) for v, t in here.exact.items() if v not in self.exact)

    def wrong(self, value: Value, got: Any) -> Wrong | str | None:
        """What is wrong with a value; None where nothing is, or where it is not known what it should be."""
        if value not in self.eager or not isinstance(value.type, TensorType):
            return None
        return wrong(got, self.eager[value], self.exact[value])


def first_bad_node(subject: Subject, build: Build | None = None) -> BadNode:
    """The first bad node of a subject. Raises NothingToFind for one that is right, and what its compilation raises."""
    graph, history = (build.graph, build.history) if build is not None else subject.transform(Decisions())
    found = _after_passes(subject, graph, history)
    if found is None:
        # rows that are left as they are would differ, although nobody reads them
        traced = trace(graph, CodegenOptions(measured=subject.options.tune), lambda stage, _rule, _node: stage != "unread")
        found = _after_opening(traced, subject.inputs) or _in_plan(traced, subject.inputs)
    if found is None:
        subject.comparable()
        raise NothingToFind(name=subject.name)
    return found


# -- graphs -------------------------------------------------------------------------------------------------------------


def _after_passes(subject: Subject, graph: Graph, history: Sequence[Step]) -> BadNode | None:
    """The first bad node of the graph after the passes, run by its ops' references."""
    known = _References.of(subject.graph, subject.inputs)
    for i, step in enumerate(history):
        if not step.changed:
            continue
        if step.numerics.kind == "approximate":
            results = replay(step.after, subject.inputs).results
            if subject.judge(results, history[: i + 1]) is None:  # within what it declared: values are now what it made them
                known = _References.of(step.after, subject.inputs)
                continue
        change = _Change(step.pass_name, step.before, step.replaced, step.by)
        bad = _bad_in(step.after, known, change, subject.inputs)
        if bad is not None:
            return bad
    return _bad_results(subject, graph, history)


def _unset(graph: Graph) -> set[Value]:
    """Uninitialised memory and views of it: it may hold anything."""
    found: set[Value] = set()
    for node in graph.nodes:
        if node.op.name.startswith(_UNINITIALISED) or (node.op.has("view") and node.args[0] in found):
            found.update(node.results)
    return found


@dataclass(frozen=True)
class _Change:
    """What led to a graph: the stage, the graph before, what took the place of which value, and by which rule."""

    stage: str
    before: Graph
    replaced: Mapping[Value, Arg]
    by: Mapping[Value, str]


def _bad_in(graph: Graph, known: _References, change: _Change, inputs: Sequence[Any]) -> BadNode | None:
    values = {**dict(zip(graph.inputs, inputs, strict=True)), **replay(graph, inputs).values}
    other = misplaced(graph, change.replaced, change.by, known.eager, known.exact, values)
    known.follow(change.replaced)
    for i, node in enumerate(graph.nodes):
        if other is not None and i >= other.place:
            break
        for v in node.results:
            what = known.wrong(v, values.get(v))
            if what is not None:
                return BadNode(node, change.stage, what, graph)
    if other is not None and other.old in change.before.producers:
        node = change.before.producers[other.old]
        return BadNode(node, change.stage, other.what, change.before, instead=other.new.hint, rule=other.rule)
    known.extend(graph, inputs)
    return None


def _bad_results(subject: Subject, graph: Graph, history: Sequence[Step]) -> BadNode | None:
    """The node behind the first wrong result of a graph."""
    stage = history[-1].pass_name if history else "captured"
    results = replay(graph, subject.inputs).results
    bound = subject.allowed(history)
    sources: list[Arg] = [*graph.outputs, *(v for _, v in graph.writes)]
    for source, got, eager, exact in zip(sources, results, subject.eager, subject.exact, strict=True):
        what = wrong(got, eager, exact, bound)
        if what is not None and isinstance(source, Value) and source in graph.producers:
            return BadNode(graph.producers[source], stage, what, graph)
    return None


def _after_opening(traced: Trace, inputs: Sequence[Any]) -> BadNode | None:
    """The first bad node of the graph with composite ops opened."""
    known = _References.of(traced.compiled.graph, inputs)
    change = _Change("expand", traced.compiled.graph, traced.opened.replaced, traced.opened.by)
    return _bad_in(traced.scheduled.graph, known, change, inputs)


# -- the plan -----------------------------------------------------------------------------------------------------------


def _in_plan(traced: Trace, inputs: Sequence[Any]) -> BadNode | None:
    graph = traced.scheduled.graph
    known = _References.of(graph, inputs)
    items = [i for i in traced.scheduled.items if not isinstance(i, AliasItem)]
    runs = 0

    def bad(count: int) -> dict[Value, Wrong | str]:
        nonlocal runs
        runs += 1
        values = _values_after(traced, inputs, count)
        found = {v: known.wrong(v, t) for v, t in values.items()}
        return {v: w for v, w in found.items() if w is not None}

    low, high = 0, len(items)
    found = bad(high)
    if not found:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        here = bad(middle)
        if here:
            high, found = middle, here
        else:
            low = middle
    item = items[high - 1]
    made = _made_by(item)
    own = {
        v: w
        for v, w in found.items()
        if traced.ids.get(_root(traced, v)) in {traced.ids.get(_root(traced, m)) for m in made}
    }
    if not own:
        victim = next(iter(found))
        name = item.name if isinstance(item, KernelItem) else item.node.op.name
        node = graph.producers.get(victim) or next(n for n in graph.nodes if victim in n.inputs)
        return BadNode(node, "memory", found[victim], graph, name, runs)
    if isinstance(item, CallItem):
        return BadNode(item.node, "call", next(iter(own.values())), graph, "", runs)
    return _in_kernel(item, graph, known, own, runs)


def _made_by(item: KernelItem | CallItem) -> Sequence[Value]:
    if isinstance(item, CallItem):
        return item.node.results
    return item.writes


def _root(traced: Trace, v: Value) -> Value:
    aliases = {i.value: i.of for i in traced.scheduled.items if isinstance(i, AliasItem)}
    while v in aliases:
        v = aliases[v]
    return v


def _homes(stored: Mapping[Value, tuple[Value, int]], v: Value) -> list[Value]:
    """What a value is a part of, what that is a part of, and so on."""
    found: list[Value] = []
    while v in stored:
        v, _ = stored[v]
        found.append(v)
    return found


def _values_after(traced: Trace, inputs: Sequence[Any], count: int) -> dict[Value, Any]:
    """What later steps and the caller read once the first `count` steps have run."""
    plan, ids = traced.compiled.plan, traced.ids
    items = [i for i in traced.scheduled.items if not isinstance(i, AliasItem)]
    made = {v for item in items[:count] for v in _made_by(item)}
    wanted = {_root(traced, v) for item in items[count:] for v in _read_by(item)}
    wanted |= {_root(traced, v) for v in traced.scheduled.graph.results}
    parts = traced.scheduled.stored
    wanted |= {v for v in parts if not wanted.isdisjoint(_homes(parts, v))}
    specs = {s.id: s for s in plan.values}
    chosen = [
        v for v in made if (v in wanted or _root(traced, v) in wanted) and v in ids and specs[ids[v]].storage != "scalar"
    ]
    chosen = [v for v in chosen if isinstance(v.type, TensorType)]
    first = max(specs, default=0) + 1
    copies = tuple(
        Call("aten.clone.default", ({"v": ids[v]},), (), (first + i,), "internal", "copied at a cut", "")
        for i, v in enumerate(chosen)
    )
    places = tuple(replace(specs[ids[v]], id=first + i, storage="handle", ref=None, offset=0) for i, v in enumerate(chosen))
    cut: Plan = replace(
        plan,
        steps=(*plan.steps[:count], *copies),
        values=(*plan.values, *places),
        outputs=tuple(OutputSpec("value", ref=first + i) for i in range(len(chosen))),
    )
    compiled: CompiledGraph = replace(traced.compiled, plan=cut)
    results = run_compiled(compiled, inputs)[: len(chosen)]
    return dict(zip(chosen, results, strict=True))


def _read_by(item: KernelItem | CallItem) -> Sequence[Value]:
    if isinstance(item, CallItem):
        return item.node.inputs
    return item.reads


# -- inside a kernel ----------------------------------------------------------------------------------------------------


def _in_kernel(item: KernelItem, graph: Graph, known: _References, own: Mapping[Value, Wrong | str], runs: int) -> BadNode:
    """The first bad node among those that one kernel computes: compiled alone, all of their values as results; where that
    hides the fault, each with what it needs only."""
    members = set(item.nodes)
    nodes = [n for n in graph.nodes if n in members]
    inside = {v for n in nodes for v in n.results}
    read = list(dict.fromkeys(v for n in nodes for v in n.inputs if v not in inside))
    given = [known.eager[v] for v in read]
    results = [v for n in nodes for v in n.results]

    def judge(wanted: Sequence[Value], among: Sequence[Node]) -> tuple[Value, Wrong | str] | None:
        part = Graph("kernel", tuple(read), tuple(among), tuple(wanted), (), symbols=graph.symbols, constants={})
        exact = replay(part, given, wide=True)
        eager = replay(part, given)
        try:
            got = run_compiled(compile_graph(part), given)
        except Exception as error:  # the fault may break a part of the kernel where it only bends the whole
            return None if len(wanted) > 1 else (wanted[0], f"alone it raises {type(error).__name__}: {error}")
        for v, x in zip(wanted, got, strict=True):
            what = _References(dict(eager.values), dict(exact.values)).wrong(v, x)
            if what is not None:
                return v, what
        return None

    found = judge(results, nodes)
    for end in () if found is not None else range(1, len(nodes) + 1):
        found = judge(list(nodes[end - 1].results), _needed(nodes[:end]))
        runs += 1
        if found is not None:
            break
    if found is None:  # only the kernel as a whole goes wrong: name what it stores wrong
        value, what = next(iter(own.items()))
    else:
        value, what = found
    node = graph.producers.get(value) or nodes[-1]
    return BadNode(node, "kernel", what, graph, item.name, runs + 1)


def _needed(nodes: Sequence[Node]) -> list[Node]:
    """The nodes that the last one reads, directly or not, and itself."""
    keep, wanted = [nodes[-1]], set(nodes[-1].inputs)
    for node in reversed(nodes[:-1]):
        if any(v in wanted for v in node.results):
            keep.append(node)
            wanted.update(node.inputs)
    return keep[::-1]
