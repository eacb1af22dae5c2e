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
from ...runtime.direct import Direct, NotDirect, Result
from ...runtime.panels import Panels
from ...runtime.plan import Plan
from .. import capture, rng
from ..freeze import freeze
from ..observe import Record, active
from ..partition import partition
from ..pipelines import Session
from ..plans import generated, runnable
from .blocks import Block, without_modes
from .native import record

log = logging.getLogger(__name__)

HEIGHT = 1009  # rows of pools in the trace, likewise
EXAMPLE = 37  # instances in the trace: a number that no other size is likely to have, since equal sizes would be tied

Run = Callable[[list[Any]], Sequence[Any]]


class BakedSize(Exception):
    """A block was traced for one number of instances."""


@dataclass(frozen=True)
class Compiled:
    """A block's graphs. `forward` takes stacked arguments and shared tensors, and gives results and what the backward reads;
    `backward` takes that, numbers first, and the gradients of the results `differentiable`, and gives those of all arguments
    and shared tensors, None for those that want none. `layouts` are the shapes, strides and dtypes of shared tensors that it
    holds for. Without `forward` it runs without Python.
    """

    layouts: tuple[Any, ...]
    forward: Run | None = None
    backward: Run | None = None
    differentiable: tuple[int, ...] = ()

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
        if block.grad
        and (t.dtype.is_floating_point or t.dtype.is_complex)
        and (k < count or block.shared[k - count].requires_grad)
    )
    with without_modes():
        traced, fakes, differentiable = _traced(block, wanting, (), session)
        if not wanting:
            watched = _passed(traced, "inference", session)
            direct = _handed_over(block, watched, session, native)
            return Compiled(layouts_of(block.shared), None if direct else _run(watched, session))
        graphs = partition(traced, fakes, session.options.recompute, num_fwd_outputs=len(block.outputs))
        watches = [_passed(gm, kind, session) for gm, kind in zip(graphs, ("forward", "backward"), strict=True)]
        if _handed_over_both(block, watches[0], watches[1], differentiable, session, native):
            return Compiled(layouts_of(block.shared))
        forward, backward = (_run(w, session) for w in watches)
        return Compiled(layouts_of(block.shared), forward, backward, differentiable)


