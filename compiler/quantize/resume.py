"""Where finished groups of layers are kept, so that an interrupted `plait.quantize` goes on instead of starting anew."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...errors import CannotResume
from ...formats import Quantized, QuantizedType
from ...ir import Graph
from ...passes.quantize.search import Found

Names = tuple[str, ...]
_PARTS = ("codes", "scales", "zeros")


class Kept:
    """A folder of finished groups, or none. `known` are those that an earlier call has left for the same graph, batches and
    `settings`; `keep` adds one. Raises CannotResume for a folder of another call."""

    def __init__(self, folder: str | Path | None, graph: Graph, batches: Sequence[Sequence[Any]], settings: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.known: dict[Names, Found] = {}
        if self.folder is None:
            return
        mark = _mark(graph, batches, settings)
        path = self.folder / "call.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = bool(finished(self.folder)) and path.exists()
            if begun and json.loads(path.read_text()) != {"mark": mark}:
                raise CannotResume(folder=folder, why="it was begun for another model, other data or another scheme")
            path.write_text(json.dumps({"mark": mark}))
        except (OSError, ValueError) as error:
            raise CannotResume(folder=folder, why=str(error)) from error
        for file in finished(self.folder):
            found = _read(file)
            if found is not None:
                self.known[found[0]] = found[1]

    def keep(self, names: Names, found: Found) -> None:
        """Write down a finished group. Raises CannotResume where that fails, as on a full disk."""
        if self.folder is None:
            return
        tensors = {} if found.scales is None else {"scales": found.scales}
        for i, name in enumerate(names):
            tensors.update({f"{i}.{part}": t for part, t in zip(_PARTS, found.held[name][1:], strict=True) if t is not None})
        about = {
            "names": names,
            "types": [str(found.held[name].type) for name in names],
            "nearest_loss": found.nearest_loss,
            "loss": found.loss,
            "clipped": sorted(found.clipped),
            "compensated": sorted(found.compensated),
            "unseen": sorted(found.unseen),
            "digest": _digest(tensors),
        }
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        path = self.folder / f"group-{digest}.safetensors"
        aside = path.with_suffix(f".{os.getpid()}")
        try:
            safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, aside, {"about": json.dumps(about)})
            aside.rename(path)
        except (OSError, safetensors.SafetensorError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            aside.unlink(missing_ok=True)
            raise CannotResume(folder=self.folder, why=str(error)) from error


def beside(path: str | Path) -> Path:
    """Where finished groups are kept until the artifact `path` is written."""
    return Path(f"{path}.partial")


def finished(folder: str | Path) -> list[Path]:
    """The files of finished groups in a folder."""
    return sorted(Path(folder).glob("group-*.safetensors"))


def remove(folder: str | Path) -> None:
    """Remove what `Kept` has written to a folder, and the folder where nothing else is in it."""
    path = Path(folder)
    for file in (*finished(path), path / "call.json"):
        file.unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _read(path: Path) -> tuple[Names, Found] | None:
    """A finished group; None where the file is damaged, so that the group is done again."""
    try:
        with safetensors.safe_open(path, "pt") as file:  # pyright: ignore[reportAttributeAccessIssue]
            about = json.loads(file.metadata()["about"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["digest"] != _digest(tensors):
            return None
        held: dict[str, Quantized] = {}
        for i, (name, text) in enumerate(zip(about["names"], about["types"], strict=True)):
            kind = QuantizedType.of(text)
            parts = [tensors.get(f"{i}.{part}") for part in _PARTS]
            assert parts[0] is not None and parts[1] is not None
            kind.check(parts[0], parts[1], parts[2])
            held[name] = Quantized(kind, parts[0], parts[1], parts[2])
    except Exception:  # whatever a damaged file makes its readers raise
        return None
    sets = (frozenset(about["clipped"]), frozenset(about["compensated"]))
    return tuple(about["names"]), Found(
        tensors.get("scales"), held, about["nearest_loss"], about["loss"], *sets, frozenset(about["unseen"])
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """What tells tensors from damaged ones."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode() + _bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(x: Tensor) -> bytes:
    plain = x.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _mark(graph: Graph, batches: Sequence[Sequence[Any]], settings: str) -> str:
    """What tells calls apart: the graph, its constants, the batches and the settings."""
    digest = hashlib.sha256(f"{settings}\n{graph}".encode())
    tensors = [graph.constants[name] for name in sorted(graph.constants)]
    for x in (*tensors, *(x for batch in batches for x in batch)):
        if isinstance(x, Tensor):
            digest.update(f"{x.dtype} {list(x.shape)}".encode() + _bytes(x))
        else:
            digest.update(repr(x).encode())
    return digest.hexdigest()
