"""Which experts live on which rank, and the modules that hold this rank's part of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import _resolve_group_name
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from ...errors import UnevenExperts

Group = ProcessGroup | DeviceMesh | str
"""Ranks that share experts: a process group, a mesh of one dimension, or a group's name."""


@dataclass(frozen=True)
class Placement:
    """Expert e of `experts` lives on rank e // local of the group; names and numbers only, so that modules can be copied.

    `name` is the group's, and None where there is one rank: nothing travels then.
    """

    experts: int
    name: str | None = None
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, experts: int, group: Group | None) -> Placement:
        """Raises UnevenExperts where the experts cannot be spread evenly."""
        if group is None:
            return cls(experts)
        name = _resolve_group_name(cast(Any, group))
        found = _resolve_process_group(name)
        if experts % found.size():
            raise UnevenExperts(experts=experts, ranks=found.size())
        return cls(experts, name if found.size() > 1 else None, found.rank(), found.size())

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.experts // self.ranks

    @property
    def own(self) -> slice:
        """The numbers of this rank's experts."""
        return slice(self.rank * self.local, (self.rank + 1) * self.local)


class LocalExperts(nn.Module):
    """A module all of whose own parameters are stacks [L, ..] of this rank's experts.

    They carry `plait_local = True`: no other rank has them, so that data-parallel training must not average them.
    """

    placement: Placement

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def hold(self, name: str, parameter: Tensor | None) -> None:
        """Register a stack of this rank's experts, or its absence."""
        made = parameter if parameter is None or isinstance(parameter, nn.Parameter) else nn.Parameter(parameter)
        self.register_parameter(name, made)
        self._mark()

    def _mark(self) -> None:
        for parameter in self.parameters(recurse=False):
            cast(Any, parameter).plait_local = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # copies of parameters do not keep attributes

    def extra_repr(self) -> str:
        spread = "" if self.placement.name is None else f", {self.placement.local} of them on rank {self.placement.rank}"
        return f"{self.placement.experts} experts{spread}"


class Compute(Protocol):
    """What all experts of this rank do to the used rows of a buffer [G, C, h]; group g meets expert g % L."""

    def __call__(self, buffer: Tensor, rows: Tensor) -> Tensor: ...


def holders(model: nn.Module) -> Iterator[tuple[str, LocalExperts]]:
    """The modules of a model that hold experts, by the name of their parameters' common prefix."""
    for name, module in model.named_modules():
        if isinstance(module, LocalExperts):
            yield f"{name}." if name else "", module
