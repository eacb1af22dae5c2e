"""Letter a: seconds of a training step of a GPT-2 with experts on two ranks, by variant and share of its exchanges.

The link between the ranks is as fast as makes exchanges take 30, 45 and 60 % of the plain step (`rank.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ..runner import Outcome, Run
from .jobs import result
from .network import Link

SHARES = {0.3: 1.15, 0.45: 1.3, 0.6: 1.3}
"""How many times faster than the best baseline a step must be, by share of exchanges."""
REMOVED = 0.77
"""The share of exchanges that nothing hides, of those of Tutel's best degree, that must be gone."""
VARIANTS = ("i", "ii/2", "ii/4", "ii/8", "iii", "iv", "v", "vi")
SIZES = {"vocabulary": 96, "width": 128, "heads": 4, "layers": 4, "context": 128, "hidden": 512, "experts": 4}
OPTIONS = {"bucket_mb": 0.25}
"""Sums of dense gradients are short messages, so that exchanges need not wait long behind one."""
FULL: dict[str, Any] = {"sizes": SIZES, "batch": 64, "variants": VARIANTS, "repeats": 20, "options": OPTIONS}
SAMPLE: dict[str, Any] = {
    "sizes": {**SIZES, "width": 64, "layers": 2, "context": 64, "hidden": 256},
    "batch": 16,
    "variants": ("i", "vi"),
    "repeats": 6,
    "options": OPTIONS,
}
LONGEST_S = 3600.0


def measure(run: Run) -> Outcome:
    """All variants at each share; a quick run takes few of them at one."""
    job, shares = (SAMPLE, [0.45]) if run.quick else (FULL, list(SHARES))
    linked = Link.available()
    if not linked:
        run.notes.append("overlap.a: no network namespaces here, so ranks talk over loopback, and times say nothing")
    detail: dict[str, Any] = {}
    with Link() if linked else contextlib.nullcontext() as link:
        for share in shares if linked else shares[:1]:
            run.say(f"exchanges of {share:.0%} of the plain step")
            found = result("rank", {**job, "shares": [share]}, link, LONGEST_S, fresh=run.quick)[str(share)]
            detail[str(share)] = found | compared(found["variants"])
    if not linked:
        off = max(v["largest_loss_difference"] for found in detail.values() for v in found["variants"].values())
        return Outcome({"times": "not measured without network namespaces", "losses apart": f"{off:.1g}"}, False, detail)
    figure = {f"exchanges {float(share):.0%}": said(found) for share, found in detail.items()}
    return Outcome(figure, all(meets(float(share), found, run.quick) for share, found in detail.items()), detail)


def compared(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What of the seconds of variants is held to a goal."""
    plain, ours = variants["i"], variants["vi"]
    baseline = min((n for n in variants if n == "i" or n.startswith("ii/")), key=lambda n: variants[n]["seconds"])
    best = variants[baseline]
    others = {n: v["seconds"] / ours["seconds"] for n, v in variants.items() if n != "vi"}
    return {
        "share": plain["waited"] / plain["seconds"],
        "baseline": baseline,
        "speedup": best["seconds"] / ours["seconds"],
        "speedups": others,
        "removed": 1 - ours["waited"] / best["waited"],
        "losses apart": max(v["largest_loss_difference"] for v in variants.values()),
    }


def meets(share: float, found: Mapping[str, Any], quick: bool) -> bool:
    """Whether the goals are met; of small models, only that overlapping pays."""
    if quick:
        return found["speedup"] > 1
    pieces = found["speedups"].get("iii", 0.0)
    return found["speedup"] >= SHARES[share] and found["removed"] >= REMOVED and pieces > 1


def said(found: Mapping[str, Any]) -> str:
    """The figures of one share."""
    ms = " ".join(f"{n} {1e3 * v['seconds']:.0f}" for n, v in found["variants"].items())
    pieces = f", {found['speedups']['iii']:.2f}x (iii)" if "iii" in found["speedups"] else ""
    return (
        f"(measured {found['share']:.0%}) vi is {found['speedup']:.2f}x the best of (i), (ii), which is {found['baseline']}"
        f"{pieces}, and removes {found['removed']:.0%} of its waiting; ms: {ms}"
    )
