"""Values on their way between ranks: sent and received in the background, waited for with a time-out.

On gloo each value has a tag, so that values may be received in another order than they are waited for. NCCL knows no tags:
there each direction between two ranks has a process group of its own, on which the order of sends is that of receives.
That has not been run on a machine with several GPUs.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
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
    peer: int | str


@dataclass
class Awaited:
    """Values that come from another rank."""

    works: list[Any]
    tensors: list[torch.Tensor]
    what: str
    peer: int | str


class Messages:
    """What a rank of a process group sends to and receives from others. `beside` are further groups that it is in: they
    break together."""

    def __init__(self, group: dist.ProcessGroup, beside: Sequence[dist.ProcessGroup] = ()) -> None:
        self.group, self.beside = group, tuple(beside)
        self.rank, self.size = group.rank(), group.size()
        self.others = " or ".join(str(r) for r in range(self.size) if r != self.rank)
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

    def together(self, start: Callable[[], Any], what: str) -> Callable[[], None]:
        """Start a collective; what is returned waits for it. Raises StageLost, StageTimedOut, both when it does and when it
        is called."""
        work = self._try(start, what, self.others)
        return lambda: self._wait(work, what, self.others)

    def gathered(self, mine: Any, what: str) -> list[Any]:
        """An object of each rank, on all of them. Raises StageLost, StageTimedOut."""
        device = torch.device("cpu") if self.group.name() == "gloo" else torch.device("cuda")
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8).to(device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        size = torch.tensor([data.numel()], device=device)
        self.together(lambda: dist.all_gather(sizes, size, group=self.group, async_op=True), what)()
        room = max(int(n) for n in sizes)
        found = [torch.zeros(room, dtype=torch.uint8, device=device) for _ in range(self.size)]
        padded = torch.zeros(room, dtype=torch.uint8, device=device)
        padded[: data.numel()] = data
        self.together(lambda: dist.all_gather(found, padded, group=self.group, async_op=True), what)()
        return [pickle.loads(t[: int(n)].cpu().numpy().tobytes()) for t, n in zip(found, sizes, strict=True)]

    def close(self) -> None:
        """Break the groups, so that the other ranks do not wait for what this one will not send."""
        if self._failed is None:
            self._failed = StageLost(rank=self.rank, what="its own work", peer=self.rank, why="it failed")
        self._break()

    def _break(self) -> None:
        for group in (self.group, *self.beside):
            _disconnect(group)

    def _finish(self, *, block: bool) -> None:
        while self._flying and (block or self._flying[0].work.is_completed()):
            sent = self._flying.pop(0)
            self._wait(sent.work, sent.what, sent.peer)

    def _try(self, start: Any, what: str, peer: int | str) -> Any:
        if self._failed is not None:
            raise self._failed
        try:
            return start()
        except RuntimeError as error:
            raise self._lost(what, peer, error) from error

    def _wait(self, work: Any, what: str, peer: int | str) -> None:
        seconds, start = timeout_s(), time.monotonic()
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            if time.monotonic() - start >= seconds:
                self._failed = StageTimedOut(rank=self.rank, what=what, peer=peer, seconds=f"{seconds:g}")
                self._break()
                raise self._failed from error
            raise self._lost(what, peer, error) from error

    def _lost(self, what: str, peer: int | str, error: RuntimeError) -> StageLost:
        self._failed = StageLost(rank=self.rank, what=what, peer=peer, why=_reason(error))
        self._break()
        return self._failed


__all__ = ["Awaited", "Messages"]
