"""The forward of one micro-batch, captured with Dynamo: a functional graph before autograd, and what its inputs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ...errors import CannotCapture, CannotStage, LossIsNoScalar, NothingToTrain, PlaitError
from ...ir import Graph, Value
from ..capture import capture_forward, real_tensors
from ..training.api import _line_of, _why


@dataclass(frozen=True)
class Captured:
    """A forward whose first result is the loss. Each input is a tensor of the model (`state`, by its number) or a leaf of
    the micro-batch (`leaves`); `names` are those of parameters and buffers by number; `trained` require gradients."""

    graph: Graph
    state: dict[int, torch.Tensor]
    leaves: dict[int, int]
    names: dict[int, str]
    trained: frozenset[int]


def capture(model: torch.nn.Module, loss: Callable[..., Any], batch: tuple[Any, ...]) -> Captured:
    """Capture `loss(model, *batch)` of a micro-batch. The model is left as it is, nothing is computed.

    Raises CannotStage, LossIsNoScalar, NothingToTrain.
    """
    found: list[tuple[Graph, list[Any]]] = []

    def compile(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with torch.enable_grad():
            graph = capture_forward(gm, inputs)
        outputs: Any = gm.graph.output_node().args[0]
        examples = [n.meta.get("example_value") for n in outputs]
        found.append((graph, list(inputs)))
        kinds = [(tuple(e.shape), e.dtype, e.device) if isinstance(e, torch.Tensor) else e for e in examples]

        def nothing(*_: Any) -> list[Any]:
            with real_tensors():
                return [torch.zeros(k[0], dtype=k[1], device=k[2]) if isinstance(k, tuple) else k for k in kinds]

        return nothing

    def program(batch: tuple[Any, ...]) -> Any:
        return loss(model, *batch)

    capturing: Any = torch.compile
    run = capturing(program, backend=compile, fullgraph=True, dynamic=False, recompile_limit=1, isolate_recompiles=True)
    try:
        with torch.enable_grad(), dynamo_config.patch(capture_scalar_outputs=True, allow_rnn=True):
            value = run(batch)
    except exc.BackendCompilerFailed as error:
        inner = error.inner_exception
        if isinstance(inner, CannotCapture):
            raise CannotStage(why="it has no functional forward: {why}".format(**inner.fields), way=_WAY) from None
        if isinstance(inner, PlaitError):
            raise inner from None
        raise
    except (exc.Unsupported, exc.UserError, exc.TorchRuntimeError) as error:
        raise CannotStage(why=_why(error), way=_WAY, source=_line_of(error)) from error
    if not isinstance(value, torch.Tensor):
        raise LossIsNoScalar(got=type(value).__name__)
    if not found:
        raise CannotStage(why="it computes nothing", way=_WAY)
    return _described(model, batch, *found[-1])


_WAY = "change that place, as for torch.compile(fullgraph=True)"


def _described(model: torch.nn.Module, batch: tuple[Any, ...], graph: Graph, inputs: list[Any]) -> Captured:
    numbers = {id(t): (name, t) for name, t in (*model.named_buffers(), *model.named_parameters())}
    leaves = {id(t): i for i, t in enumerate(pytree.tree_leaves(batch)) if isinstance(t, torch.Tensor)}
    state: dict[int, torch.Tensor] = {}
    places: dict[int, int] = {}
    names: dict[int, str] = {}
    for i, t in enumerate(inputs):
        if id(t) in leaves:
            places[i] = leaves[id(t)]
        elif isinstance(t, torch.Tensor):
            state[i] = t
            names[i] = numbers[id(t)][0] if id(t) in numbers else graph.inputs[i].hint
        else:
            raise CannotStage(why=f"input {graph.inputs[i].hint} is a number", way="keep numbers that change in tensors")
    trained = frozenset(i for i, t in state.items() if t.requires_grad)
    for i in trained:
        if id(state[i]) not in numbers:
            raise CannotStage(why=f"{names[i]} requires gradients and is no parameter of the model", way="make it one")
    if not trained:
        raise NothingToTrain(why="the loss depends on no parameter")
    results = [v for v in graph.outputs if isinstance(v, Value)]
    if len(results) != 1 or results[0].tensor.shape != () or not results[0].tensor.dtype.is_floating_point:
        if len(results) == 1:
            kind = results[0].tensor
            raise LossIsNoScalar(got=f"{str(kind.dtype).removeprefix('torch.')}{list(kind.shape)}")
        why = "modules keep a tensor of the forward, which would be one of a micro-batch"
        raise CannotStage(why=why, way="do not assign tensors to attributes in forward")
    return Captured(graph, state, places, names, trained)


__all__ = ["Captured", "capture"]
