"""Micro-batch schedules: in which order each rank runs the forwards and backwards of its stages' micro-batches.

    rank 0:  0F0 0F1 0B0 0F2 0B1 0B2        an action is <stage><kind><micro-batch>
    rank 1:  1F0 1B0 1F1 1B1 1F2 1B2

Kinds are those of `torch.distributed.pipelining`, whose CSV files are read and written: F forward, B backward, which is I,
the gradient of the stage's inputs, and W, that of its weights; SEND_F, RECV_F, SEND_B, RECV_B between neighbours; UNSHARD,
RESHARD and REDUCE_GRAD around them. C is plait's own: the forward of self-conditioning, that no backward follows. A stage
of several replicas is one rank here: replicas run the same actions, each on its part of the rows.
"""

from __future__ import annotations

import csv
import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..errors import BadSchedule

COMPUTE = ("C", "F", "B", "I", "W")
PAIRED = "OVERLAP_F_B"
WHOLE = ("UNSHARD", "RESHARD", "REDUCE_GRAD")  # of a stage, whatever the micro-batch
_SINGLE = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD|C|F|B|I|W)(\d*)")
_PAIR = re.compile(rf"\(([^()]*)\){PAIRED}")

Key = tuple[int, str, int | None]
"""Stage, kind and micro-batch."""

Format = Literal["compute_only", "compute_comms"]
"""Of a CSV file: whether it says when values travel, too."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does for one micro-batch of one stage. With `parts` it is these, one after the other."""

    stage: int
    kind: str
    microbatch: int | None = None
    parts: tuple[Action, ...] = ()

    @staticmethod
    def of(text: str) -> Action:
        """`2F0`, `1UNSHARD`, `(0F1;1B0)OVERLAP_F_B`. Raises BadSchedule."""
        text = text.strip()
        if (pair := _PAIR.fullmatch(text)) and pair[1].strip():
            return Action(-1, PAIRED, None, tuple(Action.of(part) for part in pair[1].split(";") if part.strip()))
        if (found := _SINGLE.fullmatch(text)) and (found[3] or found[2] in WHOLE):
            return Action(int(found[1]), found[2], int(found[3]) if found[3] else None)
        raise BadSchedule(why=f"{text!r} is no action such as 2F0 or 1SEND_F3")

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"


