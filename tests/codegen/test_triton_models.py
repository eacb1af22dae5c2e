"""Kernels that the scheduler generates for models: the same plan, run with every generated kernel printed as Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from plait.codegen import emit
from plait.codegen.compile import compile_graph
from plait.codegen.items import KernelItem
from plait.codegen.kernel_ir import Kernel
from plait.codegen.kernels import load_kernels
from plait.codegen.schedule import schedule
from plait.codegen.target import Target
from plait.codegen.triton.check import Checker, interpret_kernel
from plait.codegen.triton.compile import cross_compile
from plait.codegen.triton.interpret import Interpreter
from plait.codegen.triton.printer import print_kernel
from plait.compiler.observe import observe
from plait.ir import Graph
from plait.runtime.executor import Executable

from tests import models
from tests.helpers import graph, random_inputs, run, size

SCALE = models.Scale(layers=1, width=4, image=16)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(emit, "ROW_BYTES", 0)  # only kernels for CPUs keep rows in arrays,
    monkeypatch.setattr(emit, "_TILE_ROWS", 1 << 30)  # or tiles of transposed reads
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def interpreted(item: KernelItem, interpreter: Interpreter) -> Callable[[list[int], list[int], int], None]:
    """The kernel of `item` as a callable on addresses, like a built one, that interprets its Triton form."""
    kernel = item.kernel
    assert kernel is not None

    def call(addresses: list[int], numbers: list[int], threads: int) -> None:
        sizes = dict(zip(kernel.sizes, numbers, strict=True))
        tensors = {}
        for buffer, value, address in zip(kernel.buffers, item.buffers, addresses, strict=True):
            shape, strides = ([size(d, sizes) for d in part] for part in (value.tensor.shape, value.tensor.strides))
            dtype = getattr(torch, buffer.dtype)
            count = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
            tensors[buffer.name] = torch.frombuffer(memory, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        results = interpret_kernel(kernel, tensors, {s.name: n for s, n in sizes.items()}, interpreter)
        for name, result in results.items():
            tensors[name].copy_(result)

    return call


def run_as_triton(g: Graph, inputs: list, interpreter: Interpreter, cache) -> tuple[list, dict[str, Kernel]]:
    """Results of a graph whose generated kernels are interpreted (templates run natively), and those kernels."""
    compiled = compile_graph(g)
    items = {i.name: i for i in schedule(g, target=Target("cpu")).items if isinstance(i, KernelItem)}
    generated = {name: i for name, i in items.items() if i.kernel is not None}
    templates = {name: text for name, text in compiled.sources.items() if name not in generated}
    kernels = load_kernels(templates, cache) | {name: interpreted(i, interpreter) for name, i in generated.items()}
    results = Executable(compiled.plan, kernels, g.constants, check=True)(*inputs)
    return results, {name: i.kernel for name, i in generated.items() if i.kernel is not None}


def check_graph(g: Graph, checker: Checker, targets: tuple[str, ...] = ()) -> int:
    """Compare with the graph's references and compile every kernel for `targets`; returns how many there were."""
    inputs = random_inputs(g)
    results, kernels = run_as_triton(g, inputs, checker.interpreter, checker.cache)
    for got, want in zip(results, run(g, inputs), strict=False):
        if not isinstance(want, torch.Tensor):  # a size, or a gradient that nobody asked for
            assert got == want
            continue
        # float32 sums in another order: what cancels is known to a fraction of the largest element
        scale = want.abs().max().item() if want.is_floating_point() and want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)
    for kernel in kernels.values():
        for source in print_kernel(kernel):
            for target in targets:
                cross_compile(source, target, checker.cache)
    return len(kernels)


def training_graphs(step: Callable[[], torch.Tensor]) -> list[Graph]:
    """The graphs of a compiled training step, forward and backward."""
    with observe() as seen:
        step().backward()
    assert {r.kind for r in seen.graphs} == {"forward", "backward"}
    return [r.graph for r in seen.graphs if r.graph is not None]


def test_training_a_perceptron(triton_checker: Checker) -> None:
    model, (x,) = models.mlp(width=12)
    compiled = torch.compile(model.train(), backend="plait", dynamic=False)
    found = [
        check_graph(g, triton_checker, triton_checker.targets) for g in training_graphs(lambda: compiled(x).square().sum())
    ]
    assert len(found) == 2 and min(found) >= 1


@pytest.mark.slow
def test_training_a_convolutional_model(triton_checker: Checker) -> None:
    model, x = models.build("resnet", SCALE), models.example("resnet", SCALE)["pixel_values"]
    compiled = torch.compile(model.train(), backend="plait", dynamic=False)
    assert sum(check_graph(g, triton_checker) for g in training_graphs(lambda: compiled(x).square().sum())) >= 8


def test_a_transformer_block(triton_checker: Checker) -> None:
    model, (x,) = models.block(width=16)
    with torch.no_grad(), observe() as seen:
        torch.compile(model, backend="plait", dynamic=False)(x)
    (record,) = seen.graphs
    assert record.graph is not None and check_graph(record.graph, triton_checker) >= 1


def test_sizes_that_are_symbols(triton_checker: Checker) -> None:
    text = """
graph(level="tensor", symbols={"s0": (2, 64, 7), "s1": (2, 64, 5)})
def forward(x: "f32[s0,s1]", ids: "i64[s0]", table: "f32[4,s1]"):
    rows = aten.embedding.default(table, ids)
    moved = aten.add.Tensor(x, rows)
    top = aten.amax.default(moved, (1,), True)
    less = aten.sub.Tensor(moved, top)
    power = aten.exp.default(less)
    total = aten.sum.dim_IntList(power, (1,), True)
    share = aten.div.Tensor(power, total)
    columns = aten.sum.dim_IntList(share, (0,), False)
    return (share, columns)
"""
    assert check_graph(graph(text), triton_checker) >= 1
