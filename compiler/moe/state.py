"""Checkpoints that fit any number of ranks: a rank's part of a full state dict, and the full one of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from .placement import LocalExperts, Placement, holders


def _placements(model: nn.Module) -> dict[str, Placement]:
    """Where the rows of each stack of experts lie, by the parameter's name."""
    found: dict[str, Placement] = {}
    for prefix, module in holders(model):
        found |= {prefix + name: module.placement for name, _ in LocalExperts.named_parameters(module, recurse=False)}
    return found


def split_state_dict(model: nn.Module, full: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's part of a state dict that holds all experts, for `model.load_state_dict`; views, nothing is copied.

    A state dict of one rank is full. What is not experts' is left as it is.
    """
    places = _placements(model)
    return {name: value[places[name].own] if name in places else value for name, value in full.items()}


def gather_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict with the experts of all ranks, on each of them: what one rank alone would have.

    A collective: all ranks must call it.
    """
    places = _placements(model)
    return {name: _gathered(value, places.get(name)) for name, value in model.state_dict().items()}


def _gathered(value: Any, place: Placement | None) -> Any:
    if place is None or place.name is None:
        return value
    parts: list[Tensor] = [torch.empty_like(value) for _ in range(place.ranks)]
    group = _resolve_process_group(cast(Any, place.name))
    torch.distributed.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts)
