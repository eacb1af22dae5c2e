"""Forks: calls of user functions that wait for values and have nothing to do with each other run side by side.

before:  return label, grow(left, n - 1), grow(right, n - 1)
after:   t1, t2 = fork((grow, (left, n - 1)), (grow, (right, n - 1))); return label, t1, t2

Only calls that nothing of the others can reach are forked (`Seen.is_separate`). Where no instance waits, depths alone let
them share launches, and nothing is rewritten.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Sequence
from typing import Any

FORK = "_plait_fork"  # what cut code calls with (function, arguments) pairs; gives their results

_THROUGH = (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Call, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.Attribute,
            ast.Starred, ast.keyword)  # fmt: skip
_PLAIN = (ast.Name, ast.Constant, ast.Attribute, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.Slice, ast.Tuple, ast.operator,
          ast.unaryop, ast.expr_context)  # fmt: skip


class Forker(ast.NodeTransformer):
    """Rewrites the statements of a function. `forks` are the names of functions whose calls may run side by side, `blocks`
    those of blocks, which may be called in any order, and `fresh` gives new names."""

    def __init__(self, forks: Collection[str], blocks: Collection[str], fresh: Callable[[str], str]) -> None:
        self.forks = forks
        self.blocks = blocks
        self.fresh = fresh

    def body(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements with forks in them."""
        found: list[ast.stmt] = []
        for s in statements:
            for field in ("body", "orelse", "finalbody"):
                if inner := getattr(s, field, None):
                    setattr(s, field, self.body(inner))
            for handler in getattr(s, "handlers", ()):
                handler.body = self.body(handler.body)
            if isinstance(s, ast.Return | ast.Assign | ast.Expr) and s.value is not None:
                s.value = self.visit(s.value)  # comprehensions
                found += self.within(s)
            found.append(s)
        return self.between(found)

    def is_fork(self, node: ast.AST) -> bool:
        """Whether a node is a call that may run beside others."""
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in self.forks
            and not node.keywords
            and all(map(self.is_plain, node.args))
        )

    def is_plain(self, node: ast.AST) -> bool:
        """Whether an expression may be computed at any time."""
        return (isinstance(node, _PLAIN) or self.is_block(node)) and all(map(self.is_plain, ast.iter_child_nodes(node)))

    def is_block(self, node: ast.AST | None) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.blocks

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        """`[f(x) for x in xs]`: all at once."""
        simple = len(node.generators) == 1 and not node.generators[0].ifs and not node.generators[0].is_async
        if not simple or not self.is_fork(node.elt):
            return node
        assert isinstance(node.elt, ast.Call)
        node.elt = _pair(node.elt)
        made = ast.Call(ast.Name("list", ast.Load()), [_call([ast.Starred(node, ast.Load())], node)], [])
        return ast.fix_missing_locations(ast.copy_location(made, node))

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def within(self, s: Any) -> list[ast.stmt]:
        """The fork of two and more calls inside of one statement, before it."""
        calls: list[tuple[Any, str, int | None, ast.Call]] = []
        if not self.collect(s, "value", None, s.value, calls) or len(calls) < 2:
            return []
        names = [self.fresh("t") for _ in calls]
        for (parent, field, index, call), name in zip(calls, names, strict=True):
            value = ast.copy_location(ast.Name(name, ast.Load()), call)
            if index is None:
                setattr(parent, field, value)
            else:
                getattr(parent, field)[index] = value
        target = ast.Tuple([ast.Name(n, ast.Store()) for n in names], ast.Store())
        made = ast.Assign([target], _call([_pair(call) for *_, call in calls], s))
        return [ast.fix_missing_locations(ast.copy_location(made, s))]

    def collect(self, parent: Any, field: str, index: int | None, node: Any, calls: list[Any]) -> bool:
        """Gather the calls below a node; False where something beside them may have an effect."""
        if self.is_fork(node):
            calls.append((parent, field, index, node))
            return True
        if isinstance(node, ast.Name | ast.Constant | ast.expr_context | ast.operator | ast.unaryop | ast.Slice):
            return True
        if not isinstance(node, _THROUGH) or (isinstance(node, ast.Call) and not self.is_block(node)):
            return False
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                if not all(self.collect(node, name, i, v, calls) for i, v in enumerate(value)):
                    return False
            elif isinstance(value, ast.AST) and not self.collect(node, name, None, value, calls):
                return False
        return True

    def between(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Runs of `name = f(…)` as one fork; blocks between them that need nothing of theirs come before."""
        found: list[ast.stmt] = []
        run: list[ast.Assign] = []
        stored: set[str] = set()

        def end() -> None:
            if len(run) > 1:
                target = ast.Tuple([r.targets[0] for r in run], ast.Store())
                made = ast.Assign([target], _call([_pair(r.value) for r in run], run[0]))
                found.append(ast.fix_missing_locations(ast.copy_location(made, run[0])))
            else:
                found.extend(run)
            run.clear()
            stored.clear()

        for s in statements:
            assigns = isinstance(s, ast.Assign) and len(s.targets) == 1 and _names_only(s.targets[0])
            free = assigns and stored.isdisjoint(n.id for n in ast.walk(s) if isinstance(n, ast.Name))
            if free and self.is_fork(s.value):  # type: ignore[attr-defined]
                run.append(s)  # type: ignore[arg-type]
                stored |= {n.id for n in ast.walk(s.targets[0]) if isinstance(n, ast.Name)}  # type: ignore[attr-defined]
            elif free and run and self.is_block(s.value):  # type: ignore[attr-defined]
                found.append(s)
            else:
                end()
                found.append(s)
        end()
        return found


def _pair(call: Any) -> ast.Tuple:
    return ast.copy_location(ast.Tuple([call.func, ast.Tuple(call.args, ast.Load())], ast.Load()), call)


def _call(pairs: list[Any], at: ast.AST) -> ast.Call:
    return ast.copy_location(ast.Call(ast.Name(FORK, ast.Load()), pairs, []), at)


def _names_only(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple | ast.List):
        return all(_names_only(t) for t in target.elts)
    return isinstance(target, ast.Name)
