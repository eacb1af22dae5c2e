"""One rank of a pipeline: runs its actions on micro-batches, sends and receives what crosses cuts, fills its bubbles.

Everything that travels is known before the first step. Receives are posted a few actions ahead, so that values arrive while
this rank computes. Frozen layers of the batch to come run where the plan places them, between two actions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...cost.microbatches import COMPUTE, Action, Schedule, in_order
from ...ir import TensorType
from .messages import Awaited, Messages
from .programs import Backward, Frozen, Trained
from .reseed import mixed
from .staged import Staged

AHEAD = 2
"""How many receives are posted before they are needed."""

Values = dict[int, Any]


@dataclass(frozen=True, slots=True)
class Placed:
    """A frozen layer on one micro-batch, to be run before the rank's action number `before` (None: behind all)."""

    layer: int
    microbatch: int
    before: int | None


@dataclass(frozen=True)
class Layout:
    """Who does what: the schedule with its sends, the rank (within the pipeline) that runs frozen layers for each
    micro-batch, and when each rank does so."""

    schedule: Schedule
    owners: tuple[int, ...]
    placed: tuple[tuple[Placed, ...], ...]


@dataclass
class Event:
    """What a rank did: `kind` is an action's, "frozen" or "wait", `of` the stage or the frozen layer; nanoseconds of
    `time.perf_counter_ns`."""

    name: str
    kind: str
    of: int
    start: int
    end: int


@dataclass
class Batch:
    """A batch in micro-batches: the leaves of each, who runs its frozen layers, and what these gave, as far as it is known
    here."""

    leaves: list[list[Any]]
    step: int
    owners: tuple[int, ...] = ()
    frozen: list[Values] = field(default_factory=list[Values])
    done: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    awaited: dict[tuple[int, int], tuple[Awaited, tuple[int, ...]]] = field(
        default_factory=dict[tuple[int, int], tuple[Awaited, tuple[int, ...]]]
    )


