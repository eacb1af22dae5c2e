"""The kernel level: what a scheduled graph consists of. Plain data between the scheduler and the plan builder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir import Dim, Graph, Node, Value
from ..runtime.panels import Panels
from ..runtime.reordered import Reordered
from .kernel_ir import Kernel
from .triton.source import TritonSource


@dataclass(frozen=True)
class KernelItem:
    """Launch of a generated kernel. `buffers` are the values bound to its parameters, in order, `access` ("read", "write",
    "read_write") says what it does with each. `sizes` are its size arguments, `nodes` what it computes. `source` is what
    a template made, C++ text or a Triton source (None: printed from `kernel`)."""

    name: str
    buffers: tuple[Value, ...]
    access: tuple[str, ...]
    sizes: tuple[Any, ...]
    nodes: tuple[Node, ...]
    kernel: Kernel | None = None
    source: str | TritonSource | None = None

    @property
    def writes(self) -> tuple[Value, ...]:
        """Values that the kernel defines or updates."""
        return tuple(v for v, a in zip(self.buffers, self.access, strict=True) if a != "read")

    @property
    def reads(self) -> tuple[Value, ...]:
        """Values that the kernel reads."""
        return tuple(v for v, a in zip(self.buffers, self.access, strict=True) if a != "write")


@dataclass(frozen=True)
class CallItem:
    """A torch op run by the runtime: kind "library" (the best known way), "fallback" (no lowering) or
    "internal" (bookkeeping of plait itself), with the reason."""

    node: Node
    kind: str
    reason: str


@dataclass(frozen=True)
class AliasItem:
    """A value that is a view of another one: no work, only another shape, strides and offset (in elements)."""

    value: Value
    of: Value
    offset: Dim


Item = KernelItem | CallItem | AliasItem


@dataclass(frozen=True)
class Scheduled:
    """A graph at the kernel level: items in order. `scratch` are values that no node of the graph defines; `stored` maps a
    value to the value in whose memory it is computed, and the offset there (in elements): what is written back to an input,
    and parts of what is joined. `laid_out` are weights as the matmul template or oneDNN reads them."""

    graph: Graph
    items: tuple[Item, ...]
    scratch: tuple[Value, ...] = ()
    stored: Mapping[Value, tuple[Value, int]] = field(default_factory=dict)
    laid_out: Mapping[Value, Panels | Reordered] = field(default_factory=dict)
