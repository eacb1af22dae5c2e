"""Instances that wait for values: each is a fiber; when none can go on, what is recorded runs, and all go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .blocks import without_modes


class Fibers:
    """The fibers of one call. `waits` counts how often somebody wanted a value that was not there."""

    def __init__(self) -> None:
        self.waits = 0
        self.hub: Any = None
        self.grad = True  # whether gradients are recorded where the call began: others must not begin in this one's no_grad

    def run(self, body: Callable[[int], Any], count: int, flush: Callable[[], None]) -> list[Any]:
        """Run `body(i)` for all i, each in a fiber, with a `flush` whenever all wait. What one raises ends the others."""
        from greenlet import getcurrent, greenlet

        results: list[Any] = [None] * count

        def start(i: int) -> None:
            results[i] = body(i)

        self.hub, self.grad = getcurrent(), torch.is_grad_enabled()
        fibers = [greenlet(start) for _ in range(count)]
        try:
            ready = [(fiber, (i,)) for i, fiber in enumerate(fibers)]
            while ready:
                for fiber, args in ready:
                    fiber.switch(*args)
                ready = [(fiber, ()) for fiber, _ in ready if not fiber.dead]
                if ready:
                    flush()
        finally:
            self.hub = None
            for fiber in fibers:
                if fiber and not fiber.dead:
                    fiber.throw()
        return results

    def park(self) -> bool:
        """Wait until all that is recorded has been computed; False where nobody else could run meanwhile.

        What torch keeps for each thread, modes and whether gradients are recorded, is put away and taken up again: others
        run in this thread.
        """
        self.waits += 1
        if self.hub is None:
            return False
        grad = torch.is_grad_enabled()
        with without_modes(), torch.set_grad_enabled(self.grad):
            self.hub.switch()
        torch._C._set_grad_enabled(grad)
        return True
