"""Blocks as compiled graphs: the batched form traced with a size for the number of instances, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ...ir import from_fx
from ...passes.decompositions import table
from .. import capture, rng
from ..observe import Record, active
from ..partition import partition
from ..pipelines import Session
from ..plans import runnable
from .blocks import Block, without_modes

EXAMPLE = 37  # instances in the trace: a number that no other size is likely to have, since equal sizes would be tied

Run = Callable[[list[Any]], Sequence[Any]]


class BakedSize(Exception):
    """A block was traced for one number of instances."""


@dataclass(frozen=True)
class Compiled:
    """A block's graphs. `forward` takes stacked arguments and shared tensors, and gives results and what the backward reads;
    `backward` takes that, numbers first, and the gradients of the results `differentiable`, and gives those of all arguments
    and shared tensors, None for those that want none.
    """

    forward: Run
    backward: Run | None = None
    differentiable: tuple[int, ...] = ()

    def save(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """What the forward gave besides results, in the order in which the backward takes it."""
        numbers = [x for x in values if not isinstance(x, torch.Tensor)]
        return (*numbers, *(x for x in values if isinstance(x, torch.Tensor)))


class _Substitute(TorchFunctionMode):
    """Other tensors in place of shared ones."""

    def __init__(self, stand_ins: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.stand_ins = stand_ins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(x: Any) -> Any:
            return self.stand_ins.get(id(x), x) if isinstance(x, torch.Tensor) else x

        args, kwargs = tree_map(swap, (args, kwargs or {}))
        return func(*args, **kwargs)


def compile_block(block: Block, session: Session) -> Compiled:
    """Trace and compile a block. Raises what tracing and lowering raise."""
    count = len(block.inputs)
    wanting = tuple(
        k
        for k, t in enumerate((*block.inputs, *block.shared))
        if block.grad and t.dtype.is_floating_point and (k < count or block.shared[k - count].requires_grad)
    )

    differentiable: tuple[int, ...] = ()

    def flat(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal differentiable
        stand_ins = {id(s): v for s, v in zip(block.shared, values[count:], strict=True)}
        with _Substitute(stand_ins):
            made = block.batched(values[:count])
        differentiable = tuple(k for k, x in enumerate(made) if x.requires_grad)
        return tuple(x.clone() if x._is_view() or any(x is v for v in values) else x for x in made)

    with without_modes():
        fakes = _fakes(block, wanting)
        decompositions = table(session.options.keep_ops)
        with torch.set_grad_enabled(bool(wanting)):
            traced: Any = aot_export_joint_simple(
                flat, tuple(fakes), trace_joint=bool(wanting), decompositions=decompositions
            )
        _check_any_size(fakes)
        if not wanting:
            return Compiled(_compiled(traced, "inference", session))
        forward, backward = partition(traced, fakes, session.options.recompute, num_fwd_outputs=len(block.outputs))
        made = _compiled(forward, "forward", session), _compiled(backward, "backward", session)
        return Compiled(*made, differentiable)


def _check_any_size(fakes: Sequence[Any]) -> None:
    """Raise BakedSize where the trace holds for so many instances only."""
    size = fakes[0].shape[0]
    if not isinstance(size, torch.SymInt) or size.node.shape_env.replace(size.node.expr).is_number:
        raise BakedSize(f"its trace holds for {EXAMPLE} instances only")


def _fakes(block: Block, wanting: Sequence[int]) -> list[torch.Tensor]:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    found = []
    for k, t in enumerate(block.inputs):
        real = torch.empty((EXAMPLE, *t.shape), dtype=t.dtype, device=t.device, requires_grad=k in wanting)
        how = StatelessSymbolicContext([DimDynamic.DUCK, *[DimDynamic.STATIC] * len(t.shape)])
        found.append(mode.from_tensor(real, symbolic_context=how))
    for s in block.shared:
        real = s.detach().requires_grad_(s.requires_grad and block.grad)
        how = StatelessSymbolicContext([DimDynamic.STATIC] * s.dim())
        found.append(mode.from_tensor(real, symbolic_context=how))
    return found


def _compiled(gm: GraphModule, kind: str, session: Session) -> Run:
    started = time.perf_counter()
    record = Record(f"{session.name}_{kind}", kind)
    for observation in active():
        observation.graphs.append(record)
    with capture.real_tensors():
        record.captured = from_fx(rng.unfold(gm), kind)
        record.graph, steps = session.run(record.captured, "split")
        record.history = tuple(steps)
        return runnable(session, record.graph, record, lambda made: made.executable.run, started)
