"""Passes: what one is, how it is made from options, and how a list of them runs over a graph.

A pass is a frozen dataclass. Its fields are its options, and that one declaration is the `torch.compile` option, the
command-line flag and the documentation. `run` never mutates its input; it returns a new graph, or the same object where
nothing changed.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from ..cost.estimate import Estimates
from ..errors import InvalidGraph, MissingFact, PassFailed, PlaitError, WrongCapturePoint
from ..ir import Arg, Graph, Node, Reason, Rule, RuleLog, TensorType, Value
from ..ir import rewrite as rewrite_graph
from ..ir import verify as verify_graph
from ..ir.rewrite import became
from ..ir.verify import around

CapturePoint = Literal["forward", "joint", "split", "any"]


@dataclass(frozen=True)
class Numerics:
    """What a pass promises about results: `exact` (bit-equal when both graphs are interpreted by the op references on
    CPU), `reassociates` (equal up to the order of sums), or `approximate` (within the relative `bound`)."""

    kind: Literal["exact", "reassociates", "approximate"]
    bound: float = 0.0


def exact() -> Numerics:
    """Results are bit-equal."""
    return Numerics("exact")


def reassociates() -> Numerics:
    """Results differ by the order of sums only; bit-equal on integer-valued floats."""
    return Numerics("reassociates")


def approximate(bound: float) -> Numerics:
    """Results are within the relative error `bound`."""
    return Numerics("approximate", bound)


def option(default: Any = MISSING, *, doc: str) -> Any:
    """A field of a pass that is an option: its default (none: the option must be given) and its one line of docs."""
    return field(metadata={"doc": doc}) if default is MISSING else field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses registered by `@register`.

    `requires` names facts that must hold before, `establishes` facts that hold after, `preserves` facts that survive
    when the pass changes the graph; all other facts are dropped then. A pass that `reorders` changes nothing but the order
    of launches: passes before it that go by expected times look ahead to what it would make of their graphs.
    """

    name: ClassVar[str]
    at: ClassVar[CapturePoint] = "any"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[frozenset[str]] = frozenset()
    reorders: ClassVar[bool] = False

    def numerics(self) -> Numerics:
        """What the pass promises about results."""
        return exact()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The rewritten graph; the same object where nothing changed."""
        raise NotImplementedError(type(self).__name__)

    def options(self) -> dict[str, Any]:
        """Options by name, as this instance holds them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        """The pass as a command line writes it: `fold`, `fold:max_elements=16`."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        texts = [f"{k}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in given.items()]
        return f"{self.name}:{','.join(texts)}" if texts else self.name


Allow = Callable[[str, str, Node | None], bool]
"""Whether a pass may fire a rule at a node."""


Slower = Callable[[TensorType, Any, bool], str]
"""Why a linear layer on an input of this type would not be faster with a weight of a quantized type (and, third, with inputs
rounded at each call), measured; "" where it would."""


def _always(_pass: str, _rule: str, _node: Node | None) -> bool:
    return True


def _unmeasured(_x: TensorType, _kind: Any, _dynamic: bool) -> str:
    return ""


def _quietly(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """What a pass may look at besides the graph. Size symbols live on the graph.

    `at` is the capture point of the graph, `devices` are the targets, `allow(pass, rule, node)` is asked before each
    firing (bisection counts there), `current` is the pass that runs, `log` collects its firings and refusals.

    `calibration` are batches of the graph's inputs that a pass may run it on, `slower` measures kernels that a pass would
    bring in, `progress(done, of, what)` is told of long work, `report` takes what a pass wants to say beyond its log.
    `known` is what an earlier run of a pass, interrupted, has worked out, and `keep` takes what this one does, by key.
    `parameters` numbers inputs that are parameters; with `freezes` they become constants later on. `trained` numbers those
    that require gradients.

    `costs` says how long nodes and collectives take (None: nobody has measured), `forward_outputs` how many of a joint
    graph's outputs are the forward's; the others are gradients. `then` are the passes of the pipeline that follow.
    """

    at: CapturePoint = "any"
    devices: tuple[str, ...] = ("cpu",)
    options: Mapping[str, Any] = field(default_factory=dict)
    allow: Allow = _always
    current: str = ""
    log: RuleLog = field(default_factory=RuleLog)
    calibration: tuple[tuple[Any, ...], ...] = ()
    slower: Slower = _unmeasured
    progress: Callable[[int, int, str], None] = _quietly
    report: Callable[[Any], None] = _quietly
    known: Mapping[Any, Any] = field(default_factory=dict[Any, Any])
    keep: Callable[[Any, Any], None] = _quietly
    parameters: frozenset[int] = frozenset()
    freezes: bool = False
    trained: frozenset[int] = frozenset()
    costs: Estimates | None = None
    forward_outputs: int = 1
    then: tuple[Pass, ...] = ()

    def ahead(self, graph: Graph) -> Graph:
        """What the passes that follow and only reorder launches would make of a graph: no log, no report, no choice."""
        for one in self.then:
            if one.reorders:
                graph = one.run(
                    graph,
                    dataclasses.replace(self, allow=_always, current=one.name, log=RuleLog(), report=_quietly, then=()),
                )
        return graph

    def allowed(self, rule: str, node: Node | None = None) -> bool:
        """Ask before a rule of the running pass fires. For passes that do not go through `rewrite`; a pass that never asks
        is one choice as a whole."""
        return self.allow(self.current, rule, node)

    def rewrite(self, graph: Graph, rules: Iterable[Rule]) -> Graph:
        """Apply rules to the graph and to every region inside it until none fires."""
        rules = tuple(rules)
        graph = map_regions(graph, lambda region: self.rewrite(region, rules))
        return rewrite_graph(graph, rules, self.log, allow=self.allowed)


def map_regions(graph: Graph, fn: Callable[[Graph], Graph]) -> Graph:
    """The graph with `fn` applied to each region directly inside it; the same object where nothing changed."""
    if not any(n.op.has("control_flow") for n in graph.nodes):
        return graph
    done: dict[int, Graph] = {}

    def new(arg: Any) -> Any:
        if not isinstance(arg, Graph):
            return arg
        if id(arg) not in done:
            done[id(arg)] = fn(arg)
        return done[id(arg)]

    nodes: list[Node] = []
    for node in graph.nodes:
        args = tuple(new(a) for a in node.args) if node.op.has("control_flow") else node.args
        changed = any(a is not b for a, b in zip(args, node.args, strict=True))
        nodes.append(node.with_args(args) if changed else node)
    if all(a is b for a, b in zip(nodes, graph.nodes, strict=True)):
        return graph
    return graph.replace(nodes=tuple(nodes))


PASSES: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=type[Pass])


def register(cls: P) -> P:
    """Class decorator: enter a pass under its name. Raises ValueError for a bad or taken name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cls.name):
        raise ValueError(f"the name of a pass is kebab-case, not {cls.name!r}")
    if cls.name in PASSES:
        raise ValueError(f"there are two passes called {cls.name!r}")
    PASSES[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Step:
    """One pass as it ran: its options, the graph before and after, firings by rule, refusals, wall time.

    `replaced` says what took the place of which value, `by` which rule put it there, `rules` are those that were tried, by
    name. `rolled_back` says why the pass was undone ("" where it was not); `after` is then the graph before it.
    """

    pass_name: str
    options: Mapping[str, Any]
    numerics: Numerics
    before: Graph
    after: Graph
    fired: Mapping[str, int]
    refused: tuple[tuple[str, Node, Reason], ...]
    seconds: float
    replaced: Mapping[Value, Arg] = field(default_factory=dict[Value, Arg])
    by: Mapping[Value, str] = field(default_factory=dict[Value, str])
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict[str, tuple[Rule, ...]])
    rolled_back: str = ""

    def __repr__(self) -> str:
        fired = "".join(f", {rule} x{n}" for rule, n in sorted(self.fired.items()))
        undone = ", undone" if self.rolled_back else ""
        return f"<Step {self.pass_name}: {len(self.before.nodes)} -> {len(self.after.nodes)} nodes{fired}{undone}>"

    @property
    def changed(self) -> bool:
        """True where the pass returned another graph."""
        return self.after is not self.before

    def became(self, value: Value) -> Arg:
        """What stands for a value after the pass: itself where nothing took its place."""
        return became(value, self.replaced)


