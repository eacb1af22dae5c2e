"""Instances that wait for values: each is a fiber; when none can go on, what is recorded runs, and all go on.

An instance may fork into fibers of its own; it goes on when all of them have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


class Fibers:
    """The fibers of one call. `waits` counts how often somebody wanted a value that was not there, `forks` how often one
    split into several."""

    def __init__(self) -> None:
        self.waits = 0
        self.forks = 0
        self.hub: Any = None
        self.grad = True  # whether gradients are recorded where the call began: others must not begin in this one's no_grad
        self.modes: list[TorchFunctionMode] = []  # of torch's API, where the call began
        self.ready: deque[tuple[Any, tuple[Any, ...]]] = deque()
        self.parked: list[Any] = []
        self.all: list[Any] = []

    def run(self, body: Callable[[int], Any], count: int, flush: Callable[[], None]) -> list[Any]:
        """Run `body(i)` for all i, each in a fiber, with a `flush` whenever all wait. What one raises ends the others."""
        from greenlet import getcurrent, greenlet

        results: list[Any] = [None] * count

        def start(i: int) -> None:
            results[i] = body(i)

        self.hub, self.grad = getcurrent(), torch.is_grad_enabled()
        self.modes = _get_current_function_mode_stack()
        self.all = [greenlet(start) for _ in range(count)]
        self.ready.extend((fiber, (i,)) for i, fiber in enumerate(self.all))
        try:
            while self.ready or self.parked:
                while self.ready:
                    fiber, args = self.ready.popleft()
                    fiber.switch(*args)
                if self.parked:
                    flush()
                    self.ready.extend((fiber, ()) for fiber in self.parked)
                    self.parked.clear()
        finally:
            self.hub = None
            self.ready.clear()
            self.parked.clear()
            for fiber in self.all:
                if fiber and not fiber.dead:
                    fiber.throw()
            self.all = []
        return results

    def park(self) -> bool:
        """Wait until all that is recorded has been computed; False where nobody else could run meanwhile."""
        self.waits += 1
        if self.hub is None:
            return False
        from greenlet import getcurrent

        self.parked.append(getcurrent())
        self._leave()
        return True

    def spread(self, bodies: Sequence[Callable[[], Any]]) -> list[Any] | None:
        """Run functions side by side, and wait for all; None where there is nothing to run beside another, or this call does
        not run in fibers. The first error in their order is raised once all have ended."""
        if self.hub is None or len(bodies) < 2:
            return None
        from greenlet import getcurrent, greenlet

        self.forks += 1
        parent, grad, left = getcurrent(), torch.is_grad_enabled(), len(bodies)
        results: list[Any] = [None] * len(bodies)
        errors: list[Exception | None] = [None] * len(bodies)

        def start(i: int) -> None:
            nonlocal left
            try:
                if grad == self.grad:
                    results[i] = bodies[i]()
                else:
                    with torch.set_grad_enabled(grad):
                        results[i] = bodies[i]()
            except Exception as error:
                errors[i] = error
            left -= 1
            if left == 0:
                self.ready.append((parent, ()))

        children = [greenlet(start, parent=self.hub) for _ in bodies]
        self.all += children
        self.ready.extend((child, (i,)) for i, child in enumerate(children))
        self._leave()
        first = next((e for e in errors if e is not None), None)
        if first is not None:
            raise first
        return results

    def _leave(self) -> None:
        """Let others run in this thread. What torch keeps for each thread, modes of its API and whether gradients are
        recorded, is put away and taken up again where it is not as it was at the beginning."""
        grad, modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
        if grad == self.grad and modes == len(self.modes) and torch._C._is_torch_function_enabled():
            self.hub.switch()
            return
        own = _get_current_function_mode_stack()
        _become(self.modes)
        torch._C._set_grad_enabled(self.grad)
        try:
            with torch._C._EnableTorchFunction():
                self.hub.switch()
        finally:
            _become(own)
            torch._C._set_grad_enabled(grad)


def _become(modes: Sequence[TorchFunctionMode]) -> None:
    """Make these the modes of torch's API."""
    for _ in range(torch._C._len_torch_function_stack()):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
