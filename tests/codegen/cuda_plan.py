"""Runs a plan for CUDA devices on the CPU: library calls by torch, every Triton kernel by Triton's interpreter."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from plait.codegen.compile import CompiledGraph
from plait.codegen.triton.interpret import Interpreter
from plait.codegen.triton.source import TritonSource
from plait.runtime.check import check
from plait.runtime.executor import Executable
from plait.runtime.plan import Launch, Plan, ValueSpec, from_json, to_json
from plait.runtime.sizes import evaluate


def on_cpu(plan: Plan) -> Plan:
    """The same plan with everything on the CPU."""
    return from_json(json.loads(json.dumps(to_json(plan)).replace('"cuda:0"', '"cpu"')))


def sizes_of(plan: Plan, inputs: Sequence[Any]) -> dict[str, int]:
    """The sizes of a call, by name."""
    found = {s.name: inputs[s.input] if s.dim is None else inputs[s.input].shape[s.dim] for s in plan.symbols}
    for name, expr in plan.sizes:
        found[name] = evaluate(expr, found)
    return found


def memory(spec: ValueSpec, address: int, sizes: Mapping[str, int]) -> torch.Tensor:
    """What a value spans, from its first element on, as a vector over the memory at `address`."""
    dtype = getattr(torch, spec.dtype)
    shape, strides = ([evaluate(e, sizes) for e in part] for part in (spec.shape, spec.strides))
    count = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def interpreted(
    source: TritonSource, values: list[ValueSpec], sizes: Mapping[str, int], interpreter: Interpreter
) -> Callable[[list[int], list[int], int], None]:
    """One launch as a function of addresses and sizes."""

    def call(addresses: list[int], numbers: list[int], threads: int) -> None:
        names = [b.name for b in source.buffers]
        tensors = {n: memory(v, a, sizes) for n, v, a in zip(names, values, addresses, strict=True)}
        for name, result in interpreter.run(source, tensors, dict(zip(source.sizes, numbers, strict=True))).items():
            tensors[name].copy_(result)

    return call


def run_interpreted(compiled: CompiledGraph, inputs: Sequence[Any], interpreter: Interpreter) -> list[Any]:
    """Results of a graph compiled for a CUDA target, whose plan is checked first."""
    check(compiled.plan)
    plan = on_cpu(compiled.plan)
    specs, values = {k.name: k for k in plan.kernels}, {v.id: v for v in plan.values}
    sizes = sizes_of(plan, inputs)
    steps, kernels, used = [], {}, {}
    for number, step in enumerate(plan.steps):
        if isinstance(step, Launch):  # a name for each launch, so that it knows the layout of its buffers
            source = TritonSource.of(specs[step.kernel], compiled.sources[step.kernel])
            name = f"{step.kernel}_at_{number}"
            kernels[name] = interpreted(source, [values[b] for b in step.buffers], sizes, interpreter)
            used[name] = replace(specs[step.kernel], name=name)
            step = replace(step, kernel=name)
        steps.append(step)
    named = replace(plan, steps=tuple(steps), kernels=tuple(used.values()))
    return Executable(named, kernels, compiled.graph.constants)(*inputs)
