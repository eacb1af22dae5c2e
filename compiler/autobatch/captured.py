"""Captured graphs with control flow as programs for one instance: what is straight-line becomes blocks, and regions become
branches and loops of Python, on values that instances wait for.

So instances that take one branch run it together, and those that go on with a loop are the only ones that it runs for;
nothing runs under a mask. Graphs come from `torch.export` or Dynamo; regions are `torch.cond`, `while_loop` and `scan`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import RegionNotBatched
from .record import is_recording
from .sites import Site

REGIONS = ("cond", "while_loop", "scan")

Values = Sequence[Any]
Step = Callable[[dict[str, Any]], None]


class Captured(nn.Module):
    """A captured graph that runs one instance, recording where a batch is recorded. `source` is an ExportedProgram, or a
    GraphModule whose regions are graphs below it. Raises RegionNotBatched."""

    def __init__(self, source: ExportedProgram | fx.GraphModule) -> None:
        super().__init__()
        graph = source.module(check_guards=False) if isinstance(source, ExportedProgram) else source
        assert isinstance(graph, fx.GraphModule)
        self.graph_module = graph
        self.renew()
        codegen: Any = graph.graph._codegen
        self.specs: Any = getattr(codegen, "pytree_info", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's results for one instance."""
        if self.specs is None:
            found = self.program(args)
            return found[0] if self.program.single else tuple(found)
        given, spec = tree_flatten((args, kwargs))
        if not _same_structure(spec, self.specs.in_spec):
            raise TypeError(f"the graph was captured with arguments {self.specs.in_spec}, not {spec}")
        found = self.program(given)
        return tree_unflatten(found, self.specs.out_spec)

    def renew(self) -> None:
        """Make all blocks anew: what parameters are like has changed."""
        self.program = _Program(self.graph_module)

    def sites(self) -> list[Site]:
        """Every place that runs a block."""
        return self.program.sites


def _same_structure(a: TreeSpec, b: TreeSpec) -> bool:
    return a == b or str(a) == str(b)


@dataclass(frozen=True)
class _Segment:
    """Nodes between regions, from the values that they read to those that are read later."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Program:
    """The steps of one graph. Calling it takes and gives flat values."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        nodes = list(graph.graph.nodes)
        self.inputs = [n.name for n in nodes if n.op == "placeholder"]
        (output,) = (n for n in nodes if n.op == "output")
        self.output: Any = output.args[0]
        self.single = isinstance(self.output, fx.Node)
        self.held = {n.name: _attribute(graph, n.target) for n in nodes if n.op == "get_attr"}
        self.sites: list[Site] = []
        self.steps: list[Step] = []
        run: list[fx.Node] = []
        for n in nodes:
            if n.op in ("placeholder", "get_attr", "output") or (n.op == "call_module" and not n.users):  # checks of inputs
                continue
            name = _region(n)
            if name is None and not _is_part(n):
                run.append(n)
                continue
            self._segment(run)
            run = []
            self.steps.append(self._part(n) if name is None else getattr(self, f"_{name}")(n))
        self._segment(run)

    def __call__(self, given: Values) -> list[Any]:
        values = dict(self.held)
        values.update(zip(self.inputs, given, strict=True))
        for step in self.steps:
            step(values)
        return [self._value(x, values) for x in ((self.output,) if self.single else self.output)]

    @staticmethod
    def _value(x: Any, values: dict[str, Any]) -> Any:
        return values[x.name] if isinstance(x, fx.Node) else x

    # -- straight-line code ---------------------------------------------------------------------------------------------

    def _segment(self, nodes: list[fx.Node]) -> None:
        if not nodes:
            return
        own = {n.name for n in nodes}
        read = dict.fromkeys(a.name for n in nodes for a in n.all_input_nodes if a.name not in own)
        inputs = tuple(r for r in read if not isinstance(self.held.get(r), nn.Module | Tensor))
        outputs = tuple(n.name for n in nodes if any(u.name not in own for u in n.users))
        site = _site(self.graph, _Segment(tuple(nodes), inputs, outputs))
        self.sites.append(site)

        def step(values: dict[str, Any]) -> None:
            run = site.cell.cell_contents if is_recording() else site.fn
            made = run(*[values[i] for i in inputs])
            values.update(zip(outputs, made if len(outputs) != 1 else (made,), strict=True))

        if outputs:
            self.steps.append(step)

    def _part(self, n: fx.Node) -> Step:
        whole, k = n.args

        def step(values: dict[str, Any]) -> None:
            values[n.name] = self._value(whole, values)[k]

        return step

    # -- regions --------------------------------------------------------------------------------------------------------

    def _below(self, x: Any) -> _Program:
        graph = self.held[x.name]
        if not isinstance(graph, fx.GraphModule):
            raise RegionNotBatched(region=x.name, why="its graph is not one of the captured graphs")
        made = _Program(graph)
        self.sites += made.sites
        return made

    def _cond(self, n: fx.Node) -> Step:
        predicate, yes, no, *rest = n.args
        branches = self._below(no), self._below(yes)
        operands = rest[0] if rest else ()

        def step(values: dict[str, Any]) -> None:
            which = bool(self._value(predicate, values))
            values[n.name] = tuple(branches[which]([self._value(o, values) for o in operands]))  # type: ignore[union-attr]

        return step

    def _while_loop(self, n: fx.Node) -> Step:
        condition, body = self._below(n.args[0]), self._below(n.args[1])
        carried, more = n.args[2], n.args[3] if len(n.args) > 3 else ()

        def step(values: dict[str, Any]) -> None:
            state = [self._value(c, values) for c in carried]  # type: ignore[union-attr]
            fixed = [self._value(x, values) for x in more]  # type: ignore[union-attr]
            while bool(condition([*state, *fixed])[0]):
                state = body([*state, *fixed])
            values[n.name] = tuple(state)

        return step

    def _scan(self, n: fx.Node) -> Step:
        body = self._below(n.args[0])
        first, over, more = (list(x) for x in (*n.args[1:], ())[:3])  # type: ignore[arg-type]

        def step(values: dict[str, Any]) -> None:
            state = [self._value(x, values) for x in first]
            fixed = [self._value(x, values) for x in more]
            columns = [torch.unbind(self._value(x, values), 0) for x in over]
            rows = []
            for row in zip(*columns, strict=True):
                made = body([*state, *row, *fixed])
                state = made[: len(state)]
                rows.append(made[len(state) :])
            values[n.name] = (*state, *(torch.stack(column) for column in zip(*rows, strict=True)))

        return step


