"""Hand-built kernels with inputs and references, for every printer's tests.

A case runs at several sizes, among them 0, 1 and sizes that no tile divides. Sums are over integer-valued numbers where
the reference must not depend on the order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
import torch
from plait.codegen.kernel_ir import (
    Acc,
    Accumulate,
    Array,
    Block,
    Buffer,
    Compute,
    Const,
    Index,
    Kernel,
    Load,
    Loop,
    Stmt,
    Store,
)
from torch.utils._sympy.functions import FloorDiv, Mod, ModularIndexing

Tensors = dict[str, torch.Tensor]
Sizes = Mapping[str, int]

I, J, K, L, R, S, T = sympy.symbols("i j k l r s t", integer=True)  # noqa: E741
M, N, D = sympy.symbols("M N D", integer=True, nonnegative=True)
F32 = "float32"


@dataclass(frozen=True)
class KernelCase:
    """A kernel; `inputs(sizes, generator)` makes the buffers that it reads, `reference(inputs, sizes)` what it writes."""

    name: str
    kernel: Kernel
    inputs: Callable[[Sizes, torch.Generator], Tensors]
    reference: Callable[[Tensors, Sizes], Tensors]
    sizes: tuple[dict[str, int], ...] = ({},)
    rtol: float = 0.0
    atol: float = 0.0


def parallel(axis: sympy.Symbol, extent: object, *body: Stmt, vector: bool = False) -> Loop:
    return Loop(axis, sympy.sympify(extent), body, "parallel", vector)


def serial(axis: sympy.Symbol, extent: object, *body: Stmt, vector: bool = False) -> Loop:
    return Loop(axis, sympy.sympify(extent), body, "serial", vector)


def op(name: str, function: str, *args: str, dtype: str = F32) -> Compute:
    return Compute(name, dtype, function, args)


def load(name: str, buffer: str, index: object, dtype: str = F32, **masked: object) -> Load:
    return Load(name, dtype, buffer, sympy.sympify(index), **masked)


def store(buffer: str, index: object, value: str, **options: object) -> Store:
    return Store(buffer, sympy.sympify(index), value, **options)


def reads(*names: str, dtype: str = F32) -> tuple[Buffer, ...]:
    return tuple(Buffer(n, dtype, "read") for n in names)


def writes(*names: str, dtype: str = F32) -> tuple[Buffer, ...]:
    return tuple(Buffer(n, dtype, "write") for n in names)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def whole(generator: torch.Generator, *shape: int, low: int = -8, high: int = 9) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


def spoil(x: torch.Tensor) -> torch.Tensor:
    """Put NaN and infinities at fixed places of `x`, as far as it has them."""
    flat = x.view(-1)
    for position, value in ((1, math.nan), (5, math.inf), (11, -math.inf)):
        if position < flat.numel():
            flat[position] = value
    return x


def grids(*shapes: tuple[int, int]) -> tuple[dict[str, int], ...]:
    return tuple({"M": m, "N": n} for m, n in shapes)


# ---- elementwise -----------------------------------------------------------------------------------------------------

BIAS_GELU = KernelCase(
    "bias_gelu",
    Kernel(
        "bias_gelu",
        (*reads("x", "bias"), *writes("out")),
        (M, N),
        (
            Const("half", F32, 0.5),
            Const("one", F32, 1.0),
            Const("cubic", F32, 0.044715),
            Const("scale", F32, math.sqrt(2 / math.pi)),
            parallel(
                I, M,
                parallel(
                    J, N,
                    load("a", "x", I * N + J), load("b", "bias", J), op("v", "add", "a", "b"),
                    op("v2", "square", "v"), op("p", "fma", "v2", "cubic", "one"), op("q", "mul", "v", "p"),
                    op("u", "mul", "q", "scale"), op("th", "tanh", "u"), op("w", "add", "th", "one"),
                    op("h", "mul", "v", "half"), op("g", "mul", "h", "w"), store("out", I * N + J, "g"),
                    vector=True,
                ),
            ),
        ),
        ("%y = gelu(%x + %bias, approximate='tanh')",),
    ),
    lambda s, g: {"x": spoil(normal(g, s["M"], s["N"]) * 3), "bias": normal(g, s["N"])},
    lambda x, s: {"out": torch.nn.functional.gelu(x["x"] + x["bias"], approximate="tanh")},
    grids((0, 5), (1, 1), (3, 7), (5, 65)),
    rtol=1e-5,
    atol=1e-6,
)  # fmt: skip

STATIC_GELU = KernelCase(
    "static_gelu",
    Kernel(
        "static_gelu",
        (*reads("x"), *writes("out")),
        (),
        (
            Const("half", F32, 0.5),
            Const("one", F32, 1.0),
            Const("root", F32, math.sqrt(0.5)),
            parallel(
                I, 4,
                parallel(
                    J, 3,
                    parallel(
                        K, 17,
                        load("a", "x", I * 51 + J * 17 + K), op("u", "mul", "a", "root"), op("e", "erf", "u"),
                        op("w", "add", "e", "one"), op("h", "mul", "a", "half"), op("g", "mul", "h", "w"),
                        store("out", I * 51 + J * 17 + K, "g"), vector=True,
                    ),
                ),
            ),
        ),
    ),
    lambda s, g: {"x": spoil(normal(g, 4, 3, 17) * 3)},
    lambda x, s: {"out": x["x"] * 0.5 * (1 + torch.erf(x["x"] * math.sqrt(0.5)))},  # torch's own gelu(inf) is NaN
    rtol=1e-5,
    atol=1e-6,
)  # fmt: skip

TRANSPOSED = KernelCase(
    "transposed",
    Kernel(
        "transposed",
        (*reads("x"), *writes("out")),
        (M, N),
        (
            parallel(
                I, M,
                parallel(
                    J, N, load("a", "x", J * M + I), op("b", "add", "a", "a"), store("out", I * N + J, "b"), vector=True
                ),
            ),
        ),
    ),
    lambda s, g: {"x": normal(g, s["N"], s["M"])},
    lambda x, s: {"out": (2 * x["x"]).t().contiguous()},
    grids((0, 3), (1, 1), (33, 5)),
)  # fmt: skip

CASTS = KernelCase(
    "casts",
    Kernel(
        "casts",
        (
            *reads("x", dtype="bfloat16"), *reads("y", dtype="int64"), *writes("half", dtype="float16"),
            *writes("back", dtype="bfloat16"), *writes("small", dtype="int8"), *writes("truth", dtype="bool"),
            *writes("double", dtype="float64"), *writes("count", dtype="int64"),
        ),
        (N,),
        (
            parallel(
                I, N,
                load("a", "x", I, "bfloat16"), op("f", "cast", "a"), op("g", "mul", "f", "f"),
                op("h", "cast", "g", dtype="float16"), store("half", I, "h", stream=True),
                load("c", "y", I, "int64"), op("cf", "cast", "c"), op("s", "add", "g", "cf"),
                op("b", "cast", "s", dtype="bfloat16"), store("back", I, "b", stream=True),
                op("n", "cast", "f", dtype="int8"), store("small", I, "n", stream=True),
                op("t", "cast", "c", dtype="bool"), store("truth", I, "t", stream=True),
                op("d", "cast", "a", dtype="float64"), store("double", I, "d", stream=True),
                op("tn", "cast", "t", dtype="int64"), op("sum", "add", "tn", "c", dtype="int64"),
                store("count", I, "sum", stream=True),
                vector=True,
            ),
        ),
    ),
    lambda s, g: {"x": (normal(g, s["N"]) * 10).bfloat16(), "y": whole(g, s["N"])},
    lambda x, s: {
        "half": x["x"].float().square().half(),
        "back": (x["x"].float().square() + x["y"].float()).bfloat16(),
        "small": x["x"].float().to(torch.int8),
        "truth": x["y"].bool(),
        "double": x["x"].double(),
        "count": x["y"].bool().long() + x["y"],
    },
    ({"N": 0}, {"N": 1}, {"N": 77}),
)  # fmt: skip

PAD = KernelCase(
    "pad",
    Kernel(
        "pad",
        (*reads("x"), *writes("out")),
        (M, N),
        (
            Const("zero", "int64", 0),
            parallel(
                I, M,
                parallel(
                    J, N + 3,
                    Index("at", J - 2), Index("end", N), op("low", "ge", "at", "zero", dtype="bool"),
                    op("high", "lt", "at", "end", dtype="bool"), op("inside", "and", "low", "high", dtype="bool"),
                    load("a", "x", I * N + J - 2, mask="inside", other=-7.5), store("out", I * (N + 3) + J, "a"),
                    vector=True,
                ),
            ),
        ),
    ),
    lambda s, g: {"x": normal(g, s["M"], s["N"])},
    lambda x, s: {"out": torch.nn.functional.pad(x["x"], (2, 1), value=-7.5)},
    grids((0, 4), (2, 0), (1, 1), (3, 9)),
)  # fmt: skip

ADD_IN_PLACE = KernelCase(
    "add_in_place",
    Kernel(
        "add_in_place",
        (Buffer("x", F32, "read_write"), *reads("y")),
        (N,),
        (parallel(I, N, load("a", "x", I), load("b", "y", I), op("c", "add", "a", "b"), store("x", I, "c"), vector=True),),
    ),
    lambda s, g: {"x": normal(g, s["N"]), "y": normal(g, s["N"])},
    lambda x, s: {"x": x["x"] + x["y"]},
    ({"N": 1}, {"N": 50}),
)

SELECT = KernelCase(
    "select",
    Kernel(
        "select",
        (*reads("x", "y"), *reads("flag", dtype="bool"), *writes("out"), *writes("above", dtype="bool")),
        (N,),
        (
            Const("nothing", F32, -0.0),
            parallel(
                I, N,
                load("a", "x", I), load("b", "y", I), load("f", "flag", I, "bool"),
                op("gt", "gt", "a", "b", dtype="bool"), op("nf", "not", "f", dtype="bool"),
                op("take", "or", "gt", "nf", dtype="bool"), op("top", "maximum", "a", "b"), op("neg", "neg", "top"),
                op("v", "where", "take", "neg", "nothing"), store("out", I, "v"),
                op("nan", "isnan", "v", dtype="bool"), op("both", "xor", "take", "nan", dtype="bool"),
                store("above", I, "both", mask="f"),
                vector=True,
            ),
        ),
    ),
    lambda s, g: {"x": spoil(normal(g, s["N"])), "y": normal(g, s["N"]), "flag": whole(g, s["N"], low=0, high=2).bool()},
    lambda x, s: _select(x),
    ({"N": 1}, {"N": 70}),
)  # fmt: skip


def _select(x: Tensors) -> Tensors:
    take = (x["x"] > x["y"]) | ~x["flag"]
    out = torch.where(take, -torch.maximum(x["x"], x["y"]), torch.tensor(-0.0))
    unwritten = torch.ones_like(x["flag"])  # an unwritten bool is not False
    return {"out": out, "above": torch.where(x["flag"], take ^ out.isnan(), unwritten)}


REMAINDERS = KernelCase(
    "remainders",
    Kernel(
        "remainders",
        (*reads("x", "y", dtype="int32"), *writes("quotient", "rest", "cut", "left", dtype="int32")),
        (N,),
        (
            parallel(
                I, N,
                load("a", "x", I, "int32"), load("b", "y", I, "int32"),
                op("q", "floordiv", "a", "b", dtype="int32"), store("quotient", I, "q"),
                op("m", "mod", "a", "b", dtype="int32"), store("rest", I, "m"),
                op("t", "trunc_div", "a", "b", dtype="int32"), store("cut", I, "t"),
                op("f", "fmod", "a", "b", dtype="int32"), store("left", I, "f"),
                vector=True,
            ),
        ),
    ),
    lambda s, g: {"x": whole(g, s["N"]).int(), "y": whole(g, s["N"], low=-3, high=4).int()},
    lambda x, s: _remainders(x["x"], x["y"]),
    ({"N": 1}, {"N": 90}),
)  # fmt: skip


def _remainders(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    safe = torch.where(y == 0, 1, y)
    results = {
        "quotient": torch.div(x, safe, rounding_mode="floor"),
        "rest": torch.remainder(x, safe),
        "cut": torch.div(x, safe, rounding_mode="trunc"),
        "left": torch.fmod(x, safe),
    }
    return {name: torch.where(y == 0, 0, value) for name, value in results.items()}


UNFOLD = KernelCase(
    "unfold",
    Kernel(
        "unfold",
        (*reads("x"), *writes("out")),
        (N,),
        (
            parallel(
                I, N * 6,
                load("a", "x", FloorDiv(I, 6) + ModularIndexing(I, 2, 3) * N + 2 * N * Mod(I, 2)),
                store("out", I, "a"), vector=True,
            ),
        ),
    ),
    lambda s, g: {"x": normal(g, 5, s["N"])},
    lambda x, s: {"out": _unfold(x["x"], s["N"])},
    ({"N": 0}, {"N": 1}, {"N": 13}),
)  # fmt: skip


def _unfold(x: torch.Tensor, n: int) -> torch.Tensor:
    i = torch.arange(6 * n)
    return x[(i // 2) % 3 + 2 * (i % 2), i // 6]


# ---- reductions ------------------------------------------------------------------------------------------------------

SOFTMAX = KernelCase(
    "softmax",
    Kernel(
        "softmax",
        (*reads("x"), *writes("out")),
        (M, N),
        (
            parallel(
                I, M,
                Acc("top", F32, "max"),
                serial(R, N, load("a", "x", I * N + R), Accumulate("top", "a"), vector=True),
                Acc("total", F32, "sum"),
                serial(
                    S, N,
                    load("b", "x", I * N + S), op("d", "sub", "b", "top"), op("e", "exp", "d"), Accumulate("total", "e"),
                    vector=True,
                ),
                serial(
                    T, N,
                    load("c", "x", I * N + T), op("g", "sub", "c", "top"), op("h", "exp", "g"), op("p", "div", "h", "total"),
                    store("out", I * N + T, "p"), vector=True,
                ),
            ),
        ),
        ("%y = softmax(%x, dim=-1)",),
    ),
    lambda s, g: {"x": _with_nan(normal(g, s["M"], s["N"]) * 5)},
    lambda x, s: {"out": torch.softmax(x["x"], -1)},
    grids((0, 3), (2, 0), (1, 1), (5, 37), (3, 16)),
    rtol=1e-5,
    atol=1e-7,
)  # fmt: skip


def _with_nan(x: torch.Tensor) -> torch.Tensor:
    if x.numel() > 8:
        x[-1, 2] = math.nan
        x[0, 3] = -math.inf
    return x


LAYER_NORM = KernelCase(
    "layer_norm",
    Kernel(
        "layer_norm",
        (*reads("x", "weight", "bias"), *writes("out")),
        (M, N),
        (
            Const("epsilon", F32, 1e-5),
            Index("count", N),
            op("n", "cast", "count"),
            parallel(
                I, M,
                Acc("total", F32, "sum"),
                serial(R, N, load("a", "x", I * N + R), Accumulate("total", "a"), vector=True),
                op("mean", "div", "total", "n"),
                Acc("squares", F32, "sum"),
                serial(
                    S, N,
                    load("b", "x", I * N + S), op("d", "sub", "b", "mean"), op("d2", "square", "d"),
                    Accumulate("squares", "d2"), vector=True,
                ),
                op("variance", "div", "squares", "n"), op("safe", "add", "variance", "epsilon"), op("inv", "rsqrt", "safe"),
                serial(
                    T, N,
                    load("c", "x", I * N + T), op("e", "sub", "c", "mean"), op("f", "mul", "e", "inv"),
                    load("w", "weight", T), load("o", "bias", T), op("g", "fma", "f", "w", "o"),
                    store("out", I * N + T, "g"), vector=True,
                ),
            ),
        ),
    ),
    lambda s, g: {
        "x": normal(g, s["M"], s["N"]) + 1000,  # a one-pass variance would fail here
        "weight": normal(g, s["N"]),
        "bias": normal(g, s["N"]),
    },
    lambda x, s: {"out": torch.nn.functional.layer_norm(x["x"].double(), (s["N"],), x["weight"].double(),
                                                        x["bias"].double()).float()},
    grids((0, 4), (1, 1), (5, 37), (3, 64)),
    rtol=1e-3,  # the mean of numbers near 1000 is known to 6e-5, a deviation of size one therefore to 1e-4
    atol=1e-3,
)  # fmt: skip

COLUMN_SUM = KernelCase(
    "column_sum",
    Kernel(
        "column_sum",
        (*reads("x"), *writes("out")),
        (M, N),
        (
            parallel(
                J, N,
                Acc("total", F32, "sum"),
                serial(I, M, load("a", "x", I * N + J), Accumulate("total", "a")),
                store("out", J, "total"), vector=True,
            ),
        ),
    ),
    lambda s, g: {"x": whole(g, s["M"], s["N"]).float()},
    lambda x, s: {"out": x["x"].sum(0)},
    grids((0, 5), (4, 0), (1, 1), (9, 35)),
)  # fmt: skip

BLOCK_SUM = KernelCase(
    "block_sum",
    Kernel(
        "block_sum",
        (*reads("x"), *writes("out"), *writes("largest", dtype="int64")),
        (M, N),
        (
            parallel(
                J, N,
                Acc("total", F32, "sum"), Acc("most", "int64", "max"),
                serial(
                    I, M,
                    serial(
                        K, 21,
                        load("a", "x", (I * N + J) * 21 + K), Accumulate("total", "a"),
                        Index("weight", I * 100 + K), Accumulate("most", "weight"), vector=True,
                    ),
                ),
                store("out", J, "total"), store("largest", J, "most"),
            ),
        ),
    ),
    lambda s, g: {"x": whole(g, s["M"], s["N"], 21).float()},
    lambda x, s: {"out": x["x"].sum((0, 2)), "largest": torch.full((s["N"],), (s["M"] - 1) * 100 + 20)},
    grids((1, 1), (3, 5)),
)  # fmt: skip

TOTAL = KernelCase(
    "total",
    Kernel(
        "total",
        (*reads("x"), *writes("out"), *writes("scaled")),
        (N,),
        (
            Acc("s", F32, "sum"),
            serial(R, N, load("a", "x", R), Accumulate("s", "a"), vector=True),
            store("out", 0, "s"),
            Const("two", F32, 2.0),
            parallel(I, N, load("b", "x", I), op("c", "mul", "b", "two"), store("scaled", I, "c"), vector=True),
        ),
    ),
    lambda s, g: {"x": whole(g, s["N"]).float()},
    lambda x, s: {"out": x["x"].sum(), "scaled": x["x"] * 2},
    ({"N": 0}, {"N": 1}, {"N": 100}),
)

ARGMAX = KernelCase(
    "argmax",
    Kernel(
        "argmax",
        (*reads("x"), *writes("top", "bottom", dtype="int64"), *writes("column", dtype="int64")),
        (M, N),
        (
            parallel(
                I, M,
                Acc("best", "int64", "argmax", F32), Acc("worst", "int64", "argmin", F32),
                serial(
                    R, N,
                    load("a", "x", I * N + R), Index("at", R), Accumulate("best", "a", "at"), Accumulate("worst", "a", "at"),
                    vector=True,
                ),
                store("top", I, "best"), store("bottom", I, "worst"),
            ),
            parallel(
                J, N,
                Acc("first", "int64", "argmax", F32),
                serial(K, M, load("b", "x", K * N + J), Index("row", K), Accumulate("first", "b", "row")),
                store("column", J, "first"), vector=True,
            ),
        ),
    ),
    lambda s, g: {"x": _with_nan(whole(g, s["M"], s["N"], low=0, high=4).float())},
    lambda x, s: {"top": x["x"].argmax(1), "bottom": x["x"].argmin(1), "column": x["x"].argmax(0)},
    grids((1, 1), (5, 37), (3, 8)),
)  # fmt: skip

FOLDS = KernelCase(
    "folds",
    Kernel(
        "folds",
        (*reads("x"), *reads("flag", dtype="bool"), *reads("y", dtype="int32"), *writes("product", "least"),
         *writes("some", "every", dtype="bool"), *writes("high", dtype="int32")),
        (M, N),
        (
            parallel(
                I, M,
                Acc("p", F32, "prod"), Acc("m", F32, "min"), Acc("o", "bool", "any"), Acc("e", "bool", "all"),
                Acc("h", "int32", "max"),
                serial(
                    R, N,
                    load("a", "x", I * N + R), Accumulate("p", "a"), Accumulate("m", "a"),
                    load("f", "flag", I * N + R, "bool"), Accumulate("o", "f"), Accumulate("e", "f"),
                    load("b", "y", I * N + R, "int32"), Accumulate("h", "b"),
                    vector=True,
                ),
                store("product", I, "p"), store("least", I, "m"), store("some", I, "o"), store("every", I, "e"),
                store("high", I, "h"),
            ),
        ),
    ),
    lambda s, g: {
        "x": _with_nan(whole(g, s["M"], s["N"], low=1, high=3).float()),
        "flag": whole(g, s["M"], s["N"], low=0, high=5).bool(),
        "y": whole(g, s["M"], s["N"]).int(),
    },
    lambda x, s: {
        "product": x["x"].prod(1),
        "least": x["x"].amin(1),
        "some": x["flag"].any(1),
        "every": x["flag"].all(1),
        "high": x["y"].amax(1),
    },
    grids((1, 1), (4, 19)),
)  # fmt: skip

WINDOW_MAX = KernelCase(
    "window_max",
    Kernel(
        "window_max",
        (*reads("x"), *writes("out")),
        (M, N),
        (
            parallel(
                I, M,
                parallel(
                    J, N,
                    Acc("top", F32, "max"),
                    serial(
                        K, 2,
                        serial(L, 3, load("a", "x", (2 * I + K) * (3 * N) + 3 * J + L), Accumulate("top", "a")),
                    ),
                    store("out", I * N + J, "top"), vector=True,
                ),
            ),
        ),
    ),
    lambda s, g: {"x": spoil(normal(g, 2 * s["M"], 3 * s["N"]))},
    lambda x, s: {"out": torch.nn.functional.max_pool2d(x["x"][None], (2, 3))[0]},
    grids((1, 1), (3, 7)),
)  # fmt: skip

NORMALISE_ROWS = KernelCase(
    "normalise_rows",
    Kernel(
        "normalise_rows",
        (*reads("x"), Buffer("sums", F32, "read_write"), *writes("out")),
        (M, N),
        (
            parallel(
                I, M,
                Acc("s", F32, "sum"),
                serial(R, N, load("a", "x", I * N + R), Accumulate("s", "a"), vector=True),
                store("sums", I, "s"),
            ),
            parallel(
                K, M,
                parallel(
                    J, N,
                    load("b", "x", K * N + J), load("t", "sums", K), op("q", "div", "b", "t"), store("out", K * N + J, "q"),
                    vector=True,
                ),
            ),
        ),
    ),
    lambda s, g: {"x": whole(g, s["M"], s["N"], low=1).float(), "sums": torch.zeros(s["M"])},
    lambda x, s: {"sums": x["x"].sum(1), "out": x["x"] / x["x"].sum(1, keepdim=True)},
    grids((0, 3), (1, 1), (4, 19)),
)  # fmt: skip

_HEIGHT, _WIDTH = sympy.Min(16, M - K * 16), sympy.Min(32, N - L * 32)
TILED = KernelCase(
    "tiled",
    Kernel(
        "tiled",
        (*reads("x"), *writes("out")),
        (M, N),
        (
            parallel(
                K, FloorDiv(M + 15, 16),
                parallel(
                    L, FloorDiv(N + 31, 32),
                    Block("t", F32, "x", (L * 32 + J) * M + K * 16 + I, I, J, _HEIGHT, _WIDTH, 16, 32),
                    serial(
                        I, _HEIGHT,
                        serial(
                            J, _WIDTH,
                            load("a", "t", I * 32 + J), op("b", "add", "a", "a"),
                            store("out", (K * 16 + I) * N + L * 32 + J, "b"),
                            vector=True,
                        ),
                    ),
                ),
            ),
        ),
    ),
    lambda s, g: {"x": normal(g, s["N"], s["M"])},
    lambda x, s: {"out": (2 * x["x"]).t().contiguous()},
    grids((0, 3), (1, 1), (16, 32), (37, 70)),
)  # fmt: skip

KEPT_ROW = KernelCase(
    "kept_row",
    Kernel(
        "kept_row",
        (*reads("x"), *writes("out")),
        (M,),
        (
            parallel(
                I, M,
                Array("row", F32, 70),
                Acc("s", F32, "sum"),
                serial(
                    R, 70,
                    load("a", "x", I * 70 + R), op("b", "mul", "a", "a"), store("row", R, "b"), Accumulate("s", "b"),
                    vector=True,
                ),
                serial(J, 70, load("c", "row", J), op("q", "div", "c", "s"), store("out", I * 70 + J, "q", stream=True),
                       vector=True),
            ),
        ),
    ),
    lambda s, g: {"x": whole(g, s["M"], 70, low=1).float()},
    lambda x, s: {"out": x["x"].square() / x["x"].square().sum(1, keepdim=True)},
    ({"M": 0}, {"M": 1}, {"M": 33}),
)  # fmt: skip

SCAN = KernelCase(
    "scan",
    Kernel(
        "scan",
        (*reads("x"), Buffer("out", F32, "read_write")),
        (M, N),
        (
            Const("zero", "int64", 0),
            parallel(
                J, N,
                serial(
                    I, M,
                    Index("row", I), op("later", "gt", "row", "zero", dtype="bool"),
                    load("before", "out", (I - 1) * N + J, mask="later"), load("a", "x", I * N + J),
                    op("b", "add", "a", "before"), store("out", I * N + J, "b"),
                ),
                vector=True,
            ),
        ),
    ),
    lambda s, g: {"x": whole(g, s["M"], s["N"]).float(), "out": torch.full((s["M"], s["N"]), math.nan)},
    lambda x, s: {"out": x["x"].cumsum(0)},
    grids((0, 2), (1, 1), (6, 21)),
)  # fmt: skip

# ---- indirect and data-dependent -------------------------------------------------------------------------------------

EMBEDDING = KernelCase(
    "embedding",
    Kernel(
        "embedding",
        (*reads("table"), *reads("ids", dtype="int32"), *writes("out")),
        (M, D),
        (
            parallel(
                I, M,
                load("id", "ids", I, "int32"),
                serial(J, D, load("a", "table", sympy.Symbol("id", integer=True) * D + J), store("out", I * D + J, "a"),
                       vector=True),
            ),
        ),
    ),
    lambda s, g: {"table": normal(g, 9, s["D"]), "ids": whole(g, s["M"], low=0, high=9).int()},
    lambda x, s: {"out": x["table"][x["ids"].long()]},
    ({"M": 0, "D": 4}, {"M": 1, "D": 1}, {"M": 7, "D": 21}),
)  # fmt: skip

SCATTER = KernelCase(
    "scatter",
    Kernel(
        "scatter",
        (*reads("x"), *reads("ids", dtype="int64"), Buffer("out", F32, "read_write"), Buffer("hits", "int32", "read_write")),
        (M, D),
        (
            Const("one", "int32", 1),
            Const("none", "int64", -1),
            parallel(
                I, M,
                load("id", "ids", I, "int64"), op("valid", "gt", "id", "none", dtype="bool"),
                serial(
                    J, D,
                    load("a", "x", I * D + J), store("out", sympy.Symbol("id", integer=True) * D + J, "a", mask="valid",
                                                     atomic=True),
                    store("hits", 0, "one", mask="valid", atomic=True), vector=True,
                ),
            ),
        ),
    ),
    lambda s, g: {
        "x": whole(g, s["M"], s["D"]).float(),
        "ids": whole(g, s["M"], low=-1, high=3),
        "out": torch.ones(3, s["D"]),
        "hits": torch.zeros(1, dtype=torch.int32),
    },
    lambda x, s: _scatter(x, s["D"]),
    ({"M": 0, "D": 2}, {"M": 1, "D": 1}, {"M": 11, "D": 19}),
)  # fmt: skip


def _scatter(x: Tensors, d: int) -> Tensors:
    valid = x["ids"] >= 0
    out = x["out"].index_add(0, x["ids"][valid], x["x"][valid])
    return {"out": out, "hits": (valid.sum() * d).int().reshape(1)}


SEGMENT_SUM = KernelCase(
    "segment_sum",
    Kernel(
        "segment_sum",
        (*reads("x"), *reads("offsets", dtype="int64"), *writes("out"), *writes("ones")),
        (M, D),
        (
            Const("unit", F32, 1.0),
            parallel(
                I, M,
                load("first", "offsets", I, "int64"), load("last", "offsets", I + 1, "int64"),
                Index("count", sympy.Symbol("last", integer=True) - sympy.Symbol("first", integer=True)),
                Acc("n", F32, "sum"),
                serial(R, sympy.Symbol("count", integer=True), Accumulate("n", "unit"), vector=True),
                store("ones", I, "n"),
            ),
            parallel(
                K, M,
                parallel(
                    J, D,
                    load("from", "offsets", K, "int64"), load("to", "offsets", K + 1, "int64"),
                    Acc("total", F32, "sum"),
                    serial(
                        S, sympy.Symbol("to", integer=True) - sympy.Symbol("from", integer=True),
                        load("a", "x", (sympy.Symbol("from", integer=True) + S) * D + J), Accumulate("total", "a"),
                    ),
                    store("out", K * D + J, "total"), vector=True,
                ),
            ),
        ),
    ),
    lambda s, g: _segments(s, g),
    lambda x, s: _segment_sums(x),
    ({"M": 1, "D": 1}, {"M": 5, "D": 7}),
)  # fmt: skip


def _segments(s: Sizes, g: torch.Generator) -> Tensors:
    counts = whole(g, s["M"], low=0, high=25)
    counts[0] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return {"x": whole(g, int(offsets[-1]), s["D"]).float(), "offsets": offsets}


def _segment_sums(x: Tensors) -> Tensors:
    counts = x["offsets"].diff()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    out = torch.zeros(len(counts), x["x"].shape[1]).index_add(0, rows, x["x"])
    return {"out": out, "ones": counts.float()}


TRIANGLE = KernelCase(
    "triangle",
    Kernel(
        "triangle",
        (*reads("x"), *writes("out")),
        (N,),
        (
            parallel(
                I, N,
                Acc("top", F32, "max"),
                serial(R, I + 1, load("a", "x", I * N + R), Accumulate("top", "a"), vector=True),
                store("out", I, "top"),
            ),
        ),
    ),
    lambda s, g: {"x": normal(g, s["N"], s["N"])},
    lambda x, s: {"out": x["x"].masked_fill(torch.ones_like(x["x"]).triu(1).bool(), -math.inf).amax(1)},
    ({"N": 1}, {"N": 23}),
)  # fmt: skip

CASES = (
    BIAS_GELU, STATIC_GELU, TRANSPOSED, CASTS, PAD, ADD_IN_PLACE, SELECT, REMAINDERS, UNFOLD,
    SOFTMAX, LAYER_NORM, COLUMN_SUM, BLOCK_SUM, TOTAL, ARGMAX, FOLDS, WINDOW_MAX, NORMALISE_ROWS, SCAN,
    EMBEDDING, SCATTER, SEGMENT_SUM, TRIANGLE,
)  # fmt: skip
CPU_CASES = (*CASES, KEPT_ROW, TILED)