def _single(actions: Iterable[Action]) -> Iterator[Action]:
    for action in actions:
        yield from action.parts or (action,)


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order. `chains` are stages in the order in which values flow: one chain, or two that run in
    opposite directions over the same ranks."""

    name: str
    ranks: tuple[tuple[Action, ...], ...]
    chains: tuple[tuple[int, ...], ...]

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """The rank of each stage. Raises BadSchedule where one has several."""
        found: dict[int, int] = {}
        for rank, actions in enumerate(self.ranks):
            for action in _single(actions):
                if found.setdefault(action.stage, rank) != rank:
                    raise BadSchedule(why=f"stage {action.stage} is on rank {found[action.stage]} and on rank {rank}")
        return found

    @cached_property
    def microbatches(self) -> int:
        """How many micro-batches a step has."""
        return 1 + max((a.microbatch for a in self._all() if a.microbatch is not None), default=-1)

    @property
    def has_comms(self) -> bool:
        """Whether it has more than what ranks compute."""
        return any(a.kind not in COMPUTE for a in self._all())

    @cached_property
    def has_sends(self) -> bool:
        """Whether it says when values travel."""
        return any(a.kind.startswith(("SEND", "RECV")) for a in self._all())

    @cached_property
    def self_conditioned(self) -> bool:
        """Whether a forward of self-conditioning goes before the forwards of each micro-batch."""
        return any(a.kind == "C" for a in self._all())

    def beside(self, stage: int, by: int) -> int | None:
        """The stage `by` places further along its chain, None beyond its ends."""
        chain = self.chain_of(stage)
        at = chain.index(stage) + by
        return chain[at] if 0 <= at < len(chain) else None

    def chain_of(self, stage: int) -> tuple[int, ...]:
        """The chain that a stage belongs to. Raises BadSchedule."""
        for chain in self.chains:
            if stage in chain:
                return chain
        raise BadSchedule(why=f"stage {stage} is in no chain of stages")

    # -- checks -------------------------------------------------------------------------------------------------------

    def check(self) -> Schedule:
        """This schedule, if every stage runs every micro-batch forward and backward once, values travel in the same order
        at both ends of a link, and it ends. Raises BadSchedule."""
        if not self.microbatches:
            raise BadSchedule(why="it has no micro-batch")
        stages = {stage for chain in self.chains for stage in chain}
        if missing := sorted(stages ^ set(self.rank_of)):
            raise BadSchedule(why=f"stages {missing} are on no rank, or are not among stages 0 to {len(stages) - 1}")
        done: set[Key] = set()
        for action in self._all():
            key = (action.stage, action.kind, action.microbatch)
            if key in done and action.kind in COMPUTE:
                raise BadSchedule(why=f"{action} happens twice")
            done.add(key)
        for stage in stages:
            for m in range(self.microbatches):
                kinds = {k for k in "FBIW" if (stage, k, m) in done}
                if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                    given = ", ".join(sorted(kinds)) or "nothing"
                    raise BadSchedule(why=f"stage {stage} does {given} for micro-batch {m}; it needs F and B, or F, I and W")
        self._check_links()
        in_order(self)
        return self

    def _all(self) -> Iterator[Action]:
        for rank in self.ranks:
            yield from _single(rank)

    def _check_links(self) -> None:
        sent: dict[tuple[int, int], list[Key]] = {}
        got: dict[tuple[int, int], list[Key]] = {}
        for action in self._all():
            if not action.kind.startswith(("SEND", "RECV")):
                continue
            along = 1 if action.kind[-1] == "F" else -1
            other = self.beside(action.stage, along if action.kind.startswith("SEND") else -along)
            if other is None:
                raise BadSchedule(why=f"{action} has no stage at its other end")
            here, there = self.rank_of[action.stage], self.rank_of[other]
            if action.kind.startswith("SEND"):
                sent.setdefault((here, there), []).append((action.stage, action.kind[-1], action.microbatch))
            else:
                got.setdefault((there, here), []).append((other, action.kind[-1], action.microbatch))
        for link in {*sent, *got}:
            if sent.get(link) != got.get(link):
                a, b = link
                raise BadSchedule(why=f"rank {b} does not receive what rank {a} sends, in the order in which it is sent")

    # -- with communication -------------------------------------------------------------------------------------------

    def with_comms(self) -> Schedule:
        """The schedule with sends behind what computes a value, and receives right before what needs it, so that no rank
        waits earlier than it must. On each link values are received in the order in which they are sent."""
        if self.has_sends:
            return self
        made: list[list[Action]] = [[] for _ in self.ranks]
        sent: dict[tuple[int, int], list[Action]] = {}  # per link what waits at the other end: the receives to come
        for rank, action in in_order(self):
            for part in _single([action]):
                needed = self._receive(part)
                link = None if needed is None else (self.rank_of[needed[1]], rank)
                while needed is not None and link is not None and needed[0] in sent.get(link, ()):
                    made[rank].append(sent[link].pop(0))
            made[rank].append(action)
            for part in _single([action]):
                send = self._send(part)
                if send is not None:
                    made[rank].append(send[0])
                    sent.setdefault((rank, self.rank_of[send[1].stage]), []).append(send[1])
        for (_, there), left in sent.items():  # nothing reads these: they must not stay on the link
            made[there] += left
        return Schedule(self.name, tuple(map(tuple, made)), self.chains)

    def _receive(self, action: Action) -> tuple[Action, int] | None:
        """What an action needs from another rank, and the stage it comes from."""
        along = {"F": 1, "C": 1, "B": -1, "I": -1}.get(action.kind, 0)
        other = self.beside(action.stage, -along) if along else None
        if other is None or self.rank_of[other] == self.rank_of[action.stage]:
            return None
        return Action(action.stage, "RECV_F" if along > 0 else "RECV_B", action.microbatch), other

    def _send(self, action: Action) -> tuple[Action, Action] | None:
        """The send behind an action, and the receive at its other end."""
        along = {"F": 1, "C": 1, "B": -1, "I": -1}.get(action.kind, 0)
        other = self.beside(action.stage, along) if along else None
        if other is None or self.rank_of[other] == self.rank_of[action.stage]:
            return None
        kind = "F" if along > 0 else "B"
        return Action(action.stage, f"SEND_{kind}", action.microbatch), Action(other, f"RECV_{kind}", action.microbatch)

    # -- CSV ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def read(path: str | Path, format: Format = "compute_only", *, stages: int | None = None) -> Schedule:
        """The schedule of a CSV file as torch writes it: a line for each rank, empty fields where it idles. Its stages
        form one chain, 0 to `stages` - 1 (by default the largest that occurs). Raises BadSchedule, OSError."""
        try:
            with Path(path).open(newline="") as file:
                rows = [row for row in csv.reader(file) if row]  # an editor may leave an empty line at the end
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadSchedule(why=f"{path} is no CSV file: {error}") from error
        ranks = tuple(tuple(Action.of(cell) for cell in row if cell.strip()) for row in rows)
        count = 1 + max((a.stage for rank in ranks for a in _single(rank)), default=-1) if stages is None else stages
        found = Schedule(Path(path).stem, ranks, (tuple(range(count)),))
        if found.has_comms and format == "compute_only":
            raise BadSchedule(why=f"{path} has more than F, B, I and W, which the format compute_only has no place for")
        return found.check()

    def write(self, path: str | Path, format: Format = "compute_only") -> None:
        """Write it as CSV that `torch.distributed.pipelining` reads. Raises BadSchedule, OSError."""
        if len(self.chains) > 1 or self.self_conditioned:
            raise BadSchedule(why="torch's files hold one chain of stages, without self-conditioning")
        if format == "compute_comms":
            ranks = self.with_comms().ranks
        else:
            ranks = tuple(tuple(a for a in rank if a.kind in (*COMPUTE, PAIRED)) for rank in self.ranks)
        with Path(path).open("w", newline="") as file:
            csv.writer(file).writerows([[str(a) for a in rank] for rank in ranks])

    def __str__(self) -> str:
        return "\n".join(f"rank {i}: {' '.join(map(str, rank))}" for i, rank in enumerate(self.ranks))


def in_order(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Actions of all ranks in an order in which each finds what it needs: the ranks by turns, one action each. Raises
    BadSchedule where ranks wait for each other."""
    done: set[Key] = set()
    heads = [0] * len(schedule.ranks)
    found: list[tuple[int, Action]] = []
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.ranks):
            if heads[rank] == len(actions):
                continue
            action = actions[heads[rank]]
            keys = [_key(schedule, part, done) for part in _single([action])]
            if all(any(option in done for option in options) for key in keys for options in _needs(schedule, *key)):
                done.update(keys)
                heads[rank] += 1
                found.append((rank, action))
                moved = True
    waiting = [str(actions[h]) for h, actions in zip(heads, schedule.ranks, strict=True) if h < len(actions)]
    if waiting:
        raise BadSchedule(why=f"it never ends: {', '.join(waiting)} wait for what comes later")
    return iter(found)


