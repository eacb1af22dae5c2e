"""The math headers: coefficients are what the fits yield, errors in ULP over the whole range, every op of kernel IR
against torch, and a scalar, a lane of a full tile and a lane of a partial tile alike bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from plait.codegen.cpp.fits import HEADER, SPECS, fit, render
from plait.codegen.kernel_ir import COMPUTE_OPS, DTYPES, Buffer, Compute, Kernel, Load, Loop, Store

from tests.codegen.cpp_run import bits, build_kernels, call
from tests.codegen.test_triton_ops import (
    BINARY,
    BITS,
    COMPARE,
    INTEGER,
    INTEGER_UNARY,
    SHIFTS,
    SPECIAL,
    TESTS,
    UNARY,
    pairs,
)

I, N = sympy.Symbol("i", integer=True), sympy.Symbol("N", integer=True, nonnegative=True)  # noqa: E741
Function = Callable[..., torch.Tensor]


def kernel_of(name: str, ops: Mapping[str, str], dtype: str, inputs: tuple[str, ...], *, vector: bool) -> Kernel:
    """out_OP[i] = OP(x[i], ...) for every op (name -> result dtype), on lanes or on scalars."""
    body: list = [Load(n, dtype, n, I) for n in inputs]
    for op, out in ops.items():
        body += [Compute(f"v_{op}", out, op, inputs), Store(f"out_{op}", I, f"v_{op}")]
    buffers = [Buffer(n, dtype, "read") for n in inputs] + [Buffer(f"out_{op}", out, "write") for op, out in ops.items()]
    return Kernel(name, tuple(buffers), (N,), (Loop(I, N, tuple(body), "parallel", vector),))


def evaluate(
    ops: Mapping[str, str], dtype: str, inputs: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """Results of the ops on lanes, checked to be those on scalars, and those of a partial tile."""
    forms = [kernel_of(f"ops_{v}", ops, dtype, tuple(inputs), vector=v == "lanes") for v in ("lanes", "scalars")]
    libraries = build_kernels(forms, folder)
    results = []
    for kernel in forms:
        count = len(next(iter(inputs.values())))
        outs = {f"out_{op}": torch.empty(count, dtype=getattr(torch, out)) for op, out in ops.items()}
        call(libraries[kernel.name], kernel, {**inputs, **outs}, {"N": count}, 1)
        results.append({op: outs[f"out_{op}"] for op in ops})
    short = {n: x[:5].clone() for n, x in inputs.items()}
    partial = {f"out_{op}": torch.empty(5, dtype=getattr(torch, out)) for op, out in ops.items()}
    call(libraries["ops_lanes"], forms[0], {**short, **partial}, {"N": 5}, 1)
    for op in ops:
        assert bits(results[0][op]) == bits(results[1][op]), f"{op}: lanes differ from scalars"
        assert bits(results[0][op][:5]) == bits(partial[f"out_{op}"]), f"{op}: a partial tile differs from a full one"
    return results[0]


def check(ops: Mapping[str, Function], dtype: str, inputs: Mapping[str, torch.Tensor], folder: Path, **tolerance) -> None:
    expected = {op: function(*inputs.values()) for op, function in ops.items()}
    outs = {op: str(x.dtype).removeprefix("torch.") for op, x in expected.items()}
    for op, result in evaluate(outs, dtype, inputs, folder).items():
        torch.testing.assert_close(
            result, expected[op], equal_nan=True, msg=lambda m, o=op: f"{o} of {dtype}: {m}", **tolerance
        )


# ---- fits ------------------------------------------------------------------------------------------------------------


def test_header_holds_the_coefficients_that_the_fits_yield() -> None:
    assert HEADER.read_text() == render(), "run python -m plait.codegen.cpp.fits"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_fit_leaves_most_of_the_rounding_budget(spec) -> None:
    """An eighth of a unit in the last place of float32, the polynomial's share of 2 ULP; pow works in double."""
    assert fit(spec).error < (2.0**-33 if spec.dtype == "float64" else 2.0**-24)


# ---- units in the last place -----------------------------------------------------------------------------------------

ULP: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "exp": (1.0, np.exp), "exp2": (1.0, np.exp2), "expm1": (1.5, np.expm1),
    "log": (1.0, np.log), "log2": (1.0, np.log2), "log10": (1.0, np.log10), "log1p": (1.6, np.log1p),
    "sin": (1.0, np.sin), "cos": (1.0, np.cos), "tan": (2.5, np.tan),
    "tanh": (1.8, np.tanh), "sigmoid": (1.8, lambda x: 1 / (1 + np.exp(-x))),
    "erf": (1.25, lambda x: torch.erf(torch.from_numpy(x)).numpy()),
    "sqrt": (0.5001, np.sqrt), "rsqrt": (1.5, lambda x: 1 / np.sqrt(x)),
}  # fmt: skip


