"""Ahead of time: from a compiled model to one file that runs without the compiler."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .. import __version__
from ..codegen.compile import CompiledGraph
from ..codegen.coverage import Coverage
from ..codegen.cpp import build
from ..codegen.kernels import current_cache
from ..codegen.target import Target, retarget
from ..codegen.templates.matmul import has_dots
from ..codegen.triton.build import binaries
from ..errors import BadTarget
from ..ir import Graph, print_graph
from ..passes.base import Step
from ..runtime import native, weights
from ..runtime.artifact import Parts, write
from ..runtime.cuda import DeviceBinary
from ..runtime.state import hold
from . import env
from .cache import compile_cached
from .options import Options
from .plans import check_fallbacks
from .source import CPU_ISAS, Source, Targets, parse_targets

if TYPE_CHECKING:
    from .api import CompiledModel

ALL_CPUS = Targets(isas=CPU_ISAS)
"""What an artifact carries binaries for unless it is told otherwise."""


@dataclass(frozen=True)
class Ready:
    """A model that is ready to be written: its compiled graph, the graph as captured, the passes in between, and the
    structure of `(args, kwargs)` and of the result, whose leaves are the graph's inputs and outputs in order. `options` say
    whether plans for further targets may fall back to torch. `state` are buffers that the model writes, by name, a tied one
    under each of its names; the graph takes the distinct ones before its other inputs."""

    compiled: CompiledGraph
    captured: Graph
    history: Sequence[Step]
    in_tree: pytree.TreeSpec
    out_tree: pytree.TreeSpec
    info: Mapping[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What `compile_source` did: passes, what runs where (for CUDA targets by name), seconds for each part of the work."""

    history: Sequence[Step]
    coverage: Coverage
    device_coverage: Mapping[str, Coverage]
    seconds: Mapping[str, float]


def compile_source(source: Source, options: Mapping[str, Any], path: str | Path | None, targets: Targets = ALL_CPUS) -> Done:
    """Compile a model of the command line and write the artifact `path`; with None nothing is built or written.

    Raises what `plait.compile` and `save` raise.
    """
    from .api import prepare

    start = time.perf_counter()
    model = prepare(source.model, source.inputs, dynamic_shapes=source.dynamic_shapes, options=options)
    return finish(model, path, targets, start)


def finish(model: CompiledModel, path: str | Path | None, targets: Targets, start: float) -> Done:
    """Write a model that `prepare` gave, begun at `start`, as an artifact `path`; see `compile_source`."""
    devices = device_graphs(model.ready(), targets)
    seconds = {"compile": time.perf_counter() - start}
    if path is not None:
        start = time.perf_counter()
        model.save(path, targets=targets)
        seconds["build and write"] = time.perf_counter() - start
    return Done(model.history, model.coverage, {target: made.coverage for target, made in devices.items()}, seconds)


def save(model: Ready, path: str | Path, *, targets: Targets | str | None = None) -> None:
    """Write an artifact with binaries for `targets`, such as "cpu,cuda:90"; by default for all CPUs, or for the device of
    a model that was captured on one.

    A model captured on the CPU is compiled for CUDA targets too, by plans of their own; no GPU is needed. Raises BadTarget
    for an unknown target and for CPUs where the model was captured on a CUDA device, CannotRetarget, NoTriton,
    CrossCompilationFailed, NoCompiler, KernelBuildFailed, and what `runtime.artifact.write` raises.
    """
    write(path, parts(model, parse_targets(targets) if isinstance(targets, str) else targets))


def parts(model: Ready, targets: Targets | None = None) -> Parts:
    """Everything that goes into the artifact. Raises as `save` does."""
    compiled, own = model.compiled, Target(model.compiled.options.target)
    if targets is None:
        targets = ALL_CPUS if own.kind == "cpu" else Targets()
    if targets.isas and own.kind != "cpu":
        raise BadTarget(target=targets.isas[0], why=f"the model was captured for {own.name}", isas=", ".join(CPU_ISAS))
    native_sources = compiled.sources if own.kind == "cpu" else {}
    headers = {header.name: header.read_text() for header in build.HEADERS} if native_sources else {}
    isas = _useful(targets.isas, native_sources)
    devices = device_graphs(model, targets)
    held, names = _held(model.state, compiled.graph.constants)
    return Parts(
        plan=hold(compiled.plan, held),
        target=own.name,
        device_plans={target: hold(made.plan, held) for target, made in devices.items() if target != own.name},
        weights={**weights.stored(compiled.plan, compiled.graph.constants), **held},
        state=names,
        in_tree=model.in_tree,
        out_tree=model.out_tree,
        graphs=graph_texts(model, devices),
        sources={
            **{f"{name}.cpp": text for name, text in native_sources.items()},
            **{f"{name}.py": text for made in devices.values() for name, text in made.sources.items()},
            **headers,
        },
        binaries={isa: native_binaries(native_sources, isa) for isa in isas} if native_sources else {},
        device_binaries=device_binaries(devices),
        build=[*build.FLAGS],
        info=manifest(model, devices),
    )


