"""Speed beside eager and Inductor: micro-benchmarks; models on one and eight samples, frozen, in bfloat16, in training.

Five models also beside OpenVINO and ONNX Runtime, see `beside`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import beside
from .harness import Probe, geometric_mean
from .micro import MICROS
from .models import FULL
from .runner import Outcome, Run
from .times import RESERVE_S, Variant, micro, model

TRANSFORMERS = ("bert", "gpt2", "llama", "vit", "t5")
CONVOLUTIONAL = ("resnet", "convnext", "unet")
FROZEN = Variant(frozen=True)
BFLOAT16 = Variant(dtype=torch.bfloat16)
#: Products and convolutions of models that do little else come to at least this share of the machine's multiply-adds.
CEILING = 0.75
#: A row is no slower than a peer's where the 95 % interval of its speedup begins here or above.
NO_SLOWER = 0.97

BESIDE = "beside OpenVINO and ONNX Runtime"

#: Group of rows: the least geometric mean of speedups over Inductor that is wanted.
GOALS = {
    "micro-benchmarks": 2.0,
    "transformers": 1.7,
    "transformers, frozen": 1.6,
    "convolutional": 1.1,
    "bfloat16": 1.15,
    "training steps": 1.3,
}


def rows_of_models() -> Iterator[tuple[str, str, Variant]]:
    """(group, model, variant) of every row."""
    for name in (*TRANSFORMERS, *CONVOLUTIONAL):
        group = "transformers" if name in TRANSFORMERS else "convolutional"
        yield group, name, Variant()
        yield group, name, Variant(batch=8)
    for name in TRANSFORMERS:
        yield "transformers, frozen", name, FROZEN
        yield "bfloat16", name, BFLOAT16
    for name in FULL:
        yield "training steps", name, Variant(train=True, batch=2)


def measure(run: Run) -> Outcome | None:
    """Letter c. A quick run takes two micro-benchmarks."""
    probe = Probe()
    groups: dict[str, dict[str, Any]] = {group: {} for group in GOALS}
    chosen = [m for m in MICROS if m.name in ("bias gelu", "cross entropy")] if run.quick else MICROS
    budget = {"rounds": 10, "seconds": 2.0} if run.quick else {"rounds": 20, "seconds": 12.0}
    for one in chosen:
        if run.left < RESERVE_S:
            break
        run.say(one.name)
        groups["micro-benchmarks"][one.name] = micro(one, run.backend, probe, **budget)
    for group, name, variant in () if run.quick else rows_of_models():
        run.say(variant.title(name))
        row = model(name, run.backend, probe, variant, rounds=20, seconds=20.0, calls=False)
        groups[group][variant.title(name)] = row
    return _outcome(groups, {} if run.quick else beside.measure(run), run)


def _outcome(groups: Mapping[str, dict[str, Any]], others: Mapping[str, Any], run: Run) -> Outcome | None:
    rows = {title: row for found in groups.values() for title, row in found.items()}
    if not rows:
        return None
    figure: dict[str, Any] = {}
    holds = True
    for group, found in groups.items():
        if found:
            mean = geometric_mean([row["speedup_over_inductor"][0] for row in found.values()])
            figure[f"{group} over Inductor"] = f"{mean:.2f}x of {len(found)}"
            holds = holds and mean >= GOALS[group]
    large = {t: row["share of the ceiling"] for t, row in groups.get("transformers", {}).items() if t.endswith(" of 8")}
    if large:
        least = min(large, key=lambda t: large[t])
        figure["transformers of 8, share of the multiply-add ceiling"] = f"{large[least]:.0%} ({least}) or more"
        holds = holds and large[least] >= CEILING
    slower = sorted(t for t, row in rows.items() if min(row["at least"].values()) < NO_SLOWER)
    judged = {**rows, **{f"{name}, {BESIDE}": row for name, row in others.items() if "skipped" not in row}}
    wrong = [title for title, row in judged.items() if row["verdict"].get(run.backend) == "wrong"]
    figure |= {"not shown to be as fast as eager and Inductor": ", ".join(slower) or "none", "wrong": len(wrong)}
    if others:
        figure |= beside.figures(others)
    holds = holds and not slower and not wrong and beside.ahead(others)
    return Outcome(figure, holds, {**groups, BESIDE: dict(others)})