def samples(count: int = 400_000) -> torch.Tensor:
    """float32 of every exponent alike, more of them between 1e-3 and 1e2, special values."""
    generator = np.random.default_rng(7)
    anywhere = generator.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    usual = np.exp(generator.uniform(np.log(1e-3), np.log(1e2), count)) * generator.choice([-1.0, 1.0], count)
    edges = [88.72283, 88.72284, -87.33655, -103.97208, -103.97209, 128.0, -149.0, -150.0, 0.55, 0.9277, 9.0, 30000.0]
    tiny = [1e-40, -1e-40, 1.1754944e-38, 1e-45, -1.0, -0.99999994, 0.99999994, 3.4028235e38]
    special = np.array([*SPECIAL, *edges, *tiny], dtype=np.float32)
    return torch.from_numpy(np.concatenate([special, anywhere, usual.astype(np.float32)]))


def ulps(got: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Distance in units in the last place of the float32 nearest to `true`; NaN for NaN and inf for inf count as none."""
    with np.errstate(all="ignore"):
        nearest = true.astype(np.float32)
        unit = np.spacing(np.minimum(np.abs(nearest), np.float32(3e38))).astype(np.float64)
        distance = np.abs(got.astype(np.float64) - true) / unit
        alike = (np.isnan(got) & np.isnan(true)) | (got == nearest)
    return np.where(alike & ~np.isfinite(got), 0.0, distance)


def test_hot_functions_keep_their_error_bounds(tmp_path: Path) -> None:
    x = samples()
    results = evaluate(dict.fromkeys(ULP, "float32"), "float32", {"x": x}, tmp_path)
    for op, (bound, function) in ULP.items():
        with np.errstate(all="ignore"):
            true = function(x.numpy().astype(np.float64))
            nearest = torch.from_numpy(true.astype(np.float32))
        error = ulps(results[op].numpy(), true)
        at = int(np.nanargmax(error))
        assert not np.isnan(error).any(), f"{op}({x[np.isnan(error).argmax()].item()!r}) is NaN, or should be"
        assert error[at] <= bound, f"{op}({x[at].item()!r}) is off by {error[at]:.2f} units in the last place"
        zeros = (x == 0) & torch.from_numpy(true == 0)
        assert bits(results[op][zeros]) == bits(nearest[zeros]), f"{op}: sign of zero"


def test_pow_keeps_its_error_bound(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    x = np.exp(generator.uniform(-40, 40, 100_000))
    y = generator.uniform(-85, 85, x.size) / np.log(x)
    negative = generator.random(x.size) < 0.3
    x, y = np.where(negative, -x, x).astype(np.float32), np.where(negative, np.rint(y), y).astype(np.float32)
    got = evaluate({"pow": "float32"}, "float32", {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}, tmp_path)["pow"]
    error = ulps(got.numpy(), np.power(x.astype(np.float64), y.astype(np.float64)))
    assert error.max() <= 0.6


# ---- every op against torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-14)])
def test_unary_float_ops(dtype: str, rtol: float, tmp_path: Path) -> None:
    random = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), random * torch.logspace(-3, 1, 400, dtype=torch.float64)])
    check({**UNARY, **TESTS}, dtype, {"x": x.to(getattr(torch, dtype))}, tmp_path, rtol=rtol, atol=1e-38)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-14)])
def test_binary_float_ops(dtype: str, rtol: float, tmp_path: Path) -> None:
    x = torch.tensor([*SPECIAL, 3.7, -0.3, 1e-3, 7.0], dtype=getattr(torch, dtype))
    check({**BINARY, **COMPARE}, dtype, pairs(x), tmp_path, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8"])
def test_integer_ops(dtype: str, tmp_path: Path) -> None:
    info = torch.iinfo(getattr(torch, dtype))
    signed = [] if dtype == "uint8" else [-1, -2, -3, -7, -100, info.min]
    x = torch.tensor([0, 1, 2, 3, 5, 7, 31, 70, 127, info.max, *signed], dtype=getattr(torch, dtype))
    check(INTEGER_UNARY, dtype, {"x": x}, tmp_path / "unary", rtol=0, atol=0)
    ops = {**INTEGER, **COMPARE, **BITS, **SHIFTS}
    divisions = ("floordiv", "mod", "trunc_div", "fmod")
    check({op: _guarded(f) if op in divisions else f for op, f in ops.items()}, dtype, pairs(x), tmp_path, rtol=0, atol=0)


def _guarded(function: Function) -> Function:
    """Division by zero gives zero, and by -1 wraps, both of which trap in torch."""

    def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        safe = torch.where((b == 0) | (b == -1), 1, b) if a.dtype != torch.uint8 else torch.where(b == 0, 1, b)
        by_minus_one = -a if function in (INTEGER["floordiv"], INTEGER["trunc_div"]) else torch.zeros_like(a)
        divided = function(a, safe)
        if a.dtype != torch.uint8:
            divided = torch.where(b == -1, by_minus_one, divided)
        return torch.where(b == 0, 0, divided).to(a.dtype)

    return divide


def test_bool_ops(tmp_path: Path) -> None:
    flags = pairs(torch.tensor([False, True]).repeat(3))
    logical = {
        **BITS, **COMPARE, "add": torch.logical_or, "mul": torch.logical_and, "sub": torch.logical_xor,
        "maximum": torch.logical_or, "minimum": torch.logical_and,
    }  # fmt: skip
    check(logical, "bool", flags, tmp_path, rtol=0, atol=0)
    check({"not": torch.logical_not}, "bool", {"x": flags["x"]}, tmp_path / "not", rtol=0, atol=0)


def test_fma_rounds_once(tmp_path: Path) -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    got = evaluate({"fma": "float32"}, "float32", dict(zip("xyz", x, strict=True)), tmp_path)["fma"]
    assert torch.equal(got, (x[0].double() * x[1].double() + x[2].double()).float())


@pytest.mark.parametrize("source", DTYPES)
def test_casts(source: str, tmp_path: Path) -> None:
    values = [0, 1, 2, 3, 100, 127] + ([] if source in ("uint8", "bool") else [-1, -2, -100])
    exact = torch.tensor(values).to(getattr(torch, source))
    odd = [1.00390625, 1.01171875, 0.99999994, 1.00048828125, 65519.9, 65520.0, 1e-40, 6e-8, -2.5, 2.7, math.inf, math.nan]
    for x, targets in ((exact, DTYPES), (torch.tensor(odd, dtype=torch.float64).to(exact.dtype), _floats_and_bool(source))):
        body: list = [Load("a", source, "x", I)]
        for t in targets:
            body += [Compute(f"v_{t}", t, "cast", ("a",)), Store(f"out_{t}", I, f"v_{t}")]
        buffers = (Buffer("x", source, "read"), *(Buffer(f"out_{t}", t, "write") for t in targets))
        for vector in (True, False):
            kernel = Kernel(f"cast_{int(vector)}", buffers, (N,), (Loop(I, N, tuple(body), "parallel", vector),))
            long = x.repeat(3)
            outs = {f"out_{t}": torch.empty(len(long), dtype=getattr(torch, t)) for t in targets}
            library = build_kernels([kernel], tmp_path)[kernel.name]
            call(library, kernel, {"x": long, **outs}, {"N": len(long)}, 1)
            for t in targets:
                expected = long.to(getattr(torch, t))
                assert bits(outs[f"out_{t}"]) == bits(expected), f"{source} to {t}: {outs[f'out_{t}']} for {expected}"


def _floats_and_bool(source: str) -> tuple[str, ...]:
    return tuple(t for t in DTYPES if "float" in t or t == "bool") if "float" in source else ()


def test_every_half_survives_the_way_to_float_and_back(tmp_path: Path) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.int16)
    for dtype in ("float16", "bfloat16"):
        body = (Load("a", dtype, "x", I), Compute("f", "float32", "cast", ("a",)), Store("wide", I, "f"),
                Compute("h", dtype, "cast", ("f",)), Store("back", I, "h"))  # fmt: skip
        buffers = (Buffer("x", dtype, "read"), Buffer("wide", "float32", "write"), Buffer("back", dtype, "write"))
        kernel = Kernel(f"half_{dtype}", buffers, (N,), (Loop(I, N, body, "parallel", True),))
        x = every.view(getattr(torch, dtype))
        outs = {"wide": torch.empty(len(x)), "back": torch.empty_like(x)}
        call(build_kernels([kernel], tmp_path)[kernel.name], kernel, {"x": x, **outs}, {"N": len(x)}, 1)
        assert bits(outs["wide"]) == bits(x.float())
        assert bits(outs["back"]) == bits(x)


@pytest.mark.parametrize(("source", "target"), [("float32", "int32"), ("float64", "int64")])
def test_bits_are_kept_both_ways(tmp_path: Path, source: str, target: str) -> None:
    floats = torch.tensor([0.0, -0.0, 1.5, -2.25, math.inf, -math.inf, math.nan, 1e-42, 3.4e38] * 5).to(
        getattr(torch, source)
    )
    whole = floats.view(getattr(torch, target)).clone()
    for dtype, x, out, want in ((source, floats, target, whole), (target, whole, source, floats)):
        (tmp_path / dtype).mkdir()
        got = evaluate({"bitcast": out}, dtype, {"x": x}, tmp_path / dtype)["bitcast"]
        assert torch.equal(got.view(whole.dtype), want.view(whole.dtype))


def test_every_op_is_tested() -> None:
    tables = (UNARY, BINARY, COMPARE, TESTS, BITS, SHIFTS, INTEGER, INTEGER_UNARY)
    assert set().union(*tables) | {"fma", "where", "cast", "bitcast"} == set(COMPUTE_OPS)
