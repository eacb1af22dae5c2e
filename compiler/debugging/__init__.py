"""Finding the culprit: numerics after each pass, bisection, the first bad node, reduction, bundles.

dbg = plait.debug(model, (x,))     # step through a compilation
print(plait.bisect(model, (x,)))   # the one choice that makes it wrong
"""

from __future__ import annotations

from .budget import Budget
from .dump import dump, rerun
from .interpret import Replay, interpret, interpret_wide, random_inputs, replay
from .ledger import Entry, check_ledger, ledger, ledger_table

__all__ = ["Budget", "Entry", "Replay", "check_ledger", "dump", "interpret", "interpret_wide", "ledger", "ledger_table",
           "random_inputs", "replay", "rerun"]  # fmt: skip
