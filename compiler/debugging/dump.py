"""Dump the graph after each pass as text, edit it by hand, compile and run it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch

from ...codegen.compile import compile_graph
from ...ir import Graph, parse_graph, verify
from ...passes.base import Step
from ...runtime.executor import Executable

CONSTANTS = "constants.safetensors"


def dump(first: Graph, steps: Sequence[Step], folder: str | Path) -> list[Path]:
    """Write the graph as captured and after each pass as `NNN_pass.txt`, and its constants beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    constants: dict[str, torch.Tensor] = dict(first.constants)
    paths: list[Path] = []
    for i, (name, graph) in enumerate([("captured", first), *((s.pass_name, s.after) for s in steps)]):
        paths.append(folder / f"{i:03d}_{name}.txt")
        paths[-1].write_text(str(graph))
        constants.update(graph.constants)
    save_tensors(constants, folder / CONSTANTS)
    return paths


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a safetensors file; those that share memory are written apart."""
    apart = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    safetensors.torch.save_file(apart, str(path))


def rerun(source: str | Path, constants: Mapping[str, torch.Tensor] | None = None) -> Executable:
    """Compile a graph from its text, edited or not; a callable on flat inputs.

    `source` is a file, or the text itself. Constants come from `constants`, else from the file that `dump` wrote beside.
    Raises BadText, InvalidGraph and the WrongInput* errors.
    """
    text = str(source)
    if isinstance(source, Path) or "\n" not in source:
        path = Path(source)
        text = path.read_text()
        stored = path.parent / CONSTANTS
        if constants is None and stored.exists():
            constants = safetensors.torch.load_file(str(stored))
    graph = parse_graph(text, constants)
    verify(graph)
    return compile_graph(graph).executable_checking()
