"""`plait::all_to_all_capacity`: an all-to-all of buffers with a fixed capacity, of which only the used rows travel.

A buffer is [G, C, h]: G groups of C rows. With R ranks the groups r*L to r*L+L-1 go to rank r, L = G / R; what comes from
rank r takes their place. `rows` [G, 2] says which rows of each group are used: first, and end. They land at the same row
numbers, all other rows of the result are zero.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import BadExchange
from . import collectives
from .collectives import Progress, Work

PIECES = 8
"""Into how many messages what goes to one rank is cut. In one piece, gloo sends first one way and then the other."""

SMALLEST_PIECE = 64 * 1024
"""Bytes below which cutting costs more than it gains."""

_TAGS = 2**20  # numbers of collectives that are in flight on one group at a time stay far below this
_FIRST_TAG = 2**30  # far from the tags that programs choose for messages of their own

Rows = list[tuple[int, int]]

_library = torch.library.Library("plait", "FRAGMENT")
for _name in ("all_to_all_capacity", "all_to_all_capacity_start"):
    _library.define(
        f"{_name}(Tensor buf, Tensor rows, Tensor? expected, str group_name, bool clear=True) -> (Tensor, Tensor)"
    )


def all_to_all_capacity(buf: Tensor, counts: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Exchange the used rows of buf [G, C, h] among the ranks of a group: groups r*L to r*L+L-1 go to rank r, L = G / ranks.

    `counts` is [G], how many rows of each group are used, or [G, 2], the first used row and the end. Gives the buffer that
    came, zero where nothing came, and its counts in the same form. Gradients travel back the same way. `group` is a
    process group, a one-dimensional DeviceMesh, or a group's name; all its ranks must call this in the same order.

    Raises BadExchange for arguments that do not fit each other, NoSuchGroup, and CollectiveFailed, CollectiveTimedOut or
    ChannelBroken where a rank does not take part.
    """
    from torch.distributed._functional_collectives import _resolve_group_name

    name = _resolve_group_name(group)
    wide = counts.to(torch.int64)
    rows = torch.stack([torch.zeros_like(wide), wide], 1) if counts.dim() == 1 else wide
    received, came = torch.ops.plait.all_to_all_capacity(buf, rows, None, name)
    return received, (came[:, 1] if counts.dim() == 1 else came).to(counts.dtype)


def _run(buf: Tensor, rows: Tensor, expected: Tensor | None, group_name: str, clear: bool = True) -> tuple[Tensor, Tensor]:
    work = exchange(buf, rows, expected, group_name, clear)
    return collectives.channel(group_name).submit("plait.all_to_all_capacity", work).wait()


def _fake(buf: Tensor, rows: Tensor, expected: Tensor | None, group_name: str, clear: bool = True) -> tuple[Tensor, Tensor]:
    return buf.new_empty(buf.shape), rows.new_empty(rows.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, rows, _, ctx.group_name, _ = inputs
    ctx.save_for_backward(rows, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None, None]:
    sent, received = ctx.saved_tensors
    return torch.ops.plait.all_to_all_capacity(grad, received, sent, ctx.group_name)[0], None, None, None, None


for _name in ("all_to_all_capacity", "all_to_all_capacity_start"):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"plait::{_name}", _fake, lib=_library)
torch.library.register_autograd("plait::all_to_all_capacity", _backward, setup_context=_save, lib=_library)


def exchange(buf: Tensor, rows: Tensor, expected: Tensor | None, group_name: str, clear: bool = True) -> Work:
    """What a channel has to run for an exchange. Rows of the result on the host where nothing comes are zero where they are
    to be clear, of any value else. Raises BadExchange, NoSuchGroup."""
    group = collectives.resolve(group_name)
    _check(buf, rows, expected, group.size())
    buf, rows = buf.detach().contiguous(), rows.contiguous()
    if buf.device.type == "cpu":
        mine = _OverSockets(group, buf, rows, expected, clear)
        return Work(mine.finish, begin=mine.begin)
    inputs = [buf, rows] if expected is None else [buf, rows, expected]
    return Work(lambda progress: _over_nccl(group, buf, rows, expected, progress), inputs)


