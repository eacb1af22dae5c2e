"""Run a program in four worlds at once, to know what another correct implementation may answer.

The *actual* world is eager PyTorch. The *wide* world is the same program in float64. Two *noisy* worlds are float64 with a
rounding error of the actual dtype injected after every statement that may round. A statement is sound for differential
testing when all worlds agree on every integer and boolean it yields (no comparison, floor or sort hangs by a rounding
error), on where NaN and infinities are, and, loosely, on the floating values (it is not ill-conditioned). Sound
programs may contain any discontinuous op, and still have one right answer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from .judge import error_bar
from .program import SCOPE, Env, Input, Program, Statement, in_float64, step, widen

ULPS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 4.0, torch.float64: 4.0}  # noise per rounded statement
CONDITION = {torch.float16: 0.03, torch.bfloat16: 0.15, torch.float32: 2e-4, torch.float64: 1e-8}  # spread that is too much
MAX_ELEMENTS = 4096
MAX_NDIM = 5
MAX_MAGNITUDE = 2.0e4  # of rounded results: far from every dtype's overflow
NOISY = 2
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError)


class World:
    """One size set: `actual`, `wide` and `noisy` environments, name to value."""

    def __init__(self, sizes: tuple[tuple[str, int], ...], seed: int) -> None:
        self.sizes = dict(sizes)
        self.actual: Env = {}
        self.wide: Env = {}
        self.noisy: list[Env] = [{} for _ in range(NOISY)]
        self.seed = seed

    def bind(self, given: Input) -> None:
        """Make the input in every environment."""
        self.actual[given.name] = eval(given.text, SCOPE, self.sizes)
        for env in (self.wide, *self.noisy):
            env[given.name] = widen(eval(given.text, SCOPE, self.sizes))

    def apply(self, statement: Statement) -> None:
        """Execute the statement everywhere, then inject noise where it may round. Raises what the statement raises."""
        operands = [self._exact_integers(name) for name in statement.reads]
        step(statement, self.actual)
        for env in (self.wide, *self.noisy):
            step(statement, env, wide=True)
        touched = statement.defines + statement.mutates
        if statement.numerics == "exact":
            return
        if statement.numerics == "ring" and self._stays_exact(operands, touched, statement.degree):
            return
        scale = self._magnitude(statement)
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        for name in touched:
            dtype = getattr(self.actual[name], "dtype", None)
            if dtype is None or not dtype.is_floating_point:
                continue
            unit = torch.finfo(dtype).eps * ULPS[dtype]
            for env in self.noisy:
                noise = torch.rand(env[name].shape, generator=generator, dtype=torch.float64) * 2 - 1
                shifted = env[name] + noise * unit * (env[name].abs() + scale)
                if name in statement.mutates:
                    env[name].copy_(shifted)
                else:
                    env[name] = shifted

    def unsound(self, statement: Statement) -> str:
        """Why the statement's results do not have one right answer; empty when they have."""
        for name in statement.defines + statement.mutates:
            value, wide = self.actual[name], self.wide[name]
            if not isinstance(value, torch.Tensor):
                continue
            if value.numel() > MAX_ELEMENTS or value.ndim > MAX_NDIM:
                return "too large"
            others = [wide, *(env[name] for env in self.noisy)]
            if any(o.shape != value.shape for o in others):
                return "the shape depends on rounding"
            if not value.dtype.is_floating_point:
                if any(not torch.equal(o, value) for o in others):
                    return "an integer depends on rounding"
                continue
            reason = self._unsound_float(value, others)
            if reason:
                return reason
        return ""

    def _unsound_float(self, value: torch.Tensor, others: Sequence[torch.Tensor]) -> str:
        wide, exact = others[0], all(torch.equal(o.nan_to_num(0), others[0].nan_to_num(0)) for o in others)
        for other in (value.to(torch.float64), *others[1:]):
            if not (torch.equal(other.isnan(), wide.isnan()) and torch.equal(other.isposinf(), wide.isposinf())):
                return "NaN or infinity depends on rounding"
            if not torch.equal(other.isneginf(), wide.isneginf()):
                return "infinity depends on rounding"
        finite = wide[wide.isfinite()]
        if exact or not finite.numel():
            return ""
        if finite.abs().amax() > MAX_MAGNITUDE:
            return "rounded and large"
        limit = CONDITION[value.dtype] * (wide.abs() + 0.1 * finite.abs().amax() + 1e-3)
        for other in (value.to(torch.float64), *others[1:]):
            gap = (other - wide).abs()
            if (gap > limit)[wide.isfinite()].any():
                return "ill-conditioned"
        return ""

    def _exact_integers(self, name: str) -> tuple[float, int] | None:
        """(largest magnitude, number of elements) of a tensor of integers that every world agrees on; else None."""
        value = self.actual[name]
        if not isinstance(value, torch.Tensor):
            return (abs(float(value)), 1)
        wide = value.to(torch.float64)
        if not wide.isfinite().all() or not torch.equal(wide, wide.round()):
            return None
        if any(not torch.equal(env[name].to(torch.float64), wide) for env in (self.wide, *self.noisy)):
            return None
        return (wide.abs().amax().item() if wide.numel() else 0.0, max(wide.numel(), 1))

    def _stays_exact(self, operands: list[tuple[float, int] | None], touched: tuple[str, ...], degree: int) -> bool:
        """Sums and products of small integers: no partial sum, in whatever order, can leave the exact range."""
        known = [o for o in operands if o is not None]
        if len(known) < len(operands):
            return False
        bound = 2.0 * math.prod(max(magnitude, 1.0) for magnitude, _ in known)
        if degree:
            bound *= max(count for _, count in known)
        for name in touched:
            value = self.actual[name]
            if value.dtype.is_floating_point and bound >= 1 / torch.finfo(value.dtype).eps:
                return False
            if not torch.equal(value.to(torch.float64), self.wide[name].to(torch.float64)):
                return False
        return True

    def _magnitude(self, statement: Statement) -> float:
        """How large the terms of a sum inside the statement are, relative to which its rounding errors count."""
        if not statement.degree:
            return 0.0
        largest = 0.0
        for name in statement.reads:
            value = self.wide[name]
            if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.numel():
                finite = value[value.isfinite()].abs()
                largest = max(largest, finite.amax().item() if finite.numel() else 0.0)
        return min(largest**statement.degree, 1e6)