def _key(schedule: Schedule, action: Action, done: set[Key]) -> Key:
    """An action by what it carries: of two sends of a stage for a micro-batch the first is that of C, the second of F."""
    key = (action.stage, action.kind, action.microbatch)
    if action.kind in ("SEND_F", "RECV_F") and schedule.self_conditioned:
        of_c = (action.stage, action.kind.replace("F", "C"), action.microbatch)
        return key if of_c in done else of_c
    return key


def _needs(schedule: Schedule, stage: int, kind: str, m: int | None) -> Iterator[tuple[Key, ...]]:
    """What must have happened before an action: of each tuple one."""
    computed = ("B", "I") if kind in ("B", "I") or kind.endswith("_B") else (kind[-1],)  # what sends and receives carry
    if kind.startswith("SEND"):
        yield tuple((stage, one, m) for one in computed)
    elif kind in ("F", "C", "B", "I") or kind.startswith("RECV"):
        other = schedule.beside(stage, 1 if "B" in computed else -1)
        if other is None:
            pass
        elif kind.startswith("RECV"):
            yield ((other, f"SEND_{computed[0]}", m),)
        elif schedule.has_sends and schedule.rank_of[other] != schedule.rank_of[stage]:
            yield ((stage, f"RECV_{computed[0]}", m),)
        else:
            yield tuple((other, one, m) for one in computed)
    if kind == "F" and schedule.self_conditioned:
        yield ((schedule.chain_of(stage)[-1], "C", m),)
    if kind in ("B", "I"):
        yield ((stage, "F", m),)
    if kind == "W":
        yield ((stage, "I", m),)


