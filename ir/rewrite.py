"""Rewriting: a builder that makes a new graph from an old one, and rules that fire or say why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ..errors import NeedsSizeFact, NoFixpoint
from .effects import advance, effect_of, is_collective, order_after
from .graph import NOWHERE, Arg, Graph, Loc, Node, Value, bind, map_arg, symbols_in
from .infer import infer, type_of
from .op import Op, op
from .types import TUPLE, OpaqueType, ScalarType, Symbols, TokenType


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a rule did not fire: words, and the value that stood in the way."""

    why: str
    value: Value | None = None

    def __str__(self) -> str:
        return self.why


HELD_BACK = Reason("it fits, but the choice is held back: no more are allowed")


class Builder:
    """Appends nodes to a graph under construction; types are inferred, tokens are threaded."""

    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.nodes: list[Node] = []
        self.producers: dict[Value, Node] = {}
        self.subst: dict[Value, Arg] = {}
        self.tokens: dict[str, Value] = {}
        self.collectives = 0
        self._interval: dict[Node, int] = {}  # collectives before a node, where there are any
        self.constants: dict[str, torch.Tensor] = dict(graph.constants)
        self.loc: Loc = NOWHERE

    @property
    def symbols(self) -> Symbols:
        """Size symbols of the graph."""
        return self.source.symbols

    def call(self, name: str | Op, *args: Arg, hint: str = "", loc: Loc | None = None, **kwargs: Arg) -> Any:
        """Append an application; returns its value, or a tuple of values. Arguments are values of the new graph."""
        found = op(name) if isinstance(name, str) else name
        bound = bind(found, args, kwargs)
        types = infer(found, bound, self.symbols)
        base = hint or found.name.split(".")[1]
        outs = tuple(Value(t, "t" if isinstance(t, TokenType) else base) for t in types)
        node = self.append(Node(found, bound, outs, (), self.loc if loc is None else loc))
        results = node.results
        return results[0] if found.returns == 1 else results

    def append(self, node: Node) -> Node:
        """Append a node whose arguments are already values of the new graph; its place in the effect order is set here."""
        effect = effect_of(node.op, node.args)
        if effect is not None:
            after = order_after(effect, self.tokens)
            if after != node.after:
                node = node.with_args(node.args, after)
            assert node.token is not None, f"{node.op.name} needs a token output"
            advance(effect, node.token, self.tokens)
        self.nodes.append(node)
        for v in node.outputs:
            self.producers[v] = node
        if self.collectives:
            self._interval[node] = self.collectives
        if effect is not None and is_collective(node):
            self.collectives += 1
        return node

    def is_before_collective(self, node: Node) -> bool:
        """Whether a collective stands between a node and what is appended next."""
        return self._interval.get(node, 0) != self.collectives

    def mark(self) -> tuple[int, dict[str, Value], int]:
        """The present state, for `rewind`."""
        return len(self.nodes), dict(self.tokens), self.collectives

    def rewind(self, mark: tuple[int, dict[str, Value], int]) -> None:
        """Forget the nodes appended since `mark`."""
        count, self.tokens, self.collectives = mark
        for node in self.nodes[count:]:
            for v in node.outputs:
                del self.producers[v]
        del self.nodes[count:]

    def constant(self, tensor: torch.Tensor, hint: str = "constant") -> Value:
        """A new constant of the graph."""
        name, i = hint, 0
        while name in self.constants:
            i += 1
            name = f"{hint}_{i}"
        self.constants[name] = tensor
        plain = re.sub(r"\W", "_", name)
        value = Value(type_of(tensor), plain if plain.isidentifier() else f"c_{plain}")
        self.append(Node(op("plait.constant"), (name,), (value,), loc=self.loc))
        return value

    def resolve(self, arg: Arg) -> Arg:
        """An argument of the old graph in terms of the new one."""
        return map_arg(arg, lambda a: self.subst.get(a, a) if isinstance(a, Value) else a)

    def resolved(self, node: Node) -> Node:
        """An old node with its arguments in terms of the new graph; the same object where nothing changed."""
        if not self.subst or not any(v in self.subst for v in node.inputs):
            return node
        return node.with_args(tuple(self.resolve(a) for a in node.args))

    def finish(self, **changes: Any) -> Graph:
        """The new graph. Unused constants are dropped."""
        outputs = self.resolve(self.source.outputs)
        writes = tuple((i, self.resolve(v)) for i, v in self.source.writes)
        named = {n.args[0] for n in self.nodes if n.op.name == "plait.constant"}
        constants = {k: t for k, t in self.constants.items() if k in named}
        fields: dict[str, Any] = {"nodes": tuple(self.nodes), "outputs": outputs, "writes": writes, "constants": constants}
        fields.update(changes)
        return self.source.replace(**fields)


