"""Ahead of time: from a compiled model to one file that runs without the compiler."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import __version__
from ..codegen.compile import CompiledGraph
from ..codegen.coverage import Coverage
from ..codegen.cpp import build
from ..errors import BadTarget
from ..ir import Graph, print_graph
from ..passes.base import Step
from ..runtime import native
from ..runtime.artifact import Parts, write
from . import env
from .source import CPU_ISAS, Source, Targets

ALL_CPUS = Targets(isas=CPU_ISAS)
"""What an artifact carries binaries for unless it is told otherwise."""


@dataclass(frozen=True)
class Ready:
    """A model that is ready to be written: its compiled graph, the graph as captured, the passes in between, and the
    structure of `(args, kwargs)` and of the result, whose leaves are the graph's inputs and outputs in order."""

    compiled: CompiledGraph
    captured: Graph
    history: Sequence[Step]
    in_tree: pytree.TreeSpec
    out_tree: pytree.TreeSpec
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What `compile_source` did: passes, what runs where, and seconds for each part of the work."""

    history: Sequence[Step]
    coverage: Coverage
    seconds: Mapping[str, float]


def compile_source(source: Source, options: Mapping[str, Any], path: str | Path | None, targets: Targets = ALL_CPUS) -> Done:
    """Compile a model of the command line and write the artifact `path`; with None nothing is built or written.

    Raises what `plait.compile` and `save` raise.
    """
    from .api import prepare

    start = time.perf_counter()
    model = prepare(source.model, source.inputs, dynamic_shapes=source.dynamic_shapes, options=options)
    seconds = {"compile": time.perf_counter() - start}
    if path is not None:
        start = time.perf_counter()
        model.save(path, targets=targets)
        seconds["build and write"] = time.perf_counter() - start
    return Done(model.history, model.coverage, seconds)


def save(model: Ready, path: str | Path, *, targets: Targets = ALL_CPUS) -> None:
    """Write an artifact with binaries for `targets`.

    Raises BadTarget for a device that the model was not compiled for, NoCompiler, KernelBuildFailed, and what
    `runtime.artifact.write` raises.
    """
    write(path, parts(model, targets))


def parts(model: Ready, targets: Targets = ALL_CPUS) -> Parts:
    """Everything that goes into the artifact. Raises as `save` does."""
    compiled = model.compiled
    if targets.cuda and not _devices(compiled):
        raise BadTarget(
            target=f"cuda:{targets.cuda[0]}",
            why="the model was captured on the CPU, so its plan launches no device kernels",
            isas=", ".join(CPU_ISAS),
        )
    sources = {f"{name}.cpp": text for name, text in compiled.sources.items()}
    headers = {header.name: header.read_text() for header in build.HEADERS} if sources else {}
    return Parts(
        plan=compiled.plan,
        weights=compiled.graph.constants,
        in_tree=model.in_tree,
        out_tree=model.out_tree,
        graphs=graph_texts(model),
        sources={**sources, **headers},
        binaries={isa: native_binaries(compiled.sources, isa) for isa in targets.isas} if sources else {},
        build=[*build.FLAGS],
        info=manifest(model),
    )


def graph_texts(model: Ready) -> dict[str, str]:
    """Graphs as text by level: `captured`, `tensor` (after the passes)."""
    return {"captured": print_graph(model.captured), "tensor": print_graph(model.compiled.graph)}


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


def manifest(model: Ready) -> dict[str, Any]:
    """What the artifact says of itself besides what `runtime.artifact` writes: versions, passes, numerics, coverage."""
    coverage = model.compiled.coverage
    return {
        "versions": {"plait": __version__, "torch": torch.__version__, "triton": env.version("triton")},
        "passes": [_step(step) for step in model.history],
        "coverage": asdict(coverage),
        **model.info,
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "name": step.pass_name,
        "options": {k: v if isinstance(v, str | int | float | bool | None) else str(v) for k, v in step.options.items()},
        "numerics": {"kind": step.numerics.kind, "bound": step.numerics.bound},
        "fired": dict(step.fired),
    }


def _devices(compiled: CompiledGraph) -> set[str]:
    return {v.device for v in compiled.plan.values if v.device != "cpu"}