# -- running ----------------------------------------------------------------------------------------------------------

Verify = Literal["off", "structure", "each-pass"]


def run_pipeline(
    graph: Graph,
    passes: Iterable[Pass],
    ctx: Context,
    *,
    verify: Verify = "off",
    on_step: Callable[[Step], None] | None = None,
    facts: Iterable[str] = (),
    refuse: Callable[[Step], str] | None = None,
) -> tuple[Graph, list[Step]]:
    """Run passes in order; returns the last graph and one `Step` for each pass.

    A pass that changed the graph is undone where `refuse` gives a reason.

    `verify="each-pass"` verifies the graph that comes in and the graph after each pass; `"structure"` verifies the last
    graph only and looks for the culprit among the steps where it is broken. `facts` hold for the graph that comes in.

    Raises `WrongCapturePoint`, `MissingFact`, and `PassFailed` for a pass that raises or breaks the graph (its fields
    carry `before`, the text of the graph that the pass was given, for a reproducer).
    """
    running = Pipeline(graph, passes, ctx, verify=verify, on_step=on_step, facts=facts, refuse=refuse)
    while running.rest:
        running.step()
    return running.finish(), running.steps


class Pipeline:
    """A list of passes on its way over a graph: `step` runs the next one of `rest`. See `run_pipeline` for the arguments.

    Between steps `graph` may be set to another one with the same interface; facts are taken to hold on.
    """

    def __init__(
        self,
        graph: Graph,
        passes: Iterable[Pass],
        ctx: Context,
        *,
        verify: Verify = "off",
        on_step: Callable[[Step], None] | None = None,
        facts: Iterable[str] = (),
        refuse: Callable[[Step], str] | None = None,
    ) -> None:
        self.graph = graph
        self.rest = list(passes)
        self.steps: list[Step] = []
        self.facts = frozenset(facts)
        self._ctx, self._verify, self._on_step, self._refuse = ctx, verify, on_step, refuse
        if verify == "each-pass":
            verify_graph(graph)

    def step(self) -> Step:
        """Run the next pass. Raises `WrongCapturePoint`, `MissingFact`, `PassFailed`; the pass is then still the next."""
        one, graph = self.rest[0], self.graph
        _check_place(one, self._ctx, self.facts)
        try:
            step = _run_pass(one, graph, dataclasses.replace(self._ctx, then=tuple(self.rest[1:])))
        except PassFailed:
            _verify_end(self.steps, graph)  # an earlier pass may have left the graph that this one fails on
            raise
        if self._refuse is not None and step.changed and (why := self._refuse(step)):
            step = dataclasses.replace(step, after=graph, rolled_back=why)
        if self._verify == "each-pass" and step.changed:
            _verify_step(step)
        del self.rest[0]
        self.steps.append(step)
        self.graph = step.after
        kept = self.facts & one.preserves if step.changed else self.facts
        self.facts = kept | (frozenset() if step.rolled_back else one.establishes)
        if self._on_step is not None:
            self._on_step(step)
        return step

    def finish(self) -> Graph:
        """The graph after the last pass, verified where `verify` says "structure". Raises `PassFailed`, `InvalidGraph`."""
        if self._verify == "structure":
            _verify_end(self.steps, self.graph)
        return self.graph