# -- patterns ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Var:
    """Matches any argument; the same name must match the same thing twice."""

    name: str


@dataclass(frozen=True, slots=True)
class Such:
    """Matches an argument for which `test(match, argument)` holds, and names it."""

    name: str
    test: Callable[[Match, Arg], bool]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Matches a value produced by one of `ops` whose leading arguments match `args` (fewer patterns than arguments: the
    rest is free). `name` makes the node available to check and build. `sole` demands that nobody else reads the value."""

    ops: tuple[str, ...]
    args: tuple[Any, ...] = ()
    name: str = ""
    sole: bool = False


def pattern(ops: str | Sequence[str], *args: Any, name: str = "", sole: bool = False) -> Pattern:
    """Shorthand for `Pattern`."""
    return Pattern((ops,) if isinstance(ops, str) else tuple(ops), args, name, sole)


@dataclass(slots=True)
class Match:
    """What a pattern matched: the anchor node, named nodes, variables, and the graph being built."""

    node: Node
    builder: Builder
    graph: Graph
    vars: dict[str, Arg] = field(default_factory=dict[str, Arg])
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])

    def __getitem__(self, name: str) -> Arg:
        return self.vars[name]

    def producer(self, value: Arg) -> Node | None:
        """The node of the new graph that defines `value`, as far as a rule may do its work at the anchor instead: None for
        work that a collective separates from it, which an order chosen for overlap may count on."""
        node = self.builder.producers.get(value) if isinstance(value, Value) else None
        if node is not None and self.builder.is_before_collective(node) and node.inputs and not node.op.has("view"):
            return None
        return node

    def users(self, value: Value) -> int:
        """How many nodes of the old graph read `value`, plus one where it leaves the graph."""
        return len(self.graph.users.get(value, ())) + (value in self.graph.results)


Check = Callable[[Match], Reason | None]
Build = Callable[[Match, Builder], Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rewrite: `pattern` anchors it, `check` returns why not, `build` returns the replacement of the anchor's results
    (one argument, or a tuple of one for each).

    A replacement must have the type of what it replaces, strides included, since the nodes that read it keep their types;
    the rule is refused where it has another.
    """

    name: str
    pattern: Pattern
    build: Build
    check: Check | None = None


@dataclass(slots=True)
class RuleLog:
    """What rules did in one pass: firings by rule, refusals as (rule, node, reason), what took the place of which value
    (maybe replaced in its turn) and by which rule, and the rules that were tried (several may share a name).

    `trying` is the rule at work, its node and the graph it is in: what an error message names when the rule raises.
    """

    fired: dict[str, int] = field(default_factory=dict[str, int])
    refused: list[tuple[str, Node, Reason]] = field(default_factory=list[tuple[str, Node, Reason]])
    replaced: dict[Value, Arg] = field(default_factory=dict[Value, Arg])
    by: dict[Value, str] = field(default_factory=dict[Value, str])
    rules: dict[str, tuple[Rule, ...]] = field(default_factory=dict[str, tuple[Rule, ...]])
    trying: tuple[str, Node, Graph] | None = None

    def fire(self, rule: str, count: int = 1) -> None:
        """Count firings of a rule."""
        self.fired[rule] = self.fired.get(rule, 0) + count

    def put(self, rule: str, old: Value, new: Arg) -> None:
        """Remember that a rule put something in the place of a value."""
        self.replaced[old] = new
        self.by[old] = rule

    def refuse(self, rule: str, node: Node, reason: Reason) -> None:
        """Remember why a rule did not fire at a node."""
        self.refused.append((rule, node, reason))


