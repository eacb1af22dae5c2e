"""Where gradients land: from a plan's results into `p.grad`, each in memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..observe import Record
from ..pipelines import Run


class Landing:
    """Calls a plan on Dynamo's flat inputs and puts its gradients into `.grad` of the inputs numbered `of`.

    Results of a plan may be one value twice, views of one another or of inputs, where eager would accumulate copies. Which
    are, is the same in each call of a plan, so that the first one finds out.
    """

    def __init__(self, run: Run, record: Record, of: tuple[int, ...], kept: int, loss: int) -> None:
        self._run, self._record = run, record
        self._of, self._kept, self._loss = of, kept, loss
        self._plan: Any = None
        self._shared: list[int] = []

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        self._record.runs += 1
        plan = self._record.compiled  # the one that runs now; a better one may take its place during the call
        loss, *rest = self._run(list(inputs))
        kept, gradients = rest[: self._kept], rest[self._kept :]
        if self._plan is not plan:
            self._shared = shared([x for x in inputs if isinstance(x, torch.Tensor)], gradients)
            self._plan = plan
        for i in self._shared:
            gradients[i] = gradients[i].clone(memory_format=torch.contiguous_format)
        for i, gradient in zip(self._of, gradients, strict=True):
            inputs[i].grad = gradient
        kept.insert(self._loss, loss)
        return tuple(kept)


def shared(inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> list[int]:
    """Numbers of the gradients that share bytes with an input, with a gradient before, or with themselves."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for t in inputs:
        taken.setdefault(t.untyped_storage().data_ptr(), []).append(_span(t))
    found: list[int] = []
    for i, g in enumerate(gradients):
        low, high = _span(g)
        others = taken.setdefault(g.untyped_storage().data_ptr(), [])
        itself = not torch.ops.aten.is_non_overlapping_and_dense.default(g)
        if g.numel() and (itself or any(low < b and a < high for a, b in others)):
            found.append(i)
        else:
            others.append((low, high))
    return found


def _span(t: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one past the last."""
    if not t.numel():
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
