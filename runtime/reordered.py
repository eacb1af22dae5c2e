"""Weights of convolutions as oneDNN wants them, laid out once instead of at every call.

The layout is oneDNN's own and depends on the processor, so a file holds the weight and whoever runs the plan lays it out.
The plan names such a constant `weight|onednn:image:stride:padding:dilation:groups`, sizes joined by `x`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

_SIZES = r"\d+(?:x\d+)*"
_NAME = re.compile(
    rf"(?P<weight>.+)\|onednn:(?P<image>{_SIZES}):(?P<stride>{_SIZES}):(?P<padding>{_SIZES})"
    rf":(?P<dilation>{_SIZES}):(?P<groups>\d+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Reordered:
    """A convolution's weight laid out by oneDNN, for images of about these sizes [N, C, H, W]."""

    weight: str
    image: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def named(name: str) -> Reordered | None:
        """What a constant's name says; None for any other constant."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        parts = (found[part].split("x") for part in ("image", "stride", "padding", "dilation"))
        image, stride, padding, dilation = (tuple(map(int, numbers)) for numbers in parts)
        return Reordered(found["weight"], image, stride, padding, dilation, int(found["groups"]))

    @property
    def name(self) -> str:
        """The name of the constant."""
        sizes = (self.image, self.stride, self.padding, self.dilation)
        return ":".join((f"{self.weight}|onednn", *("x".join(map(str, n)) for n in sizes), str(self.groups)))

    def lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as an opaque tensor of oneDNN's."""
        reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
        return reorder(weight.detach(), self.padding, self.stride, self.dilation, self.groups, self.image)


__all__ = ["Reordered"]