def _match_arg(want: Any, got: Arg, m: Match) -> bool:
    if isinstance(want, Var):
        if want.name in m.vars:
            known = m.vars[want.name]
            return known is got or (not isinstance(known, Value) and not isinstance(got, Value) and bool(known == got))
        m.vars[want.name] = got
        return True
    if isinstance(want, Such):
        m.vars[want.name] = got
        return want.test(m, got)
    if isinstance(want, Pattern):
        node = m.producer(got)
        if node is None or node.op.name not in want.ops:
            return False
        if want.sole and m.users(got) != 1:
            return False
        return _match_node(want, node, m)
    return not isinstance(got, Value) and type(want) is type(got) and bool(want == got)


def _match_node(want: Pattern, node: Node, m: Match) -> bool:
    if want.name:
        m.nodes[want.name] = node
    if len(want.args) > len(node.args):
        return False
    for wanted, got in zip(want.args, node.args, strict=False):  # noqa: SIM110 (a generator costs a third of the sweep)
        if not _match_arg(wanted, got, m):
            return False
    return True


def match(rule: Rule, node: Node, builder: Builder, graph: Graph) -> Match | Reason | None:
    """Try a rule at a node: None where the pattern does not match, a Reason where the check refuses, else the match."""
    if node.op.name not in rule.pattern.ops:
        return None
    m = Match(node, builder, graph)
    if not _match_node(rule.pattern, node, m):
        return None
    reason = rule.check(m) if rule.check is not None else None
    return m if reason is None else reason


def rewrite(graph: Graph, rules: Iterable[Rule], log: RuleLog, *, rounds: int = 32,
            allow: Callable[[str, Node], bool] | None = None) -> Graph:  # fmt: skip
    """Apply rules until none fires. Dead nodes are left for `prune`.

    `allow(rule, node)` is asked before each firing (bisection counts and stops there). Raises `NoFixpoint` where rules keep
    firing after `rounds` sweeps.
    """
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        alike = log.rules.get(rule.name, ())
        if not any(r is rule for r in alike):
            log.rules[rule.name] = (*alike, rule)
        for name in rule.pattern.ops:
            by_op.setdefault(name, []).append(rule)
    last = ""
    known = len(log.refused)
    for _ in range(rounds):
        del log.refused[known:]  # refusals of the last sweep are those that hold in the result
        graph, last = _sweep(graph, by_op, log, allow)
        if not last:
            return graph
    raise NoFixpoint(rule=last, rounds=rounds)


def _sweep(graph: Graph, by_op: Mapping[str, list[Rule]], log: RuleLog,
           allow: Callable[[str, Node], bool] | None) -> tuple[Graph, str]:  # fmt: skip
    if not any(n.op.name in by_op for n in graph.nodes):
        return graph, ""
    builder = Builder(graph)
    fired = ""
    for old in graph.nodes:
        node = builder.resolved(old)
        for rule in by_op.get(node.op.name, ()):
            log.trying = (rule.name, old, graph)
            found = match(rule, node, builder, graph)
            if isinstance(found, Reason):
                log.refuse(rule.name, old, found)
            elif found is not None and apply(rule, found, builder, log, old, allow):
                fired = rule.name
                break
        else:
            builder.append(node)
    log.trying = None
    return (builder.finish(), fired) if fired else (graph, "")


