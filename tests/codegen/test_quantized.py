"""Products by quantized weights: numbers of every type, the order of sums, what is fused behind them, and where they run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.codegen.cpp.build import DOTS, build, host_isa
from plait.codegen.templates.launch import bind_quantized
from plait.codegen.templates.matmul import MatmulSpec, drivers, generate, has_dots, workspace_elements
from plait.codegen.templates.quantized_choice import BYTES, FLOAT, QUANTIZED, QuantizedProblem, choose, timings
from plait.cost.profile import Table
from plait.errors import InvalidMatmul
from plait.formats.quantized import Quantized, QuantizedType, quantize
from plait.ir import parse_graph
from plait.runtime import machine
from torch import nn

from tests.codegen.test_cpp_printer import SANITIZE, run_sanitized

BITS, SIGNS, SCALES = range(2, 9), (False, True), ("f16", "bf16", "f32", "e8m0")
GROUPS = (32, 64, 96, 128, 1152)  # 1152: all of K, and more than a block of sums
ROWS = (1, 2, 3, 5, 8, 9, 13, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, K = 70, 1152

Run = Callable[..., torch.Tensor]
fast = [(4, False, "f16"), (8, True, "f16")]  # a driver takes the compiler seconds
every = [
    t
    for t in itertools.product(BITS, SIGNS, SCALES)
    if t not in fast and (t[0] == 4 or t[2] == SCALES[(t[0] + 2 * t[1]) % 4])
]  # scales are read alike by all bits
dots = pytest.mark.skipif(DOTS not in machine.fitting({n: vars(t) for n, t in machine.TARGETS.items()}),
                          reason="this processor has no instructions for pairs of bfloat16")  # fmt: skip


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def weight(n: int, k: int, bits: int, group: int, symmetric: bool, scale: str, seed: int = 1) -> Quantized:
    return quantize(numbers(n, k, seed=seed), QuantizedType((n, k), bits, group, symmetric, scale))


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """product(x, weight, threads, isa): x by a weight, on the template without fused code."""
    folder = tmp_path_factory.mktemp("quantized")

    def run(x: torch.Tensor, w: Quantized, threads: int = 1, isa: str = "native") -> torch.Tensor:
        spec = spec_of(x, w)
        library = build({spec.name: generate(spec)}, folder, isa=isa)[spec.name]
        out = torch.full((x.shape[0], w.type.rows), torch.nan, dtype=x.dtype)
        symbols = {"out_row": w.type.rows}
        bind_quantized(library, spec, x.contiguous(), w, {"out": out}, symbols=symbols, threads=threads)()
        return out

    return run


def spec_of(x: torch.Tensor, w: Quantized) -> MatmulSpec:
    n, k = w.type.shape
    return QuantizedProblem(x.shape[0], n, k, str(w.type), str(x.dtype).removeprefix("torch.")).spec()


def check(x: torch.Tensor, w: Quantized, y: torch.Tensor) -> None:
    """Within 2^-23 sqrt(K) of the sum of absolute products in float32, and half a unit of a narrower result.

    code - zero and the products of bfloat16 are exact, and each sum is of at most K numbers: rounding errors of 2^-24 add up
    like a random walk.
    """
    exact, size = x.double() @ w.dequantize(torch.float64).T, x.double().abs() @ w.dequantize(torch.float64).abs().T
    bound = 2**-23 * x.shape[1] ** 0.5 * size
    if y.dtype is not torch.float32:
        bound += torch.finfo(y.dtype).eps / 2 * exact.abs() + torch.finfo(y.dtype).smallest_normal
    assert ((y.double() - exact).abs() <= bound).all(), (str(w.type), x.dtype, x.shape[0])


def check_type(product: Run, bits: int, symmetric: bool, scale: str) -> None:
    for dtype, group in itertools.product(DTYPES, GROUPS):
        w, x = weight(N, K, bits, group, symmetric, scale), numbers(max(ROWS), K, dtype=dtype)
        whole = product(x, w)
        check(x, w, whole)
        for m in ROWS:  # one order of sums, whatever M is
            assert torch.equal(product(x[:m], w, threads=1 + m % 2), whole[:m]), (str(w.type), dtype, m)


@pytest.mark.parametrize(("bits", "symmetric", "scale"), fast)
def test_types(product: Run, bits: int, symmetric: bool, scale: str) -> None:
    check_type(product, bits, symmetric, scale)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric", "scale"), every)
def test_every_type(product: Run, bits: int, symmetric: bool, scale: str) -> None:
    check_type(product, bits, symmetric, scale)


few = [4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in BITS if bits != 4)]


@pytest.mark.parametrize("bits", few)
def test_every_code_arrives_as_the_number_that_it_is(product: Run, bits: int) -> None:
    """Rows of the identity read single weights: all codes at all places, under extreme zero points."""
    kind = QuantizedType((64, 64), bits, 32)
    codes = (torch.arange(64)[:, None] * 7 + torch.arange(64)) % (kind.levels + 1)
    zeros = torch.where(torch.arange(64)[:, None] % 2 == 0, 0, kind.levels).expand(64, 2)
    w = kind.pack(codes, torch.ones(64, 2), zeros)
    for dtype in DTYPES:
        want = (codes - zeros.repeat_interleave(32, 1)).T.to(dtype)
        assert torch.equal(product(torch.eye(64, dtype=dtype), w), want)
        assert torch.equal(product(torch.eye(64, dtype=dtype)[5:6], w), want[5:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(1, 32, 32), (33, 64, 32), (1000, 640, 160), (40, 1920, 384), (2100, 320, 32)]
)
def test_chunks_threads_and_permutations_change_no_bit(product: Run, dtype: torch.dtype, n: int, k: int, group: int) -> None:
    w, x = weight(n, k, 4, group, False, "f16"), numbers(280, k, dtype=dtype)
    whole = product(x, w)
    check(x, w, whole)
    for threads in (1, 2, 3, 5):
        assert torch.equal(product(x, w, threads), whole)
        assert torch.equal(product(x[:1], w, threads), whole[:1])
    for chunk in (1, 2, 3, 4, 7, 12, 24, 25, 64):
        assert torch.equal(torch.cat([product(part, w, 2) for part in x[:72].split(chunk)]), whole[:72])
    rows = torch.randperm(280, generator=torch.Generator().manual_seed(0))
    assert torch.equal(product(x[rows], w), whole[rows])


def test_long_sums_take_the_general_path(product: Run) -> None:
    w, x = weight(32, 20480, 4, 128, False, "f16"), numbers(3, 20480)
    check(x, w, product(x, w))
    assert torch.equal(product(x[:1], w, 2), product(x, w)[:1])


@pytest.mark.parametrize("bits", few)
@pytest.mark.skipif(host_isa() != "x86-64-v4", reason="compares two instruction sets of one machine")
def test_instruction_sets_are_bit_equal(product: Run, bits: int) -> None:
    w, x = weight(N, 384, bits, 64, False, "f16"), numbers(64, 384)
    whole = product(x, w)
    for m in (64, 1, 2, 3, 5, 6, 7, 13):
        assert torch.equal(product(x[:m], w, isa="x86-64-v3"), whole[:m])


@pytest.mark.slow
@dots
def test_only_bfloat16_depends_on_the_processor(product: Run) -> None:
    w = weight(N, 384, 4, 64, False, "f16")
    for dtype in (torch.float32, torch.float16):
        x = numbers(9, 384, dtype=dtype)
        assert torch.equal(product(x, w, isa=DOTS), product(x, w, isa="x86-64-v3"))
    x = numbers(9, 384, dtype=torch.bfloat16)
    check(x, w, product(x, w, isa=DOTS))
    check(x, w, product(x, w, isa="x86-64-v3"))
    assert [has_dots(generate(spec_of(numbers(1, 384, dtype=d), w))) for d in DTYPES] == [False, True, False]


def test_nan_and_inf_reach_their_row_only(product: Run) -> None:
    w, x = weight(N, 384, 4, 128, False, "f16"), numbers(20, 384)
    x[3, 280], x[7, 300] = torch.nan, torch.inf
    out = product(x, w)
    assert out[3].isnan().all() and not out[7].isfinite().any()
    assert out[[i for i in range(20) if i not in (3, 7)]].isfinite().all()


@pytest.mark.slow
def test_no_memory_is_touched_that_is_not_the_kernels_own(product: Run, tmp_path: Path) -> None:
    """Under AddressSanitizer, on buffers that end where their elements end."""
    runs, wanted = [], []
    for bits, group, dtype in ((4, 32, torch.float32), (8, 64, torch.bfloat16), (3, 384, torch.float16)):
        w = weight(N, 384, bits, group, False, "f16")
        spec = spec_of(numbers(1, 384, dtype=dtype), w)
        library = build({spec.name: generate(spec)}, tmp_path, flags=(*SANITIZE, "-O1"))[spec.name]
        for m in (1, 2, 5, 12, 13, 40):
            x = numbers(m, 384, dtype=dtype)
            out = torch.empty(m, N, dtype=dtype)
            at = {"A": x, "B": w.codes, "scales": w.scales, "zeros": w.zeros, "out": out}
            at["workspace"] = torch.empty(workspace_elements(spec, m, N, 384, 2))
            sizes = {"M": m, "N": N, "K": 384, "lda": 384, "ldb": 0, "slots": 2, "scale_group": group, "out_row": N}
            files = [str(tmp_path / f"{len(runs)}-{name}.bin") for name in spec.buffer_names]
            for file, name in zip(files, spec.buffer_names, strict=True):
                Path(file).write_bytes(raw(at[name]))
            runs.append([str(library), spec.name, files, [sizes[s] for s in spec.size_names], 2])
            wanted.append((files[spec.buffer_names.index("out")], product(x, w)))
    done = run_sanitized(runs, tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    for file, want in wanted:
        assert Path(file).read_bytes() == raw(want)


def raw(x: torch.Tensor | None) -> bytes:
    assert x is not None
    return bytes(x.contiguous().view(torch.uint8).flatten().tolist())


# ---- in compiled models -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Quantized layers with a bias, an activation and the residual behind each."""

    def __init__(self, *kinds: QuantizedType) -> None:
        super().__init__()
        self.types = [str(kind) for kind in kinds]
        for i, kind in enumerate(kinds):
            made = quantize(numbers(*kind.shape, seed=i) / kind.columns**0.5, kind)
            for name, part in (("codes", made.codes), ("scales", made.scales), ("zeros", made.zeros)):
                self.register_buffer(f"{name}{i}", part)
            self.register_buffer(f"bias{i}", numbers(kind.rows, seed=9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, text in enumerate(self.types):
            codes, scales, zeros, bias = (getattr(self, f"{name}{i}") for name in ("codes", "scales", "zeros", "bias"))
            y = torch.ops.plait.quantized_linear(x, codes, scales, zeros, bias.to(x.dtype), text)
            x = nn.functional.gelu(y) + x
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 7)])
def test_what_follows_is_fused(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    kind = QuantizedType((64, 64), 4, 32)
    net, x = Net(kind, kind, QuantizedType((64, 64), 8, 64, True)), numbers(*lead, 64, dtype=dtype)
    compiled = plait.compile(net, (x,))
    coverage = compiled.compiled.coverage
    assert (coverage.fallback, coverage.library, coverage.launches) == (0, 0, 3), coverage
    assert len(compiled.compiled.sources) == 2  # the first two layers are one kernel
    error = 2e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(compiled(x), net(x), rtol=error, atol=error)


def test_through_an_artifact_and_back_with_any_number_of_rows(tmp_path: Path) -> None:
    net, x = Net(QuantizedType((64, 64), 4, 64), QuantizedType((64, 64), 4, 32)), numbers(6, 64)
    shapes: Any = ({0: torch.export.Dim("rows", min=2, max=64)},)
    compiled = plait.compile(net, (x,), dynamic_shapes=shapes)
    compiled.save(tmp_path / "net.plait")
    loaded = plait.load(tmp_path / "net.plait")
    whole = numbers(40, 64)
    assert loaded.coverage["fallback"] == 0
    assert torch.equal(loaded(whole), compiled(whole))
    assert torch.equal(loaded(whole[:3]), compiled(whole)[:3])


GRAPH = """def f(x: "%s[3,%d]"):
    c = plait.constant("c")
    s = plait.constant("s")
    z = plait.constant("z")
    y = plait.quantized_linear.default(x, c, s, z, None, '%s')
    return (y,)
"""


@pytest.mark.parametrize(
    ("kind", "dtype", "why"),
    [
        (QuantizedType((32, 48), 4, 16, layout="rows"), torch.float32, "groups of 16: multiples of 32 have one"),
        (QuantizedType((32, 64), 4, 32, layout="rows"), torch.float32, "the layout 'rows': 'panels' has one"),
        (QuantizedType((32, 64), 4, 32), torch.float64, "not by float64"),
    ],
)
def test_what_has_no_kernel_says_why(kind: QuantizedType, dtype: torch.dtype, why: str) -> None:
    w, x = quantize(numbers(*kind.shape), kind), numbers(3, kind.columns, dtype=dtype)
    name = {torch.float32: "f32", torch.float64: "f64"}[dtype]
    assert w.zeros is not None
    text = GRAPH % (name, kind.columns, kind)
    compiled = compile_graph(parse_graph(text, {"c": w.codes, "s": w.scales, "z": w.zeros}))
    assert compiled.coverage.fallback == 1 and why in compiled.coverage.reported[0].reason
    torch.testing.assert_close(compiled.executable(x)[0], x @ w.dequantize(dtype).T)


# ---- limits and choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"b_dtype": "u9_f16"}, {"b_dtype": "float32"}, {"a": "m"}, {"batch": 1}, {"dtype": "float64", "a_dtype": "float64"}],
)
def test_refuses_what_it_does_not_have(changes: dict[str, Any]) -> None:
    spec = spec_of(numbers(1, 64), weight(32, 64, 4, 32, False, "f16"))
    with pytest.raises(InvalidMatmul):
        dataclasses.replace(spec, **changes)


