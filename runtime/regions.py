"""Control flow of a plan: ops whose arguments are nested plans (regions) and lists of operands.

Argument lists, all operands flat: `plait.cond` (predicate, then-region, else-region, operands); `plait.while_loop` and
`plait.while_loop_stack_output` (condition-region, body-region, carried, additional); `plait.scan` (combine-region, init,
xs, additional); `plait.call` (region, operands). The semantics, also for zero iterations, are those of torch's
higher-order ops of the same names, and like theirs a result never shares memory with an operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import WrongOpResult

Region = Callable[..., list[Any]]


def _holds(predicate: Any) -> bool:
    return bool(predicate.item()) if isinstance(predicate, torch.Tensor) else bool(predicate)


def _own(results: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """The results, cloned where they share memory with an operand (which may lie in the arena) or with each other."""
    taken = {t.untyped_storage()._cdata for t in operands if isinstance(t, torch.Tensor)}
    owned = []
    for r in results:
        if isinstance(r, torch.Tensor):
            storage = r.untyped_storage()._cdata
            r = r.clone() if storage in taken else r
            taken.add(storage)
        owned.append(r)
    return owned


def cond(predicate: Any, then: Region, otherwise: Region, operands: list[Any]) -> list[Any]:
    """Run one of two regions."""
    return _own((then if _holds(predicate) else otherwise)(*operands), operands)


def call(region: Region, operands: list[Any]) -> list[Any]:
    """Run a region."""
    return _own(region(*operands), operands)


def while_loop(condition: Region, body: Region, carried: list[Any], additional: list[Any]) -> list[Any]:
    """Run `body` on the carried values while `condition` holds."""
    state = carried
    while _holds(condition(*state, *additional)[0]):
        state = body(*state, *additional)
        if len(state) != len(carried):
            raise WrongOpResult(op="plait.while_loop", got=f"{len(state)} values", expected=f"{len(carried)}")
    return _own(state, [*carried, *additional])


def while_loop_stack_output(condition: Region, body: Region, carried: list[Any], additional: list[Any]) -> list[Any]:
    """Like while_loop, but gives the carried values after every iteration, stacked; without any, the first ones."""
    state, history = carried, []
    while _holds(condition(*state, *additional)[0]):
        state = body(*state, *additional)
        history.append(state)
    return [torch.stack(steps) for steps in zip(*(history or [carried]), strict=True)]


def scan(combine: Region, init: list[Any], xs: list[Any], additional: list[Any]) -> list[Any]:
    """Fold `combine(carry, x[i])` over dimension 0 of xs; gives the last carry and the stacked other results."""
    carry, outs = init, []
    for i in range(xs[0].shape[0]):
        results = combine(*carry, *[x.select(0, i) for x in xs], *additional)
        carry = results[: len(init)]
        outs.append(results[len(init) :])
    stacked = [None if steps[0] is None else torch.stack(steps) for steps in zip(*outs, strict=True)]
    return [*_own(carry, [*init, *xs, *additional]), *stacked]


REGION_OPS: dict[str, Callable[..., list[Any]]] = {
    "plait.cond": cond,
    "plait.while_loop": while_loop,
    "plait.while_loop_stack_output": while_loop_stack_output,
    "plait.scan": scan,
    "plait.call": call,
}
