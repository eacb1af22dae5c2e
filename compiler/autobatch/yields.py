"""Functions that wait for values as generators: switching between them costs a fraction of switching between fibers.

before:  if block_1(h): return h                      after:  if (yield t) if type(t := block_1(h)) is Pending else t: …
         return left(h)                                       return (yield from left(h))

Whoever runs them sends back the number that was asked for, or for a tuple of calls their results. What cannot be rewritten,
such as a call inside of a lambda, is driven on the spot; the next call then runs in fibers.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection
from typing import Any

from .fork import FORK

PENDING, TYPE, ITEM = "_plait_pending", "_plait_type", "_plait_item"
DRIVE = "_plait_drive"  # runs a generator to its end, waiting on the spot

_NUMBERS = ("int", "float", "bool")
_APART = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.FunctionDef, ast.AsyncFunctionDef,
          ast.ClassDef)  # fmt: skip


class Yields(ast.NodeTransformer):
    """Rewrites one function. `waiting` are the names of functions that are generators; with `own` this is one as well."""

    def __init__(self, waiting: Collection[str], fresh: Callable[[str], str], *, own: bool) -> None:
        self.waiting = waiting
        self.fresh = fresh
        self.own = own
        self.apart = 0  # how deep in what has a frame of its own

    def run(self, tree: ast.FunctionDef) -> ast.FunctionDef:
        """The function; a generator where it is to be one."""
        tree.body = [self.visit(s) for s in tree.body]
        if self.own:
            never = ast.If(ast.Constant(False), [ast.Expr(ast.Yield(None))], [])
            tree.body.append(ast.copy_location(never, tree.body[-1]))
        return ast.fix_missing_locations(tree)

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, _APART):
            return super().visit(node)
        self.apart += 1
        made = super().generic_visit(node)
        self.apart -= 1
        return made

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        free = self.own and not self.apart
        if isinstance(node.func, ast.Name):
            name = node.func.id
            if name in self.waiting:
                return _at(ast.YieldFrom(node) if free else ast.Call(_load(DRIVE), [node], []), node)
            if name == FORK and free:
                return _at(ast.Yield(ast.Tuple(node.args, ast.Load())), node)
            if name in _NUMBERS and len(node.args) == 1 and free and not isinstance(node.args[0], ast.Starred):
                node.args = [self.waits(node.args[0])]
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "item" and not node.args and free:
            name = self.fresh("w")
            number = ast.Call(_load(ITEM), [ast.Yield(_load(name))], [])
            own = ast.Call(ast.Attribute(_load(name), "item", ast.Load()), [], [])
            return _at(ast.IfExp(self.is_pending(name, node.func.value), number, own), node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        return self.tested(node)

    def visit_While(self, node: ast.While) -> ast.AST:
        return self.tested(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        return self.tested(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return self.tested(node)

    def tested(self, node: Any) -> ast.AST:
        test, node.test = node.test, ast.Constant(True)
        self.generic_visit(node)
        node.test = self.truth(test)
        return node

    def truth(self, node: Any) -> Any:
        """An expression of which only the truth is asked for."""
        if isinstance(node, ast.BoolOp):
            node.values = [self.truth(v) for v in node.values]
            return node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.truth(node.operand)
            return node
        return self.waits(self.visit(node))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """`a or b` gives one of its operands, whose truth was asked for: w if truth(w := a) else b."""
        if not self.own or self.apart:
            return self.generic_visit(node)
        *before, made = [self.visit(v) for v in node.values]
        for value in reversed(before):
            name = self.fresh("w")
            test = self.waits(ast.NamedExpr(ast.Name(name, ast.Store()), value))
            kept = _load(name)
            made = ast.IfExp(test, kept, made) if isinstance(node.op, ast.Or) else ast.IfExp(test, made, kept)
        return _at(made, node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        return self.truth(node) if isinstance(node.op, ast.Not) else self.generic_visit(node)

    def waits(self, node: Any) -> Any:
        """The expression, or what it holds once that is computed."""
        plain = isinstance(node, ast.Constant | ast.Compare) or (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        )
        if plain or not self.own or self.apart:
            return node
        name = self.fresh("w")
        return _at(ast.IfExp(self.is_pending(name, node), ast.Yield(_load(name)), _load(name)), node)

    @staticmethod
    def is_pending(name: str, node: Any) -> ast.Compare:
        """Whether an expression, which is named, gives a pending tensor."""
        kind = ast.Call(_load(TYPE), [ast.NamedExpr(ast.Name(name, ast.Store()), node)], [])
        return ast.Compare(kind, [ast.Is()], [_load(PENDING)])


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _at(node: Any, where: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(node, where))
