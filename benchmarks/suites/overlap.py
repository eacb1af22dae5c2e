"""Exchanges of mixtures of experts behind computation: speed on a link, exactness, simulated clusters, faults."""

from __future__ import annotations

from ..overlap import faults, scale
from ..runner import Letter, Suite

SUITE = Suite(
    "overlap",
    "hide the exchanges of mixtures of experts behind computation",
    (
        Letter(
            "d",
            "steps of GPT2-S-MoE and GPT2-L-MoE on 8 to 64 simulated V100 and A100, over the best degree of Tutel",
            "the paper's speed-ups to 0.05 (V100 1.21, A100 1.17 in the mean); planning within 60 s",
            scale.measure,
            sample="GPT2-S-MoE on 16 A100",
            seconds=12.0,
        ),
        Letter(
            "e",
            "a rank killed, suspended or with another plan, a link cut or throttled, an expert without tokens",
            "each rank that is left says which collective failed, at most 5 s after the time-out; no hang",
            faults.measure,
            sample="a rank killed",
            seconds=16.0,
        ),
    ),
)