def _check(buf: Tensor, rows: Tensor, expected: Tensor | None, ranks: int) -> None:
    if buf.dim() != 3:
        raise BadExchange(why=f"the buffer must be [groups, capacity, width], not {list(buf.shape)}")
    if buf.shape[0] % ranks:
        raise BadExchange(why=f"{buf.shape[0]} groups cannot be shared among {ranks} ranks")
    for name, t in (("rows", rows), ("expected", expected)):
        if t is None:
            continue
        if t.shape != (buf.shape[0], 2) or t.dtype != torch.int64:
            raise BadExchange(why=f"{name} must be int64 [{buf.shape[0]}, 2], not {_kind(t)}")
        if t.device != buf.device:
            raise BadExchange(why=f"{name} must be on {buf.device}, not on {t.device}")


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _used(rows: Tensor, capacity: int, name: str) -> Rows:
    found = [(first, end) for first, end in rows.tolist()]
    for g, (first, end) in enumerate(found):
        if not 0 <= first <= end <= capacity:
            raise BadExchange(why=f"{name}[{g}] is {first} to {end}, the groups have {capacity} rows")
    return found


def _pieces(buf: Tensor, rows: Rows, first: int, count: int) -> Iterator[Tensor]:
    """The used rows of `count` groups from `first` on in messages, cut alike where they are sent and where they arrive."""
    total = sum(end - begin for begin, end in rows[first : first + count])
    width = buf.shape[2] * buf.element_size()
    step = max(-(-total // PIECES), -(-SMALLEST_PIECE // max(width, 1)), 1)
    for g in range(first, first + count):
        begin, end = rows[g]
        for at in range(begin, end, step):
            yield buf[g, at : min(at + step, end)]


class _OverSockets:
    """An exchange in memory of the host. Rows are sent from where they lie, received to where they belong.

    It begins where it is submitted: its messages are posted behind those of exchanges that are still on their way, so that
    the link has no pause between them. Each has a tag of its own, so that the order in which ranks post them is free.
    """

    def __init__(self, group: Any, buf: Tensor, rows: Tensor, expected: Tensor | None, clear: bool) -> None:
        self.clear = clear
        self.group, self.buf, self.rows, self.expected = group, buf, rows, expected
        self.sent = _used(rows, buf.shape[1], "rows")
        self.coming = None if expected is None else _used(expected, buf.shape[1], "expected")
        self.rank, self.size = group.rank(), group.size()
        self.count = buf.shape[0] // self.size
        self.peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        self.sources = [(self.rank - step) % self.size for step in range(1, self.size)]
        self.out = torch.empty_like(buf)
        self.bytes = self.tag = 0
        self.works: list[tuple[int, Any]] = []

    def begin(self, number: int) -> None:
        """Post the messages, or, where the other ranks do not know yet what is coming, the announcements."""
        self.tag = _FIRST_TAG + 2 * (number % _TAGS)
        if self.coming is not None:
            self._post(self.coming)
            return
        self.inbox = torch.empty(self.size, max(_ROOM, _HEADER + 2 * self.count), dtype=torch.int64)
        letters = [(r, _letter(self.buf, self.sent[r * self.count : (r + 1) * self.count])) for r in self.peers]
        self.works = [(r, self.group.recv([self.inbox[r]], r, self.tag)) for r in self.sources]
        self.works += [(r, self._send(letter, r, self.tag)) for r, letter in letters]

    def _post(self, coming: Rows) -> None:
        # Receives come first: gloo tells the other rank of each on the way of our rows, and a rank that is told behind
        # the rows of another only then begins to send its own.
        for r in self.sources:
            for piece in _pieces(self.out, coming, r * self.count, self.count):
                self.works.append((r, self.group.recv([piece], r, self.tag + 1)))
        for r in self.peers:
            for piece in _pieces(self.buf, self.sent, r * self.count, self.count):
                self.works.append((r, self._send(piece, r, self.tag + 1)))

    def _send(self, piece: Tensor, rank: int, tag: int) -> Any:
        self.bytes += piece.numel() * piece.element_size()
        return self.group.send([piece], rank, tag)

    def finish(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Wait until all rows have come and gone."""
        coming = self.coming
        if coming is None:
            self._wait(progress)
            coming = _read(self.inbox, self.buf, self.sent, self.rank)
            self._post(coming)
        own = range(self.rank * self.count, (self.rank + 1) * self.count)
        _copy_rows(self.buf, self.out, self.sent, own)
        if self.clear:
            _clear_rows(self.out, coming)
        self._wait(progress)
        progress.bytes += self.bytes
        if self.expected is not None:
            return self.out, self.expected.clone()
        return self.out, torch.tensor(coming, dtype=torch.int64).reshape(-1, 2)

    def _wait(self, progress: Progress) -> None:
        for r, work in self.works:
            progress.awaited = r
            work.wait(progress.left())
        progress.awaited = None
        self.works.clear()


_HEADER = 4
_ROOM = 4096
"""Room for announcements, in words: gloo ends a process that is sent more than it has room for."""


def _letter(buf: Tensor, rows: Rows) -> Tensor:
    """What another rank is told: sizes and dtype of the buffer, then which rows are coming."""
    return torch.tensor([*buf.shape, _code(buf.dtype), *(n for pair in rows for n in pair)], dtype=torch.int64)


def _code(dtype: torch.dtype) -> int:
    return zlib.crc32(str(dtype).encode())


def _read(inbox: Tensor, buf: Tensor, sent: Rows, rank: int) -> Rows:
    """The rows that the other ranks have announced, and our own. Raises BadExchange where they have other buffers."""
    count, ours = buf.shape[0] // inbox.shape[0], [*buf.shape, _code(buf.dtype)]
    coming: Rows = []
    for r, letter in enumerate(inbox.tolist()):
        if r == rank:
            coming += sent[r * count : r * count + count]
            continue
        if letter[:_HEADER] != ours:
            other = "" if letter[3] == ours[3] else " of another dtype"
            raise BadExchange(why=f"rank {r} has a buffer {letter[:3]}{other}, rank {rank} has {_kind(buf)}")
        words = letter[_HEADER : _HEADER + 2 * count]
        coming += zip(words[::2], words[1::2], strict=True)
    return coming


# Copying with torch would start its threads beside those that compute; these leave Python's lock as well.


def _copy_rows(buf: Tensor, out: Tensor, rows: Rows, groups: range) -> None:
    row = buf.shape[2] * buf.element_size()
    for g in groups:
        first, end = rows[g]
        at = (g * buf.shape[1] + first) * row
        ctypes.memmove(out.data_ptr() + at, buf.data_ptr() + at, (end - first) * row)


def _clear_rows(out: Tensor, rows: Rows) -> None:
    """Zero what lies outside of the rows."""
    row, capacity = out.shape[2] * out.element_size(), out.shape[1]
    for g, (first, end) in enumerate(rows):
        at = out.data_ptr() + g * capacity * row
        ctypes.memset(at, 0, first * row)
        ctypes.memset(at + end * row, 0, (capacity - end) * row)


def _over_nccl(group: Any, buf: Tensor, rows: Tensor, expected: Tensor | None, progress: Progress) -> tuple[Tensor, Tensor]:
    """An exchange in memory of a device, on the current stream. The host waits for the numbers of rows."""
    rank, size = group.rank(), group.size()
    count = buf.shape[0] // size
    others = [r for r in range(size) if r != rank]
    own = slice(rank * count, rank * count + count)
    if expected is None:
        came = rows.clone()
        parts = [(rows[r * count : r * count + count], came[r * count : r * count + count], r) for r in others if count]
        _batch(group, [(t, r) for t, _, r in parts], [(t, r) for _, t, r in parts])
        progress.bytes += len(parts) * count * 16
    else:
        came = expected.clone()
    sent, coming = _used(rows, buf.shape[1], "rows"), _used(came, buf.shape[1], "received rows")
    out = torch.zeros_like(buf)
    sends = [(piece, r) for r in others for piece in _pieces(buf, sent, r * count, count)]
    receives = [(piece, r) for r in others for piece in _pieces(out, coming, r * count, count)]
    _batch(group, sends, receives)
    progress.bytes += sum(piece.numel() * piece.element_size() for piece, _ in sends)
    for g in range(own.start, own.stop):
        first, end = sent[g]
        out[g, first:end].copy_(buf[g, first:end])
    return out, came


def _batch(group: Any, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> None:
    """Send and receive together, queued on the current stream."""
    from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

    ops = [P2POp(isend, t, group=group, group_peer=r) for t, r in sends]
    ops += [P2POp(irecv, t, group=group, group_peer=r) for t, r in receives]
    for work in batch_isend_irecv(ops) if ops else []:
        work.wait()
