"""The Triton matmul template: interpreted against torch, compiled for three targets, with tensor-core instructions."""

from __future__ import annotations

import pytest
import torch
from plait.codegen.triton.compile import TARGETS, cross_compile
from plait.codegen.triton.matmul import LDC, TritonMatmul, configs, linear_epilogue, print_matmul
from plait.codegen.triton.source import KernelConfig
from plait.errors import InvalidMatmul

SMALL = KernelConfig((("BLOCK_M", 16), ("BLOCK_N", 16), ("BLOCK_K", 16), ("GROUP", 2)))
SHAPES = ((1, 1, 1), (40, 37, 50), (5, 33, 0), (0, 4, 3), (70, 16, 16))


def make(dtype: str, a: str = "k", b: str = "n", bias: str | None = None, activation: str | None = None) -> TritonMatmul:
    epilogue, buffers = linear_epilogue(dtype, bias, activation)
    return TritonMatmul(f"matmul_{dtype}", dtype, epilogue, buffers, (LDC,), a, b)


def whole(shape: tuple[int, int], generator: torch.Generator, dtype: str) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=generator).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["kn", "kk", "mn", "mk"])
def test_products_of_whole_numbers_are_exact(dtype: str, layout: str, interpreter) -> None:
    source = print_matmul(make(dtype, *layout))
    generator = torch.Generator().manual_seed(0)
    for m, n, k in SHAPES:
        a, b = whole((m, k), generator, dtype), whole((k, n), generator, dtype)
        stored_a = a if layout[0] == "k" else a.t().contiguous()
        stored_b = b if layout[1] == "n" else b.t().contiguous()
        out = torch.full((m, n), float("nan"), dtype=a.dtype)
        sizes = {"M": m, "N": n, "K": k, "lda": stored_a.shape[1], "ldb": stored_b.shape[1], "ldc": n}
        got = interpreter.run(source, {"A": stored_a, "B": stored_b, "out": out}, sizes, SMALL)["out"]
        torch.testing.assert_close(got, (a.float() @ b.float()).to(a.dtype), rtol=0, atol=0)


def test_epilogue_adds_a_bias_and_applies_an_op(interpreter) -> None:
    source = print_matmul(make("bfloat16", "k", "k", bias="float32", activation="tanh"))
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(19, 24, generator=generator).bfloat16(), torch.randn(35, 24, generator=generator).bfloat16()
    bias = torch.randn(35, generator=generator)
    sizes = {"M": 19, "N": 35, "K": 24, "lda": 24, "ldb": 24, "ldc": 35}
    out = torch.empty(19, 35, dtype=torch.bfloat16)
    got = interpreter.run(source, {"A": x, "B": w, "bias": bias, "out": out}, sizes, SMALL)["out"]
    torch.testing.assert_close(got, torch.tanh(x.float() @ w.float().t() + bias).bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles_for_every_target(dtype: str, triton_cache) -> None:
    source = print_matmul(make(dtype, "k", "k", bias=dtype, activation="tanh"))
    aligned = ("A", "B", "out", "M", "N", "K", "lda", "ldb", "ldc")
    built = {target: cross_compile(source, target, triton_cache, aligned=aligned) for target in TARGETS}
    if dtype == "bfloat16":
        assert "wgmma.mma_async" in built["cuda:90"].assembly
        assert "mma.sync" in built["cuda:80"].assembly
        assert "mfma" in built["hip:gfx942"].assembly


def test_tf32_is_asked_for_by_name(triton_cache) -> None:
    epilogue, buffers = linear_epilogue("float32")
    plain = TritonMatmul("plain", "float32", epilogue, buffers, (LDC,))
    fast = TritonMatmul("fast", "float32", epilogue, buffers, (LDC,), tf32=True)
    assert "tf32" in cross_compile(print_matmul(fast), "cuda:80", triton_cache).assembly
    assert "tf32" not in cross_compile(print_matmul(plain), "cuda:80", triton_cache).assembly


def test_configs_fit_the_shared_memory_of_their_devices(triton_cache) -> None:
    limits = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024}
    spec = make("bfloat16")
    for config in (configs(spec)[1], configs(spec)[-1]):  # the largest tile, and the deepest pipeline
        for target, limit in limits.items():
            assert cross_compile(print_matmul(spec), target, triton_cache, config=config).shared <= limit


def test_recorded_text(golden) -> None:
    golden("matmul.triton.py", print_matmul(make("bfloat16", "k", "k", bias="bfloat16")).text)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "int16"}, "dtype is 'int16'"),
        ({"a": "n"}, "a is 'n'"),
        ({"tf32": True}, "tf32"),
        ({"epilogue": ()}, "stores nothing"),
        ({"sizes": (LDC, __import__("sympy").Symbol("lda"))}, "the template's own"),
    ],
)
def test_refuses_what_it_does_not_have(change: dict, why: str) -> None:
    epilogue, buffers = linear_epilogue("bfloat16")
    fields = {"name": "k", "dtype": "bfloat16", "epilogue": epilogue, "buffers": buffers, "sizes": (LDC,), **change}
    with pytest.raises(InvalidMatmul, match=why):
        TritonMatmul(**fields)