class Worlds:
    """One `World` per size set, with transactions: a statement that raises or is unsound leaves no trace."""

    def __init__(self, sizes: Sequence[tuple[tuple[str, int], ...]], seed: int) -> None:
        self.each = [World(s, seed) for s in sizes]

    def bind(self, given: Input) -> None:
        """Make the input in every world."""
        for world in self.each:
            world.bind(given)

    def accept(self, statement: Statement) -> str:
        """Execute the statement if it is legal and sound for every size set; else say why not, and undo."""
        before = self.each
        trial = copy.deepcopy(before) if statement.mutates else before
        reason = ""
        for world in trial:
            try:
                world.apply(statement)
            except REFUSALS as error:  # the catalogue proposes, eager disposes
                reason = f"{type(error).__name__}: {error}"
            reason = reason or world.unsound(statement)
            if reason:
                break
        if not reason and any(len({w.actual[n].ndim for w in trial}) > 1 for n in statement.defines):
            reason = "the number of dimensions depends on the sizes"
        if not reason:
            self.each = trial
        elif not statement.mutates:
            for world, name in ((w, n) for w in trial for n in statement.defines):
                for env in (world.actual, world.wide, *world.noisy):
                    env.pop(name, None)
        return reason

    def value(self, name: str) -> Any:
        """The actual value for the first size set."""
        return self.each[0].actual[name]

    def dims(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The shape, each dimension as its sizes over the size sets."""
        shapes = [tuple(w.actual[name].shape) for w in self.each]
        return tuple(zip(*shapes, strict=True)) if shapes[0] else ()


def reference(program: Program, run: int) -> tuple[Any, list[float]]:
    """(results and inputs after the call in float64, error bar of each leaf) for size set `run`."""
    world = World(program.sizes[run], program.seed)
    for given in program.inputs:
        world.bind(given)
    for statement in program.statements:
        world.apply(statement)
    text = f"[({', '.join(program.outputs)},), [{', '.join(i.name for i in program.inputs)}]]"
    with in_float64():
        exact = eval(text, SCOPE, world.wide)
        noisy = [eval(text, SCOPE, env) for env in world.noisy]
    bars = [max(pair) for pair in zip(*(error_bar(n, exact) for n in noisy), strict=True)]
    return exact, bars
