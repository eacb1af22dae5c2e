"""Exchanges of mixtures of experts behind computation: speed on a link, exactness, simulated clusters, faults."""

from __future__ import annotations

from ..overlap import exact, faults, model, scale, steps
from ..runner import Letter, Suite

SUITE = Suite(
    "overlap",
    "hide the exchanges of mixtures of experts behind computation",
    (
        Letter(
            "a",
            "a GPT-2 with experts on two ranks whose link makes exchanges take 30, 45 and 60 % of the plain step: both "
            "passes over the best of no overlap and Tutel's degrees 2, 4, 8, and over two pieces everywhere",
            "1.15x at 30 %, 1.3x at 45 and 60 %; ahead of two pieces; 77 % of the waiting of Tutel's best degree gone",
            steps.measure,
            sample="a smaller model, plain and with both passes, at 45 %",
            seconds=18.0,
        ),
        Letter(
            "b",
            "steps in 1 to 8 pieces against whole ones on two ranks: four gates, three capacities, uneven loads, experts "
            "without tokens",
            "routing, slots, drops and results equal in all bits, gradients of integers too; gradients and 50 losses of "
            "floats equal, or within 4 times the float32 error of the whole step",
            exact.measure,
            sample="one program in three pieces under one load",
            seconds=9.0,
        ),
        Letter(
            "c",
            "predicted seconds of steps on links of three rates, beside measured ones: two batches, six ways to overlap",
            "the median of absolute errors is at most 5 %",
            model.measure,
            sample="two layers, one rate, one batch, both passes",
            seconds=14.0,
        ),
        Letter(
            "d",
            "steps of GPT2-S-MoE and GPT2-L-MoE on 8 to 64 simulated V100 and A100, over the best degree of Tutel",
            "the paper's speed-ups to 0.05 (V100 1.21, A100 1.17 in the mean); planning within 60 s",
            scale.measure,
            sample="four layers of GPT2-S-MoE on 16 A100",
            seconds=6.0,
        ),
        Letter(
            "e",
            "a rank killed, suspended or with another plan, a link cut or throttled, an expert without tokens",
            "each rank that is left says which collective failed, at most 5 s after the time-out; no hang",
            faults.measure,
            sample="a rank killed",
            seconds=7.0,
        ),
    ),
)