def _check_place(one: Pass, ctx: Context, held: frozenset[str]) -> None:
    if "any" not in (one.at, ctx.at) and one.at != ctx.at:
        raise WrongCapturePoint(name=one.name, at=one.at, here=ctx.at)
    for fact in sorted(one.requires - held):
        makers = sorted(p.name for p in PASSES.values() if fact in p.establishes)
        raise MissingFact(name=one.name, fact=fact, makers=" or ".join(makers) or "no pass", held=sorted(held))


def _run_pass(one: Pass, graph: Graph, ctx: Context) -> Step:
    log = RuleLog()
    asked = False

    def allow(name: str, rule: str, node: Node | None) -> bool:
        nonlocal asked
        asked = True
        return ctx.allow(name, rule, node)

    start = time.perf_counter()
    try:
        after = one.run(graph, dataclasses.replace(ctx, current=one.name, log=log, allow=allow))
        if not isinstance(after, Graph):
            raise TypeError(f"it returned {type(after).__name__}, not a Graph")
    except Exception as error:  # re-raised with the pass, the rule and the place
        if asked or ctx.allow(one.name, one.name, None):
            raise _failure(one, graph, log, error) from error
        after, log = graph, RuleLog()  # a pass that never asks is one choice, also where it raises
    seconds = time.perf_counter() - start
    if after is not graph and not asked and not ctx.allow(one.name, one.name, None):
        after, log = graph, RuleLog()
    refused = tuple(log.refused)
    return Step(
        one.name, one.options(), one.numerics(), graph, after, log.fired, refused, seconds, log.replaced, log.by, log.rules
    )


def _failure(one: Pass, graph: Graph, log: RuleLog, error: Exception) -> PassFailed:
    why = str(error) if isinstance(error, PlaitError) else f"{type(error).__name__}: {error}"
    rule, op, context, source = "", "", "", None
    if log.trying is not None:
        name, node, within = log.trying
        rule, op, source = f", rule {name}", node.op.name, node.loc.short or None
        context = "\n" + around(within, within.nodes.index(node))
    return PassFailed(name=str(one), rule=rule, why=why, context=context, source=source, before=str(graph), op=op)


def _verify_step(step: Step) -> None:
    try:
        verify_graph(step.after, after_pass=step.pass_name)
    except InvalidGraph as error:
        raise PassFailed(
            name=step.pass_name, rule="", why=f"it left an invalid graph: {error}", context="", before=str(step.before)
        ) from error


def _verify_end(steps: list[Step], last: Graph) -> None:
    try:
        verify_graph(last)
    except InvalidGraph:
        for step in steps:
            _verify_step(step)
        raise
