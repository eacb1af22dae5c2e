"""Special functions: as exact as torch's float64 in float32, infinities, poles and NaN included."""

from __future__ import annotations

import math

import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.ir import Graph, parse_graph

from tests.codegen.test_triton_models import run_as_triton

POINTS = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1.0,
    -1.0,
    2.0,
    -2.5,
    0.5,
    -0.5,
    1e-30,
    -3.0,
    5.0,
    8.0,
    30.0,
    -30.0,
    1e30,
]
UNARY = {
    **dict.fromkeys(("lgamma", "digamma", "erfinv", "i0", "signbit")),
    **dict.fromkeys(f"special_{n}" for n in ("erfcx", "ndtri", "i0e", "i1", "i1e", "spherical_bessel_j0", "airy_ai")),
    **dict.fromkeys(f"special_bessel_{n}" for n in ("j0", "j1", "y0", "y1")),
    **dict.fromkeys(f"special_modified_bessel_{n}" for n in ("i0", "i1", "k0", "k1")),
    **dict.fromkeys(f"special_scaled_modified_bessel_{n}" for n in ("k0", "k1")),
}


def points(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(200, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1.3, 200, dtype=torch.float64)
    return torch.cat([torch.tensor(POINTS, dtype=torch.float64), wide, torch.rand(50, generator=generator).double()]).to(
        dtype
    )


def one(call: str, kind: str, count: int, operands: str = "x") -> Graph:
    parameters = ", ".join(f'{n}: "{kind}[{count}]"' for n in operands)
    return parse_graph(f"def f({parameters}):\n    y = aten.{call}\n    return (y,)\n")


def assert_near(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a unit or so of float32; in float64 to the error of the formulas."""
    if not got.is_floating_point():
        assert torch.equal(got, exact)
    elif dtype is torch.float32:
        torch.testing.assert_close(got, exact.float(), rtol=1.3e-7, atol=1e-38, equal_nan=True)
    else:
        torch.testing.assert_close(got, exact, rtol=3e-13, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("name", UNARY)
def test_one_operand(name: str) -> None:
    for dtype, kind in ((torch.float32, "f32"), (torch.float64, "f64")):
        x = points(dtype)
        graph = one(f"{name}.default(x)", kind, len(x))
        compiled = compile_graph(graph)
        assert not compiled.coverage.reasons
        assert_near(compiled.executable(x)[0], graph.run(x)[0] if name == "signbit" else exactly(name, x), dtype)


def exactly(name: str, x: torch.Tensor) -> torch.Tensor:
    """torch's value at the same points in float64."""
    return getattr(torch.ops.aten, name)(x.double())


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_polygamma(order: int) -> None:
    x = points(torch.float32)
    graph = one(f"polygamma.default({order}, x)", "f32", len(x))
    compiled = compile_graph(graph)
    assert not compiled.coverage.reasons
    # trigamma near its poles is as high as float32's sin(pi x) makes it, in torch too
    want = torch.polygamma(order, x) if order == 1 else torch.polygamma(order, x.double()).float()
    torch.testing.assert_close(compiled.executable(x)[0], want, rtol=3e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["nextafter.default", "copysign.Tensor", "hypot.default"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_two_operands(name: str, kind: str) -> None:
    at = torch.tensor([*POINTS[:11], 1e-40, -1e-42, 3e38], dtype=torch.float32 if kind == "f32" else torch.float64)
    x, y = (t.reshape(-1).contiguous() for t in torch.meshgrid(at, at, indexing="ij"))
    graph = one(f"{name}(x, y)", kind, len(x), "xy")
    compiled = compile_graph(graph)
    assert not compiled.coverage.reasons
    got, want = compiled.executable(x, y)[0], graph.run(x, y)[0]
    exact = name != "hypot.default"
    torch.testing.assert_close(got, want, equal_nan=True, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("kind", ["f32", "f64", "f16"])
def test_frexp_splits_into_mantissa_and_exponent(kind: str) -> None:
    dtype = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16}[kind]
    x = torch.tensor([*POINTS[:11], 1e-40, -1e-42, 1e-310, 3e38, 7.25, 1e-7], dtype=torch.float64).to(dtype)
    graph = parse_graph(f'def f(x: "{kind}[{len(x)}]"):\n    m, e = aten.frexp.Tensor(x)\n    return (m, e)\n')
    compiled = compile_graph(graph)
    assert not compiled.coverage.reasons
    for got, want in zip(compiled.executable(x), torch.frexp(x), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["lgamma", "digamma", "special_erfcx", "special_bessel_j1", "special_airy_ai"])
def test_as_triton(name: str, triton_checker) -> None:
    x = points(torch.float32)
    graph = one(f"{name}.default(x)", "f32", len(x))
    results, kernels = run_as_triton(graph, [x], triton_checker.interpreter, triton_checker.cache)
    assert kernels
    torch.testing.assert_close(results[0], exactly(name, x).float(), rtol=1.3e-7, atol=1e-38, equal_nan=True)


def test_orders_that_overflow_stay_in_torch() -> None:
    ((_, reason),) = compile_graph(one("polygamma.default(9, x)", "f32", 4)).coverage.reasons
    assert "high order" in reason
