"""Kernels printed as C++: golden text; compiled and run against torch; one and two threads bit for bit; AddressSanitizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sympy
import torch
from plait.codegen.cpp.build import compiler
from plait.codegen.cpp.printer import print_kernel
from plait.codegen.kernel_ir import Accumulate, Buffer, Compute, Index, Kernel, Load, Loop, Store
from plait.errors import IndexNotPrintable, InvalidKernel

from tests.codegen.cpp_run import EAGER_TO_FORK, bits, build_kernels, call, raw, start_of
from tests.codegen.kernels import CPU_CASES as CASES
from tests.codegen.kernels import KernelCase

EDGES = (15, 16, 17, 1000)  # around one tile, and many tiles with a remainder
I, J, K = sympy.symbols("i j k", integer=True)  # noqa: E741
N = sympy.Symbol("N", integer=True, nonnegative=True)


def all_sizes(case: KernelCase) -> list[dict[str, int]]:
    """The case's own sizes, and its last axis at the edges of a tile."""
    last = next((n for n in ("N", "D") if n in case.sizes[0]), None)
    return [*case.sizes, *({**case.sizes[-1], last: n} for n in EDGES if last)]


RUNS = [
    pytest.param(case, sizes, id="-".join([case.name, *map(str, sizes.values())]))
    for case in CASES
    for sizes in all_sizes(case)
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_kernels([c.kernel for c in CASES], tmp_path_factory.mktemp("kernels"))


def prepared(case: KernelCase, sizes: dict[str, int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    inputs = case.inputs(sizes, torch.Generator().manual_seed(0))
    expected = case.reference(inputs, sizes)
    return start_of(case.kernel, inputs, expected), expected


@pytest.mark.parametrize(("case", "sizes"), RUNS)
def test_kernel_agrees_with_torch_on_one_and_two_threads(case: KernelCase, sizes, libraries) -> None:
    results = []
    for threads in (1, 2):
        buffers, expected = prepared(case, sizes)
        call(libraries[case.kernel.name], case.kernel, buffers, sizes, threads)
        for name, tensor in expected.items():
            torch.testing.assert_close(
                buffers[name], tensor, rtol=case.rtol, atol=case.atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        results.append({name: bits(x) for name, x in buffers.items()})
    assert results[0] == results[1]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_printed_text_is_as_recorded(case: KernelCase, golden) -> None:
    assert print_kernel(case.kernel) == print_kernel(case.kernel)
    golden(f"{case.name}.cpp", print_kernel(case.kernel))


SANITIZE = ("-fsanitize=address", "-O1", "-g")


def run_sanitized(runs: list[list], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run [library, function, buffer files, sizes, threads] each in a process that has the sanitizer's allocator."""
    (folder / "runs.json").write_text(json.dumps(runs))
    library = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    worker = str(Path(__file__).with_name("asan_worker.py"))
    environment = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, worker, str(folder / "runs.json")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_no_kernel_touches_memory_that_is_not_its_own(libraries, tmp_path: Path) -> None:
    """Every case at every size under AddressSanitizer, on buffers that end where their elements end."""
    sanitized = build_kernels([c.kernel for c in CASES], tmp_path, (*EAGER_TO_FORK, *SANITIZE))
    runs, wanted = [], []
    for case, sizes in (p.values for p in RUNS):
        buffers, _ = prepared(case, sizes)
        files = [str(tmp_path / f"{len(runs)}-{name}.bin") for name in buffers]
        for file, x in zip(files, buffers.values(), strict=True):
            Path(file).write_bytes(raw(x))
        numbers = [sizes[s.name] for s in case.kernel.sizes]
        runs.append([str(sanitized[case.kernel.name]), case.kernel.name, files, numbers, 2])
        call(libraries[case.kernel.name], case.kernel, buffers, sizes, 2)
        wanted.append(list(buffers.values()))
    done = run_sanitized(runs, tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    for (_, name, files, _, _), buffers in zip(runs, wanted, strict=True):
        for file, want in zip(files, buffers, strict=True):
            got = torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=want.dtype) if want.numel() else want
            assert bits(got) == bits(want), f"{name} differs from the optimised build"


def test_sanitizer_notices_an_overread(tmp_path: Path) -> None:
    """The check above can fail: a kernel that reads one element too many is caught."""
    kernel = elementwise(Load("a", "float32", "x", I + 1), Store("out", I, "a"))
    built = build_kernels([kernel], tmp_path, SANITIZE)
    files = [str(tmp_path / "x.bin"), str(tmp_path / "out.bin")]
    for file in files:
        Path(file).write_bytes(bytes(4 * 20))
    done = run_sanitized([[str(built[kernel.name]), kernel.name, files, [20], 1]], tmp_path)
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr


def elementwise(*body, sizes=(N,)) -> Kernel:
    buffers = (Buffer("x", "float32", "read"), Buffer("out", "float32", "write"))
    return Kernel("k", buffers, sizes, (Loop(I, N, body, "parallel", True),))


def test_index_with_a_function_that_is_no_integer_arithmetic_is_refused() -> None:
    with pytest.raises(IndexNotPrintable, match="sin"):
        print_kernel(elementwise(Load("a", "float32", "x", sympy.sin(N)), Store("out", I, "a")))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ((Store("out", I, "a"),), "a is read before it is defined"),
        ((Index("at", sympy.Symbol("q", integer=True)),), "q is read before it is defined"),
        ((Load("a", "float32", "x", I), Compute("b", "float32", "add", ("a",))), "b = add of 1 operands"),
        ((Load("a", "float32", "x", I), Compute("b", "float32", "gelu", ("a",))), "b = gelu of 1 operands"),
        ((Load("a", "float32", "x", I), Accumulate("s", "a")), "s is not an accumulator in scope"),
        ((Loop(J, N, (), vector=True),), "vector loop j inside vector loop i"),
    ],
)
def test_tree_that_breaks_a_rule_is_refused(body, why: str) -> None:
    with pytest.raises(InvalidKernel, match=why):
        print_kernel(elementwise(*body))


def test_work_is_counted_where_an_extent_shrinks_along_a_loop_around_it() -> None:
    """One long chunk: its loop's extent is 56 - 4096 * 0, which no other iteration may make negative."""
    inner = Loop(J, sympy.Min(4096, 56 - 4096 * I), (Load("a", "float32", "x", J), Store("out", J, "a")))
    chunks = Loop(I, sympy.Integer(1), (inner,))
    text = print_kernel(Kernel("k", elementwise().buffers, (N,), (Loop(K, N, (chunks,), "parallel"),)))
    assert "parallel(N, N * 112, nthreads" in text, text


def test_parallel_extent_that_is_not_uniform_is_refused() -> None:
    inner = Loop(J, I + 1, (Load("a", "float32", "x", J), Store("out", J, "a")), "parallel", True)
    with pytest.raises(InvalidKernel, match="the extent of parallel loop j is not uniform"):
        print_kernel(Kernel("k", elementwise().buffers, (N,), (Loop(I, N, (inner,), "parallel"),)))


def test_names_that_cpp_reserves_are_renamed() -> None:
    text = print_kernel(elementwise(Load("float", "float32", "x", I), Compute("exp", "float32", "exp", ("float",)),
                                    Store("out", I, "exp")))  # fmt: skip
    assert "const vec<float> exp_ = exp(float_);" in text
