"""Ops that give the same tensor for the same arguments: what they make is one value for all instances."""

from __future__ import annotations

import torch

CONSTANTS = {
    torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange, torch.linspace, torch.tensor,
}  # fmt: skip
SIZED = CONSTANTS - {torch.tensor}  # those of which cut code knows that their arguments are no data
