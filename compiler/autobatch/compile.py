"""Blocks as compiled graphs: the batched form traced with a size for the number of instances, forward and backward."""

from __future__ import annotations

import logging
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
from ...runtime.direct import NotDirect
from ...runtime.panels import Panels
from .. import capture, rng
from ..freeze import freeze
from ..observe import Record, active
from ..partition import partition
from ..pipelines import Session
from ..plans import generated, runnable
from .blocks import Block, without_modes
from .native import record

log = logging.getLogger(__name__)

EXAMPLE = 37  # instances in the trace: a number that no other size is likely to have, since equal sizes would be tied

Run = Callable[[list[Any]], Sequence[Any]]


class BakedSize(Exception):
    """A block was traced for one number of instances."""


@dataclass(frozen=True)
class Compiled:
    """A block's graphs. `forward` takes stacked arguments and shared tensors, and gives results and what the backward reads;
    `backward` takes that, numbers first, and the gradients of the results `differentiable`, and gives those of all arguments
    and shared tensors, None for those that want none. `layouts` are the shapes, strides and dtypes of shared tensors with
    which it runs without Python; None where it does not, and `forward` runs it.
    """

    forward: Run | None
    backward: Run | None = None
    differentiable: tuple[int, ...] = ()
    layouts: tuple[Any, ...] | None = None

    def save(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """What the forward gave besides results, in the order in which the backward takes it."""
        numbers = [x for x in values if not isinstance(x, torch.Tensor)]
        return (*numbers, *(x for x in values if isinstance(x, torch.Tensor)))


class Substitute(TorchFunctionMode):
    """Other tensors in place of shared ones."""

    def __init__(self, stand_ins: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.stand_ins = stand_ins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(x: Any) -> Any:
            return self.stand_ins.get(id(x), x) if isinstance(x, torch.Tensor) else x

        args, kwargs = tree_map(swap, (args, kwargs or {}))
        return func(*args, **kwargs)


def compile_block(block: Block, session: Session, native: Any | None) -> Compiled:
    """Trace and compile a block. A plan that needs no Python is handed to the table `native`, if there is one. Raises what
    tracing and lowering raise."""
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
        with Substitute(stand_ins):
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
            watched = _passed(traced, "inference", session)
            layouts = _handed_over(block, watched, session, native)
            return Compiled(None if layouts is not None else _run(watched, session), layouts=layouts)
        graphs = partition(traced, fakes, session.options.recompute, num_fwd_outputs=len(block.outputs))
        watches = [_passed(gm, kind, session) for gm, kind in zip(graphs, ("forward", "backward"), strict=True)]
        forward, backward = (_run(w, session) for w in watches)
        return Compiled(forward, backward, differentiable)


def _handed_over(block: Block, watched: Record, session: Session, native: Any | None) -> tuple[Any, ...] | None:
    """The layouts of shared tensors for which `native` can run a block now; None where Python has to. Its plan has shared
    tensors as constants, so that matrices lie in panels, which are laid out anew for each call."""
    if native is None or record.Quick is None or session.decisions.watched:
        return None
    graph, count = watched.graph, len(block.inputs)
    assert graph is not None
    shared = {count + k: s.detach() for k, s in enumerate(block.shared)}
    if graph.constants or not all(s.is_contiguous() for s in shared.values()):
        return None
    frozen = freeze(graph, shared)
    names = {name: k for k, name in enumerate(frozen.constants)}
    try:
        watched.compiled = generated(session, frozen, lambda made: made)
        found = watched.compiled.direct()
    except NotDirect as why:
        log.info("%s at %s runs from Python: %s", block.name, block.source, why)
        return None
    counts = tuple(slot for slot, position, dim in found.symbols if dim == 0 and position < count)
    if len(counts) != len(found.symbols):
        return None
    bases, panels = [-1] * len(shared), []
    for name, base in found.constants:
        if name in names:
            bases[names[name]] = base
        elif (laid := Panels.named(name)) is not None and laid.weight in names:
            item = block.shared[names[laid.weight]].element_size()
            panels += [names[laid.weight], base, laid.layout == "k", laid.n, laid.k, item]
        else:
            return None
    native.direct(
        block.number, found.run, found.sizes, found.program, found.slots, counts, found.arena, found.bases,
        (*found.inputs, *bases), found.outputs, tuple(x for pair in found.checks for x in pair), tuple(panels), found,
    )  # fmt: skip
    return tuple((s.shape, s.stride(), s.dtype) for s in block.shared)


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


def _passed(gm: GraphModule, kind: str, session: Session) -> Record:
    """A traced graph after all passes."""
    watched = Record(f"{session.name}_{kind}", kind)
    for observation in active():
        observation.graphs.append(watched)
    with capture.real_tensors():
        watched.captured = from_fx(rng.unfold(gm), kind)
        watched.graph, steps = session.run(watched.captured, "split")
        watched.history = tuple(steps)
    return watched


def _run(watched: Record, session: Session) -> Run:
    started = time.perf_counter()
    assert watched.graph is not None
    with capture.real_tensors():
        return runnable(session, watched.graph, watched, lambda made: made.executable.run, started)