def layouts_of(shared: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What of shared tensors a compiled block relies on."""
    return tuple((s.shape, s.stride(), s.dtype) for s in shared)


def compile_indexed(block: Block, places: tuple[int, ...], session: Session, native: Any) -> bool:
    """Compile a block once more, with the arguments at `places` read from their pools through the ids of their rows, and
    hand that to `native`, which then measures which way is faster. False where it would need Python to run. Raises what
    tracing and lowering raise."""
    with without_modes():
        traced, _, _ = _traced(block, (), places, session)
        watched = _passed(traced, "inference", session)
        return _handed_over(block, watched, session, native, places)


def _traced(
    block: Block, wanting: tuple[int, ...], places: tuple[int, ...], session: Session
) -> tuple[Any, list[torch.Tensor], tuple[int, ...]]:
    """(the graph of a block's batched form, its fake inputs, results that have gradients). Its inputs are stacked arguments,
    but of those at `places` their pools; the row ids of these; shared tensors."""
    count, rows = len(block.inputs), len(block.inputs) + len(places)
    differentiable: tuple[int, ...] = ()

    def flat(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal differentiable
        stacked = list(values[:count])
        for k, ids in zip(places, values[count:rows], strict=True):
            stacked[k] = stacked[k].index_select(0, ids)
        stand_ins = {id(s): v for s, v in zip(block.shared, values[rows:], strict=True)}
        with Substitute(stand_ins):
            made = block.batched(stacked)
        differentiable = tuple(k for k, x in enumerate(made) if x.requires_grad)
        apart = [x._is_view() or any(x is v for v in values) for x in made]  # results need memory of their own
        contiguous = torch.contiguous_format
        return tuple(
            x.clone(memory_format=contiguous) if view else x.contiguous() for x, view in zip(made, apart, strict=True)
        )

    fakes = _fakes(block, wanting, places)
    decompositions = table(session.options.keep_ops)
    with torch.set_grad_enabled(bool(wanting)):
        traced: Any = aot_export_joint_simple(flat, tuple(fakes), trace_joint=bool(wanting), decompositions=decompositions)
    _check_any_size(fakes)
    return traced, fakes, differentiable


def _handed_over(block: Block, watched: Record, session: Session, native: Any | None, places: tuple[int, ...] = ()) -> bool:
    """Whether `native` can run a block now, and Python need not. Its plan has shared
    tensors as constants, so that matrices lie in panels, which are laid out anew for each call. The arguments at `places`
    are read through ids."""
    if native is None or record.Quick is None or session.decisions.watched:
        return False
    graph, count = watched.graph, len(block.inputs)
    assert graph is not None
    shared = {count + len(places) + k: s.detach() for k, s in enumerate(block.shared)}
    if graph.constants or not all(s.is_contiguous() for s in shared.values()):
        return False
    frozen = freeze(graph, shared)
    names = {name: k for k, name in enumerate(frozen.constants)}
    try:
        watched.compiled = generated(session, frozen)
        found = watched.compiled.direct()
        heights = tuple(slot for slot, input, dim in found.symbols if input in places and dim == 0)
        counts = _counts(watched.compiled.plan, found, "", heights)
        outputs = _memory(found, len(block.outputs))
    except NotDirect as why:
        log.info("%s at %s runs from Python: %s", block.name, block.source, why)
        return False
    bases, panels = [-1] * len(shared), []
    for name, base in found.constants:
        if name in names:
            bases[names[name]] = base
        elif (laid := Panels.named(name)) is not None and laid.weight in names:
            item = block.shared[names[laid.weight]].element_size()
            panels += [names[laid.weight], base, laid.layout == "k", laid.n, laid.k, item]
        else:
            return False
    flat = _flat(found, counts, (*found.inputs[:count], *bases), outputs, panels)
    if places:
        rows = dict(zip(places, found.inputs[count:], strict=False))
        native.indexed(block.number, flat, tuple(rows.get(k, -1) for k in range(count)), heights)
    else:
        native.direct(block.number, flat)
    return True


def _handed_over_both(
    block: Block,
    forward: Record,
    backward: Record,
    differentiable: tuple[int, ...],
    session: Session,
    native: Any | None,
) -> bool:
    """Like `_handed_over`, for a block that gradients go through: `native` runs its backward, too."""
    if native is None or record.Quick is None or session.decisions.watched:
        return False
    try:
        found = []
        for watched in (forward, backward):
            assert watched.graph is not None
            if watched.graph.constants:
                raise NotDirect("it has constants")
            watched.compiled = generated(session, watched.graph)
            found.append(watched.compiled.direct())
        first, second = found
        assert forward.compiled is not None and backward.compiled is not None
        if not forward.compiled.plan.symbols:
            raise NotDirect("it has no size that varies")
        name = forward.compiled.plan.symbols[0].name
        counts = [_counts(w.compiled.plan, d, name) for w, d in ((forward, first), (backward, second)) if w.compiled]
        results = len(block.outputs)
        saved = [r for r in first.results[results:] if r.kind != "size"]
        numbers = len(first.results) - results - len(saved)
        tangents = [(r, second.inputs[numbers + len(saved) + j]) for j, r in enumerate(differentiable)]
        outputs = _memory(first, results)
        kept = [_kept(r, second.inputs[numbers + i], len(block.inputs), outputs) for i, r in enumerate(saved)]
        gradients = [g for k, r in enumerate(second.results) for g in _gradient(block, k, r, numbers + len(saved))]
    except NotDirect as why:
        log.info("%s at %s runs from Python: %s", block.name, block.source, why)
        return False
    native.trained(
        block.number,
        _flat(first, counts[0], first.inputs, outputs, ()),
        _flat(second, counts[1], second.inputs, (), ()),
        tuple(x for entry in kept for x in entry),
        tuple(x for pair in tangents for x in pair),
        tuple(x for entry in gradients for x in entry),
    )
    return True


def _flat(
    found: Direct, counts: tuple[int, ...], inputs: Sequence[int], outputs: Sequence[int], panels: Sequence[int]
) -> Any:
    """A plan as `direct_of` of launch.cpp takes it."""
    checks = tuple(x for pair in found.checks for x in pair)
    return (
        found.run, found.sizes, found.program, found.slots, counts, found.arena, found.bases, tuple(inputs), tuple(outputs),
        checks, tuple(panels), found,
    )  # fmt: skip


def _counts(plan: Plan, found: Direct, name: str, heights: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The slots of the number of instances. Raises NotDirect where a plan has other sizes that vary, pools' `heights`
    aside."""
    slots = tuple(slot for slot, _, _ in found.symbols if slot not in heights)
    if len(slots) > 1 or any(name and s.name != name for s in plan.symbols):
        raise NotDirect("it has several sizes that vary")
    return slots


def _memory(found: Direct, count: int) -> tuple[int, ...]:
    """The bases of a plan's first results. Raises NotDirect for those that are no memory of their own."""
    bases = tuple(r.at for r in found.results[:count])
    if any(r.kind != "memory" or not r.contiguous for r in found.results[:count]) or len(set(bases)) < count:
        raise NotDirect("a result is an argument, or another one, or not contiguous")
    return bases


def _kept(result: Result, base: int, count: int, outputs: tuple[int, ...]) -> tuple[int, int, int, int]:
    """What the forward keeps for the backward, as `Trained::Saved` of state.h."""
    if result.kind == "memory" and result.at in outputs:
        return 3, outputs.index(result.at), 0, base
    if result.kind == "memory":
        return 0, result.at, result.bytes, base
    if result.kind != "input":
        raise NotDirect("it keeps nothing where a tensor is read")
    return (1, result.at, 0, base) if result.at < count else (2, result.at - count, 0, base)


def _gradient(block: Block, k: int, result: Result, first: int) -> list[tuple[int, int, int, int]]:
    """A gradient that the backward gives, as `Trained::Gradient` of state.h; none where nobody wants it."""
    if result.kind == "none":
        return []
    count = len(block.inputs)
    dtype = block.inputs[k].dtype if k < count else block.shared[k - count].dtype
    passed = result.kind == "input" and result.at >= first and k < count
    if dtype not in (torch.float32, torch.float64) or not (passed or result.kind == "memory") or not result.contiguous:
        raise NotDirect("a gradient is of another kind")
    return [(k, -1 - (result.at - first) if passed else result.at, -1 if passed else result.bytes, dtype.itemsize)]


def _check_any_size(fakes: Sequence[Any]) -> None:
    """Raise BakedSize where the trace holds for so many instances, or pools of so many rows, only."""
    sizes = [x.shape[0] for x in fakes if x.dim() and not isinstance(x.shape[0], int)]
    if not sizes or any(s.node.shape_env.replace(s.node.expr).is_number for s in sizes):
        raise BakedSize(f"its trace holds for {EXAMPLE} instances only")


def _fakes(block: Block, wanting: Sequence[int], places: Sequence[int]) -> list[torch.Tensor]:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    found = []

    def fake(real: torch.Tensor) -> torch.Tensor:
        how = StatelessSymbolicContext([DimDynamic.DUCK, *[DimDynamic.STATIC] * (real.dim() - 1)])
        return mode.from_tensor(real, symbolic_context=how)

    for k, t in enumerate(block.inputs):
        size = HEIGHT if k in places else EXAMPLE
        found.append(fake(torch.empty((size, *t.shape), dtype=t.dtype, device=t.device, requires_grad=k in wanting)))
    found += [fake(torch.zeros(EXAMPLE, dtype=torch.int64)) for _ in places]
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
