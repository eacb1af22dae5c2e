"""From what Dynamo captured of a training step to one graph of forward and backward.

before:  loss, *kept = program(inputs)                     forward only, in torch's words
after:   loss, *kept, *gradients = graph(inputs)           ATen; changed inputs are writes; the loss has the gradient 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from ...errors import CannotCaptureStep, LossIsNoScalar, NothingToTrain, PlaitError
from ..capture import Decompositions, outputs_to_writes

aten: Any = torch.ops.aten

_library = torch.library.Library("plait", "FRAGMENT")
_library.define("mark_loss(Tensor loss) -> Tensor")
_library.impl("mark_loss", torch.clone, "CompositeImplicitAutograd")

mark_loss: Any = torch.ops.plait.mark_loss.default
"""Shows which result of a captured program is the loss: one that modules keep a tensor in has more results."""


@dataclass
class Joint:
    """Forward and backward in one. The results are the loss, `kept` tensors that modules keep, and the gradients of the
    inputs numbered `of`, in that order."""

    module: GraphModule
    kept: int
    of: tuple[int, ...]

    @property
    def results(self) -> tuple[Any, ...]:
        """What the graph returns."""
        found: Any = self.module.graph.output_node().args[0]
        return found

    @property
    def gradients(self) -> dict[int, FxNode]:
        """The node of each input's gradient."""
        return dict(zip(self.of, self.results[1 + self.kept :], strict=True))

    def replace_gradients(self, new: Mapping[int, FxNode]) -> None:
        """Return other nodes for these inputs' gradients."""
        found = {**self.gradients, **new}
        output = self.module.graph.output_node()
        output.args = ((*self.results[: 1 + self.kept], *(found[i] for i in self.of)),)
        self.module.recompile()


def place_of_loss(gm: GraphModule) -> int:
    """The number of the loss among the results; all others are detached. Raises LossIsNoScalar, NothingToTrain."""
    output = gm.graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    found = [i for i, n in enumerate(results) if isinstance(n, FxNode) and n.target in (mark_loss, mark_loss.overloadpacket)]
    if not found:
        raise LossIsNoScalar(got="no tensor")
    value = results[found[0]].meta["example_value"]
    if value.numel() != 1 or not value.is_floating_point():
        raise LossIsNoScalar(got=f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
    if not value.requires_grad:
        raise NothingToTrain(why="the loss depends on no parameter")
    for i, n in enumerate(results):
        if i != found[0] and isinstance(n, FxNode) and isinstance(n.meta.get("example_value"), torch.Tensor):
            with gm.graph.inserting_before(output):  # a copy: what modules keep must not be memory of the step
                results[i] = gm.graph.call_method("clone", (gm.graph.call_method("detach", (n,)),))
    output.args = (tuple(results),)
    gm.recompile()
    return found[0]


def capture(gm: GraphModule, inputs: Sequence[Any], decompositions: Decompositions, loss: int) -> Joint:
    """The joint graph of a program whose result number `loss` is the loss. Raises CannotCaptureStep."""
    joint = _export(gm, inputs, decompositions)
    places = joint.graph.find_nodes(op="placeholder")
    numbers = {n.meta["desc"].idx: n for n in places if isinstance(n.meta["desc"], PlainAOTInput)}
    for i, given in enumerate(gm.graph.find_nodes(op="placeholder")):
        if i in numbers:
            numbers[i]._rename(given.name.strip("_"))  # as the user knows it
    for n in places:
        desc = n.meta["desc"]
        if isinstance(desc, TangentAOTInput) and desc.output == PlainAOTOutput(loss):
            _seed(joint, n, 1)
        elif isinstance(desc, TangentAOTInput) and isinstance(desc.output, InputMutationAOTOutput):
            _seed(joint, n, 0)  # what a parameter is changed to outside of autograd has no gradient
        elif numbers.get(getattr(desc, "idx", None)) is not n:
            raise CannotCaptureStep(why=f"input {desc.expr()} is no plain tensor of its own")
    output = joint.graph.output_node()
    plain: dict[int, Any] = {}
    gradients: dict[int, FxNode] = {}
    writes: list[tuple[FxNode, FxNode]] = []
    for value, desc in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        if isinstance(desc, PlainAOTOutput):
            plain[desc.idx] = value
        elif isinstance(desc, InputMutationAOTOutput) and isinstance(desc.mutated_input, PlainAOTInput):
            writes.append((numbers[desc.mutated_input.idx], value))
        elif isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput):
            if value is not None:
                gradients[desc.grad_of.idx] = value
        elif desc is not None:
            raise CannotCaptureStep(why=f"it returns {desc.expr()}")
    kept = [plain[i] for i in sorted(plain) if i != loss]
    outputs_to_writes(joint, writes, (plain[loss], *kept, *gradients.values()))
    return Joint(joint, len(kept), tuple(gradients))


def _export(gm: GraphModule, inputs: Sequence[Any], decompositions: Decompositions) -> GraphModule:
    try:
        with ExitStack() as stack:
            table: Any = dict(decompositions)
            return aot_export_joint_with_descriptors(stack, gm, tuple(inputs), decompositions=table).graph_module
    except PlaitError:
        raise
    except Exception as error:  # tracing raises many classes; all mean that there is no one graph
        raise CannotCaptureStep(why=str(error).strip().split("\n")[0] or type(error).__name__) from error


def _seed(gm: GraphModule, tangent: FxNode, seed: int) -> None:
    """Let all elements of a gradient that the graph begins with be one number."""
    val = tangent.meta["val"]
    with gm.graph.inserting_before(tangent):
        made = gm.graph.call_function(aten.full.default, (list(val.shape), seed), {"dtype": val.dtype, "device": val.device})
    made.meta["val"] = val
    tangent.replace_all_uses_with(made)
    gm.graph.erase_node(tangent)
