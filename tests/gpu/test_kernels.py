"""Printed kernels on a real GPU, launched through libcuda, against torch on the CPU."""

from __future__ import annotations

import threading

import pytest
import torch
from plait.codegen.cache import Cache
from plait.codegen.triton.matmul import LDC, TritonMatmul, configs, linear_epilogue, print_matmul
from plait.codegen.triton.printer import print_kernel
from plait.codegen.triton.quantized import TritonQuantized, print_quantized
from plait.codegen.triton.quantized import configs as quantized_configs
from plait.formats import QuantizedType, quantize

from tests.codegen.kernels import ADD_IN_PLACE, CASES, SOFTMAX, KernelCase
from tests.gpu.kit import Launcher, bytes_kernel, on_device

pytestmark = pytest.mark.gpu

RUNS = [
    pytest.param(case, sizes, id="-".join([case.name, *map(str, sizes.values())])) for case in CASES for sizes in case.sizes
]


@pytest.mark.parametrize(("case", "sizes"), RUNS)
def test_kernel_agrees_with_torch(case: KernelCase, sizes: dict[str, int], cache: Cache) -> None:
    inputs = case.inputs(sizes, torch.Generator().manual_seed(0))
    expected = case.reference(inputs, sizes)
    start = {name: torch.full_like(t, float("nan") if t.is_floating_point() else -1) for name, t in expected.items()}
    tensors = on_device(start | inputs)
    for source in print_kernel(case.kernel):
        Launcher.of(source, cache)(tensors, sizes)
    torch.cuda.synchronize()
    for name, value in expected.items():
        # a GPU's exp and division of tiles differ from the CPU's in the last digits, never in whole numbers
        rtol, atol = (0.0, 0.0) if case.rtol == 0 else (max(case.rtol, 2e-5), max(case.atol, 2e-6))
        torch.testing.assert_close(tensors[name].cpu(), value, rtol=rtol, atol=atol, equal_nan=True)


def test_large_rows_and_many_programs(cache: Cache) -> None:
    (source,) = print_kernel(SOFTMAX.kernel)
    x = torch.randn(3001, 5003, device="cuda")
    out = torch.full_like(x, float("nan"))
    Launcher.of(source, cache)({"x": x, "out": out}, {"M": 3001, "N": 5003})
    torch.testing.assert_close(out, torch.softmax(x, -1), rtol=1e-5, atol=1e-7)


def test_misaligned_views_take_the_general_binary(cache: Cache) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    memory, y = torch.arange(1024.0, device="cuda"), torch.ones(1000, device="cuda")
    before = memory.clone()
    x = memory[1:1001]
    Launcher.of(source, cache)({"x": x, "y": y}, {"N": 1000})
    before[1:1001] += 1
    assert torch.equal(memory, before)


