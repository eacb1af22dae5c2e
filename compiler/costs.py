"""Measures what the overlap passes want to know of a training step: its nodes on this machine, its collectives on this link.

Nodes are measured one by one as code generation compiles them, and kept in the profile table of this user. Collectives are
measured on all ranks together, for each process afresh, unless a table that was saved is given: links differ, and a machine
does not know what it is connected to. All ranks take the figures of the first one, so that all choose alike.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..codegen.ceilings import ceilings
from ..codegen.compile import CodegenOptions, compile_graph
from ..cost import communication
from ..cost.curve import Curve
from ..cost.estimate import COMMUNICATION, COMPUTE, EXCHANGES, MEASURED, Estimates, Rates, node_key
from ..cost.ops import size_bytes
from ..cost.profile import Table, Timing, measure_alternating, open_table, user_path
from ..cost.schedule import Slowdown
from ..errors import PlaitError
from ..ir import Arg, Graph, Node, TensorType, Value, map_arg
from .debugging.interpret import random_inputs

NODE_BUDGET_S = 0.02
"""Seconds spent on each node."""
ROUNDS = 7
"""Exchanges of each size."""
SMALLEST = 4096
"""Bytes of the smallest exchange that is measured, and of nodes that are."""
SMALL_EXCHANGE, SMALL_EXCHANGES = 64 << 10, 20
"""Bytes of the exchanges that tell what handling one takes, and how many."""
LEAST_LAUNCH_S = 1e-5
SPECIAL_SHARE = 4
"""Elementwise kernels reach this part of the rate of multiply-adds."""


def estimates(graph: Graph, group: Any, options: CodegenOptions, profile: str | None = None) -> Estimates:
    """Figures for the graph of a training step, the same on all ranks of a process group (None: there is one rank).

    `profile` is a file of measurements, of nodes and of collectives on this link; what it lacks is measured and added.
    Raises DamagedProfile, ForeignProfile.
    """
    threads = torch.get_num_threads()
    kept = open_table(Path(profile)) if profile else open_table(user_path())
    links = kept if profile else Table()
    first = group is None or group.rank() == 0
    backend = "none" if group is None else str(dist.get_backend(group))
    if first:
        _measure_nodes(graph, kept, threads, options)
    if group is not None:
        _measure_collectives(graph, links, group, f"cpu/{backend}")
    rates: Rates | None = None
    if first:
        machine = ceilings(kept, threads)
        rates = Rates(machine.fma / SPECIAL_SHARE, machine.levels[-1].read, max(machine.region, LEAST_LAUNCH_S))
        kept.save()
    slowdown = {} if group is None else _measure_slowdown(group, threads)
    handling = 0.0 if group is None else _measure_handling(group, threads)
    wanted = {node_key(node, threads, "cpu") for node in graph.nodes}
    entries = [(k, dict(t)) for k, t in kept if k in wanted] + [(k, dict(t)) for k, t in links if k not in wanted]
    entries, rates, slowdown, handling = _from_first((entries, rates, slowdown, handling), group)
    assert rates is not None
    table = Table()
    for key, timings in entries:
        for name, timing in timings.items():
            table.record(key, name, timing)
    ranks = {} if group is None else {str(group.group_name): int(group.size())}
    return Estimates(rates, table, threads, "cpu", backend, ranks, slowdown, handling).calibrated(graph.nodes)


@dataclass(frozen=True)
class Link:
    """What a process group reaches: curves of its collectives by op, measured with nothing beside them, and what streams do
    to each other."""

    curves: Mapping[str, Curve]
    slowdown: Slowdown

    def seconds(self, op: str, size: float, announced: bool = False) -> float:
        """Seconds of a collective that sends `size` bytes, 0 without a curve; `announced`: sizes are exchanged first."""
        found = self.curves.get(_curve_name(op))
        if found is None:
            return 0.0
        return found.seconds(size) + (found.latency if announced else 0.0)

    @staticmethod
    def between(slow: tuple[float, Link], fast: tuple[float, Link], rate: float) -> Link:
        """The link at a rate that was not measured, from (rate, link) of two that were: seconds are a fixed part and a part
        inverse to the rate; what the processor has to do for it grows with the rate."""
        (r0, a), (r1, b) = slow, fast
        inverse, straight = (1 / rate - 1 / r0) / (1 / r1 - 1 / r0), (rate - r0) / (r1 - r0)
        curves = {
            op: Curve.of((size, s + inverse * (b.curves[op].seconds(size) - s)) for size, s in curve.points)
            for op, curve in a.curves.items()
        }
        slowdown = {k: max(1.0, v + straight * (b.slowdown.get(k, 1.0) - v)) for k, v in a.slowdown.items()}
        return Link(curves, slowdown)


def link(graph: Graph, group: Any) -> Link:
    """Measure what a graph exchanges and sums on the link of a process group, afresh; all its ranks call this."""
    ranks, device, table = group.size(), f"cpu/{dist.get_backend(group)}", Table()
    _measure_collectives(graph, table, group, device)
    slowdown = _measure_slowdown(group, torch.get_num_threads())
    curves = {name: communication.curve(table, name, ranks, device) for name in _wanted(graph)}
    return _from_first(Link({name: c for name, c in curves.items() if c is not None}, slowdown), group)


def _from_first(value: Any, group: Any) -> Any:
    """What the first rank of a group has, on all of them."""
    if group is None:
        return value
    told = [value if group.rank() == 0 else None]
    dist.broadcast_object_list(told, group_src=0, group=group)
    return told[0]


# -- nodes ------------------------------------------------------------------------------------------------------------


def _measure_nodes(graph: Graph, table: Table, threads: int, options: CodegenOptions) -> None:
    for node in graph.nodes:
        key = node_key(node, threads, "cpu")
        if not _measurable(node) or MEASURED in table.get(key):
            continue
        try:
            run = _alone(node, options)
            table.record(key, MEASURED, measure_alternating({"": run}, threads, NODE_BUDGET_S)[""])
        except (PlaitError, RuntimeError):
            continue  # the roofline stands in


def _measurable(node: Node) -> bool:
    """Nodes with a kernel of their own, on sizes that are known."""
    if node.token is not None or node.op.has("view") or node.op.has("elementwise") or node.op.has("scalar"):
        return False
    if node.op.name == "plait.constant" or node.op.has("control_flow") or not node.inputs:
        return False
    kinds = [v.type for v in (*node.inputs, *node.results)]
    return all(isinstance(t, TensorType) and not t.symbols() for t in kinds) and _bytes(node) >= SMALLEST


def _bytes(node: Node) -> int:
    return sum(s for v in (*node.inputs, *node.results) if isinstance(s := size_bytes(v.tensor), int))


def _alone(node: Node, options: CodegenOptions) -> Callable[[], object]:
    """A call of a node as a graph of its own, on inputs of its types; buffers of experts are full."""
    fresh = {v: Value(v.type, v.hint) for v in dict.fromkeys(node.inputs)}
    args: tuple[Arg, ...] = tuple(map_arg(a, lambda a: fresh.get(a, a) if isinstance(a, Value) else a) for a in node.args)
    results = tuple(Value(v.type, v.hint) for v in node.results)
    alone = Graph("node", tuple(fresh.values()), (Node(node.op, args, results, (), node.loc),), results)
    inputs = random_inputs(alone)
    for i, v in enumerate(fresh):
        if v is node.get("rows"):
            capacity = node["x"].tensor.shape[1]
            inputs[i] = torch.tensor([0, capacity]).expand(len(inputs[i]), 2).clone()
    executable = compile_graph(alone, options).executable
    return lambda: executable.run(list(inputs))


# -- collectives ------------------------------------------------------------------------------------------------------


def _measure_collectives(graph: Graph, table: Table, group: Any, device: str) -> None:
    """Curves of what the graph exchanges and sums, on this link."""
    ranks = group.size()
    for name, largest in sorted(_wanted(graph).items()):
        if _from_first(communication.curve(table, name, ranks, device) is not None, group):
            continue
        runs = [_RUNS[name](group, size) for size in _sizes(largest)]
        for _, run in runs:
            run()
        samples: list[list[float]] = [[] for _ in runs]
        for _ in range(ROUNDS):  # all sizes by turns, so that what disturbs for a while disturbs them alike
            for (_, run), found in zip(runs, samples, strict=True):
                found += _timed(run, group, 1)
        for (sent, _), found in zip(runs, samples, strict=True):
            communication.record(table, name, ranks, sent, device, Timing.of(found))


def _wanted(graph: Graph) -> dict[str, int]:
    """Names of the curves that tell about a graph's collectives -> bytes of the largest operand."""
    wanted: dict[str, int] = {}
    for node in graph.nodes:
        if node.op.effect == "collective" and node.inputs and isinstance(node.inputs[0].type, TensorType):
            size, name = size_bytes(node.inputs[0].tensor), _curve_name(node.op.name)
            if name in _RUNS and isinstance(size, int):
                wanted[name] = max(wanted.get(name, SMALLEST), size)
    return wanted


