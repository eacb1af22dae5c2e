"""A world of fake tensors whose sizes are plait's own size symbols."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc
from torch.utils._sympy.value_ranges import ValueRanges

from .types import Dim, ScalarType, Symbols, TensorType


class FakeWorld:
    """Fake tensors over given symbols; records whether anything had to be assumed about them."""

    def __init__(self, symbols: Symbols) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._hints: dict[sympy.Symbol, int] = {}
        for i, (symbol, info) in enumerate(symbols.items()):
            hint = info.hint if info.hint is not None else max(info.low, 2) + 6 + i
            self._hints[symbol] = hint
            self.env.var_to_range[symbol] = ValueRanges(info.low, info.high if info.high is not None else sympy.oo)
            nowhere = self.env._get_sloc()  # pyright: ignore[reportPrivateUsage]
            self.env.var_to_range_sloc[symbol] = ValueRangesSLoc(nowhere, nowhere)
            # the hint's home is named differently across torch versions
            env: Any = self.env
            values = getattr(env, "backed_var_to_val", None)
            if values is None:
                values = env.var_to_val
            values[symbol] = sympy.Integer(hint)

    def size(self, value: Dim) -> Any:
        """A size as int or SymInt of this world."""
        if isinstance(value, int):
            return value
        hint = int(value.subs(self._hints))
        return torch.SymInt(SymNode(value, self.env, int, hint))

    def tensor(self, kind: TensorType) -> torch.Tensor:
        """A fake tensor of that type."""
        with self.mode:
            return torch.empty_strided(
                tuple(self.size(d) for d in kind.shape),
                tuple(self.size(d) for d in kind.strides),
                dtype=kind.dtype,
                device=kind.device,
            )

    def lift(self, arg: Any) -> Any:
        """An argument with types replaced by fake tensors and expressions by symbolic ints."""
        if isinstance(arg, TensorType):
            return self.tensor(arg)
        if isinstance(arg, ScalarType):
            if arg.expr is not None:
                return self.size(arg.expr)
            return {"int": 1, "float": 1.0, "bool": True}[arg.kind]
        if isinstance(arg, sympy.Expr):
            return self.size(arg)
        return arg

    def assumed(self) -> str:
        """What was assumed about symbols so far, in words; "" for nothing."""
        guards: list[Any] = self.env.guards
        return ", ".join(str(g.expr) for g in guards)
