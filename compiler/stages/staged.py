"""A cut forward as data: which region reads and gives which values, and what travels between stages.

Values are numbered; each number is an input of the forward (state of the model, or a leaf of the micro-batch), or a result
of a region. What crosses the cut behind stage s is all that stages up to s give and stages behind it read: it goes from
neighbour to neighbour, and so do gradients back, to which each stage on the way adds its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ...errors import CannotStage
from ...ir import Graph, TensorType, Value
from ...passes.stages.cut import FROZEN, shared_inputs
from ...passes.stages.stages import Cutting
from ..pipelines import Session
from .capture import Captured
from .programs import Frozen, Trained, frozen_program, trained_program
from .reseed import draws


@dataclass(frozen=True)
class Region:
    """A region with the numbers of the values that it reads and gives, and of the random draws in it."""

    graph: Graph
    reads: tuple[int, ...]
    gives: tuple[int, ...]
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Staged:
    """A forward cut into frozen layers and stages. `types` are those of all values; `state` and `leaves` say what the
    numbers of inputs are; `crossing[s]` and `crossing_back[s]` are what travels over the cut behind stage s and back;
    `frozen_reads[s]` is what stage s reads of frozen layers; `writes` are (buffer, its new value); `shared` are parameters
    that several stages read."""

    graph: Graph
    frozen: tuple[Region, ...]
    stages: tuple[Region, ...]
    types: tuple[Any, ...]
    state: dict[int, torch.Tensor]
    names: dict[int, str]
    leaves: dict[int, int]
    loss: int
    crossing: tuple[tuple[int, ...], ...]
    crossing_back: tuple[tuple[int, ...], ...]
    frozen_reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, int], ...]
    gradients: frozenset[int]
    shared: dict[int, tuple[int, ...]]

    def program(self, session: Session, region: Region, scale: float) -> Trained | Frozen:
        """The programs of a region; the loss has the tangent `scale`."""
        if region in self.frozen:
            return frozen_program(session, region.graph, region.draws)
        mode = FakeTensorMode(shape_env=ShapeEnv())  # as in every other trace: without, torch types some views otherwise
        examples: list[Any] = []
        activations: list[int] = []
        for i, number in enumerate(region.reads):
            kind = self.types[number]
            if not isinstance(kind, TensorType):
                raise CannotStage(why=f"{region.graph.name} reads a number", way="keep numbers that change in tensors")
            shape: Any = kind.shape
            strides: Any = kind.strides
            with mode:
                example = torch.empty_strided(shape, strides, dtype=kind.dtype, device=kind.device)
            example.requires_grad_(number in self.gradients)
            if number in self.gradients and number not in self.state:
                activations.append(i)
            examples.append(example)
        loss = region.gives.index(self.loss) if self.loss in region.gives else None
        return trained_program(session, region.graph, examples, region.draws, activations, loss, scale)


def staged(captured: Captured, cutting: Cutting, positions: Sequence[int]) -> Staged:
    """Cut a captured forward at positions of its trained nodes. Raises CannotStage."""
    cut = cutting.cut(positions)
    graph = cut.graph
    numbers: dict[Value, int] = {v: i for i, v in enumerate(graph.inputs)}
    types: list[Any] = [v.type for v in graph.inputs]
    frozen: list[Region] = []
    stages: list[Region] = []
    drawn = {n: i for i, n in enumerate(draws(cutting.parts.graph))}
    state, names = dict(captured.state), dict(captured.names)
    for node in graph.nodes:
        if node.op.name == "plait.constant":
            number = numbers[node.out] = len(types)
            state[number], names[number] = graph.constants[node["name"]], node.out.hint
            types.append(node.out.type)
    calls = [n for n in graph.nodes if n.regions]
    for call, nodes in zip(calls, cut.nodes, strict=True):
        region = call.regions[0]
        for v in call.results:
            numbers[v] = len(types)
            types.append(v.type)
        reads = tuple(numbers[v] for v in call["operands"])
        made = Region(region, reads, tuple(numbers[v] for v in call.results), tuple(drawn[n] for n in nodes if n in drawn))
        (frozen if region.name.startswith(FROZEN) else stages).append(made)
    if len(stages) != len(positions) + 1:
        raise CannotStage(why="a stage gives nothing that is read", way="cut elsewhere")
    old = cutting.parts
    maker = {n: s for s, region in enumerate(stages) for n in region.gives}
    crossing: list[tuple[int, ...]] = []
    for s in range(len(stages) - 1):
        later = {n for region in stages[s + 1 :] for n in region.reads}
        crossing.append(tuple(n for n in sorted(later) if maker.get(n, len(stages)) <= s))
    with_gradient = {numbers[v] for v in old.graph.inputs if v in old.with_gradient}
    with_gradient |= {numbers[new] for v, new in cut.became.items() if v in old.with_gradient}
    from_frozen = {n for region in frozen for n in region.gives}
    for i, _ in graph.writes:
        if i not in captured.state:
            why = f"it writes to {graph.inputs[i].hint}, a part of the batch"
            raise CannotStage(why=why, way="let the forward write to a copy")
    loss = numbers[graph.outputs[0]]
    if maker.get(loss) != len(stages) - 1:
        raise CannotStage(why="the last stage does not compute the loss", way="cut elsewhere")
    bounds = [0, *positions, len(old.touched)]
    parts = [old.touched[a:b] for a, b in itertools.pairwise(bounds)]
    return Staged(
        graph, tuple(frozen), tuple(stages), tuple(types), state, names, captured.leaves, loss,
        tuple(crossing), tuple(tuple(n for n in ids if n in with_gradient) for ids in crossing),
        tuple(tuple(n for n in region.reads if n in from_frozen) for region in stages),
        tuple((i, numbers[v]) for i, v in graph.writes), frozenset(with_gradient),
        shared_inputs(old, parts, captured.trained),
    )  # fmt: skip


__all__ = ["Region", "Staged", "staged"]