def _region(n: fx.Node) -> str | None:
    """The name of the region op that a node calls; None for other nodes. Raises RegionNotBatched for regions of other
    kinds."""
    if n.op == "call_module":
        raise RegionNotBatched(region=n.name, why="it calls a module that is not traced")
    if not isinstance(n.target, torch._ops.HigherOrderOperator):
        return None
    name = n.target.name()
    if name not in REGIONS:
        raise RegionNotBatched(region=n.name, why=f"{name} regions are not batched; cond, while_loop and scan are")
    return name


def _is_part(n: fx.Node) -> bool:
    """Whether a node picks one result of a region."""
    return n.target is operator.getitem and isinstance(n.args[0], fx.Node) and _region(n.args[0]) is not None


def _attribute(graph: fx.GraphModule, path: Any) -> Any:
    found: Any = graph
    for part in str(path).split("."):
        found = getattr(found, part)
    return found


def _site(graph: fx.GraphModule, segment: _Segment) -> Site:
    """A place that runs a segment as a block."""
    made = fx.Graph()
    new = {name: made.placeholder(name) for name in segment.inputs}
    for n in segment.nodes:
        for a in n.all_input_nodes:
            if a.name not in new:  # a parameter or a buffer
                new[a.name] = made.get_attr(str(a.target))
        new[n.name] = made.node_copy(n, lambda a: new[a.name])
    results = tuple(new[o] for o in segment.outputs)
    made.output(results[0] if len(results) == 1 else results)
    code = fx.GraphModule(graph, made)

    def block(*values: Any) -> Any:
        return code(*values)

    return Site(block, _line(segment.nodes[0]))


def _line(n: fx.Node) -> str:
    """Where in the user's program a node comes from, as file:line."""
    trace = n.stack_trace or ""
    for line in reversed(trace.splitlines()):
        if 'File "' in line and ", line " in line:
            file, _, rest = line.partition('File "')[2].partition('", line ')
            return f"{file}:{rest.partition(',')[0]}"
    return "a captured graph"
