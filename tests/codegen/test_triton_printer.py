"""Kernels printed as Triton: interpreted against torch, compiled for three targets, compared with golden text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plait.codegen.triton.printer import print_kernel

from tests.codegen.kernels import CASES, KernelCase

RUNS = [
    pytest.param(case, sizes, id="-".join([case.name, *map(str, sizes.values())])) for case in CASES for sizes in case.sizes
]


@pytest.mark.parametrize(("case", "sizes"), RUNS)
def test_interpreted_kernel_agrees_with_torch(case: KernelCase, sizes, interpreter, triton_cache, triton_checker) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs(sizes, generator)
    expected = case.reference(inputs, sizes)
    checker = replace(triton_checker, targets=triton_checker.targets if sizes == case.sizes[0] else ())
    checker.verify_kernel(case.kernel, inputs, sizes, expected, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_printed_text_is_as_recorded(case: KernelCase, golden) -> None:
    sources = print_kernel(case.kernel)
    assert sources == print_kernel(case.kernel)
    for source in sources:
        golden(f"{source.name}.triton.py", source.text)