def _useful(isas: tuple[str, ...], sources: Mapping[str, str]) -> tuple[str, ...]:
    """Instruction sets without the one that would only repeat the binaries of x86-64-v4."""
    repeated = "x86-64-v4" in isas and not any(map(has_dots, sources.values()))
    return tuple(isa for isa in isas if isa != build.DOTS or not repeated)


def _held(
    state: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(the distinct buffers by names that no constant has, in order; these names by the model's names)."""
    held: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in state.items():
        known = next((n for n, t in held.items() if t is tensor), None)
        if known is None:
            known = name
            while known in constants or known in held:
                known += "_"
            held[known] = tensor
        names[name] = known
    return held, names


def device_graphs(model: Ready, targets: Targets) -> dict[str, CompiledGraph]:
    """The model compiled for each CUDA target by name, its own first where it was captured on such a device.

    Raises CannotRetarget, FallbackRefused.
    """
    compiled, own = model.compiled, Target(model.compiled.options.target)
    graph = retarget(compiled.graph) if own.kind == "cpu" and targets.cuda else compiled.graph
    found = {own.name: compiled} if own.kind == "cuda" else {}
    for name in (f"cuda:{sm}" for sm in targets.cuda):
        if name not in found:
            found[name] = _same_ranges(compile_cached(graph, replace(compiled.options, target=name)), compiled)
            check_fallbacks(found[name], model.options)
    return found


def _same_ranges(made: CompiledGraph, of: CompiledGraph) -> CompiledGraph:
    """A compiled graph that lets in inputs of the same sizes as another one of the same model."""
    lows = {s.name: s.low for s in of.plan.symbols}
    symbols = tuple(replace(s, low=lows.get(s.name, s.low)) for s in made.plan.symbols)
    return replace(made, plan=replace(made.plan, symbols=symbols))


def device_binaries(devices: Mapping[str, CompiledGraph]) -> dict[str, list[DeviceBinary]]:
    """Binaries of every kernel that the plans for CUDA targets launch, by kernel; equal kernels share their texts.

    Raises NoTriton, CrossCompilationFailed.
    """
    found: dict[str, list[DeviceBinary]] = {}
    for target, made in devices.items():
        for name, compiled in binaries(made.plan, made.sources, target, current_cache()).items():
            found.setdefault(name, []).extend(compiled)
    return found


def graph_texts(model: Ready, devices: Mapping[str, CompiledGraph]) -> dict[str, str]:
    """Graphs as text by level: `captured`, `tensor` (after the passes), `tensor-cuda` (the same, moved to a device)."""
    texts = {"captured": print_graph(model.captured), "tensor": print_graph(model.compiled.graph)}
    moved = next((made.graph for made in devices.values() if made.graph is not model.compiled.graph), None)
    return texts if moved is None else {**texts, "tensor-cuda": print_graph(moved)}


def native_binaries(sources: Mapping[str, str], isa: str) -> dict[str, bytes]:
    """Shared objects of the kernels and of the native runner for one instruction set, by file name.

    Raises NoCompiler, KernelBuildFailed.
    """
    with tempfile.TemporaryDirectory(prefix="plait-") as scratch:
        folder = Path(scratch)
        built = build.build(sources, folder / "kernels", isa=isa)
        runner = native.build_shared([native.SOURCE.read_text()], folder / "runner.so", [*native.FLAGS, *build.ISAS[isa]])
        groups = dict.fromkeys(path.resolve() for path in built.values())
        return {f"kernels-{i}.so": path.read_bytes() for i, path in enumerate(groups)} | {"runner.so": runner.read_bytes()}


def manifest(model: Ready, devices: Mapping[str, CompiledGraph]) -> dict[str, Any]:
    """What the artifact says of itself besides what `runtime.artifact` writes: versions, passes, numerics, coverage."""
    return {
        "versions": {"plait": __version__, "torch": torch.__version__, "triton": env.version("triton")},
        "passes": [_step(step) for step in model.history],
        "coverage": asdict(model.compiled.coverage),
        "device_coverage": {target: asdict(made.coverage) for target, made in devices.items()},
        **model.info,
    }


def _step(step: Step) -> dict[str, Any]:
    bound = step.numerics.bound
    return {
        "name": step.pass_name,
        "options": {k: v if isinstance(v, str | int | float | bool | None) else str(v) for k, v in step.options.items()},
        "numerics": {"kind": step.numerics.kind, "bound": bound if math.isfinite(bound) else None},
        "fired": dict(step.fired),
    }
