"""Torch ops that plans call and that need no compiler: checks of row ids read by generated kernels, and `as_strided` of
values that a plan computes. Such a value lies anywhere in memory that it shares; torch counts from where memory begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CLEAR_STATUS, CHECK_ROWS = "plait.clear_status.default", "plait.check_rows.default"
ROW_OUT_OF_RANGE = (
    "index out of range in self: an embedding, gather or index op got a row id outside its table, or a moe op the id of an "
    "expert or a row that is not there"
)

_library = torch.library.Library("plait", "FRAGMENT")
_library.define("clear_status(*, Tensor(a!) status) -> ()")  # keyword-only: written, not read
_library.define("check_rows(Tensor status) -> ()")
_library.define("as_strided(Tensor root, SymInt[] size, SymInt[] stride, SymInt storage_offset) -> Tensor")
_library.define(
    "as_strided_scatter(Tensor root, Tensor src, SymInt[] size, SymInt[] stride, SymInt storage_offset, "
    "SymInt[] self_size, SymInt[] self_stride, SymInt self_offset) -> Tensor"
)


def _clear_status(*, status: torch.Tensor) -> None:
    status.zero_()


def _check_rows(status: torch.Tensor) -> None:
    if status.item():
        raise IndexError(ROW_OUT_OF_RANGE)


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to past the last one."""
    return 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def _copied(x: torch.Tensor, offset: int, count: int) -> torch.Tensor:
    """`count` elements of memory from the `offset`-th after the first of `x`. Raises RuntimeError past its end."""
    if count and offset + count > _span(x.shape, x.stride()):
        raise RuntimeError(f"as_strided: elements up to {offset + count} of a value that holds {_span(x.shape, x.stride())}")
    return x.as_strided((count,), (1,), x.storage_offset() + offset if count else x.storage_offset()).clone()


def _as_strided(root: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int) -> torch.Tensor:
    return _copied(root, storage_offset, _span(size, stride)).as_strided(size, stride, 0)


def _as_strided_scatter(
    root: torch.Tensor,
    src: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
    self_size: Sequence[int],
    self_stride: Sequence[int],
    self_offset: int,
) -> torch.Tensor:
    memory = _copied(root, 0, _span(root.shape, root.stride()))
    memory.as_strided(size, stride, storage_offset).copy_(src)
    return memory.as_strided(self_size, self_stride, self_offset)


for _device in ("CPU", "CUDA"):  # on CUDA devices the check waits for the stream
    _library.impl("clear_status", _clear_status, _device)
    _library.impl("check_rows", _check_rows, _device)
    _library.impl("as_strided", _as_strided, _device)
    _library.impl("as_strided_scatter", _as_strided_scatter, _device)
