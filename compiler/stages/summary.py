"""A plan in words and as data: stages by the names of their layers, and what the plan is better than."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

from ...passes.stages.filling import Filling
from ...passes.stages.layers import Layer
from ...passes.stages.partition import bound
from ...passes.stages.plan import MOST_STAGES, ROUNDS, Filler, Plan, data_parallel, equal_layers, planned
from ..terminal import fields, milliseconds, size, table


@dataclass(frozen=True)
class StageSummary:
    """A stage: the rank that it is on, the devices of that rank in one pipeline, the names of its layers, seconds of a
    micro-batch on each device."""

    number: int
    rank: int
    devices: int
    layers: tuple[str, ...]
    forward: float
    backward: float


@dataclass(frozen=True)
class Baseline:
    """What else one could do: seconds of a step, the most bytes of a device, and whether these fit."""

    choice: str
    seconds: float
    memory: float
    fits: bool


@dataclass(frozen=True)
class Summary:
    """What there is to say of a plan. Prints as tables."""

    plan: Plan

    @property
    def batch(self) -> int:
        """Samples of a step."""
        problem = self.plan.problem
        return problem.samples * problem.microbatches * problem.groups

    @property
    def devices(self) -> int:
        """All devices that were to be had."""
        return self.plan.problem.devices * self.plan.groups

    @cached_property
    def stages(self) -> list[StageSummary]:
        """The stages of all chains, by number."""
        plan, found = self.plan, list[StageSummary]()
        for c, chain in enumerate(plan.problem.profile.chains):
            for low, high in plan.partition.ranges(c, len(chain)):
                number = len(found)
                rank = plan.step.schedule.rank_of[number]
                cost, names = plan.costs[number], tuple(layer.name for layer in chain[low:high])
                devices = plan.partition.replicas[rank]
                found.append(StageSummary(number, rank, devices, names, cost.forward, cost.backward))
        return found

    @cached_property
    def baselines(self) -> list[Baseline]:
        """Plain data parallelism, and stages of equally many layers under the schedule that is oldest, at its best."""
        problem = self.plan.problem
        layers: list[Layer] = [layer for chain in problem.profile.chains for layer in chain]
        rows = -(-self.batch // self.devices)
        held = sum(problem.profile.optimizer * layer.parameters + rows * layer.saved for layer in layers)
        seconds, _ = data_parallel(problem.profile, self.devices, self.batch)
        found = [Baseline("plain data parallelism", seconds, held, held <= problem.memory)]
        tried = list(self._equal())
        fitting = [one for one in tried if max(one.memory) <= problem.memory]
        if tried:  # else no number of stages goes into the devices and the batch
            one = min(fitting or tried, key=lambda one: one.seconds if fitting else max(one.memory))
            found.append(Baseline(f"equal layers: {one}", one.seconds, max(one.memory), bool(fitting)))
        return found

    def _equal(self) -> Iterator[Plan]:
        """Stages of equally many layers, without anything in bubbles, for all numbers of stages and micro-batches that go
        into the devices and the batch."""
        problem, devices, batch = self.plan.problem, self.devices, self.batch
        name = "gpipe" if len(problem.profile.chains) == 1 else "bidirectional"
        for stages in range(2, min(devices, MOST_STAGES, *map(len, problem.profile.chains)) + 1):
            groups = devices // stages
            for count in (stages * k for k in ROUNDS):
                if devices % stages or batch % (groups * count):
                    continue
                one = replace(
                    problem, devices=stages, stages=stages, microbatches=count, samples=batch // groups // count,
                    replicas="equal", in_flight=None, allowed=None, groups=groups,
                )  # fmt: skip
                yield planned(one, equal_layers(one), name, Filler(use=False))

    def as_json(self) -> dict[str, Any]:
        """As plain data. Seconds and bytes; `ranks` hold what each does, in order."""
        plan, problem = self.plan, self.plan.problem
        chains = problem.profile.chains
        return {
            "plan": str(plan),
            "devices": self.devices,
            "batch": self.batch,
            "memory": None if problem.memory == inf else problem.memory,
            "schedule": plan.step.schedule.name,
            "groups": plan.groups,
            "microbatches": problem.microbatches,
            "samples": problem.samples,
            "seconds": plan.seconds,
            "plain_seconds": plan.step.seconds,
            "conditioned_seconds": None if plan.conditioned is None else plan.conditioned.seconds,
            "bound_seconds": bound(problem, plan.partition).seconds,
            "bubble_share": plan.bubble_share,
            "bubble_share_unfilled": plan.unfilled_share,
            "frozen_share_hidden": plan.step.filling.hidden if problem.profile.frozen else None,
            "cuts": [[chain[at].name for at in cuts] for chain, cuts in zip(chains, plan.partition.cuts, strict=True)],
            "stages": [
                {
                    "stage": s.number, "rank": s.rank, "devices": s.devices, "layers": list(s.layers),
                    "forward_seconds": s.forward, "backward_seconds": s.backward,
                }
                for s in self.stages
            ],
            "ranks": [self._rank(rank) for rank in range(len(plan.memory))],
            "alternatives": [{"plan": words, "seconds": seconds} for words, seconds in plan.alternatives],
            "baselines": [
                {"plan": b.choice, "seconds": b.seconds, "memory": b.memory, "fits": b.fits} for b in self.baselines
            ],
        }  # fmt: skip

    def _rank(self, rank: int) -> dict[str, Any]:
        plan = self.plan
        found: dict[str, Any] = {
            "devices": plan.partition.replicas[rank],
            "memory": plan.memory[rank],
            "actions": list(map(str, plan.step.schedule.ranks[rank])),
            "frozen": self._pieces(plan.step.filling, rank),
        }
        if plan.conditioned is not None:
            found["conditioned_actions"] = list(map(str, plan.conditioned.schedule.ranks[rank]))
            found["conditioned_frozen"] = self._pieces(plan.conditioned.filling, rank)
        return found

    def _pieces(self, filling: Filling, rank: int) -> list[dict[str, Any]]:
        frozen = self.plan.problem.profile.frozen
        return [
            {
                "layer": frozen[p.layer].name, "low": p.low, "high": p.high, "bubble": p.bubble, "start": p.start,
                "seconds": p.seconds,
            }
            for p in filling.pieces[rank]
        ]  # fmt: skip

    def __str__(self) -> str:
        return "\n\n".join([str(self.plan), self._stages(), self._figures(), self._choices()])

    def _stages(self) -> str:
        both = len(self.plan.problem.profile.chains) > 1
        head = ("stage", *(["rank"] if both else []), "devices", "layers", "forward ms", "backward ms", "memory")
        rows = [
            (
                s.number, *([s.rank] if both else []), s.devices, named(s.layers), f"{1e3 * s.forward:.2f}",
                f"{1e3 * s.backward:.2f}", size(round(self.plan.memory[s.rank])),
            )
            for s in self.stages
        ]  # fmt: skip
        return table(head, rows)

    def _figures(self) -> str:
        plan, filling = self.plan, self.plan.step.filling
        shown: dict[str, str] = {"step": milliseconds(plan.seconds)}
        if plan.conditioned is not None:
            p = plan.problem.profile.condition
            shown["step"] += f" on average; plain {milliseconds(plan.step.seconds)}, "
            shown["step"] += f"self-conditioned ({percent(p)} of all) {milliseconds(plan.conditioned.seconds)}"
        shown["bubbles"] = f"{percent(plan.bubble_share)} of the devices' time"
        if plan.problem.profile.frozen:
            shown["bubbles"] += f", {percent(plan.unfilled_share)} without frozen layers in them"
            shown["frozen layers"] = f"{percent(filling.hidden)} of their time in bubbles"
        if any(one.fits and one.seconds < plan.seconds for one in self.baselines[:1]):
            shown["note"] = "plain data parallelism is expected to be faster: do without stages"
        if plan.devices < self.devices:
            shown["devices"] = f"{plan.devices} of {self.devices}"
        return fields(shown)

    def _choices(self) -> str:
        best = self.plan.seconds
        rows = [(str(self.plan), best, ""), *((words, seconds, "") for words, seconds in self.plan.alternatives)]
        for one in self.baselines:
            rows.append((one.choice, one.seconds, "" if one.fits else f"does not fit: {size(round(one.memory))}"))
        head = ("choice", "step", "times the plan's", "memory")
        width = len(head) if any(why for _, _, why in rows) else len(head) - 1
        cells = [(words, milliseconds(seconds), f"{seconds / best:.2f}", why)[:width] for words, seconds, why in rows]
        return table(head[:width], cells)


def named(layers: tuple[str, ...]) -> str:
    """Layers as people read them: the first and the last."""
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]} ({len(layers)})"


def percent(share: float) -> str:
    """A share: 4.2 %."""
    return f"{100 * share:.1f} %"


__all__ = ["Baseline", "StageSummary", "Summary", "named", "percent"]
