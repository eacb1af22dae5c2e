"""Running graphs by their ops' references, value by value: as they are, or in float64.

Every graph at the tensor level can run this way at any moment, without code generation. What a pass did is judged by
running the graph before and after it on the same inputs, beside a reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_map

from ...errors import WrongInputCount, WrongInputDtype, WrongInputRank, WrongInputShape, WrongInputType
from ...ir import Graph, OpaqueType, ScalarType, TensorType, Value
from ...ir.fx import FxLinks, to_fx

SEED = 0
WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
        torch.complex64: torch.complex128, torch.complex32: torch.complex128}  # fmt: skip
#: Ops whose dtypes are their meaning: what they make of a float is kept, not computed anew in float64.
QUANTIZED = ("quantized", "quantized_decomposed", "torchao", "_quantized")
#: Operands of plait's own ops on quantized weights that are kept; the others are floats like any.
PARTS = ("codes", "scales", "zeros")

Watch = Callable[[Value, Any], None]


@dataclass(frozen=True)
class Replay:
    """One run of a graph: its results (outputs, then the new values of written inputs), and every value inside it."""

    results: tuple[Any, ...]
    values: Mapping[Value, Any]


def random_inputs(graph: Graph, seed: int = SEED) -> list[Any]:
    """Inputs of the graph's types: normal floats, integers of 0 and 1 (valid as indices), sizes as seen at capture."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {s: i.hint if i.hint is not None else max(i.low, 2) for s, i in graph.symbols.items()}

    def number(expr: Any) -> int:
        return int(expr.subs(sizes)) if hasattr(expr, "subs") else int(expr)

    def one(kind: Any) -> Any:
        if isinstance(kind, TensorType):
            shape, strides = [number(d) for d in kind.shape], [number(d) for d in kind.strides]
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
            if kind.dtype.is_floating_point or kind.dtype.is_complex:
                memory = torch.randn(span, generator=generator, dtype=WIDE.get(kind.dtype, kind.dtype))
            else:
                memory = torch.randint(0, 2, (span,), generator=generator)
            return memory.to(kind.dtype).to(kind.device).as_strided(shape, strides)
        if isinstance(kind, ScalarType):
            return number(kind.expr) if kind.expr is not None else {"int": 1, "float": 1.0, "bool": True}[kind.kind]
        assert isinstance(kind, OpaqueType)
        return None

    return [one(v.type) for v in graph.inputs]


