"""Values on their way between ranks: sent and received in the background, waited for with a time-out.

On gloo each value has a tag, so that values may be received in another order than they are waited for. NCCL knows no tags:
there each direction between two ranks has a process group of its own, on which the order of sends is that of receives.
That has not been run on a machine with several GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...errors import StageLost, StageTimedOut
from ...runtime.collectives import _disconnect, _reason, timeout_s


@dataclass
class Sent:
    """A value that leaves this rank; it stays alive until the other one has it."""

    work: Any
    tensor: torch.Tensor
    what: str
    peer: int


@dataclass
class Awaited:
    """Values that come from another rank."""

    works: list[Any]
    tensors: list[torch.Tensor]
    what: str
    peer: int


class Messages:
    """What a rank of a process group sends to and receives from others."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._flying: list[Sent] = []
        self._failed: StageLost | StageTimedOut | None = None

    def send(self, tensors: Sequence[torch.Tensor], peer: int, tag: int, what: str) -> None:
        """Start to send values; `what` names them in errors. Tags from `tag` on are used."""
        self._finish(block=False)
        for i, t in enumerate(tensors):
            dense = t.detach().contiguous()
            self._flying.append(
                Sent(self._try(lambda d=dense, i=i: self.group.send([d], peer, tag + i), what, peer), dense, what, peer)
            )

    def receive(self, tensors: Sequence[torch.Tensor], peer: int, tag: int, what: str) -> Awaited:
        """Start to receive values into tensors."""
        works = [self._try(lambda t=t, i=i: self.group.recv([t], peer, tag + i), what, peer) for i, t in enumerate(tensors)]
        return Awaited(works, list(tensors), what, peer)

    def wait(self, awaited: Awaited) -> list[torch.Tensor]:
        """The values, when they are there. Raises StageLost, StageTimedOut."""
        for work in awaited.works:
            self._wait(work, awaited.what, awaited.peer)
        return awaited.tensors

    def finish(self) -> None:
        """Wait until all that was sent has arrived. Raises StageLost, StageTimedOut."""
        self._finish(block=True)

    def close(self) -> None:
        """Break the group, so that the other ranks do not wait for what this one will not send."""
        if self._failed is None:
            self._failed = StageLost(rank=self.rank, what="its own work", peer=self.rank, why="it failed")
        _disconnect(self.group)

    def _finish(self, *, block: bool) -> None:
        while self._flying and (block or self._flying[0].work.is_completed()):
            sent = self._flying.pop(0)
            self._wait(sent.work, sent.what, sent.peer)

    def _try(self, start: Any, what: str, peer: int) -> Any:
        if self._failed is not None:
            raise self._failed
        try:
            return start()
        except RuntimeError as error:
            raise self._lost(what, peer, error) from error

    def _wait(self, work: Any, what: str, peer: int) -> None:
        seconds, start = timeout_s(), time.monotonic()
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            if time.monotonic() - start >= seconds:
                self._failed = StageTimedOut(rank=self.rank, what=what, peer=peer, seconds=f"{seconds:g}")
                _disconnect(self.group)
                raise self._failed from error
            raise self._lost(what, peer, error) from error

    def _lost(self, what: str, peer: int, error: RuntimeError) -> StageLost:
        self._failed = StageLost(rank=self.rank, what=what, peer=peer, why=_reason(error))
        _disconnect(self.group)
        return self._failed


__all__ = ["Awaited", "Messages"]
