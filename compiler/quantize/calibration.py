"""Calibration data: what a user gives, as batches of flat inputs of a graph."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import BadCalibration
from ..export import as_arguments

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one call of the model."""


def batches(calib: Any, names: tuple[str, ...] = (), examples: Any = None, samples: int | None = None) -> list[Batch]:
    """What `plait.quantize` takes as batches: an iterable of inputs (a tensor, a tuple or a dict of keywords), or a file.

    Files: .pt, as torch.save writes such a list; .safetensors or .npz with a tensor for each input by the names of the
    model's arguments, whose first axis counts samples; .npy with the only input. So many samples become a batch as the first
    axes of `examples` count, where they are given and agree, else one; what does not fill a batch is left out. `samples`
    takes the first ones of a file, or the first batches, only. Raises BadCalibration.
    """
    if isinstance(calib, str | os.PathLike):
        return _of_file(Path(calib), names, _batch_size(examples), samples)
    if isinstance(calib, Tensor | Mapping) or not isinstance(calib, Iterable):
        raise BadCalibration(why=f"it is a {type(calib).__name__}, not a list of batches")
    found = [as_arguments(batch) for batch in islice(calib, samples)]
    if not found:
        raise BadCalibration(why="there is no batch")
    return found


def _batch_size(examples: Any) -> int:
    """How many samples the example inputs of a model hold; 1 where they do not say."""
    found = {x.shape[0] if x.ndim else 0 for x in pytree.tree_leaves(examples) if isinstance(x, Tensor)}
    return max(1, found.pop()) if len(found) == 1 else 1


def _of_file(path: Path, names: tuple[str, ...], size: int, samples: int | None) -> list[Batch]:
    try:
        if path.suffix == ".pt":
            return batches(torch.load(path, weights_only=True), samples=samples)
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                tensors = {name: torch.from_numpy(file[name]) for name in file.files}
        elif path.suffix == ".npy":
            tensors = {"": torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            raise BadCalibration(why=f"{path} is none of .pt, .safetensors, .npz, .npy")
    except BadCalibration:
        raise
    except Exception as error:  # each reader has its own errors for a damaged file
        raise BadCalibration(why=f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not tensors:
        raise BadCalibration(why=f"{path} holds no tensor")
    counts = {t.shape[0] if t.ndim else 0 for t in tensors.values()}
    if len(counts) != 1 or 0 in counts:
        raise BadCalibration(
            why=f"{path}: its tensors have first axes of {sorted(counts)} samples, which must be one number"
        )
    order = [n for n in names if n in tensors] if len(tensors) > 1 else list(tensors)
    if len(order) != len(tensors):
        raise BadCalibration(why=f"{path} has tensors {sorted(tensors)}, and the model takes {', '.join(names)}")
    many = next(iter(counts)) if samples is None else min(samples, *counts)
    if many < size:
        raise BadCalibration(why=f"{path} gives {many} samples, and the model is captured on batches of {size}")
    cut = ({n: tensors[n][i : i + size] for n in order} for i in range(0, many - size + 1, size))
    if len(order) == 1 or tuple(order) == names[: len(order)]:
        return [(tuple(batch.values()), {}) for batch in cut]
    return [((), batch) for batch in cut]


def flat_batches(calib: Iterable[Batch], in_tree: Any, held: Iterable[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Batches as flat inputs of a graph: copies of the buffers `held` that it writes, then the leaves of `in_tree`.

    Raises BadCalibration for a batch of another structure.
    """
    found: list[tuple[Any, ...]] = []
    for i, batch in enumerate(calib):
        leaves, tree = pytree.tree_flatten(batch)
        if tree != in_tree:
            raise BadCalibration(why=f"batch {i} has the structure {tree}, and the model was captured with {in_tree}")
        found.append((*(t.clone() for t in held), *(x.detach() if isinstance(x, Tensor) else x for x in leaves)))
    return tuple(found)
