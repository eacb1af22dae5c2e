"""A forward cut into regions: frozen layers, then stages, each a `plait.call` of the graph that is left.

before:  t = encode(tokens); h1 = first(x, t); h2 = second(h1, t); loss = last(h2, h1)
after:   t, = call(frozen_0, [tokens]); h1, = call(stage_0, [x, t]); loss, = call(stage_1, [h1, t])
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import CannotStage
from ...ir import Arg, Builder, Graph, Node, TensorType, Value, flatten
from ...ir.graph import map_arg
from .parts import Parts

FROZEN, STAGE = "frozen", "stage"


@dataclass(frozen=True)
class Regions:
    """A graph that calls regions; the nodes of the old graph in each of them, in order, and what its values became."""

    graph: Graph
    nodes: tuple[tuple[Node, ...], ...]
    became: Mapping[Value, Value]


def regions(parts: Parts, frozen: Sequence[Sequence[Node]], stages: Sequence[Sequence[Node]]) -> Regions:
    """The graph in which each group of nodes is a region; free nodes are computed in every region that reads them, except
    for constants, which are operands: a region has none of its own."""
    graph = parts.graph
    groups = [*((f"{FROZEN}_{i}", list(nodes)) for i, nodes in enumerate(frozen)),
              *((f"{STAGE}_{i}", list(nodes)) for i, nodes in enumerate(stages))]  # fmt: skip
    owner = {v: number for number, (_, nodes) in enumerate(groups) for n in nodes for v in n.outputs}
    wanted = [v for v in (*flatten(graph.outputs), *(w for _, w in graph.writes)) if isinstance(v, Value)]
    for v in wanted:  # what only free nodes compute belongs to the last stage
        if v not in owner and v in graph.producers:
            nodes = groups[-1][1]
            nodes += [n for n in _with_free(parts, [], [v]) if n not in nodes]
            order = {n: i for i, n in enumerate(graph.nodes)}
            nodes.sort(key=order.__getitem__)
            owner.update((o, len(groups) - 1) for n in nodes for o in n.outputs)
    read: set[Value] = set(wanted)
    full: list[tuple[str, list[Node]]] = []
    for name, nodes in groups:
        mine = _with_free(parts, nodes, ())
        made = {v for n in mine for v in n.outputs}
        read |= {v for n in mine for v in n.inputs if v not in made}
        full.append((name, mine))
    builder = Builder(graph.replace(nodes=()))
    for node in graph.nodes:
        if node.op.name == "plait.constant" and node.out in read:
            builder.append(node)
    kept: list[tuple[Node, ...]] = []
    became: dict[Value, Value] = {}
    for number, (name, mine) in enumerate(full):
        outputs = tuple(v for n in mine for v in n.results if v in read and owner.get(v) == number)
        region, operands = extract(graph, mine, outputs, name)
        if not outputs:
            continue
        results = builder.call("plait.call", region, tuple(builder.resolve(v) for v in operands), loc=mine[-1].loc)
        became.update(zip(outputs, results, strict=True))
        builder.subst.update(became)
        kept.append(tuple(mine))
    return Regions(builder.finish(), tuple(kept), became)


def _with_free(parts: Parts, nodes: Iterable[Node], values: Iterable[Value]) -> list[Node]:
    """Nodes, and the free ones that they or values need, in the order of the graph."""
    wanted = set(nodes)
    todo = [v for n in wanted for v in n.inputs] + list(values)
    while todo:
        node = parts.graph.producers.get(todo.pop())
        if node is not None and node in parts.free and node not in wanted and node.op.name != "plait.constant":
            wanted.add(node)
            todo += node.inputs
    return [n for n in parts.graph.nodes if n in wanted]


def extract(
    graph: Graph, nodes: Sequence[Node], outputs: Sequence[Arg], name: str, inputs: Sequence[Value] | None = None
) -> tuple[Graph, list[Value]]:
    """A graph of some nodes, with values of its own, and the values of the old graph that its inputs stand for: those that
    were given, or what it reads, in the order in which it does."""
    made = {v for n in nodes for v in n.outputs}
    operands = list(dict.fromkeys(v for n in nodes for v in n.inputs if v not in made)) if inputs is None else list(inputs)
    fresh = {v: Value(v.type, v.hint) for v in operands}
    constants = {n.args[0]: graph.constants[n.args[0]] for n in nodes if n.op.name == "plait.constant"}
    shell = graph.replace(name=name, inputs=tuple(fresh.values()), nodes=(), outputs=(), writes=(), constants=constants)
    builder = Builder(shell)
    new: dict[Value, Value] = dict(fresh)

    def moved(arg: Arg) -> Arg:
        return new[arg] if isinstance(arg, Value) else arg

    for node in nodes:
        outs = tuple(Value(v.type, v.hint) for v in node.outputs)
        builder.append(Node(node.op, tuple(map_arg(a, moved) for a in node.args), outs, (), node.loc))
        new.update(zip(node.outputs, outs, strict=True))
    return builder.finish(outputs=tuple(moved(v) for v in outputs)), operands


def check(parts: Parts, stages: Sequence[Sequence[Node]], names: Mapping[Value, str]) -> None:
    """Raise CannotStage for what cannot be cut so: a buffer that one stage writes and another reads, and sizes or other
    numbers that would have to travel."""
    graph = parts.graph
    at = {n: s for s, nodes in enumerate(stages) for n in nodes}
    for i, v in graph.writes:
        target, writer = graph.inputs[i], graph.producers.get(v)
        users = {at[n] for n in graph.users.get(target, ()) if n in at} | ({at[writer]} if writer in at else set())
        if len(users) > 1:
            what = f"buffer {names.get(target, target.hint)!r}, which steps write, is used by stages {sorted(users)}"
            raise CannotStage(why=what, way="cut elsewhere, so that one stage holds all layers that use it")
    for s, nodes in enumerate(stages):
        for v in {v for n in nodes for v in n.inputs}:
            maker = graph.producers.get(v)
            if maker in at and at[maker] < s and not isinstance(v.type, TensorType):
                raise CannotStage(why=f"{v.hint}, a number, would have to travel to stage {s}", way="cut elsewhere")


def shared_inputs(parts: Parts, stages: Sequence[Sequence[Node]], trained: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Trained inputs that several stages read: their numbers, and the stages."""
    found: dict[int, tuple[int, ...]] = {}
    for i in trained:
        users = set(parts.graph.users.get(parts.graph.inputs[i], ()))
        stages_of = tuple(s for s, nodes in enumerate(stages) if any(n in users for n in nodes))
        if len(stages_of) > 1:
            found[i] = stages_of
    return found


__all__ = ["FROZEN", "STAGE", "Regions", "check", "extract", "regions", "shared_inputs"]
