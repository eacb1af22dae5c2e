"""A region of a cut forward as programs: frozen layers forward only, stages forward and backward, the backward in two.

forward(inputs) -> results, saved
backward(saved, tangents) -> gradients of inputs              B
input(saved, tangents) -> gradients of activations, rest      I: what the stage before waits for
weight(saved, rest) -> gradients of parameters                W: can run at any later time

I and W come from the same dI/dW analysis as `overlap-dw` (`ir/reach.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput, PlainAOTOutput, TangentAOTInput
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from ...codegen.compile import CompiledGraph
from ...errors import CannotStage, PlaitError
from ...ir import Graph, TensorType, Value, flatten, from_fx
from ...ir.reach import Reach, deferrable
from ...passes.decompositions import table
from ...passes.stages.cut import extract
from ..capture import real_tensors
from ..decisions import deciding_table
from ..partition import partition
from ..pipelines import Session
from ..plans import generated
from .reseed import draws, seeded

aten: Any = torch.ops.aten


class Program:
    """A graph that runs on flat inputs; compiled, with all ground passes, when it is first needed."""

    def __init__(self, session: Session, graph: Graph) -> None:
        self.session, self.captured = session, graph

    @cached_property
    def compiled(self) -> CompiledGraph:
        """The plan that runs it."""
        with real_tensors():
            graph, _ = self.session.run(self.captured, "split")
            return generated(self.session, graph)

    @cached_property
    def run(self) -> Callable[[list[Any]], Sequence[Any]]:
        """How it is called: on a list of flat inputs, in any layout."""
        with real_tensors():
            execute = self.compiled.executable.run
        read = [(i, v.type) for i, v in enumerate(self.captured.inputs) if isinstance(v.type, TensorType)]

        def run(inputs: list[Any]) -> Sequence[Any]:
            # Kernels do not look at strides: gradients are often views, and what other ranks send is contiguous.
            for i, kind in read:
                if inputs[i].stride() != kind.strides:
                    inputs[i] = _laid(inputs[i], kind)
            return execute(inputs)

        return run


def _laid(t: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """A value in the layout in which programs, which do not look, read it: a gradient may be a slice of a larger one, a
    micro-batch comes as the user laid it. The same tensor where it lies so."""
    shape: Any = kind.shape
    strides: Any = kind.strides
    if all(n == 1 or a == b for n, a, b in zip(shape, t.stride(), strides, strict=True)):
        return t
    spread = [i for i, step in enumerate(strides) if step == 0]  # what was expanded is one value along these
    for i in spread:
        t = t.narrow(i, 0, min(shape[i], 1))
    made = torch.empty_strided(t.shape, strides, dtype=kind.dtype, device=kind.device).copy_(t)
    return made.expand(shape) if spread else made


@dataclass(frozen=True)
class Frozen:
    """A frozen layer: `program` on the region's inputs, and the seed where it `draws`."""

    program: Program
    draws: bool


@dataclass(frozen=True)
class Backward:
    """The backward in two. I takes saved values and tangents, numbered among the backward's inputs by `input_reads`, and
    gives gradients of the region's inputs `input_of`, then what W needs of it. W takes `weight_reads` of the backward's
    inputs, then what I left, and gives gradients of the region's inputs `weight_of`."""

    input: Program | None
    input_reads: tuple[int, ...]
    input_of: tuple[int, ...]
    weight: Program | None
    weight_reads: tuple[int, ...]
    weight_of: tuple[int, ...]


@dataclass(frozen=True)
class Trained:
    """A stage. `outputs` results come first from `forward`, then the saved values. `backward` takes these, then tangents of
    the results numbered `tangents`; it gives gradients of the region's inputs numbered `of`."""

    forward: Program
    draws: bool
    outputs: int
    saved: int
    tangents: tuple[int, ...]
    backward: Program | None
    of: tuple[int, ...]
    parts: Callable[[], Backward]


def frozen_program(session: Session, region: Graph, numbers: Sequence[int]) -> Frozen:
    """The program of a frozen layer."""
    lowered = session.lower(region).after
    return Frozen(Program(session, seeded(lowered, numbers, region.name)), bool(numbers))


def trained_program(
    session: Session,
    region: Graph,
    examples: Sequence[Any],
    numbers: Sequence[int],
    activations: Sequence[int],
    loss: int | None,
    scale: float,
) -> Trained:
    """The programs of a stage. Inputs that require gradients among `examples`, fake tensors, get them; those numbered
    `activations` come from other stages, the rest are parameters. The result numbered `loss` has the tangent `scale`. Raises
    CannotStage."""
    joint = _joint(session, region, examples)
    plain: dict[int, FxNode] = {}
    gradients: dict[int, FxNode] = {}
    output = joint.graph.output_node()
    for value, desc in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        if isinstance(desc, PlainAOTOutput):
            plain[desc.idx] = value
        elif isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput):
            if value is not None:
                gradients[desc.grad_of.idx] = value
        elif value is not None:
            raise CannotStage(why=f"{region.name} returns {desc.expr()}", way="cut elsewhere")
    results = [plain[i] for i in sorted(plain)]
    output.args = ((*results, *gradients.values()),)
    of_result = {n.name: n.meta["desc"] for n in joint.graph.find_nodes(op="placeholder")}
    joint.recompile()
    forward, backward = _in_two(joint, len(results), session.options.recompute)
    forward_graph = seeded(_imported(forward, region.name), numbers, region.name)
    of = tuple(gradients)
    saved = len(forward_graph.outputs) - len(results)
    if backward is None:
        nothing = Backward(None, (), (), None, (), ())
        return Trained(Program(session, forward_graph), bool(numbers), len(results), saved, (), None, (), lambda: nothing)
    tangents = _tangents(backward, of_result, loss, scale)
    backward_graph = _imported(backward, f"{region.name}_backward")
    if draws(backward_graph):
        raise CannotStage(why=f"the backward of {region.name} draws random numbers", way="cut elsewhere")
    return Trained(
        Program(session, forward_graph), bool(numbers), len(results), saved, tangents, Program(session, backward_graph), of,
        lambda: split(session, backward_graph, of, frozenset(activations)),
    )  # fmt: skip


