"""Profiles of small models for tests of planning."""

from __future__ import annotations

from plait.cost.curve import Curve
from plait.passes.stages.layers import FrozenLayer, Layer, Links, Profile


def curve(milliseconds: float) -> Curve:
    """So many milliseconds for each sample, and a fifth of that for any number of them."""
    return Curve.of((n, 1e-3 * milliseconds * (n + 0.2)) for n in (1, 64))


def chain(name: str, *milliseconds: float) -> tuple[Layer, ...]:
    """Layers `name.0`, `name.1`, … with these forwards for each sample, and backwards of twice as much."""
    return tuple(
        Layer(
            f"{name}.{i}", curve(t), curve(2 * t), curve(t), crossing=1e6, crossing_back=1e6, saved=1e8,
            saved_for_weight=5e7, parameters=4e7, gradients=4e7,
        )
        for i, t in enumerate(milliseconds)
    )  # fmt: skip


FROZEN = (
    FrozenLayer("text.0", curve(0.3), 1e4),
    FrozenLayer("text.1", curve(0.5), 1e4, (0,)),
    FrozenLayer("image", curve(1.0), 1e5),
)
LINKS = Links(send_rate=1e10, send_latency=1e-5, sum_rate=5e8, sum_latency=5e-5)
BACKBONE = chain("down", 1.0, 2.0, 1.5) + chain("up", 1.0, 1.0, 2.5)


def profile(*, frozen: bool = True, second: bool = False, condition: float = 0.0, links: Links = LINKS) -> Profile:
    """A backbone of six layers, a second one of four, three frozen layers; over `LINKS` sums of gradients take long."""
    chains = (BACKBONE, chain("fine", 1.0, 2.0, 1.0, 2.0)) if second else (BACKBONE,)
    return Profile(
        chains, FROZEN if frozen else (), links, condition=condition, feedback=1e5 if condition else 0.0, device="test"
    )  # fmt: skip
