"""Letter b: diffusion models on simulated clusters, calibrated to what DiffusionPipe (MLSys 2024) reports of them.

What is taken from the paper: the ratio of frozen to trained seconds (ControlNet 0.76 at 8 samples on a device to 0.89 at 64,
Stable Diffusion 0.38 to 0.44), the share of a data-parallel step that sums of gradients take at 8 samples (5.2, 19.3, 36.1,
38.1 % on 8, 16, 32, 64 A100), the baselines (GPipe: two stages of equally many layers, four micro-batches, frozen layers on
all devices before, sums behind; data parallelism with sums behind the backward). What is assumed: a layer of n samples takes
a time linear in n with the overhead of `OVERHEAD` samples, layers differ by up to a half, half of the parameters lie in the
middle third.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plait.cost import stages
from plait.cost.curve import Curve
from plait.cost.microbatches import gpipe
from plait.passes.stages.layers import FrozenLayer, Layer, Links, Profile
from plait.passes.stages.partition import Problem
from plait.passes.stages.plan import Filler, Plan, data_parallel, equal_layers, plan, planned, stage_costs

from ..runner import Outcome, Run

OVERHEAD = 3.0
SECONDS_8 = 0.25
"""Of forward and backward of the trained part on 8 samples."""
NVLINK, LATENCY = 200e9, 2e-5
LEAST_BUBBLE = 0.01
POINTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
MEMORY = 80e9


@dataclass(frozen=True)
class Model:
    """frozen: frozen over trained seconds at 8 and at 64 samples; parameters: bytes of trained ones; samples of the paper's
    comparison at each number of GPUs; the paper's ratios over GPipe and over data parallelism there."""

    name: str
    frozen: tuple[float, float]
    layers: int
    frozen_layers: int
    parameters: float
    batches: dict[int, int]
    paper: dict[int, tuple[float, float]]


MODELS = (
    Model("ControlNet", (0.76, 0.89), 26, 60, 361e6 * 2, {8: 256, 16: 512, 32: 1024, 64: 2048}, {64: (1.41, 1.28)}),
    Model("Stable Diffusion", (0.38, 0.44), 50, 45, 866e6 * 2, {8: 256, 16: 512, 32: 1024, 64: 2048}, {8: (1.44, 1.16)}),
)
SYNC = {8: 0.052, 16: 0.193, 32: 0.361, 64: 0.381}


def profile_of(model: Model, gpus: int) -> Profile:
    """The model's layers, with sums of gradients as slow as the paper's share says."""
    rng = random.Random(model.name)
    weights = [rng.uniform(0.5, 1.5) for _ in range(model.layers)]
    trained = [SECONDS_8 * w / sum(weights) for w in weights]
    bytes_of = [(3.0 if model.layers <= 3 * i < 2 * model.layers else 1.5) for i in range(model.layers)]
    sizes = [model.parameters * b / sum(bytes_of) for b in bytes_of]
    overhead = _frozen_overhead(model)
    frozen_weights = [rng.uniform(0.2, 1.8) for _ in range(model.frozen_layers)]
    frozen = [model.frozen[0] * SECONDS_8 * w / sum(frozen_weights) for w in frozen_weights]
    crossing = 4e6
    chain = tuple(
        Layer(
            f"layer {i}", _curve(t / 3, OVERHEAD), _curve(t * 2 / 3, OVERHEAD), _curve(t / 3, OVERHEAD), crossing=crossing,
            crossing_back=crossing, saved=6e9 / 32 / model.layers, parameters=size, gradients=size,
        )
        for i, (t, size) in enumerate(zip(trained, sizes, strict=True))
    )  # fmt: skip
    half = model.frozen_layers // 2
    layers = tuple(
        FrozenLayer(f"frozen {i}", _curve(t, overhead), 3e4 if i in (half - 1, model.frozen_layers - 1) else 0.0,
                    () if i in (0, half) else (i - 1,))
        for i, t in enumerate(frozen)
    )  # fmt: skip
    found = Profile((chain,), layers, Links(NVLINK, LATENCY, 1e12, 1e-4), optimizer=8.0)
    return dataclasses.replace(found, links=dataclasses.replace(found.links, sum_rate=_rate(found, gpus, SYNC[gpus])))


def _curve(seconds_8: float, overhead: float) -> Curve:
    return Curve(tuple((n, seconds_8 * (n + overhead) / (8 + overhead)) for n in POINTS))


