"""A few of the benchmarks' planted faults are found, so that what finds them does not rot between benchmark runs."""

from __future__ import annotations

import pytest
from plait.compiler.debugging.bisect import bisect
from plait.compiler.debugging.first_bad import first_bad_node
from plait.compiler.decisions import Decisions

from benchmarks.plants import PLANTS, subject

BY_NAME = {p.name: p for p in PLANTS}


def test_there_are_forty_of_them_on_three_programs() -> None:
    assert len(BY_NAME) == len(PLANTS) == 40
    assert {p.program for p in PLANTS} == {"transformer", "convolutional", "training"}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        "gradient of a product",
        "gradient of an activation",
        "kernel of a backward",
        "sum of a backward",
        "race in a step",
        "dropped token",
    ],
)
def test_a_planted_fault_is_found(name: str, seed: int) -> None:
    with BY_NAME[name].planted(seed) as made:
        if made.subject.failure() is None:
            pytest.skip(f"seed {seed} plants it where it does not show")
        culprit = bisect(made.subject)
        assert made.found_by(culprit), culprit
        bad = first_bad_node(made.subject)
        assert made.is_at(bad), bad


@pytest.mark.parametrize("limit", [3, 40, 90, 150, 220, 300])
def test_a_training_step_is_right_whatever_is_held_back(limit: int) -> None:
    assert subject("training").failure(Decisions(limit)) is None
