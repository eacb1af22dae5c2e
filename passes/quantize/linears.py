"""Linear layers of a graph: products of an activation with a weight that the graph owns, or that comes in as an input."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ...errors import NoLayerMatches
from ...ir import Graph, Node, TensorType, Value
from ...ir.types import Dim

_LINEAR, _TURNS = (
    "aten.linear.default",
    ("aten.t.default", "aten.permute.default", "aten.transpose.int", "aten.numpy_T.default", "aten.mT.default"),
)
_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.matmul.default")
CLASSES = ("Linear",)
"""What targets call all linear layers."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b: the node, its input, its weight (`constant` names one of the graph's own; else it is an input of the
    graph), its bias, whether the weight is stored as [K, N]. `name` is that of the module that owns the weight."""

    node: Node
    x: Value
    weight: Value
    bias: Value | None
    constant: str | None
    name: str
    turned: bool = False

    @property
    def rows(self) -> int:
        """N."""
        return int(self.weight.tensor.shape[1 if self.turned else 0])  # type: ignore[arg-type]

    @property
    def columns(self) -> int:
        """K."""
        return int(self.weight.tensor.shape[0 if self.turned else 1])  # type: ignore[arg-type]


def linears(graph: Graph, parameters: Collection[int] = ()) -> list[Linear]:
    """The linear layers of a graph, in order: products with a weight that is a constant, or one of the inputs that
    `parameters` numbers. Weights have two static sizes and are floats. Names tell weights apart."""
    inputs = frozenset(graph.inputs[i] for i in parameters)
    found = [one for node in graph.nodes if (one := _linear(graph, node, inputs)) is not None]
    weights: dict[str, set[Value]] = {}
    for one in found:
        weights.setdefault(one.name, set()).add(one.weight)
    return [one if len(weights[one.name]) == 1 else replace(one, name=_longer(one)) for one in found]


def _longer(one: Linear) -> str:
    """The name of a layer whose module has several weights."""
    return f"{one.name}.{(one.constant or one.weight.hint or 'weight').rpartition('.')[2]}"


@dataclass(frozen=True, eq=False)
class Product:
    """x W^T + b as a node has it: the weight behind views that turn it, and whether it is there as [K, N]."""

    x: Value
    weight: Value
    bias: Value | None
    turned: bool


def product_of(graph: Graph, node: Node) -> Product | None:
    """What a node multiplies; None where it is no product of rows by a matrix."""
    bias: Value | None = None
    turned = False
    if node.op.name == _LINEAR:
        x, weight, bias = node.args
    elif node.op.name in _PRODUCTS:
        if node.op.name == "aten.addmm.default":
            bias, x, weight = node.args[:3]
            if node["beta"] != 1 or node["alpha"] != 1 or not _is_row(bias):
                return None
        else:
            x, weight = node.args
        turned = True
    else:
        return None
    weight, again = unturned(graph, weight)
    kind = weight.tensor
    if kind.rank != 2 or not kind.is_static or not kind.dtype.is_floating_point or not isinstance(x.type, TensorType):
        return None
    return Product(x, weight, bias, turned != again)


def unturned(graph: Graph, weight: Value) -> tuple[Value, bool]:
    """The weight behind views that exchange its last two axes, and whether they are exchanged in the end."""
    turned, source = False, graph.producers.get(weight)
    while source is not None and source.op.name in _TURNS and _turns(source):
        weight, turned = source.inputs[0], not turned
        source = graph.producers.get(weight)
    return weight, turned


def constant_of(graph: Graph, value: Value) -> str | None:
    """The name of the constant that a value is."""
    source = graph.producers.get(value)
    return str(source.args[0]) if source is not None and source.op.name == "plait.constant" else None


def _linear(graph: Graph, node: Node, inputs: frozenset[Value]) -> Linear | None:
    made = product_of(graph, node)
    if made is None:
        return None
    constant = constant_of(graph, made.weight)
    if constant is None and made.weight not in inputs:
        return None
    name = _name(graph, node, made.weight, constant)
    return Linear(node, made.x, made.weight, made.bias, constant, name, made.turned)


def _name(graph: Graph, node: Node, weight: Value, constant: str | None) -> str:
    """What a layer is called: after the module that owns the weight, or that ran it where the weight has several readers."""
    module = re.sub(r"^L\['(self|fn|mod)'\]\.?|\._modules|\['|'\]", lambda m: "." if m[0] == "['" else "", node.loc.module)
    shared = len(graph.users.get(weight, ())) > 1
    if module and (constant is None or shared):
        return module
    name = constant or weight.hint or "weight"
    return name.rpartition(".")[0] or name


def _is_row(bias: Value | None) -> bool:
    return bias is not None and bias.tensor.rank == 1


def _turns(node: Node) -> bool:
    """Whether a view exchanges the last two axes."""
    before, after = node.inputs[0].tensor, node.out.tensor
    return before.rank > 1 and (after.shape, after.strides) == (_exchanged(before.shape), _exchanged(before.strides))


def _exchanged(of: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return (*of[:-2], of[-1], of[-2])


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name is meant: by itself, by its last parts ("lm_head", "mlp.down_proj"), by `re:` and a regular
    expression for the beginning of the name, or by a class of `CLASSES`, which means all."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif pattern in CLASSES or name == pattern or name.endswith("." + pattern):
            return True
    return False


def chosen(
    found: Sequence[Linear], targets: Sequence[str], ignore: Sequence[str], whole: Collection[str] = ()
) -> list[Linear]:
    """The layers that are to be quantized. `whole` names others that targets may mean. Raises NoLayerMatches for a pattern
    of `targets` that matches none, and for none left."""
    names = [*(one.name for one in found), *whole]
    for pattern in targets:
        if not any(matches(name, (pattern,)) for name in names):
            raise NoLayerMatches(pattern=pattern, names=_some(names))
    if not any(matches(name, targets) and not matches(name, ignore) for name in names):
        raise NoLayerMatches(pattern=f"{', '.join(targets)} without {', '.join(ignore)}", names=_some(names))
    return [one for one in found if matches(one.name, targets) and not matches(one.name, ignore)]


def _some(names: Iterable[str]) -> str:
    every = list(dict.fromkeys(names))
    shown = ", ".join(every[:8])
    return (f"{shown} and {len(every) - 8} more" if len(every) > 8 else shown) or "it has no linear layer"