def _joint(session: Session, region: Graph, examples: Sequence[Any]) -> GraphModule:
    try:
        with ExitStack() as stack, torch.enable_grad():
            decompositions: Any = dict(deciding_table(table(session.options.keep_ops), session.decisions))
            gm = region.to_fx()
            return aot_export_joint_with_descriptors(stack, gm, tuple(examples), decompositions=decompositions).graph_module
    except PlaitError:
        raise
    except Exception as error:  # tracing raises many classes; all mean that there is no joint graph
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise CannotStage(why=f"{region.name} cannot be differentiated: {why}", way="cut elsewhere") from error


def _tangents(backward: GraphModule, descriptors: Mapping[str, Any], loss: int | None, scale: float) -> tuple[int, ...]:
    """Give the loss its gradient; the numbers of the results whose tangents are inputs that are left."""
    found: list[int] = []
    for n in backward.graph.find_nodes(op="placeholder"):
        desc = descriptors.get(n.name)
        if not isinstance(desc, TangentAOTInput):
            continue
        if not isinstance(desc.output, PlainAOTOutput):
            raise CannotStage(why=f"a stage has the gradient {desc.expr()}", way="cut elsewhere")
        val = n.meta["val"]
        if desc.output.idx != loss:
            found.append(desc.output.idx)
            continue
        with backward.graph.inserting_before(n):
            made = backward.graph.call_function(aten.full.default, ([], scale), {"dtype": val.dtype, "device": val.device})
        made.meta["val"] = val
        n.replace_all_uses_with(made)
        backward.graph.erase_node(n)
    backward.recompile()
    return tuple(found)


def _in_two(joint: GraphModule, results: int, recompute: str) -> tuple[GraphModule, GraphModule | None]:
    outputs: Any = joint.graph.output_node().args[0]
    if len(outputs) == results:
        return joint, None
    forward, backward = partition(joint, None, recompute, num_fwd_outputs=results)
    return forward, backward


def _imported(gm: GraphModule, name: str) -> Graph:
    return from_fx(gm, name)


def split(session: Session, graph: Graph, of: Sequence[int], activations: frozenset[int]) -> Backward:
    """A backward in two: I gives the gradients of `activations`, W those of parameters."""
    gradients = dict(zip(of, graph.outputs, strict=True))
    wanted = [i for i in of if i in activations]
    weights = [i for i in of if i not in activations]
    late = {v for i in weights for v in flatten(gradients[i]) if isinstance(v, Value)}
    late -= {gradients[i] for i in wanted}
    deferred = set(deferrable(graph, Reach(graph), [], late)) if wanted else set(graph.nodes)
    early = [n for n in graph.nodes if n not in deferred and n.op.name != "plait.constant"]
    made = {v for n in early for v in n.results}
    later = [n for n in graph.nodes if n in deferred or n.op.name == "plait.constant"]
    results = [gradients[i] for i in weights]
    read = dict.fromkeys(v for n in later for v in n.inputs if v in made)
    read.update(dict.fromkeys(v for v in results if v in made))
    first, input_reads = _part(graph, early, [*(gradients[i] for i in wanted), *read], f"{graph.name}_input")
    second, weight_reads = _part(graph, later, results, f"{graph.name}_weight", tuple(read))
    return Backward(
        Program(session, first) if wanted else None, input_reads, tuple(wanted),
        Program(session, second) if weights else None, weight_reads, tuple(weights),
    )  # fmt: skip


def _part(
    graph: Graph, nodes: Sequence[Any], outputs: Sequence[Any], name: str, more: Sequence[Value] = ()
) -> tuple[Graph, tuple[int, ...]]:
    """A graph of some nodes, with the constants that they read, whose inputs are inputs of the old one, by number, then
    `more`."""
    read = {v for n in nodes for v in n.inputs}
    loads = [n for n in graph.nodes if n.op.name == "plait.constant" and n.out in read and n not in nodes]
    mine = [*loads, *(n for n in nodes if n.op.name != "plait.constant" or n.out in read)]
    number = {v: i for i, v in enumerate(graph.inputs)}
    made = {v for n in mine for v in n.outputs}
    wanted = list(dict.fromkeys(v for n in mine for v in n.inputs if v not in made))
    wanted += [v for v in outputs if isinstance(v, Value) and v not in made and v not in wanted]
    order = [v for v in wanted if v in number] + list(more)
    region = extract(graph, mine, outputs, name, order)[0]
    return region, tuple(number[v] for v in order if v in number)


__all__ = ["Backward", "Frozen", "Program", "Trained", "frozen_program", "split", "trained_program"]