def test_launches_can_be_captured_in_a_graph(cache: Cache) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    launcher = Launcher.of(source, cache)
    x, y = torch.zeros(500, device="cuda"), torch.ones(500, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher({"x": x, "y": y}, {"N": 500})
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(x, torch.full_like(x, 3.0))


def test_a_thread_without_context_can_launch(cache: Cache) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    launcher = Launcher.of(source, cache)
    x, y = torch.zeros(500, device="cuda"), torch.ones(500, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream().cuda_stream
    thread = threading.Thread(target=lambda: launcher.kernel.launch([x.data_ptr(), y.data_ptr()], [500], stream))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["kn", "kk", "mn", "mk"])
def test_matmul_of_whole_numbers_is_exact(dtype: str, layout: str, cache: Cache) -> None:
    epilogue, buffers = linear_epilogue("float32")
    spec = TritonMatmul(f"matmul_{dtype}", dtype, epilogue, buffers, (LDC,), *layout)
    launcher = Launcher.of(print_matmul(spec), cache)
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 1, 1), (129, 67, 70), (256, 512, 192), (5, 33, 0)):
        a = torch.randint(-4, 5, (m, k), generator=generator).to(getattr(torch, dtype)).cuda()
        b = torch.randint(-4, 5, (k, n), generator=generator).to(getattr(torch, dtype)).cuda()
        stored = {
            "A": a if layout[0] == "k" else a.t().contiguous(),
            "B": b if layout[1] == "n" else b.t().contiguous(),
            "out": torch.full((m, n), float("nan"), device="cuda"),
        }
        sizes = {"M": m, "N": n, "K": k, "lda": stored["A"].shape[1], "ldb": stored["B"].shape[1], "ldc": n}
        launcher(stored, sizes)
        torch.testing.assert_close(stored["out"], (a.double() @ b.double()).float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_matmul_config_gives_the_same_product(dtype: str, cache: Cache) -> None:
    epilogue, buffers = linear_epilogue(dtype, bias=dtype, activation="tanh")
    spec = TritonMatmul(f"linear_{dtype}", dtype, epilogue, buffers, (LDC,), "k", "k")
    x = torch.randn(300, 520, device="cuda", dtype=getattr(torch, dtype)) / 8
    w, bias = torch.randn(257, 520, device="cuda").to(x), torch.randn(257, device="cuda").to(x)
    expected = torch.tanh(x.double() @ w.double().t() + bias.double()).to(x)
    sizes = {"M": 300, "N": 257, "K": 520, "lda": 520, "ldb": 520, "ldc": 257}
    for config in configs(spec):
        out = torch.full_like(expected, float("nan"))
        Launcher.of(print_matmul(spec), cache, config)({"A": x, "B": w, "bias": bias, "out": out}, sizes)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", ["kn", "kk", "mn", "mk"])
def test_products_of_bytes_are_exact_for_any_rows(layout: str, cache: Cache) -> None:
    spec = bytes_kernel(*layout)
    generator = torch.Generator().manual_seed(0)
    for config in configs(spec):
        launcher = Launcher.of(print_matmul(spec), cache, config)
        for m, n, k in ((1, 37, 50), (129, 67, 190), (3, 4, 0)):
            a, b = (torch.randint(-128, 128, s, generator=generator).to(torch.int8).cuda() for s in ((m, k), (k, n)))
            stored = {
                "A": a if layout[0] == "k" else a.t().contiguous(),
                "B": b if layout[1] == "n" else b.t().contiguous(),
                "out": torch.full((m, n), -1, dtype=torch.int32, device="cuda"),
            }
            sizes = {"M": m, "N": n, "K": k, "lda": stored["A"].shape[1], "ldb": stored["B"].shape[1], "ldc": n}
            launcher(stored, sizes)
            assert torch.equal(stored["out"].double(), a.double() @ b.double())


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantized_products(bits: int, cache: Cache) -> None:
    generator = torch.Generator().manual_seed(bits)
    dtype = ("float32", "bfloat16", "float16")[bits % 3]
    epilogue, buffers = linear_epilogue(dtype, bias=dtype)
    for (n, k, group), symmetric, scale in (((257, 576, 96), False, "f16"), ((70, 1024, 128), True, "e8m0")):
        kind = QuantizedType((n, k), bits, group, symmetric, scale)
        weight = quantize(torch.randn(n, k, generator=generator) / k**0.5, kind)
        parts = {"codes": weight.codes, "scales": weight.scales} | ({} if symmetric else {"zeros": weight.zeros})
        x, bias = (torch.randn(*s, generator=generator).to(getattr(torch, dtype)) for s in ((19, k), (n,)))
        tensors = on_device({"A": x, "bias": bias, **parts})
        want = (x.double() @ weight.dequantize(torch.float64).t() + bias.double()).to(x.dtype)
        for rows in (0, 1, 4):
            spec = TritonQuantized(f"quantized_{bits}", dtype, kind, epilogue, buffers, (LDC,), rows)
            choices = quantized_configs(spec)
            for config in choices if bits == 4 else choices[:1]:
                tensors["out"] = torch.full((19, n), float("nan"), dtype=x.dtype, device="cuda")
                Launcher.of(print_quantized(spec), cache, config)(tensors, {"M": 19, "lda": k, "ldc": n})
                torch.testing.assert_close(tensors["out"].cpu(), want, msg=lambda m, at=(rows, config): f"{at}: {m}")
