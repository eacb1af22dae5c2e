"""The search of one group: scales, clipping and rounding that cost least where the group's layers meet again.

Activation-aware scaling (Lin et al., AWQ, 2024, section 3.2) rounds W diag(s) and divides the input by s, so that channels
with large inputs keep more digits. s = mean|x|^r, or mean|x|^r / mean|w|^(1-r), for exponents on a grid; each candidate is
judged by running the part of the graph between the group and its join. Rounding to nearest, s = 1 without clipping, is a
candidate, so that the loss on the calibration data never exceeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...formats import Quantized, QuantizedType
from ...formats.ops import quantize_rows
from ...formats.quantized import rounded, scale_for
from ...ir import Value
from .groups import Group
from .linears import Linear
from .observe import Batch, Interpreter, rows_of, run
from .rounding import Ranges, clipped, compensated, cost, nearest
from .routes import Route

GRID = 20
"""Exponents are tried at every second point of a grid of so many, then between."""
FAMILIES = ("plain", "duo")
AT_RUN_TIME = 0.95
"""What scales must leave of the loss, at most, where no constant takes them and the input is multiplied at each call."""
FEW_ROWS = 8
"""Rows of input that a layer must have seen for its moments to say something."""


@dataclass(frozen=True)
class Method:
    """What is searched: scales of channels (`anywhere`, or only where constants take the factors), clipping, rounding that
    makes up for its errors."""

    scale: bool = False
    clip: bool = False
    compensate: bool = False
    anywhere: bool = True

    @staticmethod
    def of(name: str) -> Method:
        """The method that a scheme names: rtn, awq, gptq or awq+gptq."""
        return Method(scale="awq" in name, clip="awq" in name, compensate="gptq" in name)


@dataclass(frozen=True)
class Found:
    """What the search of a group came to: scales [K] (None: all 1) and what its layers are held as. The losses, of rounding
    to nearest and of this, are mean squared errors at the group's results, relative to their mean square. Layers go by name;
    `unseen` are those that calibration brought fewer than `FEW_ROWS` rows, too few to clip or to compensate by."""

    scales: Tensor | None
    held: Mapping[str, Quantized]
    nearest_loss: float
    loss: float
    clipped: frozenset[str]
    compensated: frozenset[str]
    unseen: frozenset[str] = frozenset()


class GroupSearch:
    """One group, when a walk has reached its end. `kinds` are the types of the layers that are to be quantized, those of
    `dynamic` with inputs rounded at each call; `route` is how the input may be scaled (None: any scales go)."""

    def __init__(
        self,
        group: Group,
        kinds: Mapping[Linear, QuantizedType],
        dynamic: frozenset[Linear],
        batches: Sequence[Batch],
        interpreter: Interpreter,
        route: Route | None,
    ) -> None:
        self.group, self.batches, self.interpreter, self.route, self.dynamic = group, batches, interpreter, route, dynamic
        self.wanted = tuple(one for one in group.linears if one in kinds)
        self.weights = {one: _weight(one, batches[0]) for one in self.wanted}
        self.kinds = {one: scale_for(self.weights[one], kinds[one]) for one in self.wanted}

    # -- what is known of the inputs -------------------------------------------------------------------------------------

    @cached_property
    def moments(self) -> dict[Value, Tensor]:
        """H = X^T X [K, K] of each value that a layer reads."""
        found: dict[Value, Tensor] = {}
        for one in self.wanted:
            if one.x not in found:
                sums = torch.zeros(one.columns, one.columns, dtype=torch.float64)
                for batch in self.batches:
                    x = rows_of(batch.values[one.x]).float()
                    sums += (x.t() @ x).double()
                found[one.x] = sums.float()
        return found

    @cached_property
    def magnitudes(self) -> Tensor:
        """mean|x| [K] of the value that the group reads."""
        rows = [rows_of(batch.values[self.group.x]).float() for batch in self.batches]
        return (sum(x.abs().double().sum(0) for x in rows) / max(1, sum(len(x) for x in rows))).float()  # type: ignore[union-attr]

    @cached_property
    def unseen(self) -> frozenset[Linear]:
        """Layers that calibration has hardly reached."""
        return frozenset(one for one in self.wanted if self.seen(one) < FEW_ROWS)

    @property
    def known(self) -> list[Linear]:
        """The others."""
        return [one for one in self.wanted if one not in self.unseen]

    def seen(self, one: Linear) -> int:
        """Rows that calibration brought to a layer."""
        return sum(rows_of(batch.values[one.x]).shape[0] for batch in self.batches)

    # -- judging ---------------------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> float:
        """The mean square of the results."""
        return self._mean(lambda batch, v: batch.values[v].double().square())

    def loss(self, weights: Mapping[Linear, Tensor]) -> float:
        """The mean squared error at the results with these weights, relative to the results' mean square."""
        if len(self.wanted) == 1 and self.group.join is self.wanted[0].node.out and not self.dynamic:
            one = self.wanted[0]
            error = weights[one] - self.weights[one]
            total = float(cost(error, self.moments[one.x]).sum()) / max(1, self.seen(one) * one.rows)
        else:
            now = {id(batch): self._run(batch, weights) for batch in self.batches}
            total = self._mean(lambda batch, v: (now[id(batch)].values[v].double() - batch.values[v].double()).square())
        return total / self.reference if self.reference > 0 else total

    def _run(self, batch: Batch, weights: Mapping[Linear, Tensor]) -> Batch:
        def layer(one: Linear) -> Callable[[Mapping[Value, Any]], Tensor]:
            def product(values: Mapping[Value, Any]) -> Tensor:
                x, bias = values[one.x], None if one.bias is None else values[one.bias]
                if one in self.dynamic:
                    codes, scales = quantize_rows(x)
                    x = (codes.float() * scales).to(x.dtype)
                return torch.nn.functional.linear(x, weights[one].to(x.dtype), bias)

            return product

        return run(self.group.nodes, batch, self.interpreter, {one.node: layer(one) for one in self.wanted})

    def _mean(self, of: Callable[[Batch, Value], Tensor]) -> float:
        total, count = 0.0, 0
        for batch in self.batches:
            for v in self.group.results:
                found = of(batch, v)
                total, count = total + float(found.sum()), count + found.numel()
        return total / max(1, count)

    # -- searching -------------------------------------------------------------------------------------------------------

    def run(self, method: Method) -> Found:
        """The best that was found."""
        plain = {one: rounded(w, self.kinds[one]) for one, w in self.weights.items()}
        if all(one in self.unseen for one in self.wanted):
            held = {one.name: nearest(w, self.kinds[one], None) for one, w in self.weights.items()}
            return Found(None, held, 0.0, 0.0, frozenset(), frozenset(), frozenset(held))
        first = self.loss(plain)
        tried = self._scales(first) if method.scale else [(first, None)]
        return min((self._finished(method, first, best, scales) for best, scales in tried), key=lambda found: found.loss)

    def _finished(self, method: Method, first: float, best: float, scales: Tensor | None) -> Found:
        """Clipping, and rounding that makes up for its errors, behind scales that cost `best` without them."""
        scaled = {one: w if scales is None else w * scales for one, w in self.weights.items()}
        back = torch.ones(()) if scales is None else 1 / scales
        now = {one: rounded(w, self.kinds[one]) * back for one, w in scaled.items()}
        ranges: dict[Linear, Ranges | None] = dict.fromkeys(self.wanted)
        makeup: dict[Linear, Quantized] = {}
        if method.clip:
            for one in self.known:
                found = clipped(scaled[one], self.kinds[one], self._moments(one, scales))
                tried = {**now, one: rounded(scaled[one], self.kinds[one], found.low, found.high) * back}
                if (loss := self.loss(tried)) < best:
                    best, now, ranges[one] = loss, tried, found
        if method.compensate:
            for one in self.known:
                made = compensated(scaled[one], self.kinds[one], self._moments(one, scales), ranges[one])
                tried = {**now, one: made.dequantize() * back}
                if (loss := self.loss(tried)) < best:
                    best, now, makeup[one] = loss, tried, made
        held = {
            one.name: makeup[one] if one in makeup else nearest(w, self.kinds[one], ranges[one]) for one, w in scaled.items()
        }
        clips = frozenset(one.name for one, found in ranges.items() if found is not None)
        hardly = frozenset(one.name for one in self.unseen)
        return Found(scales, held, first, best, clips, frozenset(one.name for one in makeup), hardly)

    def _moments(self, one: Linear, scales: Tensor | None) -> Tensor:
        moments = self.moments[one.x]
        return moments if scales is None else moments / scales[:, None] / scales

    def _scales(self, plain: float) -> list[tuple[float, Tensor | None]]:
        """What scales cost, and the scales: the best of each family that are better than none, or none. Which is best behind
        clipping is not known before. A multiplication at run time must be worth it."""
        bar = plain if self.route is not None else AT_RUN_TIME * plain
        tried: dict[tuple[str, float], float] = {}
        found: dict[str, tuple[float, Tensor | None]] = {}

        def look(asked: Iterable[tuple[str, float]]) -> None:
            for name, ratio, s in self._candidates(key for key in asked if key not in tried and 0 <= key[1] <= 1):
                tried[name, ratio] = loss = self._with(s)
                if loss < found.get(name, (bar, None))[0]:
                    found[name] = loss, s

        look((name, i / GRID) for name in FAMILIES for i in range(0, GRID + 1, 2))
        for reach in (1, 0.5):
            for family in FAMILIES:
                _, ratio = min((loss, r) for (name, r), loss in tried.items() if name == family)
                look((family, ratio + step * reach / GRID) for step in (-1, 1))
        return list(found.values()) or [(plain, None)]

    def _candidates(self, asked: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float, Tensor]]:
        x = self.magnitudes
        relative = torch.cat([_relative(w, self.kinds[one].group) for one, w in self.weights.items()]).mean(0)
        for name, ratio in asked:
            s = x.pow(ratio).clamp(1e-4) if name == "plain" else x.pow(ratio) / (relative.pow(1 - ratio) + 1e-4)
            s = torch.where(s.isfinite() & (s > 0), s, 1.0)
            if self.route is not None:
                s = self.route.tied(s)
            yield name, ratio, s / (s.max() * s.min()).sqrt()

    def _with(self, scales: Tensor) -> float:
        return self.loss({one: rounded(w * scales, self.kinds[one]) / scales for one, w in self.weights.items()})


def _relative(weight: Tensor, group: int) -> Tensor:
    """|w| [N, K] by the largest of its group."""
    grouped = weight.abs().unflatten(-1, (-1, group))
    return (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(-2)


def _weight(one: Linear, batch: Batch) -> Tensor:
    weight = batch.values[one.weight].detach().float()
    return weight.t().contiguous() if one.turned else weight
