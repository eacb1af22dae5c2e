"""torchao as a peer: weights rounded to nearest, and its AWQ (one linear layer at a time, without clipping).

Its GPTQ refuses to run without a CUDA device. Formats of its own for int4 on GPUs are not compared: they round to the same
codes with scales in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .environments import is_installed, run

PACKAGES = ("torchao==0.18.0",)


def is_there() -> bool:
    """Whether torchao is installed for the benchmarks already."""
    return is_installed("torchao", PACKAGES)


def rounded(weights: Sequence[Tensor], bits: int, group: int, *, symmetric: bool = False) -> list[Tensor]:
    """What torchao's IntxWeightOnlyConfig computes with in place of weights [N, K]. Raises NoPeer."""
    return _made(weights, {}, bits, group, symmetric)[0]


def awq(x: Tensor, weights: Sequence[Tensor], bits: int, group: int) -> tuple[list[Tensor], list[Tensor]]:
    """(what torchao's AWQ computes with, in the original columns; scales [K]) for each weight alone. Raises NoPeer."""
    return _made(weights, {"x": x.float()}, bits, group, False)


def _made(
    weights: Sequence[Tensor], more: dict[str, Tensor], bits: int, group: int, symmetric: bool
) -> tuple[list[Tensor], list[Tensor]]:
    given = {f"w.{i}": w.float() for i, w in enumerate(weights)} | more
    settings = {"bits": bits, "group": group, "symmetric": symmetric}
    made, _ = run("torchao", PACKAGES, "quantize_torchao.py", given, settings)
    return [made[f"w.{i}"] for i in range(len(weights))], [made[f"s.{i}"] for i in range(len(weights)) if f"s.{i}" in made]
