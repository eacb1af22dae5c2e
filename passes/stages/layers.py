"""What planning knows of a model: chains of layers with their times and sizes, and what links and devices can do.

A layer is a part of a model that is not cut further. Seconds are curves over the samples that one device computes; bytes
that belong to samples are per sample.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from math import inf
from typing import Any

import numpy as np

from ...cost.curve import Curve
from ...errors import BadProfile

NOTHING = Curve(((1, 0.0),))


@dataclass(frozen=True)
class Layer:
    """A layer that is trained.

    forward, backward, weight: seconds over samples; the backward's include those of W, the weight gradients, alone.
    crossing: bytes per sample of all values that are alive behind it, whoever made them; crossing_back: of these the bytes
    that have gradients; crossing_fixed: bytes that are the same for any number of samples. saved: bytes per sample from
    forward to backward. parameters, gradients: bytes; gradients are what replicas sum.
    """

    name: str
    forward: Curve
    backward: Curve
    weight: Curve = NOTHING
    crossing: float = 0.0
    crossing_back: float = 0.0
    crossing_fixed: float = 0.0
    saved: float = 0.0
    saved_for_weight: float = 0.0
    parameters: float = 0.0
    gradients: float = 0.0


@dataclass(frozen=True)
class FrozenLayer:
    """A layer that no gradient reaches: seconds over samples, bytes per sample of its results, the numbers of the frozen
    layers whose results it reads."""

    name: str
    seconds: Curve
    out: float = 0.0
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Links:
    """What connects devices: bytes per second and seconds of latency from device to device (`send`), and of sums over
    devices (`sum`, the rate at which each device's ring moves bytes)."""

    send_rate: float = inf
    send_latency: float = 0.0
    sum_rate: float = inf
    sum_latency: float = 0.0

    def send(self, size: float) -> float:
        """Seconds for one device to get so many bytes to another."""
        return size / self.send_rate + self.send_latency if size else 0.0

    def sum(self, size: float, devices: int) -> float:
        """Seconds of a sum of so many bytes over devices, as a ring."""
        if devices < 2 or not size:
            return 0.0
        return 2 * (devices - 1) / devices * size / self.sum_rate + self.sum_latency


@dataclass(frozen=True)
class Profile:
    """All that planning needs: `chains` of trained layers, one or two (the second runs through the devices in the other
    direction), frozen layers in an order in which each comes behind those that it reads, links.

    `optimizer` are bytes of parameters, gradients and optimizer state for each byte of parameters, `condition` is the
    probability that a step is self-conditioned, `feedback` are the bytes per sample that then go back to the first stage.
    """

    chains: tuple[tuple[Layer, ...], ...]
    frozen: tuple[FrozenLayer, ...] = ()
    links: Links = field(default_factory=Links)
    optimizer: float = 4.0
    condition: float = 0.0
    feedback: float = 0.0
    device: str = ""

    @cached_property
    def _rows(self) -> dict[tuple[int, int], Any]:
        return {}

    def seconds(self, chain: int, rows: int) -> Any:
        """An array of forward, backward and weight seconds (first axis) of each layer of a chain on so many samples."""
        key = (chain, rows)
        if key not in self._rows:
            layers = self.chains[chain]
            self._rows[key] = np.array(
                [
                    [layer.forward.seconds(rows) for layer in layers],
                    [layer.backward.seconds(rows) for layer in layers],
                    [layer.weight.seconds(rows) for layer in layers],
                ]
            )
        return self._rows[key]

    def frozen_seconds(self, rows: int) -> float:
        """Seconds of all frozen layers on so many samples."""
        if (-1, rows) not in self._rows:
            self._rows[-1, rows] = sum(layer.seconds.seconds(rows) for layer in self.frozen)
        return self._rows[-1, rows]

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it."""
        return {
            "version": VERSION,
            "device": self.device,
            "links": {name: value for name, value in vars(self.links).items() if value != inf},
            "optimizer": self.optimizer,
            "condition": self.condition,
            "feedback": self.feedback,
            "chains": [[_written(layer) for layer in chain] for chain in self.chains],
            "frozen": [_written(layer) for layer in self.frozen],
        }

    @staticmethod
    def from_json(data: Any) -> Profile:
        """What `to_json` wrote, or a person. Raises BadProfile."""
        try:
            if data["version"] != VERSION:
                raise BadProfile(why=f"it is of version {data['version']!r}, and this plait reads {VERSION}")
            return Profile(
                tuple(tuple(_read(Layer, layer) for layer in chain) for chain in data["chains"]),
                tuple(_read(FrozenLayer, layer) for layer in data.get("frozen", ())),
                Links(**{name: float(value) for name, value in data.get("links", {}).items()}),
                float(data.get("optimizer", 4.0)),
                float(data.get("condition", 0.0)),
                float(data.get("feedback", 0.0)),
                str(data.get("device", "")),
            ).checked()
        except KeyError as error:
            raise BadProfile(why=f"it has no {error}") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadProfile(why=f"{type(error).__name__}: {error}") from error

    def checked(self) -> Profile:
        """This profile, if it makes sense. Raises BadProfile."""
        if not 1 <= len(self.chains) <= 2 or not all(self.chains):
            raise BadProfile(why="a model has one or two chains of trained layers, none of them empty")
        links = vars(self.links)
        if not all(value > 0 for name, value in links.items() if name.endswith("rate")):
            raise BadProfile(why="a link has a rate that is not positive")
        others = [self.optimizer, self.feedback, *(value for name, value in links.items() if name.endswith("latency"))]
        if not all(0 <= value < inf for value in others) or not 0 <= self.condition <= 1:
            raise BadProfile(why="a latency, optimizer or feedback is negative or no number, or condition is no probability")
        for i, layer in enumerate(self.frozen):
            if any(not 0 <= j < i for j in layer.after):
                raise BadProfile(why=f"frozen layer {layer.name!r} reads what comes behind it")
        links = self.links
        if not all(rate > 0 for rate in (links.send_rate, links.sum_rate)):
            raise BadProfile(why="a link has a rate that is not positive")
        if not all(0 <= n < inf for n in (links.send_latency, links.sum_latency, self.optimizer, self.feedback)):
            raise BadProfile(why="a latency, `optimizer` or `feedback` is negative or no number")
        if not 0 <= self.condition <= 1:
            raise BadProfile(why=f"`condition` is a probability, not {self.condition}")
        for layer in (*(one for chain in self.chains for one in chain), *self.frozen):
            numbers = [v for v in vars(layer).values() if isinstance(v, float | int)]
            curves = [v for v in vars(layer).values() if isinstance(v, Curve)]
            numbers += [n for curve in curves for point in curve.points for n in point]
            if not all(0 <= n < inf for n in numbers):
                raise BadProfile(why=f"layer {layer.name!r} has a time or a size that is negative or no number")
            if any(not curve.points for curve in curves):
                raise BadProfile(why=f"layer {layer.name!r} has a curve without points")
        return self


VERSION = 1


def _written(layer: Layer | FrozenLayer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, Curve):
            found[name] = [list(point) for point in value.points]
        elif value or name == "name":
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _read(kind: type[Any], data: dict[str, Any]) -> Any:
    known = {one.name: one.type for one in fields(kind)}
    found: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise BadProfile(why=f"a layer has {name!r}, and only {', '.join(known)} are known")
        if known[name] == "Curve":
            found[name] = Curve.of((float(n), float(s)) for n, s in value)
        elif name == "after":
            found[name] = tuple(int(i) for i in value)
        else:
            found[name] = str(value) if name == "name" else float(value)
    if missing := [one.name for one in fields(kind) if one.default is MISSING and one.name not in found]:
        raise BadProfile(why=f"layer {found.get('name', '')!r} has no {' and no '.join(missing)}")
    return kind(**found)


__all__ = ["NOTHING", "FrozenLayer", "Layer", "Links", "Profile"]
