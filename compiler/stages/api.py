"""`plait.staged_step`: a training step in pipeline stages, one or several on each rank.

step = plait.staged_step(model, loss, optimizer, mesh, microbatches=8)
for value in step.over(batches):                  # forward, backward, optimizer.step() of each batch; the mean loss
    ...
print(step)                                       # what was cut where, what is frozen

Every rank holds the whole model, is called with the same batches, and trains the parameters of its own stages; what other
ranks hold of these is old until `synchronise`. Layers that no gradient reaches run one batch ahead, in bubbles.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from ...cost.microbatches import NAMED, Schedule
from ...errors import BadSchedule, BatchChanged, CannotStage, NotCompiledYet
from ...passes.stages.stages import Cutting
from ..export import name_of
from ..options import Options
from ..pipelines import Session
from ..training.checks import check_model, check_optimizer
from ..training.ranks import Ranks
from .capture import capture
from .execute import Batch, Event, Layout, Placed, Rank
from .messages import Messages
from .placing import Placement, agree
from .programs import Frozen, Trained
from .staged import Staged, staged

MEASURED = 3
"""After so many steps frozen layers are placed by what these took."""


def staged_step(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    mesh: Any = None,
    *,
    microbatches: int = 4,
    schedule: str | Schedule = "1f1b",
    stages: int | None = None,
    begin: Sequence[str] = (),
    fill: bool = True,
    placed: Sequence[Sequence[Placed]] | None = None,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> StagedStep:
    """Train a model in pipeline stages; the result is called with a batch and returns its mean loss.

    `loss(model, *batch)` gives a mean over the rows of its batch; batches are cut along the first dimension into
    `microbatches` equal parts. `mesh` (a 1-D DeviceMesh or a ProcessGroup) names the ranks, which form pipelines beside each
    other of as many ranks as the schedule has; without a mesh one process runs all stages. `schedule` is gpipe, 1f1b,
    interleaved, zero-bubble, or one that was read from a file. `stages` (by default one for each rank) are cut evenly, or
    `begin` names the modules that the second one and those behind it begin with. Without `fill` frozen layers run before
    each step; `placed` says for each rank when they run instead of where bubbles are expected. Random draws follow from
    `seed` (by default torch's initial one on the first rank), the step and the micro-batch alone.

    Raises WrappedModel, NothingToTrain, ForeignParameters, SeveralDevices, BadMesh, BadSchedule; the first call raises
    CannotStage, LossIsNoScalar, BatchChanged and what compiling raises.
    """
    check_model(model)
    check_optimizer(model, optimizer)
    ranks = Ranks.of(mesh)
    begin = (begin,) if isinstance(begin, str) else begin
    plan = _schedule(schedule, ranks, stages, len(begin), microbatches)
    return StagedStep(
        model, loss, optimizer, ranks, plan, tuple(begin), fill, placed, seed, Options.of(options), name or name_of(model)
    )


def _schedule(given: str | Schedule, ranks: Ranks | None, stages: int | None, begin: int, microbatches: int) -> Schedule:
    if isinstance(given, Schedule):
        found = given.check()
        if found.microbatches != microbatches:
            raise BadSchedule(why=f"it is for {found.microbatches} micro-batches, and {microbatches} were asked for")
    elif given not in NAMED:
        raise BadSchedule(why=f"{given!r} is none of {', '.join(NAMED)}")
    else:
        each = 2 if given == "interleaved" else 1
        count = stages or (begin + 1 if begin else each * ranks.count if ranks else each)
        if given == "interleaved":
            if count % 2:
                raise BadSchedule(why=f"{count} stages are not two for each rank")
            count //= 2
        found: Schedule = NAMED[given](count, microbatches).check()
    made = len(found.chains[0])
    if len(found.chains) > 1 or found.self_conditioned:
        raise BadSchedule(why="schedules of two backbones, and of self-conditioning, can be planned, not run")
    wanted = begin + 1 if begin else stages
    if wanted is not None and wanted != made:
        raise BadSchedule(why=f"it has {made} stages, and {wanted} were asked for")
    if ranks is not None and ranks.count % len(found.ranks):
        raise BadSchedule(why=f"it is for {len(found.ranks)} ranks, which do not divide the {ranks.count} of the mesh")
    if ranks is not None:
        _check_travels(found.with_comms())
    return found


def _check_travels(schedule: Schedule) -> None:
    """Raise BadSchedule where a file says when values travel, but not for all of them."""
    for rank, actions in enumerate(schedule.ranks):
        come: set[tuple[int, str, int | None]] = set()
        for action in itertools.chain.from_iterable(a.parts or (a,) for a in actions):
            come.add((action.stage, action.kind, action.microbatch))
            along = {"F": -1, "B": 1, "I": 1}.get(action.kind)
            other = None if along is None else schedule.beside(action.stage, along)
            if other is None or schedule.rank_of[other] == rank:
                continue
            receive = "RECV_F" if along == -1 else "RECV_B"
            if (action.stage, receive, action.microbatch) not in come:
                raise BadSchedule(why=f"rank {rank} does {action} without {action.stage}{receive}{action.microbatch} before")


@dataclass(frozen=True)
class _Announced:
    """The batch to come, what was made of it ahead of time, and the versions of what that was made from."""

    batch: tuple[Any, ...]
    made: Batch
    versions: tuple[int, ...]


class StagedStep:
    """A training step in stages, compiled at its first call for batches of one signature."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        ranks: Ranks | None,
        schedule: Schedule,
        begin: tuple[str, ...],
        fill: bool,
        placed: Sequence[Sequence[Placed]] | None,
        seed: int | None,
        options: Options,
        name: str,
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.schedule, self.options, self.name = schedule, options, name
        self._begin, self._fill, self._placed = begin, fill, placed
        self._ranks, self._count = ranks, schedule.microbatches
        self._pipeline = len(schedule.ranks) if ranks is not None else 1
        self._seed = torch.initial_seed() if seed is None else seed
        self._steps = 0
        self._ran = 0  # of these by this object: the others were made before a checkpoint
        self._signature: tuple[Any, ...] | None = None
        self._runner: Rank | None = None
        self._staged: Staged | None = None
        self._ahead: _Announced | None = None
        self._beside: Any = None
        self._messages: Messages | None = None
        self._measuring: list[Event] = []
        self.placement: Placement | None = None
        if ranks is not None:
            ranks.share([*model.parameters(), *model.buffers()])
            told = [self._seed]
            dist.broadcast_object_list(told, group_src=0, group=ranks.group)
            self._seed = told[0]
            self._make_groups(ranks)

    def _make_groups(self, ranks: Ranks) -> None:
        """What this rank talks through: the ranks of the mesh, and those that hold the same stages in other pipelines."""
        if ranks.count > self._pipeline:
            members = dist.get_process_group_ranks(ranks.group)[ranks.group.rank() % self._pipeline :: self._pipeline]
            self._beside = dist.new_group(members, use_local_synchronization=True)
        self._messages = Messages(ranks.group, [self._beside] if self._beside is not None else [])

    # -- calls --------------------------------------------------------------------------------------------------------

    def __call__(self, *batch: Any, ahead: tuple[Any, ...] | None = None) -> torch.Tensor:
        """Train on a batch; `ahead` is the next one, whose frozen layers then run in this step's bubbles.

        Raises BatchChanged for a batch of another signature, one that micro-batches do not divide, or another one than was
        announced; StageLost, StageTimedOut where another rank is gone.
        """
        try:
            return self._call(batch, ahead)
        except BaseException:
            if self._runner is None:
                self._signature = None  # nothing was compiled for it
            self._ahead = None
            if self._messages is not None:
                self._messages.close()
            raise

    def over(self, batches: Iterable[Any]) -> Iterator[torch.Tensor]:
        """Train on batches, each a tuple, or a single tensor; each one's frozen layers run during the step before."""
        tuples = (b if isinstance(b, tuple) else tuple(b) if isinstance(b, list) else (b,) for b in batches)
        current = next(tuples, None)
        while current is not None:
            following = next(tuples, None)
            yield self(*current, ahead=following)
            current = following

    def _call(self, batch: tuple[Any, ...], ahead: tuple[Any, ...] | None) -> torch.Tensor:
        self._check(batch)
        if ahead is not None:
            self._check(ahead)
        runner = self._runner or self._compile(batch)
        state = torch.get_rng_state()
        try:
            mine = self._taken(batch)
            coming = None
            if ahead is not None and self._fill:
                coming = self._batch(ahead, self._steps + 1)
                self._ahead = _Announced(ahead, coming, self._versions(runner.staged, ahead))
            loss, gradients = runner.step(mine, coming)
        finally:
            torch.set_rng_state(state)
        gradients = self._summed(gradients)
        assert self._staged is not None
        for p in self.model.parameters():
            p.grad = None
        for n, g in gradients.items():
            self._staged.state[n].grad = g
        told = self._told(loss)
        self.optimizer.step()
        self._steps += 1
        self._ran += 1
        if self._ran == MEASURED and runner.messages is not None and self._placed is None:
            self._place(runner)
        return told()

    def _place(self, runner: Rank) -> None:
        """Let frozen layers run where bubbles were measured to be."""
        runner.watching[:] = [events for events in runner.watching if events is not self._measuring]
        self.placement = agree(runner, self._measuring)
        if self._fill and runner.staged.frozen:
            runner.layout = self.placement.layout

    def _taken(self, batch: tuple[Any, ...]) -> Batch:
        """The micro-batches of a batch, with what was computed of them ahead of time."""
        if self._ahead is None:
            return self._batch(batch, self._steps)
        announced, self._ahead = self._ahead, None
        pairs = zip(pytree.tree_leaves(announced.batch), pytree.tree_leaves(batch), strict=True)
        if any(a is not b for a, b in pairs if isinstance(a, torch.Tensor)):
            what = "the batch is not the one that was announced as `ahead`, whose frozen layers have been computed"
            raise BatchChanged(what=what, way="pass the same tensors, or leave out `ahead`; `over(batches)` does it right")
        assert self._staged is not None
        if announced.versions != self._versions(self._staged, batch):
            what = "the batch or a frozen parameter was written to since frozen layers ran on what was announced as `ahead`"
            way = "let each batch have tensors of its own; pass `fill=False` where frozen parameters follow the trained ones"
            raise BatchChanged(what=what, way=way)
        return announced.made

    @staticmethod
    def _versions(found: Staged, batch: tuple[Any, ...]) -> tuple[int, ...]:
        """Changes with every write to what frozen layers read."""
        read = {n for region in found.frozen for n in region.reads if n in found.state}
        tensors = [*(found.state[n] for n in sorted(read)), *pytree.tree_leaves(batch)] if found.frozen else []
        return tuple(t._version for t in tensors if isinstance(t, torch.Tensor) and not t.is_inference())

    def _batch(self, batch: tuple[Any, ...], step: int) -> Batch:
        leaves = pytree.tree_leaves(batch)
        index = 0 if self._ranks is None else self._ranks.group.rank() // self._pipeline
        pipelines = 1 if self._ranks is None else self._ranks.count // self._pipeline
        rows = self._rows(leaves) // (self._count * pipelines)
        parts: list[list[Any]] = []
        for m in range(self._count):
            at = (index * self._count + m) * rows
            parts.append([_part(t, at, rows) for t in leaves])
        return Batch(parts, step * pipelines + index)

    @staticmethod
    def _rows(leaves: Sequence[Any]) -> int:
        return next((len(t) for t in leaves if isinstance(t, torch.Tensor) and t.dim()), 0)

    def _check(self, batch: tuple[Any, ...]) -> None:
        leaves, spec = pytree.tree_flatten(batch)
        sizes = {len(t) for t in leaves if isinstance(t, torch.Tensor) and t.dim()}
        if len(sizes) != 1:
            found = ", ".join(map(str, sorted(sizes))) or "no tensor with rows"
            what = f"tensors of a batch must have equally many rows, and these have {found}"
            raise BatchChanged(what=what, way="put what belongs to no row into the model or the loss")
        parts = self._count * (1 if self._ranks is None else self._ranks.count // self._pipeline)
        (rows,) = sizes
        if rows % parts or not rows:
            what = f"a batch of {rows} rows cannot be cut into {parts} equal micro-batches"
            raise BatchChanged(what=what, way="drop or pad the last batch of an epoch, or choose other `microbatches`")
        kinds = tuple((tuple(t.shape), t.dtype, t.device) if isinstance(t, torch.Tensor) else t for t in leaves)
        modes = tuple(module.training for module in self.model.modules())
        trained = tuple((p.requires_grad, p.shape, p.dtype, p.stride()) for p in self.model.parameters())
        signature = (spec, kinds, modes, trained)
        if self._signature is None:
            self._signature = signature
        elif signature != self._signature:
            raise BatchChanged(
                what=_difference(self._signature, signature), way="make a `staged_step` for each kind of batch"
            )

    # -- compiling ----------------------------------------------------------------------------------------------------

    def _compile(self, batch: tuple[Any, ...]) -> Rank:
        spec = pytree.tree_structure(batch)
        micro = pytree.tree_unflatten(self._batch(batch, 0).leaves[0], spec)
        captured = capture(self.model, self.loss, micro)
        cutting = Cutting.of(captured.graph, captured.trained)
        count = len(self.schedule.chains[0])
        positions = cutting.at_modules(self._begin) if self._begin else cutting.balanced(count) if count > 1 else []
        found = staged(captured, cutting, positions)
        self._refuse_shared(found)
        self._agree(found)
        self._staged, self.report = found, cutting.report(positions)
        rank, peers = 0, list[int]()
        if self._ranks is not None:
            here = self._ranks.group.rank()
            rank, first = here % self._pipeline, here - here % self._pipeline
            peers = list(range(first, first + self._pipeline))
        messages = self._messages if self._pipeline > 1 else None
        schedule = self.schedule.with_comms() if messages is not None else self.schedule
        layout = self._layout(schedule, len(found.frozen))
        session = Session(self.name, self.options)
        programs: dict[int, Trained] = {}
        for s, region in enumerate(found.stages):
            if messages is None or schedule.rank_of[s] == rank:
                made = found.program(session, region, 1 / self._count)
                assert isinstance(made, Trained)
                programs[s] = made
        frozen = [found.program(session, region, 1.0) for region in found.frozen]
        self._runner = Rank(
            found, layout, rank, programs, [f for f in frozen if isinstance(f, Frozen)], messages, peers, self._seed
        )  # fmt: skip
        if messages is not None and self._placed is None:
            self._runner.watching.append(self._measuring)
        return self._runner

    def _agree(self, found: Staged) -> None:
        """Raise where ranks have come to other stages than this one: what they send would not be what others expect."""
        if self._messages is None:
            return
        kinds = self._signature[1] if self._signature is not None else ()
        leaves = ", ".join(map(_kind, kinds))
        mine = (leaves, hashlib.blake2b(f"{found.graph}\n{self.schedule}".encode()).hexdigest())
        for rank, other in enumerate(self._messages.gathered(mine, "the stages that other ranks have cut")):
            if other[0] != mine[0]:
                what = f"rank {rank} was given a batch of ({other[0]}), and this one of ({leaves})"
                raise BatchChanged(what=what, way="pass the same batches on all ranks")
            if other != mine:
                why = f"rank {rank} captured another graph, or has another schedule, than this one"
                raise CannotStage(why=why, way="make the same model, loss and `staged_step` on all ranks")

    def _refuse_shared(self, found: Staged) -> None:
        for n, where in found.shared.items():
            if len({self.schedule.rank_of[s] for s in where}) > 1 and self._ranks is not None:
                what = f"parameter {found.names[n]!r} is used by stages {where} on several ranks"
                raise CannotStage(why=what, way="cut so that one rank holds all layers that use it, or untie it")

    def _layout(self, schedule: Schedule, frozen: int) -> Layout:
        ranks = len(schedule.ranks)
        owners = tuple(m % ranks for m in range(self._count))
        if self._placed is not None:
            return Layout(schedule, owners, tuple(tuple(p) for p in self._placed))
        return Layout(schedule, owners, tuple(_spread(schedule, rank, owners, frozen) for rank in range(ranks)))

    # -- what ranks exchange behind a step ----------------------------------------------------------------------------

    def _summed(self, gradients: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Gradients averaged over pipelines beside each other."""
        if self._ranks is None or self._ranks.count == self._pipeline or not gradients:
            return gradients
        assert self._messages is not None
        pipelines, group = self._ranks.count // self._pipeline, self._beside
        waiting = [
            self._messages.together(lambda g=g: dist.all_reduce(g, group=group, async_op=True), "the sum of gradients")
            for _, g in sorted(gradients.items())
        ]
        for wait in waiting:
            wait()
        torch._foreach_div_(list(gradients.values()), pipelines)
        return gradients

    def _told(self, loss: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        """The mean loss of the whole batch, known on all ranks."""
        if self._ranks is None:
            assert loss is not None
            return lambda: loss
        assert self._messages is not None and self._staged is not None
        kind = self._staged.types[self._staged.loss]
        value = torch.zeros((), dtype=torch.float64, device=kind.device)
        if loss is not None:
            value += loss / (self._ranks.count // self._pipeline)
        group = self._ranks.group
        wait = self._messages.together(lambda: dist.all_reduce(value, group=group, async_op=True), "the mean loss")

        def told() -> torch.Tensor:
            wait()
            return value.to(kind.dtype)

        return told

    def synchronise(self) -> None:
        """Give all ranks the parameters and buffers as their stages have trained them, as before a checkpoint; what the
        optimizer holds stays with the ranks. All ranks call this."""
        if self._ranks is None:
            return
        if self._staged is None:
            raise NotCompiledYet(name=self.name)
        assert self._messages is not None
        owner: dict[int, int] = {}
        for s, region in enumerate(self._staged.stages):
            for n in region.reads:
                if n in self._staged.state:
                    owner.setdefault(n, self.schedule.rank_of[s])
        group = self._ranks.group
        for n, rank in sorted(owner.items()):
            tensor = self._staged.state[n].detach()
            dense = tensor.contiguous()  # gloo takes no other; the tensor itself where it is
            start = partial(dist.broadcast, dense, group_src=rank, group=group, async_op=True)
            self._messages.together(start, f"{self._staged.names[n]!r} as rank {rank} has trained it")()
            if dense is not tensor:
                tensor.copy_(dense)

    def state_dict(self) -> dict[str, int]:
        """What random draws follow from: `seed`, and how many `steps` were made. For a checkpoint, beside what model and
        optimizer hold; an optimizer has a state for the parameters that its rank trains alone."""
        return {"seed": self._seed, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Draw from now on as the step whose state this is would have. All ranks call this, with the same state. Raises
        BatchChanged where the next batch has been announced."""
        if self._ahead is not None:
            what = "the next batch was announced as `ahead`, and its frozen layers have drawn for another step"
            raise BatchChanged(what=what, way="load a state before the first step, or behind one without `ahead`")
        self._seed, self._steps = state["seed"], state["steps"]
        if self._runner is not None:
            self._runner.seed = self._seed

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """Collects what this rank does in the steps within the block, and when."""
        if self._runner is None:
            raise NotCompiledYet(name=self.name)
        watching = self._runner.watching
        watching.append(events := list[Event]())
        try:
            yield events
        finally:
            watching[:] = [one for one in watching if one is not events]

    def __str__(self) -> str:
        return f"{self!r}\n{self.report}" if self._staged is not None else repr(self)

    def __repr__(self) -> str:
        ranks = len(self.schedule.ranks)
        return (
            f"<StagedStep {self.name}: {len(self.schedule.chains[0])} stages on {ranks} ranks, {self._count} micro-batches>"
        )


def _spread(schedule: Schedule, rank: int, owners: Sequence[int], frozen: int) -> tuple[Placed, ...]:
    """A rank's frozen work where it would wait, by the numbers of actions alone: before each receive as much as the rest."""
    actions = list(itertools.chain.from_iterable(a.parts or (a,) for a in schedule.ranks[rank]))
    places: list[int | None] = [i for i, a in enumerate(actions) if a.kind.startswith("RECV")]
    work = [(layer, m) for m, owner in enumerate(owners) if owner == rank for layer in range(frozen)]
    if not places:
        return tuple(Placed(layer, m, None) for layer, m in work)
    each = len(work) / len(places)
    return tuple(Placed(layer, m, places[min(int(i / each), len(places) - 1)]) for i, (layer, m) in enumerate(work))


def _part(leaf: Any, at: int, rows: int) -> Any:
    """A micro-batch's part of a leaf. Each is a tensor of its own: capturing would take what comes twice for one input."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf[at : at + rows] if leaf.dim() else leaf.detach()


def _difference(old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
    if old[0] != new[0]:
        return "this batch nests otherwise than the first one"
    for i, (a, b) in enumerate(zip(old[1], new[1], strict=True)):
        if a != b:
            return f"leaf {i} of this batch is {_kind(b)}, and was {_kind(a)} in the first one"
    if old[2] != new[2]:
        return "a module was switched between training and evaluation since the first batch"
    return "other parameters require gradients than with the first batch"


def _kind(leaf: Any) -> str:
    if isinstance(leaf, tuple):
        shape, dtype, device = leaf
        return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
    return repr(leaf)


__all__ = ["StagedStep", "staged_step"]
