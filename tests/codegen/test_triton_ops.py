"""Every scalar op of kernel IR, printed as Triton: interpreted against torch, special values included, and compiled."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import sympy
import torch
from plait.codegen.kernel_ir import COMPUTE_OPS, Buffer, Compute, Kernel, Load, Loop, Store
from plait.codegen.triton.check import interpret_kernel
from plait.codegen.triton.compile import cross_compile
from plait.codegen.triton.ops import cast_text, compute_text, full_text, identifier, literal
from plait.codegen.triton.source import KernelConfig
from plait.errors import InvalidKernel

AT, N = sympy.Symbol("i", integer=True), sympy.Symbol("N", integer=True, nonnegative=True)

UNARY = {
    "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "square": torch.square, "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1,
    "log": torch.log, "log1p": torch.log1p, "log2": torch.log2, "log10": torch.log10, "sin": torch.sin, "cos": torch.cos,
    "tan": torch.tan, "asin": torch.asin, "acos": torch.acos, "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh,
    "tanh": torch.tanh, "asinh": torch.asinh, "acosh": torch.acosh, "atanh": torch.atanh, "erf": torch.erf,
    "erfc": torch.erfc, "sigmoid": torch.sigmoid, "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc,
    "round": torch.round,
}  # fmt: skip
BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "floordiv": torch.floor_divide,
    "mod": torch.remainder, "trunc_div": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "fmod": torch.fmod,
    "minimum": torch.minimum, "maximum": torch.maximum, "pow": torch.pow, "atan2": torch.atan2,
}  # fmt: skip
COMPARE = {"eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge}
TESTS = {"isnan": torch.isnan, "isinf": torch.isinf}
BITS = {"and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor}
SHIFTS = {"shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift}
INTEGER = {
    name: BINARY[name] for name in ("add", "sub", "mul", "minimum", "maximum", "pow", "floordiv", "mod", "trunc_div", "fmod")
}
INTEGER_UNARY = {
    "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "not": torch.bitwise_not, "square": torch.square,
    "floor": torch.clone, "ceil": torch.clone, "trunc": torch.clone, "round": torch.clone,
}  # fmt: skip
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 2.0, -2.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30]


def kernel_of(ops: dict[str, str], dtype: str, arity: int) -> Kernel:
    """A kernel that computes every op (name -> result dtype) of x, or of x and y."""
    names = ("x", "y")[:arity]
    loaded = tuple(f"{n}_at" for n in names)
    body: list = [Load(at, dtype, n, AT) for at, n in zip(loaded, names, strict=True)]
    for op, out in ops.items():
        body += [Compute(f"v_{op}", out, op, loaded), Store(f"out_{op}", AT, f"v_{op}")]
    buffers = [Buffer(n, dtype, "read") for n in names] + [Buffer(f"out_{op}", out, "write") for op, out in ops.items()]
    return Kernel(f"ops_{dtype}_{arity}", tuple(buffers), (N,), (Loop(AT, N, tuple(body), "parallel", True),))


def pairs(values: torch.Tensor) -> dict[str, torch.Tensor]:
    x, y = torch.meshgrid(values, values, indexing="ij")
    return {"x": x.reshape(-1).contiguous(), "y": y.reshape(-1).contiguous()}


def verify(checker, ops, dtype, inputs, **tolerance) -> None:
    """Check the ops' functions on `inputs`; comparisons and tests give bool."""
    values = [inputs[n] for n in ("x", "y")[: len(inputs)]]
    results = {op: function(*values) for op, function in ops.items()}
    outs = {op: str(result.dtype).removeprefix("torch.") for op, result in results.items()}
    kernel = kernel_of(outs, dtype, len(inputs))
    expected = {f"out_{op}": result for op, result in results.items()}
    sources = replace(checker, targets=()).verify_kernel(kernel, inputs, {"N": len(values[0])}, expected, **tolerance)
    one_each = KernelConfig((("XBLOCK", 128),), num_warps=4)  # one element per thread: all these ops make long programs
    for source in sources:
        for target in checker.targets:
            cross_compile(source, target, checker.cache, config=one_each)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1.2e-6), ("float64", 3e-15)])
