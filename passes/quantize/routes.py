"""Transformations of constants and the proofs that they keep what the graph computes.

A *route* says how a factor for each channel (the last axis) of a value can be moved into constants further up: x / s
becomes another weight of the norm, of the multiplication or of the linear layer that makes x. It is found by carrying
labels, one for each channel, up through the graph; an op without a rule, or a value that somebody else reads too, is a
Reason, never a guess. Channels that meet on the way (heads that share their values, in grouped-query attention) form a class
and need one factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...ir import Graph, Node, Reason, TensorType, Value
from .groups import Group
from .linears import Linear

_VIEWS = frozenset(
    f"aten.{n}"
    for n in ("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
              "flatten.using_ints", "unflatten.int")
)  # fmt: skip
_PLAIN = frozenset(
    f"aten.{n}"
    for n in ("alias.default", "clone.default", "detach.default", "contiguous.default", "type_as.default",
              "_to_copy.default", "to.dtype", "lift_fresh_copy.default", "dropout.default", "relu.default", "neg.default")
)  # fmt: skip
"""Ops that a positive factor for each channel passes through: f(c x) = c f(x)."""
_NORMS = {"aten.layer_norm.default": ("weight", "bias"), "aten.native_layer_norm.default": ("weight", "bias"),
          "aten.rms_norm.default": ("weight",), "aten._fused_rms_norm.default": ("weight",)}  # fmt: skip
_PRODUCTS = ("aten.linear.default", "aten.mm.default", "aten.addmm.default", "aten.matmul.default", "aten.bmm.default")
_CONSTANT = "plait.constant"
_COPIES = ("aten.alias.default", "aten.detach.default", "aten._to_copy.default", "aten.to.dtype", "aten.type_as.default")
_TURNS = ("aten.t.default", "aten.permute.default", "aten.transpose.int")
_CUTS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
NONE = -1
"""The label of elements that no factor touches."""


@dataclass(frozen=True)
class Edit:
    """A constant is multiplied (with `divide` divided) by the factors that `labels`, broadcastable to it, name. `offset` is
    what the graph adds to it before it is used (1 in Gemma's norms): constant + offset is multiplied."""

    constant: str
    labels: Tensor
    offset: float = 0.0
    divide: bool = False

    def inverse(self) -> Edit:
        """The edit that divides."""
        return replace(self, divide=not self.divide)

    def of(self, factors: Tensor) -> Tensor:
        """What is multiplied by, of factors [channels]."""
        return 1 / factors if self.divide else factors

    def apply(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """The constant with factors [channels] multiplied in, or divided by, computed in float64."""
        known = torch.cat([self.of(factors.double()), torch.ones(1, dtype=torch.float64)])
        return ((tensor.double() + self.offset) * known[self.labels] - self.offset).to(tensor.dtype)


@dataclass(frozen=True)
class Route:
    """How a factor for each channel of a value moves into constants. `classes` [channels] numbers channels that need one
    factor. Equal factors of a class are the caller's to give, see `tied`."""

    edits: tuple[Edit, ...]
    classes: Tensor

    def tied(self, factors: Tensor) -> Tensor:
        """Factors [channels] made equal within each class, by their geometric mean."""
        sums = torch.zeros(int(self.classes.max()) + 1, dtype=torch.float64).index_add(
            0, self.classes, factors.double().log()
        )
        return (sums / self.classes.bincount()).exp()[self.classes].to(factors.dtype)


def input_route(graph: Graph, group: Group, held: frozenset[Linear]) -> Route | Reason:
    """How the values that a group reads can be divided by a factor for each channel. All that reads them must be the group,
    whose layers are in `held`, and so get weights of their own, or have weights that nobody else reads."""
    for one in group.linears:
        if one not in held and (one.constant is None or not _alone(graph, one)):
            return Reason(f"{one.name} reads {group.x.hint} too, with a weight that is not its own")
    if group.others:
        return Reason(f"{group.others[0].op.name} reads {group.x.hint} too")
    readers = (*(one.node for one in group.linears), *group.carriers)
    if any(v in graph.results for v in (group.x, *(c.out for c in group.carriers))):
        return Reason(f"{group.x.hint} is a result of the graph")
    channels = group.x.tensor.shape[-1]
    if not isinstance(channels, int):
        return Reason("the number of channels is symbolic")
    finder = _Finder(graph, channels)
    labels = torch.arange(channels).reshape(*[1] * (group.x.tensor.rank - 1), channels)
    why = finder.up(group.x, labels, frozenset(readers))
    return why if why is not None else finder.route()


def _alone(graph: Graph, one: Linear) -> bool:
    """Whether nothing but a layer reads its weight."""
    value = one.weight
    while value not in graph.results and len(users := graph.users.get(value, ())) == 1:
        if users[0] is one.node:
            return True
        value = users[0].out
    return False


class _Finder:
    def __init__(self, graph: Graph, channels: int) -> None:
        self.graph = graph
        self.parent = list(range(channels))
        self.edits: list[Edit] = []

    def route(self) -> Route:
        roots = [self.root(i) for i in range(len(self.parent))]
        number = {r: i for i, r in enumerate(dict.fromkeys(roots))}
        return Route(tuple(self.edits), torch.tensor([number[r] for r in roots]))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def join(self, labels: Tensor, dim: int) -> Tensor | Reason:
        """Labels without their variation along a dimension: those that meet there become one class."""
        first = labels.select(dim, 0).unsqueeze(dim)
        for a, b in zip(first.expand_as(labels).reshape(-1).tolist(), labels.reshape(-1).tolist(), strict=True):
            if (a == NONE) != (b == NONE):
                return Reason("channels that are scaled meet some that are not")
            if a != NONE:
                self.parent[self.root(b)] = self.root(a)
        return first

    def up(self, value: Value, labels: Tensor, readers: frozenset[Node]) -> Reason | None:
        """Move the factors `labels` (broadcastable to the value) of a value that only `readers` read further up; why not."""
        if value in self.graph.results:
            return Reason(f"{value.hint} is a result of the graph")
        if not value.tensor.dtype.is_floating_point:
            return Reason(f"{value.hint} holds no floats")
        for user in self.graph.users.get(value, ()):
            if user in readers and sum(v is value for v in user.inputs) > 1:
                return Reason(f"{user.op.name} reads {value.hint} twice")
            if user not in readers and user.results and not self.apart(user, value, labels):
                return Reason(f"{user.op.name} reads {value.hint} too")
        node = self.graph.producers.get(value)
        if node is None:
            return Reason(f"{value.hint} is an input of the graph")
        if value is not node.results[0] and node.op.name not in _CUTS:
            return Reason(f"{value.hint} is not the first result of {node.op.name}")
        name, only = node.op.name, frozenset((node,))
        if name in _PLAIN:
            return self.up(node.inputs[0], labels, only)
        if name in _NORMS:
            return self.norm(node, labels, _NORMS[name])
        if name in _PRODUCTS:
            return self.product(node, labels)
        if name in _VIEWS:
            found = _reshaped(labels, value.tensor, node.inputs[0].tensor)
            return found if isinstance(found, Reason) else self.up(node.inputs[0], found, only)
        if name in _TURNS:
            return self.up(node.inputs[0], _permuted(node, labels), only)
        if name == "aten.expand.default":
            return self.expand(node, labels)
        if name == "aten.repeat_interleave.self_int":
            return self.repeat(node, labels)
        if name == "aten.slice.Tensor":
            return self.cut(node, labels, node["dim"], node["start"] or 0)
        if name in _CUTS:
            before = sum(int(v.tensor.shape[node["dim"]]) for v in node.results[: node.results.index(value)])  # type: ignore[arg-type]
            return self.cut(node, labels, node["dim"], before)
        if name == "aten.mul.Tensor":
            return self.mul(node, labels)
        if name == "aten.div.Tensor":
            return self.operand(node, node.args[0], labels) if _is_tensor(node.args[0]) else Reason("a number by a value")
        if name == "aten.add.Tensor" and node["alpha"] == 1 and all(map(_is_tensor, node.args[:2])):
            return self.both(node, labels)
        if name == "aten.scaled_dot_product_attention.default":
            return self.attention(node, labels)
        return Reason(f"{name} does not pass on factors of its channels")

    def apart(self, user: Node, value: Value, labels: Tensor) -> bool:
        """Whether a reader takes a slice of a value that no factor touches."""
        if user.op.name != "aten.slice.Tensor" or user.args[0] is not value:
            return False
        dim = user["dim"] % value.tensor.rank
        if labels.shape[dim] == 1:
            return False
        piece = labels[tuple([slice(None)] * dim + [slice(user["start"], user["end"], user["step"])])]
        return bool((piece == NONE).all())

    def cut(self, node: Node, labels: Tensor, dim: int, start: int) -> Reason | None:
        """A piece of a value: factors of the rest are none."""
        source = node.inputs[0].tensor
        dim %= source.rank
        size, length = source.shape[dim], labels.shape[dim]
        if node.get("step", 1) != 1 or not isinstance(size, int):
            return (
                self.up(node.inputs[0], labels, frozenset((node,))) if length == 1 and _whole(node) else Reason("a stride")
            )
        if length == 1:
            if _whole(node):
                return self.up(node.inputs[0], labels, frozenset((node,)))
            return Reason(f"a piece of the axis {dim}, along which factors are the same")
        shape = list(labels.shape)
        shape[dim] = size
        whole = torch.full(shape, NONE)
        start = max(0, start + size) if start < 0 else start
        whole.narrow(dim, start, length).copy_(labels)
        return self.up(node.inputs[0], whole, frozenset((node,)))

    def expand(self, node: Node, labels: Tensor) -> Reason | None:
        source, out = node.inputs[0].tensor, node.out.tensor
        for dim in range(out.rank):
            at = dim - (out.rank - source.rank)
            if labels.shape[dim] != 1 and (at < 0 or source.shape[at] == 1):
                joined = self.join(labels, dim)
                if isinstance(joined, Reason):
                    return joined
                labels = joined
        return self.up(node.inputs[0], labels.reshape(labels.shape[out.rank - source.rank :]), frozenset((node,)))

    def repeat(self, node: Node, labels: Tensor) -> Reason | None:
        """Elements of an axis, each repeated so many times in a row."""
        dim, times = node["dim"], node["repeats"]
        if dim is None or not isinstance(times, int):
            return Reason("a repetition of all elements, or of so many that a size says")
        dim %= labels.ndim
        if labels.shape[dim] != 1:
            joined = self.join(labels.unflatten(dim, (-1, times)), dim + 1)
            if isinstance(joined, Reason):
                return joined
            labels = joined.squeeze(dim + 1)
        return self.up(node.inputs[0], labels, frozenset((node,)))

    def mul(self, node: Node, labels: Tensor) -> Reason | None:
        """One of the factors takes it: a constant first, then what leads to a layer."""
        whys: list[Reason] = []
        for operand in sorted(filter(_is_tensor, node.args[:2]), key=lambda v: not self.is_constant(v)):
            kept, parents = list(self.edits), list(self.parent)
            found = self.operand(node, operand, labels)
            if found is None:
                return None
            self.edits, self.parent = kept, parents
            whys.append(found)
        return Reason(", and ".join(dict.fromkeys(reason.why for reason in whys)))

    def both(self, node: Node, labels: Tensor) -> Reason | None:
        """Both summands take it."""
        for operand in node.args[:2]:
            found = self.operand(node, operand, labels)
            if found is not None:
                return found
        return None

    def operand(self, node: Node, operand: Value, labels: Tensor) -> Reason | None:
        """Move factors, as they are wanted of an operand, into it; where it is broadcast they must be the same."""
        source, lead = operand.tensor, labels.ndim - operand.tensor.rank
        for dim, n in enumerate(labels.shape):
            if n != 1 and (dim < lead or source.shape[dim - lead] != n):
                return Reason(f"{operand.hint} is broadcast along an axis whose factors differ")
        part = labels.reshape([1] * max(0, -lead) + list(labels.shape[max(0, lead) :]))
        if self.is_constant(operand):
            return self.constant(operand, part, frozenset((node,)))
        return self.up(operand, part, frozenset((node,)))

    def is_constant(self, value: Value) -> bool:
        node = self.graph.producers.get(value)
        if node is None:
            return False
        read = node.inputs[:1] if node.op.name in _COPIES else node.inputs  # type_as reads the dtype of another value
        return node.op.name == _CONSTANT or (bool(read) and all(map(self.is_constant, read)))

    def constant(self, value: Value, labels: Tensor, readers: frozenset[Node]) -> Reason | None:
        """A constant, or a constant plus a number, takes the factors."""
        offset = 0.0
        while True:
            node = self.graph.producers[value]
            what = f"the constant {node.args[0] if node.op.name == _CONSTANT else value.hint}"
            for user in self.graph.users.get(value, ()):
                if user in readers and sum(v is value for v in user.inputs) > 1:
                    return Reason(f"{user.op.name} reads {what} twice")
                if user not in readers and user.results:
                    return Reason(f"{what} is read elsewhere too")
            if value in self.graph.results:
                return Reason(f"{what} is a result of the graph")
            if not value.tensor.dtype.is_floating_point:
                return Reason(f"{what} holds no floats")
            if node.op.name == _CONSTANT:
                break
            if node.op.name == "aten.add.Tensor" and isinstance(node.args[1], int | float) and node["alpha"] == 1:
                offset += node.args[1]
            elif node.op.name in _VIEWS:
                found = _reshaped(labels, value.tensor, node.inputs[0].tensor)
                if isinstance(found, Reason):
                    return found
                labels = found
            elif node.op.name in _TURNS:
                labels = _permuted(node, labels)
            elif node.op.name not in _COPIES:
                return Reason(f"a constant behind {node.op.name}")
            value, readers = node.inputs[0], frozenset((node,))
        if any(_overlap(labels, edit.labels) for edit in self.edits if edit.constant == node.args[0]):
            return Reason(f"{what} would be scaled twice")
        self.edits.append(Edit(node.args[0], labels, offset))
        return None

    def norm(self, node: Node, labels: Tensor, names: Sequence[str]) -> Reason | None:
        if math.prod(labels.shape[:-1]) != 1:
            return Reason("factors that vary between rows of a norm")
        if len(node["normalized_shape"]) != 1 or node[names[0]] is None:
            return Reason(f"{node.op.name} has no weight for each channel")
        for name in names:
            if node[name] is None:
                continue
            if not self.is_constant(node[name]):
                return Reason(f"the {name} of {node.op.name} is no constant")
            found = self.constant(node[name], labels.reshape(-1), frozenset((node,)))
            if found is not None:
                return found
        return None

    def product(self, node: Node, labels: Tensor) -> Reason | None:
        """A linear layer, or a product with something else: columns of the second factor, and the bias, take the factors."""
        bias, weight = None, node.args[1]
        if node.op.name == "aten.linear.default":
            bias = node.args[2]
        elif node.op.name == "aten.addmm.default":
            bias, weight = node.args[0], node.args[2]
            if node["beta"] != 1:
                return Reason("a scaled bias")
        rank = weight.tensor.rank
        if rank < 2:
            return Reason("a product with a vector")
        part = labels if node.args[0].tensor.rank > 1 else labels.unsqueeze(-2)
        if node.op.name == "aten.linear.default":
            if math.prod(labels.shape[:-1]) != 1:
                return Reason("factors that vary between rows of a product")
            part = labels.reshape(-1, 1)
        elif part.shape[-2] != 1:
            return Reason("factors that vary between rows of a product")
        found = self.operand(node, weight, part)
        return found if found is not None or bias is None else self.operand(node, bias, labels)

    def attention(self, node: Node, labels: Tensor) -> Reason | None:
        """Attention is linear in its values, for each head and channel; heads may share theirs."""
        value = node["value"]
        if labels.shape[-2] != 1:
            return Reason("factors that vary along attention's rows")
        if value.tensor.rank != labels.ndim or any(
            n not in (1, m) for n, m in zip(labels.shape[:-3], value.tensor.shape, strict=False)
        ):
            return Reason("values are broadcast to batches")
        heads, own = labels.shape[-3] if labels.ndim > 2 else 1, value.tensor.shape[-3] if value.tensor.rank > 2 else 1
        if heads != 1 and heads != own:
            if not node.get("enable_gqa", False) or not isinstance(own, int):
                return Reason("values are broadcast to heads")
            joined = self.join(labels.unflatten(-3, (own, heads // own)), labels.ndim - 2)
            if isinstance(joined, Reason):
                return joined
            labels = joined.squeeze(labels.ndim - 2)
        return self.up(value, labels, frozenset((node,)))


def _is_tensor(arg: Any) -> TypeGuard[Value]:
    return isinstance(arg, Value) and isinstance(arg.type, TensorType)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two edits' labels of one constant name factors for the same element."""
    return bool(((a != NONE) & (b != NONE)).any())


def _whole(node: Node) -> bool:
    """Whether a slice takes all of its axis."""
    return bool(node.results) and node.inputs[0].tensor.shape == node.out.tensor.shape


def _permuted(node: Node, labels: Tensor) -> Tensor:
    """Labels of a permutation's input."""
    rank = node.out.tensor.rank
    order = list(range(rank))
    if node.op.name == "aten.t.default":
        order.reverse()
    elif node.op.name == "aten.transpose.int":
        i, j = node["dim0"] % rank, node["dim1"] % rank
        order[i], order[j] = order[j], order[i]
    else:
        order = [d % rank for d in node["dims"]]
    return labels.permute([order.index(d) for d in range(rank)])


def _reshaped(labels: Tensor, out: TensorType, source: TensorType) -> Tensor | Reason:
    """Labels of a reshape's input from those of its result: axes that are cut or merged are matched by their sizes."""
    made: list[int] = []
    runs: list[tuple[range, range]] = []  # from the right: runs of axes with equal products
    i, j = len(out.shape), len(source.shape)
    while i or j:
        i0, j0 = i, j
        left: Any = 1
        right: Any = 1
        while (i, j) == (i0, j0) or left != right:
            if i and (i == i0 or _less(left, right)):
                i -= 1
                left = left * out.shape[i]
            elif j and (j == j0 or _less(right, left)):
                j -= 1
                right = right * source.shape[j]
            else:  # sizes that cannot be told apart: what is left of both
                i = j = 0
                break
        runs.append((range(i, i0), range(j, j0)))
    for of_out, of_source in runs:
        varies = [labels.shape[d] for d in of_out]
        if all(n == 1 for n in varies):
            made[:0] = [1] * len(of_source)
            continue
        sizes = [out.shape[d] for d in of_out]
        target = [source.shape[d] for d in of_source]
        if not all(isinstance(n, int) for n in (*sizes, *target)):
            return Reason("a reshape of channels with a symbolic size")
        shape = [*labels.shape[: of_out.start], *sizes, *labels.shape[of_out.stop :]]
        labels = labels.expand(shape).reshape(*shape[: of_out.start], *target, *shape[of_out.stop :])
        # axes along which all is the same again
        for at in range(len(target)):
            dim = of_out.start + at
            if labels.shape[dim] != 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
                labels = labels.narrow(dim, 0, 1)
        made[:0] = [labels.shape[of_out.start + at] for at in range(len(target))]
    return labels.reshape(made)


def _less(a: Any, b: Any) -> bool:
    """Whether a product of sizes is known to have to grow to reach another."""
    return a < b if isinstance(a, int) and isinstance(b, int) else a == 1 != b
