"""Weights in panels: how the matmul template reads a matrix that the model owns, laid out once instead of at every call.

A matrix B of N columns and K rows becomes ceil(N / 32) panels of [ceil(K / w)][32][w], padded with zeros: w k of a column
make a word of four bytes, or are one element where that is longer. The plan names such a constant `weight|panels:k:NxK`,
after the weight and its contiguous axis: "k" for [N, K] in memory, "n" for [K, N].
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

WIDTH = 32
"""Columns of a panel; mirrors NR of codegen/templates/matmul_tile.h."""
_NAME = re.compile(r"(?P<weight>.+)\|panels:(?P<layout>[kn]):(?P<n>\d+)x(?P<k>\d+)", re.DOTALL)


@dataclass(frozen=True)
class Panels:
    """The panels of a weight: `layout` is the contiguous axis of the matrix in memory, `n` its columns, `k` its rows."""

    weight: str
    layout: str
    n: int
    k: int

    @staticmethod
    def named(name: str) -> Panels | None:
        """What a constant's name says; None for a constant that is no panels."""
        found = _NAME.fullmatch(name)
        return None if found is None else Panels(found["weight"], found["layout"], int(found["n"]), int(found["k"]))

    @property
    def name(self) -> str:
        """The name of the constant."""
        return f"{self.weight}|panels:{self.layout}:{self.n}x{self.k}"

    def elements(self, dtype: torch.dtype) -> int:
        """How many elements the panels of a weight have, padding included."""
        word = _word(dtype)
        return -(-self.n // WIDTH) * WIDTH * (-(-self.k // word) * word)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The panels of a weight, flat."""
        matrix, word = weight.detach() if self.layout == "k" else weight.detach().t(), _word(weight.dtype)
        if self.n % WIDTH or self.k % word:
            matrix = torch.nn.functional.pad(matrix, (0, -self.k % word, 0, -self.n % WIDTH))
        return matrix.reshape(matrix.shape[0] // WIDTH, WIDTH, -1, word).transpose(1, 2).reshape(-1)

    def unpack(self, panels: torch.Tensor) -> torch.Tensor:
        """The weight that `pack` was given, bit for bit."""
        rows, word = -(-self.n // WIDTH), _word(panels.dtype)
        matrix = panels.view(rows, -1, WIDTH, word).transpose(1, 2).reshape(rows * WIDTH, -1)[: self.n, : self.k]
        return matrix.contiguous() if self.layout == "k" else matrix.t().contiguous()


def _word(dtype: torch.dtype) -> int:
    """How many k of a column lie side by side."""
    return max(1, 4 // dtype.itemsize)
