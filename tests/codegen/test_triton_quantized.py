"""Products with quantized weights, and of bytes, as Triton: interpreted against float64, compiled, and in models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import plait
import pytest
import sympy
import torch
from plait.codegen.compile import CodegenOptions, CompiledGraph, compile_graph
from plait.codegen.target import retarget
from plait.codegen.triton.compile import TARGETS, cross_compile, resources
from plait.codegen.triton.matmul import LDC, TritonMatmul, configs, fitting, linear_epilogue, print_matmul
from plait.codegen.triton.quantized import TritonQuantized, config_for, print_quantized
from plait.codegen.triton.quantized import configs as quantized_configs
from plait.codegen.triton.source import KernelConfig, TritonSource
from plait.compiler.quantize.modules import QuantizedLinear
from plait.compiler.source import Targets
from plait.errors import InvalidMatmul
from plait.formats import Quantized, QuantizedType, quantize
from plait.ir import parse_graph
from plait.runtime import artifact as artifacts
from plait.runtime.archive import Archive
from plait.runtime.check import check
from plait.runtime.plan import from_json
from torch import nn

from tests import cuda_models
from tests.codegen.cuda_plan import run_interpreted

TILED = KernelConfig((("BLOCK_M", 16), ("BLOCK_N", 32), ("BLOCK_K", 32), ("GROUP", 2)))
VECTOR = KernelConfig((("BLOCK_N", 32), ("BLOCK_K", 64)))
BYTES = KernelConfig((("BLOCK_M", 16), ("BLOCK_N", 16), ("BLOCK_K", 32), ("GROUP", 2)))


def small(spec: TritonQuantized) -> KernelConfig:
    """Tiles that cut the sizes of these tests into several programs and rounds, the last of them partial."""
    return VECTOR if spec.rows else TILED


def made(kind: QuantizedType, dtype: str, rows: int, bias: str | None = None, activation: str | None = None):
    epilogue, buffers = linear_epilogue(dtype, bias, activation)
    return TritonQuantized("quantized", dtype, kind, epilogue, buffers, (LDC,), rows)


def product(spec: TritonQuantized, x: torch.Tensor, weight: Quantized, interpreter, **others: torch.Tensor) -> torch.Tensor:
    """What the kernel of `spec` gives; x may lie in wider rows."""
    out = torch.full((x.shape[0], spec.weight.rows), float("nan"), dtype=x.dtype)
    tensors = {"A": x, "codes": weight.codes, "scales": weight.scales, "out": out, **others}
    if weight.zeros is not None:
        tensors["zeros"] = weight.zeros
    sizes = {"M": x.shape[0], "lda": x.stride(0), "ldc": out.shape[1]}
    return interpreter.run(print_quantized(spec), tensors, sizes, small(spec))["out"]


def whole(kind: QuantizedType, generator: torch.Generator, scale: float = 1.0) -> Quantized:
    """A weight of random codes and zero points, whose scales are powers of two around `scale`."""
    n, k, groups = kind.rows, kind.columns, kind.groups
    codes, zeros = (torch.randint(0, kind.levels + 1, (n, columns), generator=generator) for columns in (k, groups))
    scales = scale * 2.0 ** torch.randint(0, 3, (n, groups), generator=generator)
    return kind.pack(codes, scales, None if kind.symmetric else zeros)


# -- quantized weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_of_whole_numbers_are_exact(bits: int, rows: int, interpreter) -> None:
    generator = torch.Generator().manual_seed(10 * bits + rows)
    for symmetric, (m, n, k, group) in ((False, (3, 70, 96, 96)), (True, (1, 31, 128, 32))):
        kind = QuantizedType((n, k), bits, group, symmetric)
        weight = whole(kind, generator)
        x = torch.randint(-4, 5, (m, k + 3), generator=generator).float()[:, :k]  # rows lie apart
        want = x.double() @ weight.dequantize(torch.float64).t()
        assert torch.equal(product(made(kind, "float32", rows), x, weight, interpreter).double(), want)


@pytest.mark.parametrize("scale", ["f16", "bf16", "f32", "e8m0"])
@pytest.mark.parametrize(("dtype", "rows"), [("float16", 0), ("bfloat16", 0), ("float16", 4), ("bfloat16", 1)])
def test_halves_are_summed_in_float32_and_rounded_once(dtype: str, rows: int, scale: str, interpreter) -> None:
    generator = torch.Generator().manual_seed(3)
    kind = QuantizedType((40, 128), 4, 64, scale=scale)
    weight = quantize(torch.randn(40, 128, generator=generator), kind)
    x, bias = (torch.randn(*shape, generator=generator).to(getattr(torch, dtype)) for shape in ((6, 128), (40,)))
    got = product(made(kind, dtype, rows, dtype, "tanh"), x, weight, interpreter, bias=bias)
    exact = torch.tanh(x.double() @ weight.dequantize(torch.float64).t() + bias.double())
    apart = (got.double() - exact).abs() / exact.abs().clamp(min=1e-3)
    assert apart.max() <= 0.51 * torch.finfo(got.dtype).eps  # half a unit, and what float32 adds to it


@pytest.mark.parametrize("rows", [0, 1])
def test_scales_that_halves_do_not_hold(rows: int, interpreter) -> None:
    kind = QuantizedType((33, 64), 4, 32, scale="f32")
    generator = torch.Generator().manual_seed(rows)
    weight = whole(kind, generator, 2.0**20)  # a weight of up to 15 * 2^22, where float16 ends at 2^16
    x = (torch.randint(-4, 5, (3, 64), generator=generator) * 2.0**-20).half()
    want = (x.double() @ weight.dequantize(torch.float64).t()).half()
    assert torch.equal(product(made(kind, "float16", rows), x, weight, interpreter), want) and want.isfinite().all()


def test_the_smallest_and_the_largest_shared_exponent(interpreter) -> None:
    kind = QuantizedType((32, 64), 4, 32, symmetric=True, scale="e8m0")
    codes = torch.full((32, 64), 9)
    weight = kind.pack(codes, torch.ones(32, 2))
    weight = weight._replace(scales=torch.tensor([0, 254], dtype=torch.uint8)[None, :, None].expand(1, 2, 32).contiguous())
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 32] = 4.0, 2.0**-126
    for rows in (0, 1):
        got = product(made(kind, "float32", rows), x, weight, interpreter)
        assert torch.equal(got, torch.full((1, 32), 4 * 2.0**-127 + 2.0**-126 * 2.0**127))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows(rows: int, interpreter) -> None:
    kind = QuantizedType((33, 64), 4, 32)
    weight = quantize(torch.randn(33, 64), kind)
    assert product(made(kind, "float32", rows), torch.empty(0, 64), weight, interpreter).shape == (0, 33)


ALIGNED = ("A", "codes", "scales", "zeros", "bias", "out", "lda", "ldc")


@pytest.mark.parametrize("target", TARGETS)
def test_quantized_products_compile_for_every_target(target: str, triton_cache) -> None:
    tensor_cores = {"cuda:80": "mma.sync", "cuda:90": "wgmma.mma_async", "hip:gfx942": "mfma"}[target]
    cases = (
        (4, 128, "bfloat16", 0),
        (4, 128, "bfloat16", 1),
        (3, 64, "float16", 0),
        (8, 32, "float32", 0),
        (5, 32, "float16", 4),
    )
    for bits, group, dtype, rows in cases:
        source = print_quantized(made(QuantizedType((512, 1152), bits, group), dtype, rows, dtype))
        assembly = cross_compile(source, target, triton_cache, aligned=ALIGNED).assembly
        assert (tensor_cores in assembly) == (rows == 0 and dtype != "float32") or (target, dtype) == (
            "hip:gfx942",
            "float32",
        )


@pytest.mark.slow
def test_configs_fit_their_devices(triton_cache, tmp_path: Path) -> None:
    kind = QuantizedType((4096, 4096), 4, 128)
    for rows in (0, 1):
        spec = made(kind, "bfloat16", rows)
        for config in quantized_configs(spec):
            for target, limit in (("cuda:80", 163 * 1024), ("cuda:90", 227 * 1024)):
                binary = cross_compile(print_quantized(spec), target, triton_cache, config=config, aligned=ALIGNED)
                assert binary.shared <= limit
                used = resources(binary, tmp_path)
                assert used is None or used.spilled <= 16, (config, target, used)


def test_words_are_read_four_at_a_time(triton_cache) -> None:
    source = print_quantized(made(QuantizedType((512, 1024), 4, 128), "bfloat16", 1))
    assembly = cross_compile(source, "cuda:90", triton_cache, aligned=ALIGNED).assembly
    assert re.search(r"ld\.global\.v4\.b32", assembly)


@pytest.mark.parametrize("rows", [0, 2])
def test_recorded_text(rows: int, golden) -> None:
    spec = made(QuantizedType((70, 384), 3, 96), "bfloat16", rows, "bfloat16")
    golden(f"quantized_{'vector' if rows else 'tiled'}.triton.py", print_quantized(spec).text)


def test_tiles_suit_the_rows_and_the_weight() -> None:
    spec = made(QuantizedType((512, 576), 4, 96), "bfloat16", 0)
    tiles = {rows: dict(config_for(spec, rows).tiles) for rows in (None, 2, 17, 64, 1000)}
    assert [t["BLOCK_M"] for t in tiles.values()] == [128, 16, 32, 64, 128]
    assert {t["BLOCK_K"] for t in tiles.values()} == {32}  # none crosses a group of 96
    deep = [
        dict(config_for(made(QuantizedType((32, k), 4, 32), "float16", 1), 1).tiles)["BLOCK_K"] for k in (576, 1536, 4096)
    ]
    assert deep == [128, 512, 1024]  # at most a fifth of the lanes idle


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"rows": 3}, "1, 2 or 4 rows, not 3"),
        ({"weight": QuantizedType((8, 24), 4, 8, layout="rows")}, "the layout 'panels', not 'rows'"),
        ({"weight": QuantizedType((2, 8, 32), 4, 32)}, "3 dimensions"),
        ({"weight": QuantizedType((1 << 17, 1 << 17), 4, 128)}, "more words"),
        ({"epilogue": ()}, "stores nothing"),
        ({"sizes": (LDC, sympy.Symbol("lda"))}, "the template's own"),
    ],
)
def test_refuses_what_it_does_not_have(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidMatmul, match=why):
        replace(made(QuantizedType((64, 64), 4, 32), "bfloat16", 0), **change)


# -- bytes --------------------------------------------------------------------------------------------------------------


def bytes_kernel(a: str = "k", b: str = "k") -> TritonMatmul:
    return TritonMatmul("bytes", "int8", *linear_epilogue("int32"), (LDC,), a, b)


@pytest.mark.parametrize("layout", ["kn", "kk", "mn", "mk"])
def test_products_of_bytes_are_exact_for_any_rows(layout: str, interpreter) -> None:
    source = print_matmul(bytes_kernel(*layout))
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 37, 50), (17, 16, 33), (3, 4, 0)):
        a, b = (torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for shape in ((m, k), (k, n)))
        stored_a = a if layout[0] == "k" else a.t().contiguous()
        stored_b = b if layout[1] == "n" else b.t().contiguous()
        sizes = {"M": m, "N": n, "K": k, "lda": stored_a.shape[1], "ldb": stored_b.shape[1], "ldc": n}
        tensors = {"A": stored_a, "B": stored_b, "out": torch.full((m, n), -1, dtype=torch.int32)}
        assert torch.equal(interpreter.run(source, tensors, sizes, BYTES)["out"].double(), a.double() @ b.double())


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_bytes_compile_with_integer_tensor_cores(target: str, triton_cache) -> None:
    spec = bytes_kernel()
    source, aligned = print_matmul(spec), ("A", "B", "out", "K", "lda", "ldb", "ldc")
    wanted = {"cuda:80": r"mma\.sync\S*\.s8\.s8", "cuda:90": r"wgmma\S*\.s8\.s8", "hip:gfx942": r"mfma_i32\S*i8"}[target]
    assert re.search(wanted, cross_compile(source, target, triton_cache, aligned=aligned).assembly)
    limit = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024}.get(target)
    for config in () if limit is None else (configs(spec)[1], fitting(configs(spec), 1)):
        assert cross_compile(source, target, triton_cache, config=config, aligned=aligned).shared <= limit


# -- in models ----------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A gated feed-forward layer of three quantized weights, each of another type, with a residual."""

    def __init__(self, activations: str = "float") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kinds = [QuantizedType((96, 64), 4, 32), QuantizedType((96, 64), 3, 64, True), QuantizedType((64, 96), 8, 32)]
        if activations == "int8":
            shapes = ((96, 64), (96, 64), (64, 96))
            kinds = [QuantizedType(s, 8, s[1], symmetric=True, scale="f32", layout="bytes") for s in shapes]
        weights = [quantize(torch.randn(*k.shape, generator=generator) / k.columns**0.5, k) for k in kinds]
        bias = torch.randn(64, generator=generator)
        self.up, self.gate = (QuantizedLinear(w, None, activations) for w in weights[:2])  # type: ignore[arg-type]
        self.down = QuantizedLinear(weights[2], bias, activations)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def compiled(model: nn.Module, x: torch.Tensor, shapes: Any = None, target: str = "cuda:90") -> CompiledGraph:
    made = compile_graph(retarget(cuda_models.captured(model.eval(), (x,), shapes)), CodegenOptions(target=target))
    check(made.plan)
    return made


