"""How long the nodes of a graph take: what was measured where it was, a roofline else; collectives by their curves.

Nodes that are computed inside the kernel of their reader (elementwise ops, views) cost their operations; others their ways
to memory too. A node that runs on a share of its rows takes that share of its time, but for what a launch costs anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..ir import Node, TensorType, flatten
from ..ir.op import Op
from .communication import curve
from .curve import Curve
from .ops import size_bytes, work
from .profile import Key, Table
from .schedule import Slowdown

COMPUTE, COMMUNICATION = "compute", "communication"
"""Names of streams."""

_FREE = ("plait.constant", "aten._unsafe_view.default")

MEASURED = "measured"
EXCHANGES = ("plait.all_to_all_capacity.default", "plait.all_to_all_capacity_start.default")


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches: operations per second, bytes per second of memory, seconds that a launch takes at least."""

    flops: float
    bytes: float
    launch: float


def node_key(node: Node, threads: int, device: str) -> Key:
    """Where measurements of a node lie: its op, types of tensors and other arguments as text."""
    args = tuple(str(a.type) if hasattr(a, "type") else str(a) for a in flatten(node.args))
    return Key(node.op.name, args, threads, device)


@dataclass(frozen=True)
class Estimates:
    """Seconds of the nodes of a graph on one device.

    `ranks` are the sizes of process groups by name, `slowdown` is what streams that are busy at once do to each other.
    `handling` seconds of the computing cores go into each collective, whatever its size: where threads that communicate have
    cores of their own, none. Collectives without a curve take no time. `known` has, by op, what the roofline says of nodes
    that were measured, and what was measured: a node of other sizes misses its roofline as much as the nearest of them.
    """

    rates: Rates
    table: Table | None = None
    threads: int = 1
    device: str = "cpu"
    backend: str = "gloo"
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    slowdown: Slowdown = field(default_factory=dict[tuple[str, str], float])
    handling: float = 0.0
    known: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict[str, tuple[tuple[float, float], ...]])
    curves: dict[tuple[str, int], Curve | None] = field(default_factory=dict[tuple[str, int], "Curve | None"])
    _known_nodes: dict[Node, float] = field(default_factory=dict[Node, float], init=False, repr=False, compare=False)

    def compute(self, node: Node, share: float = 1.0) -> float:
        """Seconds of a node that is no collective, on a share of its rows."""
        if node.op.has("view") or node.op.name in _FREE or node.op.has("scalar") or _in_place(node):
            return 0.0
        whole = self._known_nodes.get(node)
        if whole is None:
            whole = self.measured(node)
            whole = self._known_nodes[node] = self._like_known(node.op, self.roofline(node)) if whole is None else whole
        least = 0.0 if node.op.has("elementwise") else min(self.rates.launch, whole)
        return least + share * (whole - least)

    def roofline(self, node: Node) -> float:
        """What a node takes by the rates alone."""
        inside, found = node.op.has("elementwise"), work(node)
        moved = 0 if inside else _number(found.read) + _number(found.written)
        seconds = max(_number(found.flops) / self.rates.flops, moved / self.rates.bytes)
        return seconds + (0.0 if inside else self.rates.launch)

    def _like_known(self, op: Op, seconds: float) -> float:
        pairs = self.known.get(op.name)
        if not pairs or seconds <= 0:
            return seconds
        expected, measured = min(pairs, key=lambda pair: abs(math.log(pair[0] / seconds)))
        return seconds * measured / expected

    def calibrated(self, nodes: Iterable[Node]) -> Estimates:
        """With what was measured of nodes, for others of the same ops."""
        found: dict[str, dict[float, float]] = {}
        for node in nodes:
            measured, expected = self.measured(node), self.roofline(node) if node.outputs else 0.0
            if measured is not None and expected > 0:
                found.setdefault(node.op.name, {})[expected] = measured
        return replace(self, known={name: tuple(sorted(pairs.items())) for name, pairs in found.items()})

    def measured(self, node: Node) -> float | None:
        """The median of what was measured of a node, None where nothing was."""
        if self.table is None:
            return None
        timing = self.table.get(node_key(node, self.threads, self.device)).get(MEASURED)
        return None if timing is None else timing.median

    def collective(self, node: Node, share: float = 1.0) -> float:
        """Seconds of a collective between its launch and its end, with nothing else on the link; an exchange that sends a
        share of its buffer."""
        group = str(node.get("group_name", ""))
        ranks = self.ranks.get(group, 1)
        found = self._curve(node.op, ranks)
        return 0.0 if found is None else found.seconds(share * sent(node, ranks))

    def _curve(self, op: Op, ranks: int) -> Curve | None:
        name = EXCHANGES[0] if op.name in EXCHANGES else op.name
        at = (name, ranks)
        if at not in self.curves:
            device = f"{self.device}/{self.backend}"
            self.curves[at] = None if self.table is None else curve(self.table, name, ranks, device)
        return self.curves[at]


def _in_place(node: Node) -> bool:
    """Whether a node joins what kernels compute where it lies in the joined value: parts along its outermost axis. Those
    that a library or the user made are copied all the same, which is not counted."""
    if node.op.name != "aten.cat.default" or not node.out.tensor.is_contiguous:
        return False
    at = node["dim"] % node.out.tensor.rank
    return all(size == 1 for size in node.out.tensor.shape[:at])


def sent(node: Node, ranks: int) -> float:
    """Bytes that curves of a collective are over: those that leave this rank for a full exchange, its operand's else."""
    size = float(sum(_number(size_bytes(v.type)) for v in node.inputs[:1] if isinstance(v.type, TensorType)))
    return size * (ranks - 1) / ranks if node.op.name in EXCHANGES else size


def _number(size: Any) -> float:
    return float(size) if isinstance(size, int | float) else 0.0


__all__ = ["COMMUNICATION", "COMPUTE", "EXCHANGES", "MEASURED", "Estimates", "Rates", "node_key", "sent"]
