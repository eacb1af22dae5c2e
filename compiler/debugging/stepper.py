"""Stepping through a compilation.

dbg = plait.debug(model, (x,))
dbg.until("simplify")
print(dbg.graph, dbg.diff())
print(dbg.values("add"), dbg.source("add"), dbg.kernel("add"))
print(*dbg.why("pow-two", "pow_1"), sep="\\n")
model = dbg.edit(str(dbg.graph).replace("aten.tanh", "aten.sin")).resume()
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...codegen.compile import Trace, compile_graph, trace
from ...errors import NothingAhead, UnknownNode
from ...ir import Graph, Node, Reason, Value
from ...ir.text import value_names
from ...passes.base import Step
from ...runtime.structure import Structure
from ..api import CompiledModel
from ..decisions import Decisions
from ..export import Exported
from ..pipelines import Session
from ..plans import codegen_options
from .computed import Computed, computed
from .edit import edit
from .history import find_step, step_diff
from .interpret import Replay, check_inputs, interpret, replay
from .ledger import Entry, ledger
from .subject import Subject
from .walk import Walk
from .why import why


@dataclass(frozen=True)
class Source:
    """The user's line behind a node: file, line number, its text, the module's path, and the rules that made the node from
    others on its way. `file` is "" where nothing is known."""

    file: str
    line: int
    code: str
    module: str
    rules: tuple[str, ...]

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: {self.code}" if self.file else "no source line is known"
        module = f" (in {self.module})" if self.module else ""
        return place + module + (f", made by {', '.join(self.rules)}" if self.rules else "")


class Debugger:
    """A compilation that waits between passes. `subject` is what is compiled, `history` the steps so far.

    Nodes are named as `graph` prints them; a name that is not in it any more means the last graph that had it. A Node or a
    Value does as well.
    """

    def __init__(self, subject: Subject, exported: Exported | None = None) -> None:
        self.subject = subject
        self._exported = exported
        self._structure = Structure(exported.in_tree, exported.out_tree) if exported is not None else None
        self._session = Session(subject.name, subject.options)
        self._walk = Walk(subject.graph, subject.level, subject.inputs, self._session)
        self._replays: dict[Graph, Replay] = {}
        self._traced: tuple[Graph, list[Step], Trace] | None = None

    def __repr__(self) -> str:
        return f"<Debugger {self.subject.name}: after {len(self.history)} steps, ahead {', '.join(self.ahead) or 'nothing'}>"

    # -- going on -----------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The graph as it is now."""
        return self._walk.graph

    @property
    def history(self) -> tuple[Step, ...]:
        """The steps so far, edits among them."""
        return tuple(self._walk.history)

    @property
    def ahead(self) -> list[str]:
        """The passes to come; "lower" is where the graph is traced again below autograd."""
        return self._walk.ahead

    @property
    def next(self) -> str | None:
        """The pass that `step` will run, None at the end."""
        return next(iter(self.ahead), None)

    def step(self) -> Step:
        """Run the next pass. Raises NothingAhead, and what the pass raises; it is then still the next."""
        if self._walk.done:
            raise NothingAhead(name="any more", ahead="none")
        return self._walk.step()

    def until(self, name: str) -> Step:
        """Run passes up to and including the next one of that name. Raises NothingAhead."""
        if name not in self.ahead:
            raise NothingAhead(name=repr(name), ahead=", ".join(self.ahead) or "none")
        while True:
            step = self.step()
            if step.pass_name == name:
                return step

    def edit(self, change: str | Callable[[Graph], Graph]) -> Debugger:
        """Go on with another graph: the edited text, or what a function makes of the graph. It becomes a step of its own.

        Raises BadText, UnknownOp, InvalidGraph, and EditRefused where inputs or results get other types.
        """
        known = {name: t for g in self._graphs() for name, t in g.constants.items()}
        step = edit(self.graph, change, {**known, **self.graph.constants})
        self._walk.graph = step.after
        self._walk.history.append(step)
        return self

    def resume(self) -> Any:
        """Run the passes that are left and generate code: a `CompiledModel` for a model, for a graph a callable on flat
        inputs. Raises what `plait.compile` raises."""
        self._walk.finish()
        if self._exported is None:
            options = codegen_options(self.subject.options, self.graph)
            return compile_graph(self.graph, options, self._session.decisions).executable_checking()
        return CompiledModel(self._exported.copied(), self.graph, self.history, self._session)

    # -- looking ------------------------------------------------------------------------------------------------------

    def diff(self, which: int | str = -1) -> str:
        """What a step changed, as a unified diff of the graph's text; "" for nothing. Raises UnknownStep."""
        return step_diff(find_step(self.history, which))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The present graph's result on these arguments, by default the saved inputs, by the ops' references. For a model
        it is nested like the model's; for a graph the flat outputs, then the new values of written inputs."""
        if self._structure is None or self._exported is None:
            check_inputs(self.graph, args or self.subject.inputs)
            return interpret(self.graph, args or self.subject.inputs)
        inputs = [*self._exported.held, *self._structure.flatten(args, kwargs)] if args or kwargs else self.subject.inputs
        check_inputs(self.graph, inputs)
        return self._structure.unflatten(interpret(self.graph, inputs)[: len(self.graph.outputs)])

    def node(self, name: str | Node | Value) -> Node:
        """The node that makes a value. Raises UnknownNode."""
        value, graph = self._found(name)
        if value not in graph.producers:
            raise UnknownNode(name=value.hint, why="it is an input", near=_nearest("", graph))
        return graph.producers[value]

    def values(self, node: str | Node | Value) -> Any:
        """What a value is on the saved inputs, by the ops' references; for a Node with several results a tuple of them."""
        value, graph = self._found(node)
        if graph not in self._replays:
            self._replays = {graph: replay(graph, self.subject.inputs)}  # the values of one graph are enough to hold
        values = {**dict(zip(graph.inputs, self.subject.inputs, strict=True)), **self._replays[graph].values}
        if isinstance(node, Node) and len(node.results) > 1:
            return tuple(values[v] for v in node.results)
        return values[value]

    def source(self, node: str | Node | Value) -> Source:
        """The user's line behind a node."""
        loc = self.node(node).loc
        file, line, code = loc.frame or ("", 0, "")
        return Source(file, line, code, loc.module, loc.rules)

    def kernel(self, node: str | Node | Value) -> Computed:
        """The kernel, or the call, that computes a node: the compilation is finished for this, and the graph stays here."""
        value, graph = self._found(node)
        history = self.history
        after = next((i for i, s in reversed(list(enumerate(history))) if s.after is graph), -1)
        later, traced = self._rest()
        return computed(value, [*history[after + 1 :], *later], traced)

    def why(self, rule: str, node: str | Node | Value | None = None) -> list[Reason]:
        """Why a rule did not fire at a node, or without one anywhere, the closest attempt first. Only passes that have run
        are asked. Raises UnknownRule, UnknownNode."""
        return why(self.history, self.ahead, rule, None if node is None else self.node(node))

    def ledger(self) -> list[Entry]:
        """The results after each step so far, beside float64 and the step before; `debugging.ledger_table` prints it."""
        return ledger(self.subject.graph, self.history, self.subject.inputs)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _graphs(self) -> list[Graph]:
        """The graphs of this compilation, the latest first."""
        return list(dict.fromkeys([self.graph, *(s.after for s in reversed(self.history)), self.subject.graph]))

    def _found(self, what: str | Node | Value) -> tuple[Value, Graph]:
        """A value, and the latest graph that has it."""
        for graph in self._graphs():
            if isinstance(what, str):
                value = next((v for v, name in value_names(graph).items() if name == what), None)
            else:
                value = what.outputs[0] if isinstance(what, Node) else what
            if value is not None and (value in graph.producers or value in graph.inputs):
                return value, graph
        name = what if isinstance(what, str) else repr(what)
        why = "no graph of this compilation has it"
        if (owner := next((o for g in self._graphs() for n, o in _inside(g) if n == name), None)) is not None:
            why = (
                f"it is inside a region of {owner}, which runs as a whole: its nodes have no values and kernels of their own"
            )
        raise UnknownNode(name=name, why=why, near=_nearest(name, self.graph))

    def _rest(self) -> tuple[list[Step], Trace]:
        """The steps to come and code generation, on a copy of this compilation: its choices are not counted here."""
        if self._traced is None or self._traced[0] is not self.graph:
            options = replace(self.subject.options, verify="off", print_after=(), dump_dir=None)
            session = Session(self.subject.name, options, reports=False)
            mine = self._session.decisions
            session.decisions = Decisions(mine.limit, mine.count)
            twin = self._walk.fork(session)
            graph = twin.finish()
            traced = trace(graph, codegen_options(options, graph), session.decisions)
            self._traced = self.graph, twin.history, traced
        return self._traced[1], self._traced[2]


def _inside(graph: Graph) -> Iterator[tuple[str, str]]:
    """(name of a value inside a region, name of the node that owns the region)."""
    names = value_names(graph)
    for node in graph.nodes:
        for region in node.regions:
            owner = names[node.out] if node.outputs else node.op.name
            yield from ((name, owner) for name in value_names(region).values())
            yield from ((name, owner) for name, _ in _inside(region))


def _nearest(name: str, graph: Graph) -> str:
    known = [n for v, n in value_names(graph).items() if v in graph.producers]
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0)) or "nothing: the graph is empty"
