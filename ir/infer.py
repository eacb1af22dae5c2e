"""Type inference: one rule per op, from argument types to result types.

Common ops have a rule written over ints and symbols in `infer_rules.py`; all others go through one memoised fake-tensor
call. Inference never guards: where a rule would need a fact about a size symbol it returns None and the fake-tensor call
decides, and a fake-tensor call that had to assume something about a symbol raises `NeedsSizeFact`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy
import torch

from ..errors import InferenceFailed, NeedsSizeFact
from .effects import effect_of
from .facts import Facts, Unknown
from .graph import Arg, Graph, Value, map_arg, symbols_in
from .op import Op
from .types import LIST, TUPLE, OpaqueType, ScalarType, SymbolInfo, Symbols, TensorType, TokenType, ValueType, dim

Result = tuple[ValueType, ...] | TensorType | None
"""What a rule returns: the result types, None where it does not cover the case."""

InferRule = Callable[..., Result]

RULES: dict[str, InferRule] = {}


def rule(*names: str) -> Callable[[InferRule], InferRule]:
    """Register an inference rule for op names with overload: `fn(facts, *args)`, types in place of values."""

    def register(fn: InferRule) -> InferRule:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} has two inference rules")
            RULES[name] = fn
        return fn

    return register


def by_rule(op: Op, typed: tuple[Arg, ...], symbols: Symbols) -> Result:
    """Result types by the hand-written rule of `op`; None where there is none, or it does not cover the case."""
    from . import infer_rules, infer_views, moe_rules, quantized_rules  # register the rules

    assert all((infer_rules, infer_views, moe_rules, quantized_rules))
    found = RULES.get(op.name)
    if found is None:
        return None
    try:
        return found(Facts(symbols), *typed)
    except Unknown:
        return None


def infer(op: Op, args: tuple[Arg, ...], symbols: Symbols) -> tuple[ValueType, ...]:
    """Types of the results of `op` on `args` (values stand for their types), the token last where the op has an effect.

    Raises `InferenceFailed` with torch's words where the op refuses the types, `NeedsSizeFact` where it depends on a
    fact about a size symbol that is not known.
    """
    typed = map_arg(args, lambda a: a.type if isinstance(a, Value) else a)
    found = () if op.returns == 0 else by_rule(op, typed, symbols)  # what returns nothing checks when it runs
    if found is None:
        found = _region_types(op, typed) if op.has("control_flow") else _by_fake_tensors(op, typed, symbols)
    types = found if isinstance(found, tuple) else (found,)
    effect = effect_of(op, args)
    return types if effect is None else (*types, TokenType(effect))


def _region_types(op: Op, args: tuple[Arg, ...]) -> tuple[ValueType, ...]:
    regions = [a for a in args if isinstance(a, Graph)]
    body = regions[-1]
    outs = tuple(v.type if isinstance(v, Value) else OpaqueType("none") for v in body.outputs)
    if op.name in ("plait.scan", "plait.while_loop_stack_output"):
        raise InferenceFailed(op=op.name, why="stacked results of a loop carry the types seen at capture")
    return outs


def _by_fake_tensors(op: Op, typed: tuple[Arg, ...], symbols: Symbols) -> tuple[ValueType, ...]:
    key = tuple(_hashable(a) for a in typed)
    used = sorted(symbols_in(typed), key=lambda s: s.name)
    infos = tuple((s, symbols.get(s, SymbolInfo())) for s in used)
    found = _fake_call(op, key, infos)
    if isinstance(found, str) and not op.has("view"):
        # Which layout torch picks may hang on how unknown sizes compare. Ops that make new memory may promise any layout,
        # so promise the row-major one; views have no such choice.
        plain = map_arg(key, lambda a: a.with_(shape=a.shape) if isinstance(a, TensorType) else a)
        found = _fake_call(op, plain, infos)
    if isinstance(found, str):
        raise NeedsSizeFact(op=op.name, fact=found)
    return found


def _hashable(arg: Arg) -> Arg:
    # 1, 1.0 and True are equal as keys but not as arguments
    if isinstance(arg, TUPLE):
        return tuple(_hashable(a) for a in arg)
    return (type(arg).__name__, arg) if isinstance(arg, bool | int | float | complex) else arg


def _plain(arg: Arg) -> Arg:
    if isinstance(arg, TUPLE):
        if len(arg) == 2 and isinstance(arg[0], str) and arg[0] in ("bool", "int", "float", "complex"):
            return arg[1]
        return tuple(_plain(a) for a in arg)
    return arg


@lru_cache(maxsize=65536)
def _fake_call(
    op: Op, key: tuple[Arg, ...], symbols: tuple[tuple[sympy.Symbol, SymbolInfo], ...]
) -> tuple[ValueType, ...] | str:
    """The result types, or the fact about sizes that torch assumed to give them; either is worth remembering."""
    from .fake import FakeWorld

    world = FakeWorld(dict(symbols))
    args = tuple(map_arg(_plain(a), world.lift) for a in key)
    positional = [a for a, p in zip(args, op.params, strict=True) if not p.keyword_only]
    named = {p.name: a for a, p in zip(args, op.params, strict=True) if p.keyword_only}
    try:
        with world.mode, torch.no_grad():
            result = op.reference(*positional, **named)
    except Exception as error:  # torch raises many classes here; all mean "these types are refused"
        raise InferenceFailed(op=op.name, why=str(error).split("\n")[0]) from error
    if fact := world.assumed():
        return fact
    results = result if isinstance(result, (TUPLE, LIST)) else (result,)
    return tuple(type_of(r) for r in results)


def type_of(value: Any) -> ValueType:
    """Plait type of a (fake) tensor, number, symbolic number or None. Anything else is opaque."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or type(value).__name__ == "NestedTensor":
            return OpaqueType(str(value.layout).removeprefix("torch."))
        return TensorType(
            tuple(dim(s) for s in value.shape), value.dtype, str(value.device), tuple(dim(s) for s in value.stride())
        )
    if isinstance(value, torch.SymInt):
        return ScalarType("int", sympy.sympify(dim(value)))
    if isinstance(value, torch.SymFloat | float):
        return ScalarType("float")
    if isinstance(value, torch.SymBool | bool):
        return ScalarType("bool")
    if isinstance(value, int):
        return ScalarType("int", sympy.Integer(value))
    return OpaqueType("none" if value is None else type(value).__name__)


__all__ = ["RULES", "Result", "by_rule", "infer", "rule", "type_of"]
