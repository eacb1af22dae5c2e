"""Letter c: bits of a quantized weight in the artifact and in memory, and what else is in there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import plait
import torch
from plait.compiler.api import CompiledModel
from plait.compiler.quantize.result import QuantizedModel
from plait.runtime import weights
from plait.runtime.archive import Archive
from plait.runtime.artifact import WEIGHTS
from torch import Tensor, nn

from ..runner import Outcome, Run
from .subjects import example, smollm2

GOAL = 4.2
SCHEME = "rtn-w4g128"
PARTS = ("codes", "scales", "zeros", "input_scale")
LENGTH = 64


def measure(run: Run) -> Outcome:
    """SmolLM2 at W4 in groups of 128; a quick run takes one layer of its sizes."""
    if run.quick:
        layer = nn.Sequential(nn.Linear(1536, 576, bias=False)).eval()
        row = _measured(layer, torch.randn(LENGTH, 1536), ())
        return Outcome(_figure(row), _holds(row), row)
    try:
        model, _ = smollm2()
    except example("smollm2").NotInstalled as missing:
        run.notes.append(str(missing))
        return Outcome("SmolLM2 is not installed", False)
    run.say("artifacts of SmolLM2")
    row = _measured(model, torch.arange(LENGTH)[None], ("lm_head",))
    return Outcome(_figure(row), _holds(row), row)


def _measured(model: nn.Module, x: Tensor, ignore: tuple[str, ...]) -> dict[str, Any]:
    made = plait.quantize(model, [(x,)], scheme=SCHEME, ignore=ignore, want="any")
    count = sum(layer.type.rows * layer.type.columns for layer in made.layers)
    with tempfile.TemporaryDirectory(prefix="plait-bytes-") as folder, torch.no_grad():
        paths = [Path(folder, name) for name in ("quantized.plait", "float.plait")]
        made.save(paths[0])
        plait.compile(model, (x,)).save(paths[1])
        stored = _of_file(paths[0])
        sizes = [p.stat().st_size for p in paths]
        floats = sum(_of_file(paths[1]).values())
    held = _of_memory(made.compile())
    return {
        "quantized weights": count,
        "layers": len(made.layers),
        "artifact": _split(stored, made, count) | {"file": sizes[0], "float file": sizes[1], "float weights": floats},
        "memory": _split(held, made, count),
    }


def _of_file(path: Path) -> dict[str, int]:
    """Bytes of each entry of the file of weights inside an artifact."""
    archive = Archive(path)
    view = archive.view(WEIGHTS)
    start = archive.offset(WEIGHTS)
    return {name: t.nbytes for name, t in weights.read(archive.map, start, start + len(view), WEIGHTS).items()}


def _of_memory(compiled: CompiledModel) -> dict[str, int]:
    """Bytes of each constant that the plan reads."""
    plan, graph = compiled.compiled.plan, compiled.compiled.graph
    placed = weights.placed(plan, graph.constants)
    return {str(v.ref): placed[str(v.ref)].nbytes for v in weights.constants(plan)}


def _split(sizes: Mapping[str, int], made: QuantizedModel, count: int) -> dict[str, Any]:
    """Bits of a quantized weight, and bytes of the rest by what it is."""
    names = {f"{layer.name}.{part}" for layer in made.layers for part in PARTS}
    coded = {name: size for name, size in sizes.items() if name in names}
    if len({n.rpartition(".")[0] for n in coded}) != len(made.layers):
        raise RuntimeError("some quantized layer has no codes of its own name")
    rest = {name: size for name, size in sizes.items() if name not in names}
    embeddings = _bytes(size for name, size in rest.items() if "embed" in name or "lm_head" in name)
    return {
        "bits of a quantized weight": round(8 * _bytes(coded.values()) / count, 4),
        "quantized layers": _bytes(coded.values()),
        "embeddings and head": embeddings,
        "other weights": _bytes(rest.values()) - embeddings,
    }


def _bytes(sizes: Iterable[int]) -> int:
    return sum(sizes)


def _figure(row: Mapping[str, Any]) -> dict[str, Any]:
    artifact, memory = row["artifact"], row["memory"]
    return {
        "bits of a quantized weight, artifact": artifact["bits of a quantized weight"],
        "in memory": memory["bits of a quantized weight"],
        "quantized layers": f"{artifact['quantized layers'] / 1e6:.1f} MB",
        "embeddings and head, float": f"{artifact['embeddings and head'] / 1e6:.1f} MB",
        "artifact over the float artifact": f"{artifact['file'] / artifact['float file']:.1%}",
    }


def _holds(row: Mapping[str, Any]) -> bool:
    return all(row[where]["bits of a quantized weight"] <= GOAL for where in ("artifact", "memory"))
