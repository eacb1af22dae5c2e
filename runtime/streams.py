"""Side streams of a device plan: launches on stream k wait for the steps they name, and everything joins at the end.

Stream 0 is the caller's current stream. A `Call` runs there and waits for all launches before it. Because everything
joins, memory that a call frees at its end may be reused by the current stream at once; nothing is freed before.
"""

from __future__ import annotations

from typing import Any

import torch

from .plan import Call, Launch, Plan


class Streams:
    """The streams of one plan. Calls from several threads share them, which orders their launches, no more."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._device = device
        self._side = {s.stream: torch.cuda.Stream(device) for s in plan.steps if isinstance(s, Launch) and s.stream}
        self._awaited = {w for s in plan.steps if isinstance(s, Launch) for w in s.waits}
        self._home = [s.stream if isinstance(s, Launch) else 0 for s in plan.steps]
        self._joins = [isinstance(s, Call) for s in plan.steps]
        self._waits = [s.waits if isinstance(s, Launch) else () for s in plan.steps]

    def begin(self, last: Any) -> torch.cuda.Stream:
        """At the start of a call in a frame last used on stream `last`: gives the current stream, ordered after it."""
        current = torch.cuda.current_stream(self._device)
        if last is not None and last != current:
            current.wait_stream(last)
        for side in self._side.values():
            side.wait_stream(current)
        return current

    def before(self, number: int, current: torch.cuda.Stream, events: dict[int, Any]) -> int:
        """Before step `number`: makes its stream wait for what the plan says; returns the stream's handle."""
        stream = self._side.get(self._home[number], current)
        if self._joins[number]:
            for side in self._side.values():
                stream.wait_stream(side)
        for w in self._waits[number]:
            if self._home[w] != self._home[number]:
                stream.wait_event(events[w])
        return stream.cuda_stream

    def after(self, number: int, current: torch.cuda.Stream, events: dict[int, Any]) -> None:
        """After step `number`: records the event that others wait for."""
        if number in self._awaited:
            events[number] = self._side.get(self._home[number], current).record_event()

    def finish(self, current: torch.cuda.Stream) -> None:
        """At the end of a call: the current stream waits for all side streams."""
        for side in self._side.values():
            current.wait_stream(side)