def test_unary_float_ops(dtype: str, rtol: float, triton_checker) -> None:
    generator = torch.Generator().manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    random = torch.randn(400, generator=generator, dtype=torch.float64) * torch.logspace(-3, 1, 400, dtype=torch.float64)
    x = torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), random]).to(torch_dtype)
    verify(triton_checker, {**UNARY, **TESTS}, dtype, {"x": x}, rtol=rtol, atol=1e-38)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_binary_float_ops(dtype: str, triton_checker) -> None:
    x = torch.tensor([*SPECIAL, 3.7, -0.3, 1e-3, 7.0], dtype=getattr(torch, dtype))
    verify(triton_checker, {**BINARY, **COMPARE}, dtype, pairs(x), rtol=1e-6 if dtype == "float32" else 1e-13, atol=0)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8"])
def test_integer_ops(dtype: str, triton_checker) -> None:
    signed = [] if dtype == "uint8" else [-1, -2, -3, -7, -100]
    x = torch.tensor([0, 1, 2, 3, 5, 7, 31, 70, 127, *signed], dtype=getattr(torch, dtype))
    verify(triton_checker, INTEGER_UNARY, dtype, {"x": x})
    ops = {**INTEGER, **COMPARE, **BITS, **SHIFTS}
    by_zero = {op: _guarded(f) if op in ("floordiv", "mod", "trunc_div", "fmod") else f for op, f in ops.items()}
    verify(triton_checker, by_zero, dtype, pairs(x))


def _guarded(function):
    """Division by zero gives zero."""
    return lambda a, b: torch.where(b == 0, 0, function(a, torch.where(b == 0, 1, b))).to(a.dtype)


def test_bool_ops(triton_checker) -> None:
    flags = pairs(torch.tensor([False, True]))
    logical = {
        **BITS, **COMPARE, "add": torch.logical_or, "mul": torch.logical_and, "sub": torch.logical_xor,
        "maximum": torch.logical_or, "minimum": torch.logical_and,
    }  # fmt: skip
    verify(triton_checker, logical, "bool", flags)
    verify(triton_checker, {"not": torch.logical_not}, "bool", {"x": flags["x"]})


def test_fma_and_where_have_three_operands(triton_checker) -> None:
    body = (
        Load("a", "float32", "x", AT),
        Load("b", "float32", "y", AT),
        Compute("c", "float32", "fma", ("a", "b", "a")),
        Compute("less", "bool", "lt", ("a", "b")),
        Compute("d", "float32", "where", ("less", "c", "b")),
        Store("out", AT, "d"),
    )
    buffers = (Buffer("x", "float32", "read"), Buffer("y", "float32", "read"), Buffer("out", "float32", "write"))
    kernel = Kernel("three", buffers, (N,), (Loop(AT, N, body, "parallel", True),))
    x, y = torch.randn(40), torch.randn(40)
    expected = torch.where(x < y, x * y + x, y)
    triton_checker.verify_kernel(kernel, {"x": x, "y": y}, {"N": 40}, {"out": expected})


def test_every_op_is_tested() -> None:
    tables = (UNARY, BINARY, COMPARE, TESTS, BITS, SHIFTS, INTEGER, INTEGER_UNARY)
    assert set().union(*tables) | {"fma", "where", "cast", "bitcast"} == set(COMPUTE_OPS)


@pytest.mark.parametrize(("source", "target"), [("float32", "int32"), ("int64", "float64")])
def test_bitcast_keeps_the_bits(source: str, target: str, triton_checker) -> None:
    body = (Load("a", source, "x", AT), Compute("b", target, "bitcast", ("a",)), Store("out", AT, "b"))
    buffers = (Buffer("x", source, "read"), Buffer("out", target, "write"))
    kernel = Kernel(f"bits_{source}", buffers, (N,), (Loop(AT, N, body, "parallel", True),))
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(getattr(torch, source if "float" in source else target))
    x = x if "float" in source else x.view(torch.int64)
    triton_checker.verify_kernel(kernel, {"x": x}, {"N": len(x)}, {"out": x.view(getattr(torch, target))}, rtol=0, atol=0)


DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")


WHOLE = [0, 1, 2, 3, 100, 127]
# halfway cases of bfloat16 and float16, carries into the exponent, float16's largest number, numbers below the smallest
ODD = [1.00390625, 1.01171875, 1.9999999, 0.99999994, 1.00048828125, 65519.9, 65520.0, 1e-40, -2.5, 2.7, math.inf, math.nan]


