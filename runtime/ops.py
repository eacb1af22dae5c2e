"""Torch ops that plans call and that need no compiler: checks of row ids read by generated kernels."""

from __future__ import annotations

import torch

_library = torch.library.Library("plait", "FRAGMENT")
_library.define("clear_status(*, Tensor(a!) status) -> ()")  # keyword-only: written, not read
_library.define("check_rows(Tensor status) -> ()")


def _clear_status(*, status: torch.Tensor) -> None:
    status.zero_()


def _check_rows(status: torch.Tensor) -> None:
    if status.item():
        raise IndexError("index out of range in self: an embedding, gather or index op got a row id outside its table")


for _device in ("CPU", "CUDA"):  # on CUDA devices the check waits for the stream
    _library.impl("clear_status", _clear_status, _device)
    _library.impl("check_rows", _check_rows, _device)