# -- the schedules that are known by name -----------------------------------------------------------------------------


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    ranks = tuple(
        (*(Action(s, "F", m) for m in range(microbatches)), *(Action(s, "B", m) for m in range(microbatches)))
        for s in range(stages)
    )
    return Schedule("gpipe", ranks, (tuple(range(stages)),))


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """A few forwards to warm up, then forwards and backwards by turns: at most `stages` - s micro-batches are in flight."""
    ranks: list[tuple[Action, ...]] = []
    for s in range(stages):
        warm = min(microbatches, stages - s - 1)
        actions = [Action(s, "F", m) for m in range(warm)]
        for m in range(microbatches):
            if warm + m < microbatches:
                actions.append(Action(s, "F", warm + m))
            actions.append(Action(s, "B", m))
        ranks.append(tuple(actions))
    return Schedule("1f1b", tuple(ranks), (tuple(range(stages)),))


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B where each rank has `chunks` stages, s, s + ranks, …: bubbles are that much shorter. Micro-batches go in rounds
    of as many as there are ranks, so that they must divide. Raises BadSchedule."""
    if microbatches % ranks:
        raise BadSchedule(why=f"{microbatches} micro-batches do not go in rounds of {ranks}, one for each rank")
    total = microbatches * chunks

    def forward(rank: int, i: int) -> Action:
        return Action(i // ranks % chunks * ranks + rank, "F", i // (ranks * chunks) * ranks + i % ranks)

    def backward(rank: int, i: int) -> Action:
        chunk = chunks - 1 - i // ranks % chunks
        return Action(chunk * ranks + rank, "B", i // (ranks * chunks) * ranks + i % ranks)

    made: list[tuple[Action, ...]] = []
    for rank in range(ranks):
        warm = min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), total)
        actions = [forward(rank, i) for i in range(warm)]
        for i in range(total):
            if warm + i < total:
                actions.append(forward(rank, warm + i))
            actions.append(backward(rank, i))
        made.append(tuple(actions))
    return Schedule("interleaved", tuple(made), (tuple(range(ranks * chunks)),))


@dataclass(frozen=True)
class Times:
    """Seconds of a stage's actions on one micro-batch; `send` is what its result takes to the next stage, or its gradient
    to the one before."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    send: float = 0.0