def interpret(graph: Graph, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The graph's outputs, then the new values of written inputs, by the ops' references. The inputs stay as they are;
    random draws start from the same seed each time."""
    return _run(graph, inputs, wide=False, watch=None)


def interpret_wide(graph: Graph, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Like `interpret`, computed in float64: constants, inputs and casts to narrower floats are widened. Integers stay as
    they are, quantized ops get and give what they would; random draws are made as in the graph, and widened."""
    return _run(graph, inputs, wide=True, watch=None)


def replay(graph: Graph, inputs: Sequence[Any], *, wide: bool = False) -> Replay:
    """Run the graph and keep every value outside of regions. In-place ops are none, so values stay as they were made."""
    values: dict[Value, Any] = {}
    results = _run(graph, inputs, wide=wide, watch=values.__setitem__)
    return Replay(results, values)


def check_inputs(graph: Graph, inputs: Sequence[Any]) -> None:
    """Raise the WrongInput* error of the first flat input that a graph does not take."""
    if len(inputs) != len(graph.inputs):
        names = ", ".join(v.hint for v in graph.inputs)
        raise WrongInputCount(expected=len(graph.inputs), got=len(inputs), names=names)
    for v, x in zip(graph.inputs, inputs, strict=True):
        if not isinstance(v.type, TensorType):
            continue
        kind = v.type
        if not isinstance(x, torch.Tensor):
            raise WrongInputType(name=v.hint, expected="a tensor", got=type(x).__name__)
        if x.dtype != kind.dtype:
            want, got = (str(d).removeprefix("torch.") for d in (kind.dtype, x.dtype))
            raise WrongInputDtype(name=v.hint, expected=want, got=got)
        spec, shape = list(kind.shape), list(x.shape)
        if x.ndim != kind.rank:
            raise WrongInputRank(name=v.hint, expected=kind.rank, got=x.ndim, shape=shape, spec=spec)
        for d, (want, got) in enumerate(zip(kind.shape, x.shape, strict=True)):
            if isinstance(want, int) and want != got:
                raise WrongInputShape(name=v.hint, dim=d, expected=want, got=got, shape=shape, spec=spec)


def widen(x: Any) -> Any:
    """A tensor in float64 or complex128; integers, booleans and what is no tensor as they are."""
    return x.to(WIDE[x.dtype]) if isinstance(x, torch.Tensor) and x.dtype in WIDE else x


def copied(x: Any) -> Any:
    """A copy of a tensor, gaps and repeats in its memory included: compiled code may rely on strides. Others as they are."""
    if not isinstance(x, torch.Tensor):
        return x
    new = x.clone()
    return new if new.stride() == x.stride() else laid_out(x, x.stride())


def laid_out(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A copy of a tensor with these strides; elements that share a place in memory must be equal."""
    if not x.numel():
        return torch.empty_strided(x.shape, tuple(strides), dtype=x.dtype, device=x.device)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    memory = torch.zeros(span, dtype=x.dtype, device=x.device)
    places = torch.arange(span, device=x.device).as_strided(x.shape, tuple(strides))
    memory[places.reshape(-1)] = x.detach().reshape(-1)
    return memory.as_strided(x.shape, tuple(strides))


def _run(graph: Graph, inputs: Sequence[Any], *, wide: bool, watch: Watch | None) -> tuple[Any, ...]:
    links = FxLinks()
    gm = to_fx(graph, links)
    if wide:
        for child in gm.children():
            if isinstance(child, GraphModule):
                _widen_module(child)
    given = [tree_map(copied, x) for x in inputs]
    given = [widen(x) for x in given] if wide else given
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(SEED)
        outputs = _Interpreter(gm, links, wide, watch).run(*given)
    return (*outputs, *(given[i] for i, _ in graph.writes))


class _Interpreter(Interpreter):
    def __init__(self, gm: GraphModule, links: FxLinks, wide: bool, watch: Watch | None) -> None:
        super().__init__(gm)
        self.links = links
        self.wide = wide
        self.watch = watch

    def run_node(self, n: FxNode) -> Any:
        result = self._quantized(n) if self.wide and _holds_codes(n.target) else super().run_node(n)
        if self.watch is not None and n in self.links.values:
            self.watch(self.links.values[n], result)
        return result

    def fetch_attr(self, target: str) -> Any:
        found = super().fetch_attr(target)
        return widen(found) if self.wide else found

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.wide or isinstance(target, HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            return tree_map(widen, super().call_function(target, args, kwargs))
        return super().call_function(target, map_aggregate(args, _wide_dtype), map_aggregate(kwargs, _wide_dtype))  # type: ignore[arg-type]

    def _quantized(self, n: FxNode) -> Any:
        """A quantized op on operands of the dtypes that the graph gives it; of plait's own, on parts of weights that are."""
        assert isinstance(n.target, OpOverload)
        own = n.target.namespace == "plait"
        named = (*zip((a.name for a in n.target._schema.arguments), n.args, strict=False), *n.kwargs.items())
        parts = [arg for name, arg in named if name in PARTS]

        def narrow(arg: FxNode) -> Any:
            if own and arg not in parts:
                return self.env[arg]
            x, kind = self.env[arg], self.links.values[arg].type if arg in self.links.values else None
            return x.to(kind.dtype) if isinstance(x, torch.Tensor) and isinstance(kind, TensorType) else x

        args, kwargs = map_arg((n.args, n.kwargs), narrow)
        if own:
            args, kwargs = map_aggregate(args, _wide_dtype), map_aggregate(kwargs, _wide_dtype)
        return tree_map(widen, n.target(*args, **kwargs))


def _holds_codes(target: Any) -> bool:
    return isinstance(target, OpOverload) and target.namespace in (*QUANTIZED, "plait")


def _widen_module(gm: GraphModule) -> None:
    """A region's module in float64, in place."""
    for child in gm.children():
        if isinstance(child, GraphModule):
            _widen_module(child)
    for name, buffer in list(gm.named_buffers(recurse=False)):
        setattr(gm, name, widen(buffer))
    for n in list(gm.graph.nodes):
        if n.op != "call_function":
            continue
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            with gm.graph.inserting_after(n):
                wide = gm.graph.call_function(_widen_result, (n,))
            n.replace_all_uses_with(wide, lambda user, wide=wide: user is not wide)
            continue
        n.args = map_aggregate(n.args, _wide_dtype)
        n.kwargs = map_aggregate(n.kwargs, _wide_dtype)
    gm.recompile()


def _wide_dtype(a: Any) -> Any:
    return WIDE.get(a, a) if isinstance(a, torch.dtype) else a


def _widen_result(result: Any) -> Any:
    return tree_map(widen, result)
