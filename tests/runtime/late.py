"""Collectives that run at their wait, without a process group: the worst that the memory of what they read can meet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from plait.runtime import dispatch, steps


class Late:
    """One result of a collective. It does not keep alive what the collective reads."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], part: int | None) -> None:
        self.fn, self.args, self.part = fn, [_loose(a) for a in args], part

    def wait(self) -> torch.Tensor:
        found = self.fn(*map(_held, self.args))
        return found if self.part is None else found[self.part]


def _loose(x: Any) -> Any:
    return weakref.ref(x) if isinstance(x, torch.Tensor) else [_loose(y) for y in x] if isinstance(x, list) else x


def _held(x: Any) -> Any:
    if isinstance(x, list):
        return [_held(y) for y in x]
    if not isinstance(x, weakref.ref):
        return x
    found = x()
    assert found is not None, "an operand was freed while it was in use"
    return found


def put_off(monkeypatch: pytest.MonkeyPatch, fakes: Mapping[str, Callable[..., Any]]) -> None:
    """Let plans run `fakes` in place of collectives, when they are waited for."""

    class Collectives(dispatch.Collectives):
        def started(self, number: int, step: Any, op: Any, writes: bool) -> Callable[..., Any]:
            assert self.asynchronous(step), f"step {number} does not wait for its collective"
            count, fn = len(step.outs), fakes[step.op]
            return lambda *args: [Late(fn, args, None if count == 1 else part) for part in range(count)]

        def waited(self, op: Any) -> Callable[[Any], Any]:
            return lambda x: x.wait() if isinstance(x, Late) else op(x)

    monkeypatch.setattr(steps, "Collectives", Collectives)
    monkeypatch.setattr(dispatch, "agree", lambda plan: None)
