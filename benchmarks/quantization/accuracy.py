"""Letter a: what rounding costs in perplexity and how much of it AWQ takes back; sentence embeddings; single layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..runner import Outcome, Run
from . import embeddings, layers
from .subjects import TINY, Subject, apart, example, floats, quantized, remembered, small, smol

BITS, GROUPS = (4, 3), (128, 32)
GOALS = {4: 0.5, 3: 0.35}
LOGITS = 1e-3
METHODS = ("rtn", "awq", "awq+gptq")
SAMPLED = r"re:model\.layers\.[34]\."
LOSSLESS = (
    "the weights were rounded in groups of 32 with float offsets: such a format would lose nothing here, "
    "and this one has integer zero points"
)


def measure(run: Run) -> Outcome | None:
    """Everything; a quick run takes the small Llama with outliers at groups of 128, on less text."""
    if run.quick:
        return _sample(run)
    rows: dict[str, Any] = {}
    for subject in subjects(run):
        rows[subject.name] = perplexities(subject, BITS, GROUPS, METHODS, run)
        rows[subject.name]["compiled logits apart"] = compiled_apart(subject, run)
    sentences, single = embeddings.measure(run), layers.measure(run)
    figure: dict[str, Any] = {}
    for name, row in rows.items():
        figure |= {f"{name}, W{bits}: gap closed": _percent(row, bits) for bits in BITS}
    figure |= embeddings.figures(sentences) | layers.figures(single)
    holds = all(closed(row) and row["compiled logits apart"] <= LOGITS for row in rows.values())
    complete = any(name == "SmolLM2" for name in rows) and "skipped" not in sentences
    holds = holds and complete and embeddings.holds(sentences) and layers.holds(single)
    return Outcome(figure, holds, {"perplexity": rows, "sentences": sentences, "layers": single})


def subjects(run: Run) -> Iterable[Subject]:
    """SmolLM2 where its package is installed, the small Llama with outliers and as trained."""
    yield small(outliers=True)
    yield small(outliers=False)
    try:
        yield smol()
    except example("smollm2").NotInstalled as missing:
        run.notes.append(str(missing))


def _sample(run: Run) -> Outcome | None:
    """Two layers, measured anew."""
    if not TINY.exists():
        run.notes.append("the small Llama is not trained yet: a full run of letter a does that")
        return None
    subject, found = small(outliers=True, calibration=4, evaluation=16), {}
    exact = subject.perplexity(subject.model)
    for bits in BITS:
        schemes = {m: f"{m}-w{bits}g128" for m in METHODS[:2]}
        found[f"w{bits}g128"] = _shares(
            {m: _perplexity(replace(subject, name="sample"), s, run, targets=[SAMPLED]) for m, s in schemes.items()}, exact
        )
    row = {"float": round(exact, 4), "schemes": found}
    return Outcome({f"W{bits}: gap closed": _percent(row, bits) for bits in BITS}, closed(row), row)


def perplexities(
    subject: Subject, bits: Iterable[int], groups: Iterable[int], methods: Iterable[str], run: Run
) -> dict[str, Any]:
    """Perplexity of the float model and of each scheme, and the share of what rounding costs that others take back."""

    def of(scheme: str) -> float:
        run.say(f"{subject.name}: {scheme}")
        return remembered(subject.name, scheme, lambda: _perplexity(subject, scheme, run))

    exact = remembered(subject.name, "float", lambda: subject.perplexity(subject.model))
    tokens = len(subject.evaluation) // subject.window * subject.window
    found: dict[str, Any] = {"float": round(exact, 4), "tokens": tokens, "schemes": {}}
    for b in bits:
        for g in groups:
            row = _shares({m: of(f"{m}-w{b}g{g}") for m in methods}, exact)
            if (subject.name, b, g) == ("SmolLM2", 4, 32):
                row["note"] = LOSSLESS
            found["schemes"][f"w{b}g{g}"] = row
    return found


def _perplexity(subject: Subject, scheme: str, run: Run, **more: Any) -> float:
    return subject.perplexity(floats(quantized(subject, scheme, run, **more).module()))


def _shares(row: dict[str, float], exact: float) -> dict[str, Any]:
    """Perplexities by method, and what the others take back of what rounding to nearest costs."""
    gap = row["rtn"] - exact
    shares = {f"{m} closes": round((row["rtn"] - p) / gap, 3) for m, p in row.items() if m != "rtn"}
    return {m: round(p, 4) for m, p in row.items()} | shares


def _closed(row: dict[str, Any], bits: int) -> list[float]:
    return [r["awq closes"] for scheme, r in row["schemes"].items() if scheme.startswith(f"w{bits}")]


def _percent(row: dict[str, Any], bits: int) -> str:
    return f"{min(_closed(row, bits)):.0%}"


def closed(row: dict[str, Any]) -> bool:
    """Whether AWQ closes as much of each gap as it should."""
    return all(share >= GOALS[bits] for bits in GOALS for share in _closed(row, bits))


def compiled_apart(subject: Subject, run: Run) -> float:
    """How far the compiled quantized model's logits of one window are from those of the float layers that it stands for."""
    run.say(f"{subject.name}: compiled, one window")
    made, window = quantized(subject, "awq-w4g128", run), subject.calibration[0]
    with torch.no_grad():
        return float(f"{apart(made(window), floats(made.module())(window)):.2e}")