class Rank:
    """Runs steps. `programs` are those of this rank's stages, `frozen` those of all frozen layers; `state` holds parameters
    and buffers by number; `seed` is the same on all ranks."""

    def __init__(
        self,
        staged: Staged,
        layout: Layout,
        rank: int,
        programs: Mapping[int, Trained],
        frozen: Sequence[Frozen],
        messages: Messages | None,
        peers: Sequence[int],
        seed: int,
    ) -> None:
        self.staged, self.layout, self.rank = staged, layout, rank
        self.programs, self.frozen, self.messages, self.peers, self.seed = programs, frozen, messages, peers, seed
        self.schedule = layout.schedule
        self.actions = list(_single(layout.schedule.ranks[rank])) if messages else list(_all(layout.schedule))
        self.count = self.schedule.microbatches
        self.split: dict[int, Backward] = {
            s: p.parts() for s, p in programs.items() if any(a.kind in ("I", "W") and a.stage == s for a in self.actions)
        }
        self.receives = [i for i, a in enumerate(self.actions) if a.kind.startswith("RECV")]
        self.readers = self._readers()
        self.written = frozenset(i for i, _ in staged.writes)
        self.watching: list[list[Event]] = []

    def _readers(self) -> list[tuple[int, tuple[int, ...]]]:
        """(rank, numbers): what each other rank's stages read of frozen layers."""
        found: dict[int, set[int]] = {}
        for s, reads in enumerate(self.staged.frozen_reads):
            found.setdefault(self.schedule.rank_of[s], set()).update(reads)
        return [(r, tuple(sorted(ids))) for r, ids in sorted(found.items()) if ids]

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, ahead: Batch | None) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
        """Run forwards and backwards of a batch, and frozen layers of the one `ahead`. The mean loss, where the last stage
        is here, and the gradients of parameters by number."""
        self.saved: dict[tuple[int, int], Any] = {}
        self.arrived: dict[tuple[int, str, int], Values] = {}
        self.posted: dict[int, tuple[Awaited, tuple[int, ...]]] = {}
        self.losses: list[torch.Tensor] = []
        self.gradients: dict[int, torch.Tensor] = {}
        self.apart: dict[tuple[int, int], torch.Tensor] = {}
        self.batch, self.ahead = batch, ahead
        self.next_receive = 0
        self.prepare(batch)
        if ahead is not None and self.staged.frozen:
            self.expect(ahead)
        waiting = list(self.layout.placed[self.rank]) if ahead is not None else []
        for i, action in enumerate(self.actions):
            while waiting and waiting[0].before is not None and waiting[0].before <= i:
                self._fill(waiting.pop(0))
            self._post()
            self._do(i, action)
        for placed in waiting:
            self._fill(placed)
        if self.messages is not None:
            self.messages.finish()
        self._join()
        loss = torch.stack(self.losses).sum() / self.count if self.losses else None
        return loss, self.gradients

    def prepare(self, batch: Batch) -> None:
        """Run those frozen layers of a batch that have not been run ahead of time, on this rank's micro-batches."""
        if not self.staged.frozen:
            return
        self.expect(batch)
        for m in range(self.count):
            if self._owns(batch, m):
                for layer in range(len(self.staged.frozen)):
                    if (layer, m) not in batch.done:
                        self._run_frozen(batch, layer, m)

    def _owns(self, batch: Batch, m: int) -> bool:
        return self.messages is None or batch.owners[m] == self.rank

    def expect(self, batch: Batch) -> None:
        """Post the receives of what other ranks compute of a batch's frozen layers."""
        if batch.frozen:
            return
        batch.frozen = [{} for _ in range(self.count)]
        batch.owners = self.layout.owners
        if self.messages is None:
            return
        mine = dict(self.readers).get(self.rank, ())
        for m in range(self.count):
            if self._owns(batch, m) or not mine:
                continue
            for layer, region in enumerate(self.staged.frozen):
                ids = tuple(n for n in region.gives if n in mine)
                if ids:
                    what = f"frozen layer {layer} of micro-batch {m}"
                    found = self._receive(ids, batch.owners[m], self._tag("frozen", layer, m), what)
                    batch.awaited[layer, m] = (found, ids)

    def _fill(self, placed: Placed) -> None:
        if self.ahead is not None and (placed.layer, placed.microbatch) not in self.ahead.done:
            self._run_frozen(self.ahead, placed.layer, placed.microbatch)

    def _run_frozen(self, batch: Batch, layer: int, m: int) -> None:
        region = self.staged.frozen[layer]
        start = time.perf_counter_ns()
        known = batch.frozen[m]
        inputs = [self._operand(n, batch, m, known) for n in region.reads]
        program = self.frozen[layer]
        if program.draws:
            inputs.append(self._seed(batch, m))
        results = program.program.run(inputs)
        known.update(zip(region.gives, results, strict=True))
        batch.done.add((layer, m))
        self._note(f"frozen {layer} of {m}", "frozen", layer, start)
        if self.messages is not None:
            for r, ids in self.readers:
                sending = tuple(n for n in region.gives if n in ids)
                if r != self.rank and sending:
                    what = f"frozen layer {layer} of micro-batch {m}"
                    self._send([known[n] for n in sending], r, self._tag("frozen", layer, m), what)

    def _do(self, i: int, action: Action) -> None:
        kind, stage, m = action.kind, action.stage, action.microbatch
        if kind in ("UNSHARD", "RESHARD", "REDUCE_GRAD"):
            return  # nothing is sharded here, and gradients are summed behind the step
        assert m is not None
        start = time.perf_counter_ns()
        if kind == "F":
            self._forward(stage, m)
        elif kind == "B":
            self._backward(stage, m)
        elif kind == "I":
            self._input(stage, m)
        elif kind == "W":
            self._weight(stage, m)
        elif kind == "SEND_F":
            self._send_values(self.staged.crossing[stage], stage, stage + 1, "F", m)
        elif kind == "SEND_B":
            self._send_values(self.staged.crossing_back[stage - 1], stage, stage - 1, "B", m)
        else:
            self._arrive(i, action)
            self._note(str(action), "wait", stage, start)
            return
        self._note(str(action), kind, stage, start)

    def _note(self, name: str, kind: str, of: int, start: int) -> None:
        for events in self.watching:
            events.append(Event(name, kind, of, start, time.perf_counter_ns()))

    # -- forwards and backwards ---------------------------------------------------------------------------------------

    def _operand(self, n: int, batch: Batch, m: int, known: Values) -> Any:
        if n in self.written:  # the next micro-batch writes it before the backward of this one reads what it was
            return self.staged.state[n].clone()
        if n in self.staged.state:
            return self.staged.state[n]
        if n in self.staged.leaves:
            return batch.leaves[m][self.staged.leaves[n]]
        return known[n]

    def _frozen_values(self, stage: int, m: int) -> Values:
        known = self.batch.frozen[m] if self.batch.frozen else {}
        for n in self.staged.frozen_reads[stage]:
            if n not in known:
                layer = next(i for i, region in enumerate(self.staged.frozen) if n in region.gives)
                awaited, ids = self.batch.awaited.pop((layer, m))
                assert self.messages is not None
                known.update(zip(ids, self.messages.wait(awaited), strict=True))
        return known

    def _forward(self, stage: int, m: int) -> None:
        region, program = self.staged.stages[stage], self.programs[stage]
        came = self.arrived.pop((stage, "F", m), {})
        known = {**self._frozen_values(stage, m), **came}
        inputs = [self._operand(n, self.batch, m, known) for n in region.reads]
        if program.draws:
            inputs.append(self._seed(self.batch, m))
        results = program.forward.run(inputs)
        given = dict(zip(region.gives, results[: program.outputs], strict=True))
        self.saved[stage, m] = results[program.outputs :]
        self._write(stage, given)
        if stage + 1 < len(self.staged.stages):
            out = {n: given[n] if n in given else came[n] for n in self.staged.crossing[stage]}
            self.arrived[stage + 1, "F", m] = out
        else:
            self.losses.append(given[self.staged.loss].detach())

    def _write(self, stage: int, given: Values) -> None:
        for buffer, value in self.staged.writes:
            if value in given:
                self.staged.state[buffer].copy_(given[value])

    def _tangents(self, stage: int, m: int) -> tuple[list[Any], Values]:
        """The gradients of what a stage gives, and those of all that crosses the cut behind it."""
        program, region = self.programs[stage], self.staged.stages[stage]
        came = self.arrived.pop((stage, "B", m), {})
        found: list[Any] = []
        for i in program.tangents:
            n = region.gives[i]
            found.append(came[n] if n in came else _zeros(self.staged.types[n]))
        return found, came

    def _backward(self, stage: int, m: int) -> None:
        program = self.programs[stage]
        saved = self.saved.pop((stage, m))
        tangents, came = self._tangents(stage, m)
        results: Sequence[Any] = () if program.backward is None else program.backward.run([*saved, *tangents])
        by_input = dict(zip(program.of, results, strict=True))
        self._hand_back(stage, m, by_input, came)
        self._accumulate(stage, by_input)

    def _input(self, stage: int, m: int) -> None:
        parts = self.split[stage]
        saved = self.saved.pop((stage, m))
        tangents, came = self._tangents(stage, m)
        given = [*saved, *tangents]
        results: Sequence[Any] = () if parts.input is None else parts.input.run([given[i] for i in parts.input_reads])
        count = len(parts.input_of)
        self._hand_back(stage, m, dict(zip(parts.input_of, results[:count], strict=True)), came)
        self.saved[stage, m] = [*(given[i] for i in parts.weight_reads), *results[count:]]

    def _weight(self, stage: int, m: int) -> None:
        parts = self.split[stage]
        inputs = self.saved.pop((stage, m))
        if parts.weight is not None:
            self._accumulate(stage, dict(zip(parts.weight_of, parts.weight.run(inputs), strict=True)))

    def _hand_back(self, stage: int, m: int, by_input: Mapping[int, Any], came: Values) -> None:
        """What the stage before gets: its gradients as they came from behind, with those of this stage added."""
        if stage == 0:
            return
        region = self.staged.stages[stage]
        mine = {region.reads[i]: g for i, g in by_input.items()}
        out: Values = {}
        for n in self.staged.crossing_back[stage - 1]:
            later, own = came.get(n), mine.get(n)
            out[n] = _zeros(self.staged.types[n]) if later is own is None else own if later is None else later
            if later is not None and own is not None:
                out[n] = later + own
        self.arrived[stage - 1, "B", m] = out

    def _accumulate(self, stage: int, by_input: Mapping[int, Any]) -> None:
        region = self.staged.stages[stage]
        old: list[torch.Tensor] = []
        new: list[torch.Tensor] = []
        for i, g in by_input.items():
            n = region.reads[i]
            if n not in self.staged.state:
                continue
            into: dict[Any, torch.Tensor] = self.apart if n in self.staged.shared else self.gradients
            key = (stage, n) if n in self.staged.shared else n
            if key in into:
                old.append(into[key])
                new.append(g)
            else:
                into[key] = g.clone(memory_format=torch.contiguous_format)
        if old:
            torch._foreach_add_(old, new)

    def _join(self) -> None:
        """Sum the gradients of parameters that several stages read. In the stages' order, so that the sum is the same under
        every schedule."""
        for (_, n), g in sorted(self.apart.items(), key=lambda item: item[0]):
            self.gradients[n] = self.gradients[n] + g if n in self.gradients else g

    def _seed(self, batch: Batch, m: int) -> torch.Tensor:
        return torch.tensor(mixed(self.seed, batch.step, m), dtype=torch.int64)

    # -- messages -----------------------------------------------------------------------------------------------------

    def _tag(self, kind: str, stage: int, m: int) -> int:
        """The first tag of a message; tags of one step are used again in the next."""
        room = max(len(self.staged.types), 1)
        rows = {"F": 0, "B": 1, "frozen": 2}
        most = max(len(self.staged.stages), len(self.staged.frozen)) + 1
        return ((rows[kind] * most + stage) * self.count + m) * room

    def _send_values(self, ids: Sequence[int], stage: int, other: int, kind: str, m: int) -> None:
        values = self.arrived.pop((other, kind, m))
        what = f"{'results' if kind == 'F' else 'gradients'} of stage {stage} for micro-batch {m}"
        self._send([values[n] for n in ids], self.schedule.rank_of[other], self._tag(kind, other, m), what)

    def _send(self, tensors: Sequence[torch.Tensor], rank: int, tag: int, what: str) -> None:
        assert self.messages is not None
        self.messages.send(tensors, self.peers[rank], tag, what)

    def _receive(self, ids: Sequence[int], rank: int, tag: int, what: str) -> Awaited:
        assert self.messages is not None
        tensors = [
            torch.empty(kind.shape, dtype=kind.dtype, device=kind.device) for kind in (self.staged.types[n] for n in ids)
        ]
        return self.messages.receive(tensors, self.peers[rank], tag, what)

    def _post(self) -> None:
        """Post receives so that some more than those that were waited for are on their way."""
        while self.next_receive < len(self.receives) and len(self.posted) < AHEAD:
            i = self.receives[self.next_receive]
            action = self.actions[i]
            assert action.microbatch is not None
            forward = action.kind == "RECV_F"
            other = action.stage - 1 if forward else action.stage + 1
            ids = self.staged.crossing[other] if forward else self.staged.crossing_back[action.stage]
            what = f"{'results' if forward else 'gradients'} of stage {other} for micro-batch {action.microbatch}"
            tag = self._tag("F" if forward else "B", action.stage, action.microbatch)
            self.posted[i] = (self._receive(ids, self.schedule.rank_of[other], tag, what), ids)
            self.next_receive += 1

    def _arrive(self, i: int, action: Action) -> None:
        assert self.messages is not None and action.microbatch is not None
        awaited, ids = self.posted.pop(i)
        values = self.messages.wait(awaited)
        self.arrived[action.stage, action.kind[-1], action.microbatch] = dict(zip(ids, values, strict=True))


def _zeros(kind: TensorType) -> torch.Tensor:
    shape: Any = kind.shape
    return torch.zeros(shape, dtype=kind.dtype, device=kind.device)


def _single(actions: Iterable[Action]) -> Iterable[Action]:
    for action in actions:
        yield from action.parts or (action,)


def _all(schedule: Schedule) -> Iterable[Action]:
    """The actions of all ranks in an order in which a single process can run them. There nothing travels."""
    return (a for _, action in in_order(schedule) for a in (action.parts or (action,)) if a.kind in COMPUTE)


__all__ = ["AHEAD", "Batch", "Event", "Layout", "Placed", "Rank"]
