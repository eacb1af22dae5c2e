"""Curves of collectives: through measured points, between and beyond them, in the profile table."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait.cost.communication import curve, record
from plait.cost.curve import Curve
from plait.cost.profile import Table, Timing, load

OP, DEVICE = "_c10d_functional.all_to_all_single", "cpu/gloo"
POINTS = st.lists(
    st.tuples(st.integers(1, 1 << 24), st.floats(1e-6, 1.0)), min_size=1, max_size=12, unique_by=lambda p: p[0]
)


def test_linear_between_points_latency_below_rate_beyond() -> None:
    line = Curve.of([(4000, 5e-3), (1000, 2e-3), (2000, 3e-3)])
    assert line.seconds(10) == line.latency == 2e-3
    assert line.seconds(3000) == pytest.approx(4e-3)
    assert line.rate == pytest.approx(1e6) and line.seconds(6000) == pytest.approx(7e-3)


def test_one_point_is_latency_and_rate() -> None:
    line = Curve.of([(1000, 1e-3)])
    assert line.seconds(500) == 1e-3 and line.seconds(3000) == pytest.approx(3e-3)


@given(POINTS, st.integers(0, 1 << 26), st.integers(0, 1 << 26))
def test_more_bytes_never_take_less_time(points: list[tuple[int, float]], a: int, b: int) -> None:
    line, (less, more) = Curve.of(points), sorted((a, b))
    assert line.seconds(less) <= line.seconds(more) * (1 + 1e-9)
    assert [size for size, _ in line.points] == sorted(size for size, _ in points)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12))
def test_points_in_order_are_kept_and_noise_is_averaged(seconds: list[float]) -> None:
    rising = sorted(seconds)
    assert [s for _, s in Curve.of(enumerate(rising, 1)).points] == rising
    averaged = [s for _, s in Curve.of(enumerate(seconds, 1)).points]
    assert sum(averaged) == pytest.approx(sum(seconds)) and averaged == sorted(averaged)


def test_curves_are_saved_and_told_apart_by_collective_group_and_device(tmp_path: Path) -> None:
    table = Table(tmp_path / "profile.json")
    for size in (1 << 10, 1 << 20):
        record(table, OP, 2, size, DEVICE, Timing.of([size * 1e-9] * 5))
        record(table, OP, 4, size, DEVICE, Timing.of([size * 2e-9] * 5))
    table.save()
    again = load(tmp_path / "profile.json")
    two, four = curve(again, OP, 2, DEVICE), curve(again, OP, 4, DEVICE)
    assert two is not None and four is not None
    assert four.seconds(1 << 19) == pytest.approx(2 * two.seconds(1 << 19))
    assert curve(again, OP, 8, DEVICE) is None and curve(again, OP, 2, "cuda/nccl") is None
