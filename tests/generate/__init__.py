"""Random programs for differential testing: the same seed gives the same program, on every machine.

`program(seed)` grows a Python function over mixed ops, views, broadcasting, dtypes, empty and size-1 dimensions, NaN and
infinities, in-place updates and aliasing results, static or with dynamic sizes. Its source runs standalone. Every line was
accepted by four runs (`worlds.py`), so the program has one right answer up to the rounding that `judge.py` allows.
`check` compiles a program with a backend and judges it, `shrink` drops what a failure does not need.

From the repository root: `python -m tests.generate SEED [--backend NAME] [--shrink]`.
"""

from __future__ import annotations

import random

from . import compound, elementwise, structure
from .builder import Builder, Dim, NoCandidate, Sizes
from .check import Result, check, reproduction, shrink
from .judge import Verdict, judge
from .program import Program

__all__ = ["Program", "Result", "Verdict", "check", "judge", "program", "reproduction", "shrink"]

CATALOGUE = {
    elementwise.exact_unary: 6, elementwise.tests: 3, elementwise.rounded_unary: 8, elementwise.activation: 5,
    elementwise.int_unary: 2, elementwise.ring_binary: 12, elementwise.exact_binary: 5, elementwise.rounded_binary: 6,
    elementwise.ternary: 4, elementwise.where: 4, elementwise.cast: 5, elementwise.in_place: 5, elementwise.exchange: 2,
    elementwise.size_arithmetic: 3, structure.permute: 5, structure.reshape: 6, structure.expand: 4, structure.slices: 6,
    structure.small_views: 6, structure.join: 4, structure.split: 3, structure.index: 3, structure.scatter: 2,
    structure.pad: 2, compound.sums: 10, compound.picks: 5, compound.pairs: 2, compound.norms: 5, compound.losses: 2,
    compound.affine_norm: 2, compound.linear: 5, compound.products: 4, compound.convolution: 3, compound.target_loss: 1,
}  # fmt: skip
DYNAMIC_SHARE = 0.35


def program(seed: int, *, max_nodes: int = 16, dynamic: bool | None = None) -> Program:
    """The program of `seed` with 3 to `max_nodes` statements; `dynamic` forces or forbids dynamic sizes.

    The result has `.fn`, `.make_inputs(run)`, `.sizes`, `.description` and `.source`.
    """
    rng = random.Random(seed * 2 + 1)
    if dynamic is None:
        dynamic = rng.random() < DYNAMIC_SHARE
    builder = Builder(rng, seed, _sizes(rng, dynamic))
    for _ in range(rng.randint(1, 3)):
        _first_input(builder)
    wanted = rng.randint(3, max(3, max_nodes))
    makers, weights = list(CATALOGUE), list(CATALOGUE.values())
    for _ in range(12 * wanted):
        if len(builder.statements) >= wanted:
            break
        builder.propose(rng.choices(makers, weights)[0])
    return builder.finish()


def _sizes(rng: random.Random, dynamic: bool) -> tuple[Sizes, ...]:
    """Size names with a value per run; dynamic programs run again at a second size, some at an empty or single one."""
    if not dynamic:
        values = rng.choices([0, 1, 2, 3, 4, 6, 7, 8, 16, 17, 33, 64], weights=[1, 3, 3, 4, 5, 4, 3, 5, 4, 3, 2, 1], k=3)
        return (tuple(zip("nmk", values, strict=True)),)
    low, high = rng.sample([2, 3, 4, 5, 6, 8, 9, 12], 2), rng.sample([7, 10, 11, 14, 16, 18, 24], 2)
    runs = [tuple(zip("nm", low, strict=True)), tuple(zip("nm", high, strict=True))]
    if rng.random() < 0.3:
        runs.append((("n", rng.choice([0, 1])), ("m", 13)))
    return tuple(runs)


def _first_input(b: Builder) -> None:
    ndim = b.rng.choices([0, 1, 2, 3, 4], weights=[1, 3, 6, 5, 2])[0]
    dims: list[Dim] = []
    for _ in range(ndim):
        fixed = b.rng.choice([1, 2, 3, 4, 4, 5, 8])
        dims.append(b.rng.choice([*b.symbols.values(), (fixed,) * len(b.sizes)]))
    try:
        b.fresh(dims, "float" if not b.inputs else "any")
    except NoCandidate:
        return