def apply(rule: Rule, found: Match, builder: Builder, log: RuleLog, old: Node,
          allow: Callable[[str, Node], bool] | None) -> bool:  # fmt: skip
    """Build the replacement and put it in place of the node's results. False, and a refusal in the log, where it has another
    type, would need a fact about sizes, or is held back."""
    mark = builder.mark()
    builder.loc = found.node.loc.by(rule.name)
    try:
        replacement = rule.build(found, builder)
    except NeedsSizeFact as error:  # the rewritten form would hold for some sizes only
        log.refuse(rule.name, old, Reason(str(error)))
        builder.rewind(mark)
        return False
    except Exception:
        if allow is None or allow(rule.name, old):
            raise
        log.refuse(rule.name, old, HELD_BACK)  # bisection finds out which choice it is that raises
        builder.rewind(mark)
        return False
    replacements = replacement if isinstance(replacement, TUPLE) else (replacement,)
    pairs = list(zip(found.node.results, replacements, strict=True))
    reason = next((r for r in (_type_change(v, new) for v, new in pairs) if r is not None), None)
    if reason is None and allow is not None and not allow(rule.name, old):
        reason = HELD_BACK
    if reason is not None:
        log.refuse(rule.name, old, reason)
        builder.rewind(mark)
        return False
    builder.subst.update(pairs)
    for v, new in pairs:
        log.put(rule.name, v, new)
    log.fire(rule.name)
    return True


def became(value: Value, replaced: Mapping[Value, Arg]) -> Arg:
    """What took the place of a value in the end, itself where nothing did: what took it may have been replaced too."""
    now: Arg = value
    for _ in range(len(replaced) + 1):
        if not isinstance(now, Value) or now not in replaced:
            break
        now = replaced[now]
    return now


def _type_change(old: Value, new: Arg) -> Reason | None:
    if not isinstance(new, Value):
        nothing = new is None and old.type == OpaqueType("none")  # an op was not asked for this result
        return None if nothing or isinstance(old.type, ScalarType) else Reason(f"{new!r} is no {old.type}", old)
    return None if new.type == old.type else Reason(f"the replacement is {new.type}, not {old.type}", old)


def prune(graph: Graph) -> Graph:
    """Drop pure nodes whose results nobody reads; the same object where there are none.

    A node that first makes a size symbol known (by a number read from a tensor, or by the shape of its result) is read by
    whatever mentions that symbol.
    """
    live: set[Value] = set(graph.results)
    binders = _binders(graph)
    wanted: set[sympy.Symbol] = symbols_in((graph.outputs, *(v.type for v in graph.results))) if binders else set()
    keep: list[Node] = []
    for node in reversed(graph.nodes):
        binds = binders.get(node)
        if node.token is None and not any(v in live for v in node.outputs) and not (binds and binds & wanted):
            continue
        live.update(node.inputs)
        live.update(node.after)
        keep.append(node)
        if binders:
            wanted |= symbols_in((node.args, *(v.type for v in node.results)))
    if len(keep) == len(graph.nodes):
        return graph
    keep.reverse()
    named = {n.args[0] for n in keep if n.op.name == "plait.constant"}
    return graph.replace(nodes=tuple(keep), constants={k: t for k, t in graph.constants.items() if k in named})


def _binders(graph: Graph) -> dict[Node, set[sympy.Symbol]]:
    """Nodes that first make size symbols known, with these symbols."""
    if not graph.symbols:
        return {}
    known = symbols_in(tuple(v.type for v in graph.inputs))
    found: dict[Node, set[sympy.Symbol]] = {}
    for node in graph.nodes:
        new = symbols_in(tuple(v.type for v in node.results)) - known
        if new:
            found[node] = new
            known |= new
    return found


__all__ = ["HELD_BACK", "Builder", "Match", "Pattern", "Reason", "Rule", "RuleLog", "Such", "Var", "apply", "became",
           "match", "pattern", "prune", "rewrite"]  # fmt: skip