def _frozen_overhead(model: Model) -> float:
    """The overhead in samples with which the frozen part's share grows as reported."""
    low, high = 0.0, OVERHEAD
    target = model.frozen[1] / model.frozen[0] * (64 + OVERHEAD) / (8 + OVERHEAD)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (64 + middle) / (8 + middle) > target else (low, middle)
    return low


def _rate(profile: Profile, gpus: int, share: float) -> float:
    """The rate of sums with which data parallelism at 8 samples on each device waits for so large a part of its step."""

    def waits(rate: float) -> float:
        one = dataclasses.replace(profile, links=dataclasses.replace(profile.links, sum_rate=rate))
        seconds, exposed = data_parallel(one, gpus, 8 * gpus, overlapped=False)
        return exposed / seconds

    return _bisect(waits, share, 1e8, 1e13)


def _bisect(falling: Callable[[float], float], target: float, low: float, high: float) -> float:
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return low


def gpipe_seconds(profile: Profile, gpus: int, batch: int) -> float:
    """The paper's GPipe: frozen layers on all devices first, then the pipeline, then all sums."""
    groups = gpus // 2
    problem = Problem(profile, 2, 2, 4, batch // groups // 4, groups=groups)
    costs = stage_costs(problem, equal_layers(problem))
    plain = [dataclasses.replace(cost, sync=0.0) for cost in costs]
    frozen = profile.frozen_seconds(-(-batch // gpus))
    return frozen + stages.run(gpipe(2, 4), plain).seconds + max(cost.sync for cost in costs)


def setting(model: Model, gpus: int) -> dict[str, Any]:
    """Seconds of a step on so many GPUs, ours and the baselines, and our ablations."""
    profile, batch = profile_of(model, gpus), model.batches[gpus]
    filler = Filler(least=LEAST_BUBBLE)
    ours = plan(profile, gpus, batch, memory=MEMORY, replicas="equal", stage_counts=(2, 3, 4, 6, 8), filler=filler)
    free = plan(profile, gpus, batch, memory=MEMORY, replicas="equal", filler=filler)
    whole = _again(ours, Filler(partial=False, least=LEAST_BUBBLE))
    none = _again(ours, Filler(use=False))
    ddp, exposed = data_parallel(profile, gpus, batch, overlapped=False)
    hidden, _ = data_parallel(profile, gpus, batch)
    base = gpipe_seconds(profile, gpus, batch)
    return {
        "model": model.name, "gpus": gpus, "batch": batch, "plan": str(ours), "seconds": ours.seconds,
        "bubble share": ours.bubble_share, "unfilled": ours.unfilled_share, "gpipe": base, "data parallel": ddp,
        "data parallel waits": exposed / ddp, "data parallel, sums hidden": hidden, "over gpipe": base / ours.seconds,
        "over data parallel": ddp / ours.seconds,
        "without partial": whole.seconds, "without filling": none.seconds,
        "best with any number of stages": str(free), "its seconds": free.seconds,
        "frozen over trained": profile.frozen_seconds(batch // gpus)
        / float(profile.seconds(0, batch // gpus)[:2].sum()),
    }  # fmt: skip


def _again(one: Plan, filler: Filler) -> Plan:
    return planned(one.problem, one.partition, one.step.schedule.name, filler)


def measure(run: Run) -> Outcome | None:
    """The paper's comparisons: bubbles left, ablations, ratios over both baselines."""
    rows: list[dict[str, Any]] = []
    for model in MODELS[:1] if run.quick else MODELS:
        for gpus in (64,) if run.quick else tuple(model.batches):
            run.say(f"{model.name} on {gpus} GPUs")
            rows.append(setting(model, gpus))
    ours = next(r for r in rows if r["model"] == "ControlNet" and r["gpus"] == 64)
    ordered = all(r["seconds"] <= r["without partial"] * 1.0001 <= r["without filling"] * 1.0002 for r in rows)
    figure = {
        "largest bubble share": round(max(r["bubble share"] for r in rows), 3),
        "ControlNet, 64 GPUs, over GPipe": round(ours["over gpipe"], 2),
        "over data parallel": round(ours["over data parallel"], 2),
        "slower without partial-batch": f"{ours['without partial'] / ours['seconds'] - 1:.1%}",
        "without filling": f"{ours['without filling'] / ours['seconds'] - 1:.1%}",
        "ablations in the paper's order": ordered,
    }
    holds = figure["largest bubble share"] < 0.05 and ordered
    holds = holds and ours["over gpipe"] >= 1.41 and ours["over data parallel"] >= 1.28
    return Outcome(figure, holds, rows)