def zero_bubble(
    stages: int,
    microbatches: int,
    times: Sequence[Times] = (),
    *,
    in_flight: int | None = None,
) -> Schedule:
    """Backwards in two: I at once, since the stage before waits for it, W where a rank would idle.

    W runs where neither the next F nor the next I can start, or where memory asks for it. Each rank takes F and I in the
    order of 1F1B or as they come, whichever is expected to end earlier. As under 1F1B stage s has no more than
    `stages` - s micro-batches without I, and no more than `in_flight` without W (by default `stages`, what the first stage
    has under 1F1B). With more in flight it has `in_flight` - 2 s without I, if that is more, and bubbles vanish.
    Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024: ZB-H1 by default, ZB-H2 with 2 `stages` - 1.
    """
    most = stages if in_flight is None else max(in_flight, 1)
    chain = tuple(range(stages))
    limits = [(max(min(most, stages) - s, most - 2 * s, 1), most) for s in chain]
    found = [
        _Greedy("zero-bubble", (chain,), {s: s for s in chain}, microbatches, times, limits, True, alternating)
        for alternating in (True, False)
    ]
    made = [(one.run(), max(one.free)) for one in found]
    return min(made, key=lambda pair: pair[1])[0]


def bidirectional(stages: int, microbatches: int, times: Sequence[Times] = ()) -> Schedule:
    """Two backbones over the same ranks: stages 0 to `stages` - 1 down, `stages` to 2 `stages` - 1 up, which fill each
    other's bubbles. Source: Li & Hoefler, Chimera, SC 2021."""
    down, up = tuple(range(stages)), tuple(range(stages, 2 * stages))
    rank_of = {s: s for s in down} | {s: 2 * stages - 1 - s for s in up}
    limits = [(stages - s, stages) for s in range(stages)] * 2
    return greedy("bidirectional", (down, up), rank_of, microbatches, times, limits, split=False)


def greedy(
    name: str,
    chains: tuple[tuple[int, ...], ...],
    rank_of: Mapping[int, int],
    microbatches: int,
    times: Sequence[Times],
    in_flight: Sequence[tuple[int, int]],
    *,
    split: bool,
) -> Schedule:
    """The schedule in which each rank starts, whenever it is free, what it can: backwards before forwards before W.
    `in_flight[s]` says how many micro-batches of stage s are at most without I, and without W."""
    return _Greedy(name, chains, rank_of, microbatches, times, in_flight, split, False).run()


