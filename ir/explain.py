"""Why a rule did not fire: the matcher once more, slowly, collecting what stood in the way instead of giving up.

The sweep in `rewrite.py` says nothing about patterns that do not match, since it tries thousands. Here one rule is tried
where somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph import Arg, Graph, Node, Value
from .rewrite import Builder, Match, Pattern, Reason, Rule, RuleLog, Such, Var, apply, match


@dataclass(frozen=True, slots=True)
class NearMiss(Reason):
    """Why a rule did not fire, and how close it came: `rule` was tried at `node`, the anchor of its pattern, and `matched`
    of the `parts` of the pattern fitted. The check and the replacement come after the whole pattern."""

    rule: str = ""
    node: Node | None = None
    matched: int = 0
    parts: int = 0

    @property
    def closeness(self) -> float:
        """The share of the pattern that fitted, above 1 where only the check or the replacement stood in the way."""
        return (self.matched + (self.matched == self.parts)) / self.parts

    def __str__(self) -> str:
        at = f" at {self.node.outputs[0].hint or self.node.op.name}" if self.node is not None and self.node.outputs else ""
        return f"{self.rule}{at}, {self.matched} of {self.parts} parts fit: {self.why}"


def explain(rule: Rule, node: Node, graph: Graph) -> list[NearMiss]:
    """Everything that keeps a rule from firing at a node of a graph, in the order of its pattern; empty where it would fire.

    Raises what the rule's check and build raise.
    """
    parts = _parts(rule.pattern) - rule.pattern.sole  # nobody asks this of the anchor
    if node.op.name not in rule.pattern.ops:
        why = f"the pattern starts at {_one_of(rule.pattern.ops)}, this is {node.op.name}"
        return [NearMiss(why, None, rule.name, node, 0, parts)]
    builder = Builder(graph)
    for earlier in graph.nodes[: graph.nodes.index(node)]:
        builder.append(earlier)
    attempt = _Attempt(Match(node, builder, graph))
    attempt.node(rule.pattern, node)
    if attempt.misses:
        return [NearMiss(why, value, rule.name, node, attempt.matched, parts) for why, value in attempt.misses]
    found = match(rule, node, builder, graph)
    if isinstance(found, Reason):
        return [NearMiss(found.why, found.value, rule.name, node, parts, parts)]
    assert found is not None, "both matchers read a pattern alike"
    log = RuleLog()
    if apply(rule, found, builder, log, node, None):
        return []
    return [NearMiss(reason.why, reason.value, rule.name, node, parts, parts) for _, _, reason in log.refused]


def near_misses(rules: Iterable[Rule], graph: Graph, node: Node | None = None) -> list[NearMiss]:
    """What keeps rules from firing, the attempt that came closest first: at a node, or anywhere in the graph.

    A node is also looked at as an inner part of a pattern that starts further on.
    """
    found = [miss for rule in rules for anchor in anchors(rule, graph, node) for miss in explain(rule, anchor, graph)]
    return sorted(found, key=lambda miss: -miss.closeness)


def anchors(rule: Rule, graph: Graph, node: Node | None = None) -> list[Node]:
    """Nodes where a rule's pattern could start: all of its ops; with `node` that node, or where it is an op of the pattern's
    inside, those further on whose operands lead to it. A node that is none of the pattern's ops stands for itself."""
    if node is None:
        return [n for n in graph.nodes if n.op.name in rule.pattern.ops]
    reached, found = [node], [node] if node.op.name in rule.pattern.ops else []
    for _ in range(_depth(rule.pattern) - 1) if node.op.name in _inner_ops(rule.pattern) else ():
        reached = list(dict.fromkeys(u for n in reached for v in n.results for u in graph.users.get(v, ())))
        found += [n for n in reached if n.op.name in rule.pattern.ops]
    return list(dict.fromkeys(found)) or [node]


@dataclass(slots=True)
class _Attempt:
    """A pattern against a node: counts the parts that fit, keeps what did not. `unseen` once parts cannot be looked at."""

    m: Match
    matched: int = 0
    unseen: bool = False
    misses: list[tuple[str, Value | None]] = field(default_factory=list[tuple[str, Value | None]])

    def fit(self, holds: bool, why: str, value: Arg = None) -> bool:
        """Count a part, or keep why it does not fit."""
        if holds:
            self.matched += 1
        else:
            self.misses.append((why, value if isinstance(value, Value) else None))
        return holds

    def node(self, want: Pattern, node: Node) -> None:
        """A pattern whose op fits, against its node."""
        self.matched += 1
        if want.name:
            self.m.nodes[want.name] = node
        if len(want.args) > len(node.args):
            self.unseen = True
            self.fit(False, f"{node.op.name} has {len(node.args)} arguments, the pattern names {len(want.args)}", node.out)
        for wanted, got, param in zip(want.args, node.args, node.op.params, strict=False):
            self.arg(wanted, got, f"{param.name} of {node.op.name}")

    def arg(self, want: Any, got: Arg, where: str) -> None:
        """One part of a pattern against one argument."""
        if isinstance(want, Var):
            known = self.m.vars.setdefault(want.name, got)
            same = known is got or (not isinstance(known, Value) and not isinstance(got, Value) and bool(known == got))
            self.fit(same, f"{where} is {_text(got)}, but {want.name!r} is already {_text(known)}", got)
        elif isinstance(want, Such):
            self.m.vars[want.name] = got
            if not self.unseen:  # a test may ask for what an earlier part would have named
                self.fit(want.test(self.m, got), f"{where} is {_text(got)}, which is refused as {want.name!r}", got)
        elif isinstance(want, Pattern):
            self.inner(want, got, where)
        else:
            same = not isinstance(got, Value) and type(want) is type(got) and bool(want == got)
            self.fit(same, f"{where} is {_text(got)}, not {want!r}", got)

    def inner(self, want: Pattern, got: Arg, where: str) -> None:
        """A pattern inside another, against the node that makes the argument."""
        wanted = _one_of(want.ops)
        maker = self.m.producer(got)
        if maker is None or maker.op.name not in want.ops:
            by = "which no node makes" if maker is None else f"made by {maker.op.name}"
            self.unseen = True
            self.fit(False, f"{where} is {_text(got)}, {by}; wanted is {wanted}", got)
            return
        if want.sole and isinstance(got, Value):
            readers = self.m.users(got)
            self.fit(readers == 1, f"{_text(got)}, {where}, has {readers} readers; the rule must be the only one", got)
        self.node(want, maker)


def _parts(want: Any) -> int:
    """How many parts of a pattern can fit or not."""
    return 1 + want.sole + sum(map(_parts, want.args)) if isinstance(want, Pattern) else 1


def _depth(want: Any) -> int:
    return 1 + max((_depth(a) for a in want.args), default=0) if isinstance(want, Pattern) else 0


def _inner_ops(want: Pattern) -> set[str]:
    inner = [a for a in want.args if isinstance(a, Pattern)]
    return {name for a in inner for name in (*a.ops, *_inner_ops(a))}


def _one_of(ops: Sequence[str]) -> str:
    return ops[0] if len(ops) == 1 else "one of " + ", ".join(ops)


def _text(got: Arg) -> str:
    return (got.hint or f"a {got.type}") if isinstance(got, Value) else repr(got)


__all__ = ["NearMiss", "anchors", "explain", "near_misses"]
