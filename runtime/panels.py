"""Weights in panels: how the matmul template reads a matrix that the model owns, laid out once instead of at every call.

A matrix B of N columns and K rows becomes ceil(N / 32) panels of [K][32], the last one padded with zeros. The plan names
such a constant `weight|panels:k:NxK`, after the weight and its contiguous axis: "k" for [N, K] in memory, "n" for [K, N].
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

    @property
    def elements(self) -> int:
        """How many elements the panels have, padding included."""
        return -(-self.n // WIDTH) * WIDTH * self.k

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The panels of a weight, flat."""
        matrix = weight.detach() if self.layout == "k" else weight.detach().t()
        if self.n % WIDTH:
            matrix = torch.nn.functional.pad(matrix, (0, 0, 0, -self.n % WIDTH))
        return matrix.reshape(-1, WIDTH, self.k).transpose(1, 2).reshape(-1)

    def unpack(self, panels: torch.Tensor) -> torch.Tensor:
        """The weight that `pack` was given, bit for bit."""
        matrix = panels.view(-1, self.k, WIDTH).transpose(1, 2).reshape(-1, self.k)[: self.n]
        return matrix.contiguous() if self.layout == "k" else matrix.t().contiguous()
