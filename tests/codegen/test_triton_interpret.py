"""The interpreter process: layouts, what it refuses, and how it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from plait.codegen.kernel_ir import Buffer, Compute, Kernel, Load, Loop, Store
from plait.codegen.triton.check import Checker
from plait.codegen.triton.interpret import Interpreter
from plait.codegen.triton.printer import print_kernel
from plait.codegen.triton.source import TritonSource
from plait.errors import InterpretationFailed, InterpretationTimedOut

AT, N = sympy.Symbol("i", integer=True), sympy.Symbol("N", integer=True, nonnegative=True)


def double(offset: int = 0, stride: int = 1) -> TritonSource:
    body = (Load("a", "float32", "x", AT), Compute("b", "float32", "add", ("a", "a")))
    loop = Loop(AT, N, (*body, Store("out", AT * stride + offset, "b")), "parallel", True)
    buffers = (Buffer("x", "float32", "read"), Buffer("out", "float32", "write"))
    return print_kernel(Kernel("double", buffers, (N,), (loop,)))[0]


def edited(source: TritonSource, old: str, new: str) -> TritonSource:
    assert old in source.text
    return replace(source, text=source.text.replace(old, new))


def test_results_keep_the_layout_and_inputs_stay(interpreter: Interpreter) -> None:
    x, out = torch.arange(5.0), torch.zeros(10)[::2]
    got = interpreter.run(double(stride=2), {"x": x, "out": out}, {"N": 5})["out"]
    assert got.tolist() == [0, 2, 4, 6, 8] and got.stride() == (2,)
    assert out.tolist() == [0] * 5


def test_without_programs_nothing_runs(interpreter: Interpreter) -> None:
    broken = edited(double(), "b = a + a", "b = a + undefined")
    empty = torch.zeros(0)
    assert interpreter.run(broken, {"x": empty, "out": empty}, {"N": 0})["out"].shape == (0,)


@pytest.mark.parametrize("offset", [1, -1, 10_000_000])
def test_a_store_outside_its_buffer_is_found(interpreter: Interpreter, offset: int) -> None:
    with pytest.raises(InterpretationFailed, match=r"store outside the buffers: \d+ of 8 lanes"):
        interpreter.run(double(offset), {"x": torch.ones(8), "out": torch.ones(8)}, {"N": 8})


def test_a_forgotten_mask_is_found(interpreter: Interpreter) -> None:
    unmasked = edited(double(), ", mask=xmask, other=0.0", "")
    with pytest.raises(InterpretationFailed, match="load outside the buffers"):
        interpreter.run(unmasked, {"x": torch.ones(5), "out": torch.ones(5)}, {"N": 5})


def test_an_error_names_the_kernel_and_the_worker_goes_on(interpreter: Interpreter) -> None:
    with pytest.raises(InterpretationFailed, match=r"interpreting kernel double failed: NameError.*undefined"):
        interpreter.run(
            edited(double(), "b = a + a", "b = a + undefined"), {"x": torch.ones(3), "out": torch.ones(3)}, {"N": 3}
        )
    assert interpreter.run(double(), {"x": torch.ones(3), "out": torch.ones(3)}, {"N": 3})["out"].tolist() == [2, 2, 2]


def test_an_endless_kernel_is_stopped_and_a_dead_worker_replaced() -> None:
    endless = edited(double(), "    b = a + a", "    b = a + a\n    while N == N:\n        b = b + a")
    crashing = edited(double(), "import triton\n", "import os\nos._exit(3)\nimport triton\n")
    tensors = {"x": torch.ones(3), "out": torch.ones(3)}
    with Interpreter(timeout=20) as own:
        own.run(double(), tensors, {"N": 3})
        own.timeout = 0.5
        with pytest.raises(InterpretationTimedOut, match=r"took more than 0.5 s"):
            own.run(endless, tensors, {"N": 3})
        own.timeout = 20
        with pytest.raises(InterpretationFailed, match="the worker ended with code 3"):
            own.run(crashing, tensors, {"N": 3})
        assert own.run(double(), tensors, {"N": 3})["out"].tolist() == [2, 2, 2]


def test_verify_kernel_notices_wrong_results(triton_checker: Checker) -> None:
    body = (Load("a", "float32", "x", AT), Store("out", AT, "a"))
    buffers = (Buffer("x", "float32", "read"), Buffer("out", "float32", "write"))
    kernel = Kernel("copy", buffers, (N,), (Loop(AT, N, body, "parallel", True),))
    x = torch.arange(7.0)
    triton_checker.verify_kernel(kernel, {"x": x}, {"N": 7}, {"out": x})
    with pytest.raises(AssertionError, match=r"copy\.out"):
        triton_checker.verify_kernel(kernel, {"x": x}, {"N": 7}, {"out": x + 1})
    with pytest.raises(AssertionError, match=r"copy\.out"):  # a part that the kernel does not write stays NaN
        triton_checker.verify_kernel(kernel, {"x": x}, {"N": 6}, {"out": x})