def test_a_driver_serves_all_groups_of_a_type() -> None:
    specs = [spec_of(numbers(1, 64), weight(32, 64, 4, group, False, "f16")) for group in (32, 64)]
    assert (
        list(drivers(generate(specs[0])))
        == list(drivers(generate(specs[1])))
        == ["matmul_float_float_u4_f16_k_quantized_plain"]
    )


def test_choice_measures_each_way_and_keeps_it(tmp_path: Path) -> None:
    table = Table(tmp_path / "profile.json")
    problem = QuantizedProblem(2, 64, 64, "u4g32[1,32]", cold=False)
    found = timings(problem, table, 1, tmp_path, budget=0.005)
    assert list(found) == [QUANTIZED, FLOAT, BYTES] and all(us > 0 for us in found.values())
    assert choose(problem, table, 1, tmp_path, 0.005, (BYTES,)).name == BYTES
    assert choose(problem, table, 1, tmp_path, 0.005).name in (QUANTIZED, FLOAT)
    assert dict(table.get(problem.key(1))).keys() == set(found)
    assert QuantizedProblem(1, 64, 48, "u4g16:rows[1,16]").names == (FLOAT, BYTES)


def test_of_a_large_weight_a_part_is_measured() -> None:
    problem = QuantizedProblem(1, 200_000, 8192, "u4g128[1,128]")
    assert problem.part.n * problem.k <= 1 << 26 and problem.part.n % 32 == 0
    assert problem.part.part == problem.part