class _Greedy:
    def __init__(
        self,
        name: str,
        chains: tuple[tuple[int, ...], ...],
        rank_of: Mapping[int, int],
        microbatches: int,
        times: Sequence[Times],
        in_flight: Sequence[tuple[int, int]],
        split: bool,
        alternating: bool,
    ) -> None:
        self.name, self.chains, self.rank_of, self.count = name, chains, rank_of, microbatches
        self.split, self.alternating = split, alternating
        stages = 1 + max(rank_of)
        self.times = list(times) or [Times()] * stages
        self.limits = in_flight
        self.stages = [[s for s in range(stages) if rank_of[s] == r] for r in range(1 + max(rank_of.values()))]
        self.before = {b: a for chain in chains for a, b in itertools.pairwise(chain)}
        self.after = {a: b for b, a in self.before.items()}
        self.ready: dict[tuple[int, str, int], float] = {}  # when what an action needs is there
        for chain in chains:
            self.ready.update({(chain[0], "F", m): 0.0 for m in range(microbatches)})
        self.next = {(s, k): 0 for s in range(stages) for k in "FIW"}
        self.free = [0.0] * len(self.stages)
        self.made: list[list[Action]] = [[] for _ in self.stages]

    def run(self) -> Schedule:
        events = [(0.0, r) for r in range(len(self.stages))]
        while events:
            now, rank = heapq.heappop(events)
            if now < self.free[rank]:
                continue
            chosen = self._choose(rank, now)
            if chosen is not None:
                stage, kind = chosen
                self._start(rank, stage, kind, now)
                for r in range(len(self.stages)):
                    heapq.heappush(events, (max(self.free[r], now), r))
                heapq.heappush(events, (self.free[rank], rank))
                continue
            later = [t for t in self._times_to_come(rank) if t > now]
            if later:
                heapq.heappush(events, (min(later), rank))
        done = sum(map(len, self.made))
        wanted = len(self.rank_of) * self.count * (3 if self.split else 2)
        if done < wanted:
            raise BadSchedule(why=f"{self.name} with these limits of micro-batches in flight never ends")
        return Schedule(self.name, tuple(map(tuple, self.made)), self.chains)

    def _choose(self, rank: int, now: float) -> tuple[int, str] | None:
        for kind in "IFW":
            found: list[tuple[float, int, int]] = []
            for stage in self.stages[rank]:
                m = self.next[stage, kind]
                at = self.ready.get((stage, kind, m)) if m < self.count else None
                if at is None or at > now or not self._may(stage, kind):
                    continue
                found.append((at, m, stage))
            if found:
                return min(found)[2], kind
        return None

    def _may(self, stage: int, kind: str) -> bool:
        started, most = self.next[stage, "F"], self.limits[stage][0]
        room = started - self.next[stage, "I"] < most
        if kind == "I":
            return not (self.alternating and room and started < self.count)
        fits = not self.split or started - self.next[stage, "W"] < self.limits[stage][1]
        return kind == "W" or (room and fits)

    def _times_to_come(self, rank: int) -> Iterator[float]:
        for stage in self.stages[rank]:
            for kind in "IFW":
                at = self.ready.get((stage, kind, self.next[stage, kind]))
                if at is not None:
                    yield at

    def _start(self, rank: int, stage: int, kind: str, now: float) -> None:
        m, cost = self.next[stage, kind], self.times[stage]
        seconds = {"F": cost.forward, "I": cost.backward_input, "W": cost.backward_weight}[kind]
        if kind == "I" and not self.split:
            seconds += cost.backward_weight
        end = self.free[rank] = now + seconds
        self.made[rank].append(Action(stage, "B" if kind == "I" and not self.split else kind, m))
        self.next[stage, kind] += 1
        if kind == "F":
            if stage in self.after:
                self.ready[self.after[stage], "F", m] = end + cost.send
            else:
                self.ready[stage, "I", m] = end
        elif kind == "I":
            if self.split:
                self.ready[stage, "W", m] = end
            if stage in self.before:
                self.ready[self.before[stage], "I", m] = max(
                    end + cost.send, self.ready.get((self.before[stage], "I", m), 0)
                )


def self_conditioned(schedule: Schedule) -> Schedule:
    """The schedule with a forward of self-conditioning for each micro-batch, so far ahead of its forwards that it has gone
    through all stages, and what it gives has gone back to the first, when these begin. Raises BadSchedule."""
    ahead = sum(map(len, schedule.chains))
    while True:
        made = _conditioned(schedule, ahead)
        try:
            in_order(made)
            return made
        except BadSchedule:
            # two chains need not move at one pace, so that no fixed number is enough; all of them first always is
            if ahead >= max(map(len, schedule.ranks), default=0):
                raise
            ahead *= 2


def _conditioned(schedule: Schedule, ahead: int) -> Schedule:
    """Each rank's C, in the order of its F, so many forwards ahead of these."""
    ranks: list[tuple[Action, ...]] = []
    for rank in schedule.ranks:
        forwards = [Action(a.stage, "C", a.microbatch) for a in rank if a.kind == "F"]
        made: list[Action] = []
        due = 0
        for action in rank:
            if action.kind == "F":
                made += forwards[:ahead] if due == 0 else ()
                made += forwards[ahead + due : ahead + due + 1]
                due += 1
            made.append(action)
        ranks.append(tuple(made))
    return Schedule(f"{schedule.name}, self-conditioned", tuple(ranks), schedule.chains)


NAMED: Mapping[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zero-bubble": zero_bubble,
}  # fmt: skip
"""Schedules of a single backbone by name: (ranks, micro-batches) -> schedule."""

__all__ = [
    "COMPUTE", "NAMED", "PAIRED", "Action", "Format", "Key", "Schedule", "Times", "bidirectional", "gpipe", "greedy",
    "in_order", "interleaved", "one_f_one_b", "self_conditioned", "zero_bubble",
]  # fmt: skip