def _curve_name(op: str) -> str:
    return EXCHANGES[0] if op in EXCHANGES else op


def _sizes(largest: int) -> list[int]:
    found = [SMALLEST]
    while found[-1] < largest:
        found.append(min(4 * found[-1], largest))
    return found


def _timed(run: Callable[[], object], group: Any, rounds: int = ROUNDS) -> list[float]:
    """Seconds of a collective that all ranks begin together."""
    samples: list[float] = []
    for _ in range(rounds):
        dist.barrier(group)
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


def _exchange(group: Any, size: int) -> tuple[int, Callable[[], object]]:
    """An exchange of a buffer of about `size` bytes, all of it used; the bytes that leave a rank."""
    ranks, width = group.size(), 64
    capacity = max(size // (4 * width * ranks), 1)
    buf = torch.zeros(ranks, capacity, width)
    rows = torch.tensor([[0, capacity]] * ranks)
    name = str(group.group_name)
    sent = buf.numel() * 4 * (ranks - 1) // ranks
    return sent, lambda: torch.ops.plait.all_to_all_capacity(buf, rows, rows, name)


def _sum(group: Any, size: int) -> tuple[int, Callable[[], object]]:
    x = torch.zeros(max(size // 4, 1))
    name = str(group.group_name)

    def run() -> object:
        ops: Any = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x, "sum", name))

    return 4 * x.numel(), run


_RUNS: dict[str, Callable[[Any, int], tuple[int, Callable[[], object]]]] = {
    EXCHANGES[0]: _exchange,
    "_c10d_functional.all_reduce.default": _sum,
}


# -- what streams do to each other ------------------------------------------------------------------------------------


def _measure_slowdown(group: Any, threads: int) -> dict[tuple[str, str], float]:
    """By what factor computation takes longer while an exchange runs, and the other way round."""
    a = torch.randn(256, 256)
    _, run = _exchange(group, 4 << 20)

    def compute(seconds: float) -> float:
        """Products per second."""
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            torch.mm(a, a)
            count += 1
        return count / (time.perf_counter() - start)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run()
        single: list[float] = []
        together: list[float] = []
        plain: list[float] = []
        rates: list[float] = []
        for _ in range(ROUNDS):  # by turns, so that what else the machine does disturbs all alike
            single += _timed(run, group, 1)
            span = 0.9 * statistics.median(single)
            plain.append(compute(span))
            dist.barrier(group)
            took: list[float] = []
            thread = threading.Thread(target=lambda: took.append(_seconds(run)))  # noqa: B023 (joined below)
            thread.start()
            rates.append(compute(span))
            while thread.is_alive():
                torch.mm(a, a)
            thread.join()
            together += took
    finally:
        torch.set_num_threads(before)
    slower = statistics.median(together) / statistics.median(single)
    return {
        (COMPUTE, COMMUNICATION): max(1.0, statistics.median(plain) / statistics.median(rates)),
        (COMMUNICATION, COMPUTE): max(1.0, slower),
    }


def _measure_handling(group: Any, threads: int) -> float:
    """Seconds of the cores that compute which a small exchange takes."""
    if len(os.sched_getaffinity(0)) > threads:
        return 0.0
    _, run = _exchange(group, SMALL_EXCHANGE)
    run()
    dist.barrier(group)
    start = time.process_time()
    for _ in range(SMALL_EXCHANGES):
        run()
    return (time.process_time() - start) / SMALL_EXCHANGES


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


__all__ = ["Link", "estimates", "link"]
