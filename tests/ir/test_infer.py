"""Hand-written inference against torch: random types, layouts, broadcasting and size symbols."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from plait.errors import InferenceFailed
from plait.formats import QuantizedType
from plait.ir import SymbolInfo, TensorType, contiguous_strides, dim, infer_rules, infer_views, op, size_symbol
from plait.ir.graph import bind
from plait.ir.infer import RULES, by_rule

assert infer_rules and infer_views  # importing them fills RULES

S0, S1 = size_symbol("s0"), size_symbol("s1")
SYMBOLS = {S0: SymbolInfo(2, 64, 7), S1: SymbolInfo(2, None, 5)}
VALUES = ({S0: 7, S1: 5}, {S0: 2, S1: 3})

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
SIZES = (1, 2, 3, 4, 1, 3, S0, S1, 2 * S0, S0 * S1)


def shape(rng: random.Random, low: int = 0, high: int = 4) -> tuple[Any, ...]:
    return tuple(rng.choice(SIZES) for _ in range(rng.randint(low, high)))


def layout(rng: random.Random, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = rng.random()
    if kind < 0.5 or not sizes:
        return contiguous_strides(sizes)
    order = list(range(len(sizes)))
    rng.shuffle(order)
    dense = contiguous_strides([sizes[i] for i in order])
    strides = [dense[order.index(i)] for i in range(len(sizes))]
    if kind > 0.8:  # gaps, or a broadcast dimension
        i = rng.randrange(len(sizes))
        strides = [s if j != i else 0 for j, s in enumerate(strides)] if kind > 0.9 else [dim(2 * s) for s in strides]
    return tuple(strides)


def tensor(rng: random.Random, sizes: Any = None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> TensorType:
    sizes = shape(rng) if sizes is None else tuple(sizes)
    return TensorType(sizes, rng.choice(dtypes), "cpu", layout(rng, sizes))


def broadcastable(rng: random.Random, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    kept = tuple(1 if rng.random() < 0.25 else s for s in sizes)
    return kept[rng.randint(0, len(kept)) :] if rng.random() < 0.3 else kept


def number(rng: random.Random) -> Any:
    return rng.choice((2, 2.5, True, 0, -1, S0))


def unary(rng: random.Random) -> tuple[Any, ...]:
    return (tensor(rng),)


def binary(rng: random.Random) -> tuple[Any, ...]:
    sizes = shape(rng)
    a = tensor(rng, broadcastable(rng, sizes))
    return a, tensor(rng, broadcastable(rng, sizes)) if rng.random() < 0.7 else number(rng)


def with_number(rng: random.Random) -> tuple[Any, ...]:
    return tensor(rng), number(rng)


def where(rng: random.Random) -> tuple[Any, ...]:
    sizes = shape(rng)
    return tensor(rng, broadcastable(rng, sizes), (torch.bool,)), *(tensor(rng, broadcastable(rng, sizes)) for _ in range(2))


def three(rng: random.Random) -> tuple[Any, ...]:
    sizes = shape(rng)
    return tuple(tensor(rng, broadcastable(rng, sizes)) for _ in range(3))


def dims_of(rng: random.Random, rank: int, low: int = 0) -> tuple[int, ...]:
    some = rng.sample(range(rank), rng.randint(min(low, rank), rank))
    return tuple(d - rank if rng.random() < 0.3 else d for d in some)


def one_dim(rng: random.Random, rank: int) -> int:
    return rng.randint(-max(rank, 1), max(rank, 1) - 1)


def reduction(many: bool, dtypes: tuple[torch.dtype, ...] = DTYPES, empty: bool = True) -> Callable[..., tuple[Any, ...]]:
    def make(rng: random.Random) -> tuple[Any, ...]:
        x = tensor(rng, None, dtypes)
        dims: Any = dims_of(rng, x.rank, 0 if empty else 1) if many else one_dim(rng, x.rank)
        return x, dims, rng.random() < 0.5

    return make


def over(dtypes: tuple[torch.dtype, ...], *rest: Any) -> Callable[..., tuple[Any, ...]]:
    return lambda rng: (tensor(rng, None, dtypes), *rest)


def matrices(rank: int, bias: bool) -> Callable[..., tuple[Any, ...]]:
    def make(rng: random.Random) -> tuple[Any, ...]:
        m, k, n, b = (rng.choice(SIZES) for _ in range(4))
        dtypes = (rng.choice(FLOATS),)
        lead = (b,) if rank == 3 else ()
        product = [tensor(rng, (*lead, m, k), dtypes), tensor(rng, (*lead, k, n), dtypes)]
        return (tensor(rng, broadcastable(rng, (*lead, m, n)), dtypes), *product) if bias else tuple(product)

    return make


def linear(rng: random.Random) -> tuple[Any, ...]:
    k, n = rng.choice(SIZES), rng.choice(SIZES)
    dtypes = (rng.choice(FLOATS),)
    bias = tensor(rng, (n,), dtypes) if rng.random() < 0.5 else None
    return tensor(rng, (*shape(rng, 0, 3), k), dtypes), tensor(rng, (n, k), dtypes), bias


def permute(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng)
    dims = list(range(x.rank))
    rng.shuffle(dims)
    return x, tuple(d - x.rank if rng.random() < 0.3 else d for d in dims)


def view(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng)
    sizes = list(x.shape)
    for _ in range(2):
        i = rng.randrange(len(sizes)) if sizes else 0
        if rng.random() < 0.5 and len(sizes) > 1 and i + 1 < len(sizes):
            sizes[i : i + 2] = [dim(sizes[i] * sizes[i + 1])]
        elif rng.random() < 0.5:
            sizes.insert(i, 1)
        elif sizes and sizes[i] == 4:
            sizes[i : i + 1] = [2, 2]
        elif sizes and sizes[i] == S0 * S1:
            sizes[i : i + 1] = [S1, S0]
    if sizes and rng.random() < 0.3:
        sizes[rng.randrange(len(sizes))] = -1
    return x, tuple(sizes)


def expand(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng)
    sizes = tuple(
        rng.choice((3, S0)) if s == 1 and rng.random() < 0.6 else (-1 if rng.random() < 0.3 else s) for s in x.shape
    )
    return x, (*(rng.choice((2, S1)) for _ in range(rng.randint(0, 2))), *sizes)


def slicing(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng, shape(rng, 1))
    bounds = (None, 0, 1, 2, -1, -2, 100, 2**63 - 1, S0)
    return x, one_dim(rng, x.rank), rng.choice(bounds), rng.choice(bounds), rng.choice((1, 1, 2))


def along(*more: Callable[[random.Random], Any]) -> Callable[..., tuple[Any, ...]]:
    def make(rng: random.Random) -> tuple[Any, ...]:
        x = tensor(rng, shape(rng, 1))
        return x, *(m(rng) for m in more), one_dim(rng, x.rank)

    return make


def join(rng: random.Random) -> tuple[Any, ...]:
    sizes = shape(rng, 1)
    at, dtypes = rng.randrange(len(sizes)), (rng.choice(DTYPES),)
    parts = tuple(tensor(rng, [*sizes[:at], rng.choice(SIZES), *sizes[at + 1 :]], dtypes) for _ in range(rng.randint(1, 3)))
    return parts, at - len(sizes) if rng.random() < 0.3 else at


def stack(rng: random.Random) -> tuple[Any, ...]:
    sizes, dtypes = shape(rng, 0, 3), (rng.choice(DTYPES),)
    return tuple(tensor(rng, sizes, dtypes) for _ in range(rng.randint(1, 3))), rng.randint(-len(sizes) - 1, len(sizes))


def pad(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng)
    return x, tuple(rng.choice((0, 1, 2, -1)) for _ in range(2 * rng.randint(0, x.rank))), rng.choice((0, 1.5))


def gather(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng, [7] * rng.randint(1, 3))
    index = tensor(rng, [rng.choice((1, 2, 7)) for _ in x.shape], (torch.int64,))
    return x, one_dim(rng, x.rank), index


def layer_norm(rng: random.Random) -> tuple[Any, ...]:
    dtypes = (rng.choice(FLOATS),)
    x = tensor(rng, shape(rng, 1), dtypes)
    tail = x.shape[x.rank - rng.randint(1, x.rank) :]
    affine = tensor(rng, tail, dtypes) if rng.random() < 0.5 else None
    return x, tail, affine, affine, 1e-5


def split_sizes(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng, shape(rng, 1))
    at = one_dim(rng, x.rank)
    total = x.shape[at]
    first = rng.randint(0, total) if isinstance(total, int) else 1
    return x, (first, dim(total - first)), at


def select(rng: random.Random) -> tuple[Any, ...]:
    x = tensor(rng, shape(rng, 1))
    return x, one_dim(rng, x.rank), rng.choice((0, 1, -1, -2))


def embedding(rng: random.Random) -> tuple[Any, ...]:
    return tensor(rng, (rng.choice(SIZES), rng.choice(SIZES))), tensor(rng, None, (torch.int64, torch.int32))


def expand_as(rng: random.Random) -> tuple[Any, ...]:
    sizes = shape(rng)
    return tensor(rng, broadcastable(rng, sizes)), tensor(rng, sizes)


def memory_format(rng: random.Random) -> Any:
    return rng.choice((None, None, torch.preserve_format, torch.contiguous_format, torch.channels_last))


MAKERS: dict[str, Callable[[random.Random], tuple[Any, ...]]] = {
    "aten.where.self": where,
    "aten.addcmul.default": three,
    "aten.clamp.default": lambda rng: (tensor(rng), rng.choice((None, 0, 0.5)), rng.choice((1, 2.0))),
    "aten.hardtanh.default": lambda rng: (tensor(rng), 0, 1),
    "aten.div.Tensor_mode": lambda rng: (*binary(rng), rng.choice((None, "floor", "trunc"))),
    "aten.clone.default": lambda rng: (tensor(rng), memory_format(rng)),
    "aten.contiguous.default": unary,
    "aten._to_copy.default": lambda rng: (tensor(rng), rng.choice(DTYPES), None, None, None, False, memory_format(rng)),
    "aten.full.default": lambda rng: (shape(rng), number(rng), rng.choice((None, *DTYPES))),
    "aten.zeros.default": lambda rng: (shape(rng), rng.choice((None, *DTYPES))),
    "aten.ones.default": lambda rng: (shape(rng), rng.choice((None, *DTYPES))),
    "aten.empty.memory_format": lambda rng: (shape(rng), rng.choice((None, *DTYPES))),
    "aten.scalar_tensor.default": lambda rng: (number(rng), rng.choice((None, *DTYPES))),
    "aten.full_like.default": lambda rng: (tensor(rng), 2, rng.choice((None, *DTYPES)), None, None, None,
                                           memory_format(rng)),
    "aten.arange.start_step": lambda rng: (rng.randint(-3, 3), rng.randint(-3, 9), rng.choice((1, 2, -1, 0.5)),
                                           rng.choice((None, torch.float32, torch.int32))),
    "aten.sum.dim_IntList": reduction(True), "aten.sum.default": unary, "aten.prod.default": unary,
    "aten.prod.dim_int": reduction(False), "aten.mean.dim": reduction(True, FLOATS), "aten.mean.default": over(FLOATS),
    "aten.amax.default": reduction(True), "aten.amin.default": reduction(True),
    "aten.logsumexp.default": reduction(True, FLOATS, empty=False),
    "aten.argmax.default": reduction(False), "aten.argmin.default": reduction(False),
    "aten.max.dim": reduction(False), "aten.min.dim": reduction(False),
    "aten.any.dim": reduction(False), "aten.all.dim": reduction(False), "aten.any.dims": reduction(True),
    "aten.all.dims": reduction(True), "aten.any.default": unary, "aten.all.default": unary,
    "aten.var.correction": lambda rng: (*reduction(True, FLOATS)(rng)[:2], 1, rng.random() < 0.5),
    "aten.var_mean.correction": lambda rng: (*reduction(True, FLOATS)(rng)[:2], 0, rng.random() < 0.5),
    "aten._softmax.default": lambda rng: (*reduction(False, FLOATS)(rng)[:2], False),
    "aten._log_softmax.default": lambda rng: (*reduction(False, FLOATS)(rng)[:2], False),
    "aten.native_layer_norm.default": layer_norm,
    "aten.mm.default": matrices(2, False), "aten.bmm.default": matrices(3, False), "aten.addmm.default": matrices(2, True),
    "aten.baddbmm.default": matrices(3, True), "aten.linear.default": linear,
    "aten.permute.default": permute, "aten.t.default": lambda rng: (tensor(rng, shape(rng, 0, 2)),),
    "aten.transpose.int": along(lambda rng: rng.choice((0, -1))), "aten.unsqueeze.default": along(),
    "aten.squeeze.dims": lambda rng: (x := tensor(rng), dims_of(rng, x.rank)),
    "aten.squeeze.dim": lambda rng: (x := tensor(rng), one_dim(rng, x.rank)), "aten.squeeze.default": unary,
    "aten.view.default": view, "aten._unsafe_view.default": view, "aten.reshape.default": view,
    "aten.expand.default": expand,
    "aten.slice.Tensor": slicing, "aten.select.int": select,
    "aten.split.Tensor": along(lambda rng: rng.choice((1, 2, 3))), "aten.split_with_sizes.default": split_sizes,
    "aten.unbind.int": along(), "aten.alias.default": unary, "aten.detach.default": unary, "aten.lift_fresh.default": unary,
    "aten.cat.default": join, "aten.stack.default": stack, "aten.constant_pad_nd.default": pad,
    "aten.gather.default": gather,
    "aten.index_select.default": lambda rng: (*along()(rng), tensor(rng, shape(rng, 1, 1), (torch.int64, torch.int32))),
    "aten.embedding.default": embedding, "aten.expand_as.default": expand_as,
}  # fmt: skip


def convolution(rng: random.Random) -> tuple[Any, ...]:
    def lies(sizes: tuple[Any, ...]) -> TensorType:
        last = infer_rules.channels_last_strides(sizes)
        return TensorType(sizes, dtype, "cpu", rng.choice((contiguous_strides(sizes), last, layout(rng, sizes))))

    dtype, groups = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64)), rng.choice((1, 1, 2))
    channels, sides = rng.choice((1, 2, 3)), [rng.choice((3, 5, 8, S1 + 4, 1)) for _ in range(2)]
    x = lies((rng.choice((1, 3, S0)), channels * groups, *sides))
    weight = lies((rng.choice((2, 4)), channels, *(rng.choice((1, 3)) for _ in range(2))))
    bias = rng.choice((None, TensorType((weight.shape[0],), dtype)))
    pairs = [tuple(rng.choice(n) for _ in range(2)) for n in ((1, 2), (0, 1), (1, 2))]
    return x, weight, bias, *pairs, False, (0, 0), groups


def coded(rng: random.Random) -> tuple[QuantizedType, tuple[TensorType | None, ...]]:
    """A quantized type, and types of its parts."""
    bits, symmetric, layout_ = rng.choice((2, 3, 4, 8)), rng.random() < 0.5, rng.choice(("panels", "rows"))
    kind = QuantizedType(
        (rng.choice((8, 40)), 64), bits, rng.choice((32, 64)), symmetric, rng.choice(("f16", "f32")), layout_
    )
    parts = zip(kind.part_shapes, kind.part_dtypes, strict=True)
    return kind, tuple(None if s is None or d is None else TensorType(s, d) for s, d in parts)


def rows(rng: random.Random, columns: int) -> TensorType:
    return TensorType((*shape(rng, 0, 2), columns), rng.choice(FLOATS))


def quantized_linear(rng: random.Random) -> tuple[Any, ...]:
    kind, parts = coded(rng)
    x = rows(rng, rng.choice((64, 64, 64, 32)))
    return x, *parts, rng.choice((None, TensorType((kind.rows,), torch.float32))), str(kind)


def dequantize(rng: random.Random) -> tuple[Any, ...]:
    kind, parts = coded(rng)
    return *parts, str(kind), rng.choice(FLOATS)


def dynamic_linear(rng: random.Random) -> tuple[Any, ...]:
    n = rng.choice((8, 40))
    return rows(rng, 64), TensorType((n, 64), torch.int8), TensorType((n, 1), torch.float32), None


MAKERS["aten.convolution.default"] = convolution
MAKERS["plait.quantized_linear.default"] = quantized_linear
MAKERS["plait.dequantize.default"] = dequantize
MAKERS["plait.dynamic_linear.default"] = dynamic_linear
MAKERS["plait.fake_quantize.default"] = lambda rng: (
    tensor(rng, rng.choice(((40, 64), (40, 64), (8, 32))), FLOATS), "u4g32[40,64]"
)  # fmt: skip
for _name in ("zeros_like", "ones_like", "empty_like"):
    MAKERS[f"aten.{_name}.default"] = lambda rng: (
        tensor(rng), rng.choice((None, *DTYPES)), None, None, None, memory_format(rng)
    )  # fmt: skip
for _name in RULES:
    _kinds = [p.kind for p in op(_name).params[:2]]
    _two = _kinds == ["tensor", "tensor"] or _name.endswith(".Scalar") or _name == "aten.pow.Tensor_Scalar"
    MAKERS.setdefault(_name, (with_number if "Scalar" in _name else binary) if _two else unary)


def at(value: Any, values: dict[sympy.Symbol, int]) -> Any:
    """A type or argument with numbers put in for the size symbols."""
    if isinstance(value, tuple):
        return tuple(at(v, values) for v in value)
    if isinstance(value, sympy.Expr):
        return int(value.subs(values))
    if isinstance(value, TensorType):
        return value.with_(shape=at(value.shape, values), strides=at(value.strides, values))
    return value


def layout_of(kinds: tuple[Any, ...]) -> list[Any]:
    """What must agree: everything, but strides of tensors without elements, which nothing can be read through."""
    return [(k.shape, k.dtype, k.device, None if 0 in k.shape else k.strides) for k in kinds]


def compare(name: str, args: tuple[Any, ...]) -> bool:
    """Compare the rule's answer with torch's at two choices of sizes; False where the rule does not answer."""
    found = by_rule(op(name), bind(op(name), args), SYMBOLS)
    if found is None:
        return False
    found = found if isinstance(found, tuple) else (found,)
    for values in VALUES:
        static = bind(op(name), at(args, values))
        fake = torch_types(name, static)
        assert layout_of(at(found, values)) == layout_of(fake), f"{name}{args} at {values}"
    return True


def torch_types(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What torch's fake tensors answer."""
    from plait.ir.infer import _by_fake_tensors

    try:
        return _by_fake_tensors(op(name), args, {})
    except InferenceFailed as error:
        raise AssertionError(f"the rule accepts what torch refuses: {name}{args}: {error}") from error


@pytest.mark.parametrize("name", sorted(RULES))
def test_rule_agrees_with_torch(name: str) -> None:
    rng = random.Random(name)
    answered = sum(compare(name, MAKERS[name](rng)) for _ in range(40))
    assert answered >= 2, f"the rule of {name} answered {answered} of 40 cases"