def sources(made: CompiledGraph) -> list[TritonSource]:
    return [TritonSource.of(k, made.sources[k.name]) for k in made.plan.kernels]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (3, 64), (2, 9, 64)], ids=str)
def test_a_model_of_quantized_weights_is_three_kernels(shape: tuple[int, ...], interpreter) -> None:
    model, x = Gated(), randn(*shape)
    made = compiled(model, x)
    assert (made.coverage.launches, made.coverage.library, made.coverage.fallback) == (3, 0, 0)
    assert all(("tl.dot" in text) == (shape == (2, 9, 64)) for text in made.sources.values())
    torch.testing.assert_close(run_interpreted(made, [x], interpreter)[0], model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_halves_round_where_eager_does(dtype: torch.dtype, interpreter) -> None:
    model, x = Gated().to(dtype), randn(19, 64).to(dtype)
    torch.testing.assert_close(run_interpreted(compiled(model, x), [x], interpreter)[0], model(x).detach())


@pytest.mark.parametrize(("top", "dot"), [(4, False), (5, True), (None, True)])
def test_rows_that_are_symbols_choose_by_their_range(top: int | None, dot: bool, interpreter) -> None:
    model = Gated()
    made = compiled(model, randn(3, 64), ({0: torch.export.Dim("rows", min=1, max=top)},))
    assert {"tl.dot" in text for text in made.sources.values()} == {dot}
    for rows in (2, 4 if top == 4 else 5):
        x = randn(rows, 64)
        torch.testing.assert_close(run_interpreted(made, [x], interpreter)[0], model(x).detach(), rtol=1e-5, atol=1e-5)


def test_layers_that_repeat_share_their_kernels() -> None:
    made = compiled(nn.Sequential(Gated(), Gated()), randn(1, 64))
    assert (made.coverage.launches, len(made.plan.kernels)) == (6, 3)


@pytest.mark.parametrize("shape", [(1, 64), (64,), (2, 11, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_bytes(shape: tuple[int, ...], dtype: torch.dtype, interpreter) -> None:
    model, x = Gated("int8").to(dtype), randn(*shape).to(dtype)
    made = compiled(model, x)
    assert (made.coverage.library, made.coverage.fallback) == (0, 0)
    products = [s for s in sources(made) if "tl.dot" in s.text]
    assert len(products) == 3 and all("out_dtype=tl.int32" in s.text for s in products)  # scales, bias, gate are epilogues
    torch.testing.assert_close(run_interpreted(made, [x], interpreter)[0], model(x).detach())


@pytest.mark.parametrize(
    ("kind", "dtype", "why"),
    [
        (
            QuantizedType((8, 24), 4, 8, layout="rows"),
            torch.float32,
            "kernels for GPUs read the layout 'panels', not 'rows'",
        ),
        (QuantizedType((8, 32), 4, 32), torch.float64, "the template multiplies halves and float32, not float64"),
    ],
)
def test_what_no_kernel_takes_runs_in_torch_and_says_why(kind: QuantizedType, dtype: torch.dtype, why: str, interpreter):
    model, x = QuantizedLinear(quantize(randn(*kind.shape), kind)), randn(2, kind.columns).to(dtype)
    made = compiled(model, x)
    assert made.coverage.reasons == [("plait.quantized_linear.default", why)]
    torch.testing.assert_close(run_interpreted(made, [x], interpreter)[0], model(x))


def test_unsigned_bytes_are_not_multiplied_as_signed_ones() -> None:
    text = """def f(a: "u8[32,16]", b: "i8[16,8]"):
        y = aten._int_mm.default(a, b)
        return (y,)
    """
    made = compile_graph(retarget(parse_graph(text)), CodegenOptions(target="cuda:90"))
    assert made.coverage.reasons == [("aten._int_mm.default", "cuBLAS's matmul of bytes")]


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_an_artifact_for_gpus_holds_the_kernels(activations: str, tmp_path: Path) -> None:
    model, x = Gated(activations).eval(), randn(1, 64)
    plait.compile(model, (x,)).save(tmp_path / "gated.plait", targets=Targets(isas=("x86-64-v3",), cuda=(90,)))
    opened = Archive(tmp_path / "gated.plait")
    plan = from_json(opened.json(artifacts.plan_members(opened.manifest)["cuda:90"]))
    check(plan)
    cubins = {n.rsplit("/", 1)[1].rsplit("-", 1)[0] for n in opened.names if n.startswith("kernels/bin/cuda-90/")}
    assert cubins >= {k.name for k in plan.kernels} and {k.language for k in plan.kernels} == {"triton"}
    assert sum("int_mm" in k.name or "quantized_linear" in k.name for k in plan.kernels) == 3
    loaded = plait.load(tmp_path / "gated.plait", device="cpu")
    torch.testing.assert_close(loaded(x), model(x).detach(), rtol=1e-5, atol=1e-5)
