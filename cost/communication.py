"""How long collectives take, from what was measured: curves of seconds over bytes, kept in the profile table.

A collective is measured at several sizes and looked up between them. All sizes of one collective in one group make a curve;
the table holds it as one key for each size, `ranks=N` and `bytes=N` among the key's types, so that it is saved, merged and
shared like every other measurement.
"""

from __future__ import annotations

from .curve import Curve
from .profile import Key, Table, Timing

NAME = "measured"


def key(op: str, ranks: int, size: int, device: str) -> Key:
    """Where a measurement of a collective lies: `op` as torch names it, the device with the backend, "cpu/gloo"."""
    return Key(op, (f"ranks={ranks}", f"bytes={size}"), 1, device)


def record(table: Table, op: str, ranks: int, size: int, device: str, timing: Timing) -> None:
    """Keep a measurement in the table."""
    table.record(key(op, ranks, size, device), NAME, timing)


def curve(table: Table, op: str, ranks: int, device: str) -> Curve | None:
    """The curve of a collective in a group of so many ranks, None where it was never measured."""
    found: list[tuple[int, float]] = []
    for k, timings in table:
        if (k.op, k.device) == (op, device) and k.types[:1] == (f"ranks={ranks}",) and NAME in timings:
            found.append((int(k.types[1].removeprefix("bytes=")), timings[NAME].median))
    return Curve.of(found) if found else None


__all__ = ["curve", "key", "record"]
