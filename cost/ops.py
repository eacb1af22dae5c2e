"""How much work one application is: floating-point operations, bytes read and written. Counted from types, not measured.

Sizes may be symbolic; then the counts are expressions, and `Work.at` puts numbers in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from ..ir import Graph, Node, TensorType, Value
from ..ir.types import Dim, dim, product


@dataclass(frozen=True, slots=True)
class Work:
    """Additions plus multiplications (a special function counts as `SPECIAL` of them), bytes read, bytes written.

    `known` is False where the count of operations is not: the op has no formula and the bytes are all there is. `fma` are
    those of the operations that are halves of fused multiply-adds.
    """

    flops: Dim = 0
    read: Dim = 0
    written: Dim = 0
    known: bool = True
    fma: Dim = 0

    @property
    def bytes(self) -> Dim:
        """Bytes read and written."""
        return dim(self.read + self.written)

    def __add__(self, other: Work) -> Work:
        return Work(
            dim(self.flops + other.flops), dim(self.read + other.read), dim(self.written + other.written),
            self.known and other.known, dim(self.fma + other.fma),
        )  # fmt: skip

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Work:
        """The counts with numbers for the size symbols."""

        def number(d: Any) -> int:
            return d if isinstance(d, int) else int(d.subs(dict(sizes)))

        return Work(number(self.flops), number(self.read), number(self.written), self.known, number(self.fma))


#: Operations that one exponential, logarithm, root, division or error function counts as.
SPECIAL = 10

_SPECIAL = frozenset(
    f"aten.{n}"
    for n in ("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid",
              "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "erf", "erfc", "erfinv", "gelu", "silu",
              "mish", "elu", "softplus", "pow", "div", "remainder", "fmod", "lgamma", "digamma", "log_sigmoid_forward")
)  # fmt: skip

Rule = Callable[[Node], Work]

RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def size_bytes(kind: TensorType) -> Dim:
    """Bytes of the distinct elements of a tensor: a dimension of stride 0 counts once."""
    shape = [1 if stride == 0 else size for size, stride in zip(kind.shape, kind.strides, strict=True)]
    return dim(product(shape) * kind.dtype.itemsize)


def _traffic(node: Node) -> Work:
    """Every operand read once, every result written once."""
    read: Any = sum(size_bytes(v.type) for v in dict.fromkeys(node.inputs) if isinstance(v.type, TensorType))
    written: Any = sum(size_bytes(v.type) for v in node.results if isinstance(v.type, TensorType))
    return Work(0, dim(read), dim(written))


def _counted(node: Node, flops: Any) -> Work:
    moved = _traffic(node)
    return Work(dim(flops), moved.read, moved.written)


def _multiply_adds(node: Node, flops: Any) -> Work:
    return replace(_counted(node, flops), fma=dim(flops))


def work(node: Node) -> Work:
    """The work of one node: that of its regions for control flow, nothing for views and constants."""
    if node.op.has("control_flow"):
        return _region_work(node)
    if node.op.has("view") or node.op.name == "plait.constant" or node.op.has("scalar"):
        return Work()
    rule = RULES.get(node.op.name)
    if rule is not None:
        return rule(node)
    if node.op.has("elementwise"):
        out = node.results[0].tensor
        return _counted(node, out.numel * (SPECIAL if node.op.base in _SPECIAL else 1))
    moved = _traffic(node)
    return Work(0, moved.read, moved.written, known=False)


def graph_work(graph: Graph) -> Work:
    """The work of a whole graph, each node on its own: values between nodes are written and read again."""
    total = Work()
    for node in graph.nodes:
        total = total + work(node)
    return total


def _region_work(node: Node) -> Work:
    inside = [graph_work(r) for r in node.regions]
    if node.op.name == "plait.call":
        return inside[0]
    if node.op.name == "plait.cond" and all(isinstance(w.flops, int) for w in inside):
        return max(inside, key=lambda w: (w.flops, w.bytes))
    # how often a loop runs is not known: one round, marked as a guess
    total = Work(known=False)
    for w in inside:
        total = total + w
    return total


def _numel(v: Value) -> Dim:
    return v.tensor.numel


# -- products ---------------------------------------------------------------------------------------------------------


@_rule("aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default", "aten.matmul.default",
       "aten.linear.default", "aten.addmm.default", "aten.baddbmm.default")  # fmt: skip
def _product(node: Node) -> Work:
    a = node.inputs[1 if node.op.name in ("aten.addmm.default", "aten.baddbmm.default") else 0]
    return _multiply_adds(node, 2 * _numel(node.out) * a.tensor.shape[-1])


@_rule("plait.expert_mm.default")
def _expert_product(node: Node) -> Work:
    """How many rows are used is not in the types: all of them at most."""
    return _multiply_adds(node, 2 * _numel(node.out) * node.inputs[0].tensor.shape[-1])


@_rule("plait.expert_mm_weight.default")
def _expert_weight_product(node: Node) -> Work:
    return _multiply_adds(node, 2 * _numel(node.inputs[0]) * node.inputs[1].tensor.shape[-1])


@_rule("plait.quantized_linear.default", "plait.dynamic_linear.default")
def _quantized_product(node: Node) -> Work:
    return _multiply_adds(node, 2 * _numel(node.out) * node.inputs[0].tensor.shape[-1])


@_rule("aten.convolution.default", "mkldnn._convolution_pointwise.default")
def _convolution(node: Node) -> Work:
    return _multiply_adds(node, _convolution_flops(node, node.inputs[0].tensor, node.inputs[1].tensor, node.out.tensor))


def _convolution_flops(node: Node, x: TensorType, w: TensorType, out: TensorType) -> Any:
    """2 × (positions of the side that the weight slides over) × batch × weights."""
    positions = product((x if node.get("transposed", False) else out).shape[2:])
    return 2 * positions * out.shape[0] * w.numel


@_rule("aten.convolution_backward.default")
def _convolution_backward(node: Node) -> Work:
    grad, x, w = (v.tensor for v in node.inputs[:3])
    wanted = node["output_mask"]
    return _multiply_adds(node, (bool(wanted[0]) + bool(wanted[1])) * _convolution_flops(node, x, w, grad))


@_rule("aten.scaled_dot_product_attention.default", "aten._scaled_dot_product_flash_attention_for_cpu.default",
       "aten._scaled_dot_product_flash_attention.default",
       "aten._scaled_dot_product_efficient_attention.default")  # fmt: skip
def _attention(node: Node) -> Work:
    q, k, v = (x.tensor for x in node.inputs[:3])
    scores = product(q.shape[:-1]) * k.shape[-2]
    return _multiply_adds(node, 2 * scores * (q.shape[-1] + v.shape[-1]))


@_rule("aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
       "aten._scaled_dot_product_flash_attention_backward.default")  # fmt: skip
def _attention_backward(node: Node) -> Work:
    q, k, v = (x.tensor for x in node.inputs[1:4])
    scores = product(q.shape[:-1]) * k.shape[-2]
    return _multiply_adds(node, 2 * scores * (3 * q.shape[-1] + 2 * v.shape[-1]))


# -- reductions and norms: operations for each element of the operand -------------------------------------------------

_PER_ELEMENT = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "prod": 1, "any": 1, "all": 1, "argmax": 1, "argmin": 1,
    "var": 3, "var_mean": 3, "std": 3, "cumsum": 1, "cumprod": 1, "logsumexp": SPECIAL + 2, "linalg_vector_norm": 2,
    "_softmax": SPECIAL + 4, "_log_softmax": SPECIAL + 4, "softmax": SPECIAL + 4, "log_softmax": SPECIAL + 4,
    "_softmax_backward_data": 4, "_log_softmax_backward_data": SPECIAL + 3, "native_layer_norm": 7, "_fused_rms_norm": 4,
    "native_group_norm": 7, "_native_batch_norm_legit_no_training": 2, "_native_batch_norm_legit_functional": 7,
    "native_layer_norm_backward": 12,
}  # fmt: skip


def _per_element(count: int) -> Rule:
    return lambda node: _counted(node, _numel(node.inputs[0]) * count)


for _name, _count in _PER_ELEMENT.items():
    _packet: Any = getattr(torch.ops.aten, _name)
    _rule(*(f"aten.{_name}.{o}" for o in _packet.overloads()))(_per_element(_count))

# -- mixture of experts: one operation for each element of what is weighted or added ------------------------------------


@_rule("plait.moe_encode.default", "plait.moe_decode.default", "plait.moe_decode_weight.default")
def _pairs(node: Node) -> Work:
    """Rows of pairs are read (written, by encode), not the whole buffer; encode writes zeros elsewhere."""
    choice, h = node["choice"].tensor, node.inputs[0].tensor.shape[-1]
    moved, rows = _traffic(node), dim(choice.numel * h * node.inputs[0].tensor.dtype.itemsize)
    if node.op.name == "plait.moe_encode.default":
        return Work(0 if node["weight"] is None else dim(choice.numel * h), moved.read, moved.written)
    return Work(dim(2 * choice.numel * h), dim(moved.read - size_bytes(node["buf"].tensor) + rows), moved.written)


@_rule("plait.moe_keep.default", "plait.moe_slots.default")
def _gate(node: Node) -> Work:
    """A stable sort of all pairs and a few passes over them."""
    return _counted(node, _numel(node["choice"]) * SPECIAL)


@_rule("plait.expert_act.default")
def _expert_act(node: Node) -> Work:
    operations = 1 if node["kind"] in ("relu", "none") else SPECIAL
    return _counted(node, _numel(node.out) * (operations + (node["bias"] is not None) + (node["other"] is not None)))


@_rule("plait.expert_act_backward.default")
def _expert_act_backward(node: Node) -> Work:
    """Its slope and the product with it, and with `other` also the activation itself."""
    operations = 1 if node["kind"] in ("relu", "none") else SPECIAL
    gated = node["other"] is not None
    return _counted(node, _numel(node["x"]) * ((operations + 1) * (1 + gated) + gated + (node["bias"] is not None)))


# -- moves ------------------------------------------------------------------------------------------------------------


@_rule("aten.clone.default", "aten._to_copy.default", "aten.contiguous.default", "aten.copy.default", "aten.cat.default",
       "aten.stack.default", "aten.constant_pad_nd.default", "aten.flip.default", "aten.roll.default", "aten.repeat.default",
       "aten.full.default", "aten.arange.start_step", "aten.zeros.default", "aten.ones.default", "aten.empty.memory_format",
       "aten.scalar_tensor.default", "aten.tril.default", "aten.triu.default", "aten.lift_fresh_copy.default",
       "plait.moe_join.default")  # fmt: skip
def _move(node: Node) -> Work:
    return _traffic(node)


@_rule("aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default", "aten.empty_like.default",
       "aten.new_zeros.default", "aten.new_full.default", "aten.new_empty.default")  # fmt: skip
def _fill(node: Node) -> Work:
    return Work(0, 0, _traffic(node).written)


@_rule("aten.embedding.default", "aten.index_select.default", "aten.gather.default", "aten.index.Tensor",
       "aten._unsafe_index.Tensor")  # fmt: skip
def _lookup(node: Node) -> Work:
    """Only what is looked up is read, not the whole table."""
    written = _traffic(node).written
    indices: Any = sum(size_bytes(v.tensor) for v in node.inputs[1:])
    return Work(0, dim(indices + written), written)


@_rule("aten.select_scatter.default", "aten.slice_scatter.default", "aten.scatter.src", "aten.scatter.value",
       "aten.index_put.default")  # fmt: skip
def _scatter(node: Node) -> Work:
    return _traffic(node)


@_rule("aten.scatter_add.default", "aten.index_add.default", "aten.embedding_dense_backward.default")
def _scatter_add(node: Node) -> Work:
    return _counted(node, max((_numel(v) for v in node.inputs), key=lambda n: n if isinstance(n, int) else -1))


@_rule("aten.max_pool2d_with_indices.default", "aten.avg_pool2d.default")
def _pool(node: Node) -> Work:
    return _counted(node, _numel(node.out) * product(node["kernel_size"]))


__all__ = ["SPECIAL", "Work", "graph_work", "size_bytes", "work"]
