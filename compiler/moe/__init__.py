"""Mixtures of experts that train over several ranks: `plait.moe`. See docs/moe.md."""

from __future__ import annotations

from .gates import GATES, Gate, GateLike, Routing, balance_loss, z_loss
from .layer import Capacity, Experts, MoE, mix
from .mixtral import StackedExperts, rewrite
from .placement import Group, LocalExperts, Placement
from .state import gather_state_dict, split_state_dict

__all__ = [
    "GATES",
    "Capacity",
    "Experts",
    "Gate",
    "GateLike",
    "Group",
    "LocalExperts",
    "MoE",
    "Placement",
    "Routing",
    "StackedExperts",
    "balance_loss",
    "gather_state_dict",
    "mix",
    "rewrite",
    "split_state_dict",
    "z_loss",
]
