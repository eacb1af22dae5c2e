"""Ghost ops: the shorter side of a branch counts as deep as the longer one, so that what follows shares launches.

before:  if c: h = block_1(h)                      else: t = block_2(h); h = block_3(t)
after:   if c: h = block_1(h); h = deeper(1, h)    else: t = block_2(h); h = block_3(t)
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence

DEEPER = "_plait_deeper"  # what cut code calls with a number and a value; gives the value, so much deeper
MOST = 5  # more is no mere imbalance


class Ghosts:
    """Rewrites the statements of a function. `blocks` are the names of blocks, `called` those of cut functions."""

    def __init__(self, blocks: Collection[str], called: Collection[str]) -> None:
        self.blocks = blocks
        self.called = called

    def body(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements with ghost ops in them."""
        for s in statements:
            for field in ("body", "orelse", "finalbody"):
                if inner := getattr(s, field, None):
                    setattr(s, field, self.body(inner))
            if isinstance(s, ast.If):
                self.balance(s)
        return list(statements)

    def balance(self, s: ast.If) -> None:
        counts = self.count(s.body), self.count(s.orelse)
        if None in counts:
            return
        more = counts[0] - counts[1]  # type: ignore[operator]
        if not 0 < abs(more) < MOST:
            return
        short, long = (s.orelse, s.body) if more > 0 else (s.body, s.orelse)
        names = [n for n in _stored(long) if n in _stored(short) or _is_own(n, long)]
        for n in names:
            value = ast.Call(ast.Name(DEEPER, ast.Load()), [ast.Constant(abs(more)), ast.Name(n, ast.Load())], [])
            made = ast.Assign([ast.Name(n, ast.Store())], value)
            short.append(ast.fix_missing_locations(ast.copy_location(made, s)))

    def count(self, statements: Sequence[ast.stmt]) -> int | None:
        """How many blocks the statements run; None where that is not known, or nothing follows them."""
        found = 0
        for s in statements:
            if not isinstance(s, ast.Assign | ast.AugAssign | ast.Expr | ast.Pass):
                return None
            for n in ast.walk(s):
                if isinstance(n, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda):
                    return None
                if isinstance(n, ast.Name) and n.id in self.called:
                    return None
                found += isinstance(n, ast.Name) and n.id in self.blocks
        return found


def _stored(statements: Sequence[ast.stmt]) -> list[str]:
    nodes = (n for s in statements for n in ast.walk(s))
    return list(dict.fromkeys(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)))


def _is_own(name: str, statements: Sequence[ast.stmt]) -> bool:
    """Whether statements read a name before they store it, so that it holds something where they do not run as well."""
    for s in statements:
        names = [n for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == name]
        if any(isinstance(n.ctx, ast.Load) for n in names) or (names and isinstance(s, ast.AugAssign)):
            return True
        if names:
            return False
    return False
