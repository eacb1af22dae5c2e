"""Whole compiled graphs in the disk cache: what their key is made of, and how a plan is stored and found again.

The cache itself is `codegen/cache.py`. An entry of kind "graph" holds the plan, the sources of its kernels and the coverage;
binaries are entries of kinds "kernel" and "objects" of their own, shared by all graphs that use them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..codegen.cache import Cache, Entry, Key, sha256
from ..codegen.compile import CodegenOptions, CompiledGraph, compile_graph
from ..codegen.coverage import Coverage, Reported
from ..codegen.cpp.build import host_isa
from ..codegen.kernels import current_cache
from ..codegen.tuning import instructions
from ..errors import ArtifactVersion, DamagedArtifact
from ..ir import Graph, print_graph
from ..runtime.plan import Plan, from_json, to_json
from . import env
from .decisions import Decisions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A compiled graph as the cache keeps it: its plan, the text of every kernel by name, what runs where."""

    plan: Plan
    sources: Mapping[str, str]
    coverage: Coverage


def graph_key(graph: Graph, options: Any, **more: str) -> Key:
    """The key of a graph compiled with `options` (a dataclass of plain values) on this machine.

    Covers the graph's text and the content of its constants, the options, plait's own code, versions and the machine.
    `more` adds named parts.
    """
    return Key.of(
        "graph",
        graph=print_graph(graph),
        constants=constants_hash(graph.constants),
        options=json.dumps(dataclasses.asdict(options), sort_keys=True, default=str),
        code=code_hash(),
        **_machine(),
        **more,
    )


@functools.cache
def _machine() -> dict[str, str]:
    return {
        "plait": __version__,
        "torch": torch.__version__,
        "triton": str(env.version("triton")),
        "compiler": env.compiler(),
        "machine": " ".join((env.processor(), host_isa(), *instructions(), *env.devices())),
    }


def constants_hash(constants: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, types, layouts and contents of tensors. Equal storage is read once."""
    digest = hashlib.sha256()
    seen: dict[tuple[int, int], str] = {}
    for name, tensor in sorted(constants.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}".encode())
        storage = tensor.untyped_storage()
        where = (storage.data_ptr(), storage.nbytes())
        if where not in seen:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # pyright: ignore
            seen[where] = hashlib.sha256(flat.cpu().numpy()).hexdigest()  # pyright: ignore[reportArgumentType]
        digest.update(f"{tensor.storage_offset()} {seen[where]}".encode())
    return digest.hexdigest()


@functools.cache
def code_hash() -> str:
    """Hash of plait's own source: another version of a pass or printer must not find what an older one made."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("ir", "cost", "passes", "codegen", "runtime"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                digest.update(f"{path.relative_to(root)} {sha256(path.read_bytes())}\n".encode())
    return digest.hexdigest()


def find(cache: Cache, key: Key) -> Stored | None:
    """The compiled graph stored under `key`, None where there is none or it cannot be read."""
    entry = cache.get(key)
    if not isinstance(entry, Entry):
        if log.isEnabledFor(logging.INFO):
            log.info("no compiled graph %s: %s", key.digest[:12], entry.explain())
        return None
    try:
        plan = from_json(json.loads(entry.read("plan.json")))
        sources = json.loads(entry.read("sources.json"))
        coverage = json.loads(entry.read("coverage.json"))
    except (OSError, DamagedArtifact, ArtifactVersion) as error:  # pruned just now, or written by other code
        log.warning("cannot use the compiled graph %s: %s", key.digest[:12], error)
        return None
    reported = tuple(Reported(**r) for r in coverage.pop("reported"))
    return Stored(plan, sources, Coverage(**coverage, reported=reported))


def store(cache: Cache, key: Key, compiled: Stored) -> None:
    """Keep a compiled graph under `key`."""
    cache.put(
        key,
        {
            "plan.json": json.dumps(to_json(compiled.plan)).encode(),
            "sources.json": json.dumps(dict(compiled.sources)).encode(),
            "coverage.json": json.dumps(dataclasses.asdict(compiled.coverage)).encode(),
        },
    )


def compile_cached(graph: Graph, options: CodegenOptions, decisions: Decisions | None = None) -> CompiledGraph:
    """`compile_graph`, unless the disk cache holds the result; what is compiled anew is kept. While choices may be held back
    the cache is left alone."""
    decisions = decisions or Decisions()
    if decisions.watched:
        return compile_graph(graph, options, decisions)
    cache = current_cache()
    key = graph_key(graph, options)
    found = find(cache, key)
    if found is not None:
        return CompiledGraph(graph, found.plan, found.sources, found.coverage, options)
    compiled = compile_graph(graph, options, decisions)
    store(cache, key, Stored(compiled.plan, compiled.sources, compiled.coverage))
    return compiled