def verify_casts(checker, x: torch.Tensor, targets: tuple[str, ...]) -> None:
    source = str(x.dtype).removeprefix("torch.")
    body: list = [Load("a", source, "x", AT)]
    for target in targets:
        body += [Compute(f"v_{target}", target, "cast", ("a",)), Store(f"out_{target}", AT, f"v_{target}")]
    buffers = (Buffer("x", source, "read"), *(Buffer(f"out_{t}", t, "write") for t in targets))
    kernel = Kernel(f"casts_{source}_{len(targets)}", buffers, (N,), (Loop(AT, N, tuple(body), "parallel", True),))
    expected = {f"out_{t}": x.to(getattr(torch, t)) for t in targets}
    checker.verify_kernel(kernel, {"x": x}, {"N": len(x)}, expected, rtol=0, atol=0)


@pytest.mark.parametrize("source", DTYPES)
def test_casts_from(source: str, triton_checker) -> None:
    negative = [] if source in ("uint8", "bool") else [-1, -2, -100]
    verify_casts(triton_checker, torch.tensor(WHOLE + negative).to(getattr(torch, source)), DTYPES)
    if "float" in source:
        floats = tuple(t for t in DTYPES if "float" in t)
        verify_casts(triton_checker, torch.tensor(ODD, dtype=torch.float64).to(getattr(torch, source)), (*floats, "bool"))


ULP = {
    "expm1": (mpmath.expm1, -30, 30, 4), "log1p": (mpmath.log1p, -0.9999, 50, 3), "tanh": (mpmath.tanh, -12, 12, 5),
    "sinh": (mpmath.sinh, -80, 80, 4), "cosh": (mpmath.cosh, -80, 80, 4), "asinh": (mpmath.asinh, -1e3, 1e3, 4),
    "acosh": (mpmath.acosh, 1, 100, 4), "atanh": (mpmath.atanh, -0.9999, 0.9999, 4), "atan": (mpmath.atan, -50, 50, 3),
    "asin": (mpmath.asin, -1, 1, 4), "acos": (mpmath.acos, -1, 1, 4), "tan": (mpmath.tan, -1.5, 1.5, 3),
    "erfc": (mpmath.erfc, -4, 9, 8), "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), -80, 80, 3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_helper_functions_keep_their_error_bounds(dtype: str, interpreter) -> None:
    generator = np.random.default_rng(0)
    scalar = np.dtype(dtype).type
    for name, (function, low, high, bound) in ULP.items():
        x = np.concatenate([generator.uniform(low, high, 300), generator.uniform(max(low, -1), min(high, 2), 100)])
        x = torch.from_numpy(x.astype(dtype))
        kernel = kernel_of({name: dtype}, dtype, 1)
        result = interpret_kernel(kernel, {"x": x, f"out_{name}": x}, {"N": len(x)}, interpreter)[f"out_{name}"]
        with mpmath.workdps(40):
            for at, got in zip(x.tolist(), result.tolist(), strict=True):
                true = function(mpmath.mpf(at))
                assert abs(got - true) <= bound * np.spacing(abs(scalar(float(true)))), f"{name}({at!r}) = {got!r}"


def test_ops_without_meaning_are_refused() -> None:
    for op, dtype in (("sin", "int32"), ("and", "float32"), ("shl", "float64"), ("sqrt", "bool"), ("exp", "bfloat16")):
        with pytest.raises(InvalidKernel, match=f"{op} has no meaning for {dtype}"):
            compute_text("k", op, dtype, dtype, ["a", "b"])


def test_text_of_constants_and_names() -> None:
    assert literal(0.1, "float32") == "0.1"
    assert literal(1 / 3, "float32") == "0.33333334"
    assert literal(1 / 3, "float64") == "0.3333333333333333"
    assert literal(-math.inf, "float32") == 'float("-inf")'
    assert literal(1e300, "float32") == 'float("inf")'
    assert full_text("[]", -0.0, "float32") == "tl.full([], 0.0, tl.float32) * -1.0"
    assert full_text("[4]", 1, "bfloat16") == "tl.full([4], 1.0, tl.float32).to(tl.bfloat16)"
    assert cast_text("a", "int64", "bfloat16") == "a.to(tl.float32).to(tl.bfloat16)"
    assert [identifier(n) for n in ("from", "a.b", "3d", "_tanh", "xindex", "x")] == [
        "from_", "a_b", "_3d", "_tanh_", "xindex_", "x",
    ]  # fmt: skip
