"""Whether batching pays: calls are timed beside some of their instances run one by one, until it is clear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

SAMPLES = 3  # comparisons for each class of numbers of instances; all must say the same
ALONE = 4  # instances that one comparison runs one by one


class Pace:
    """Comparisons, by number of instances: batches of eight to fifteen share theirs, and so on."""

    def __init__(self) -> None:
        self.ratios: dict[int, list[float]] = {}

    def ratio(self, count: int) -> float | None:
        """How many times as fast the batch is as its instances one by one: the best of the comparisons, None before they are
        done."""
        found = self.ratios.get(count.bit_length(), [])
        return max(found) if len(found) == SAMPLES else None

    def compare(self, program: Callable[..., Any], instances: Sequence[tuple[Any, ...]], seconds: float) -> None:
        """Time some instances one by one beside a batch of all that took so long."""
        count = len(instances)
        found = self.ratios.setdefault(count.bit_length(), [])
        if len(found) == SAMPLES or not count or any(isinstance(x, Iterator) for x in tree_leaves(list(instances))):
            return
        some = instances[:: max(1, count // ALONE)][:ALONE]
        with torch.random.fork_rng():
            started = time.perf_counter()
            for instance in some:
                program(*instance)
            alone = time.perf_counter() - started
        found.append(alone / len(some) * count / seconds)
