"""Arena planning: which bytes of a call's arena each intermediate value occupies.

Blocks whose size is a number share space by best fit over their live ranges. Blocks whose size depends on symbols lie
behind them and share space only with blocks of the very same size expression, which holds for all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGN = 64


@dataclass(frozen=True)
class Block:
    """A value that wants arena space: bytes (int or prefix expression), first and last step that touch it (inclusive)."""

    key: Any
    nbytes: Any
    first: int
    last: int


def aligned(nbytes: Any) -> Any:
    """Bytes rounded up to the arena's alignment."""
    if isinstance(nbytes, int):
        return max(-(-nbytes // ALIGN) * ALIGN, ALIGN)
    return ["mul", ["ceildiv", nbytes, ALIGN], ALIGN]


@dataclass(frozen=True)
class Arena:
    """Where blocks lie: byte offset by key (int or a name of `sizes`), the arena's size, and the named sums."""

    offsets: Mapping[Any, Any]
    size: Any
    sizes: tuple[tuple[str, Any], ...]


def plan_arena(blocks: Sequence[Block], reuse: Callable[[Any], bool] = lambda _: True) -> Arena:
    """Place blocks so that those which overlap in time never overlap in space. `reuse(key)` is asked before a block takes
    memory that another one has at another time; where it says no, the block gets memory of its own."""
    offsets: dict[Any, Any] = {}
    static = sorted((b for b in blocks if isinstance(b.nbytes, int)), key=lambda b: (-aligned(b.nbytes), b.first))
    placed: list[tuple[Block, int]] = []
    top = 0
    for block in static:
        size = aligned(block.nbytes)
        busy = sorted((o, o + aligned(p.nbytes)) for p, o in placed if p.first <= block.last and block.first <= p.last)
        offset = _best_gap(busy, size)
        if offset < top and not reuse(block.key):
            offset = top
        placed.append((block, offset))
        offsets[block.key] = offset
        top = max(top, offset + size)
    size, sizes = _place_symbolic([b for b in blocks if not isinstance(b.nbytes, int)], offsets, top, reuse)
    return Arena(offsets, size, sizes)


def _best_gap(busy: list[tuple[int, int]], size: int) -> int:
    best: tuple[int, int] | None = None
    at = 0
    for low, high in busy:
        if low - at >= size and (best is None or low - at < best[0]):
            best = (low - at, at)
        at = max(at, high)
    return best[1] if best is not None else at


def _place_symbolic(
    blocks: list[Block], offsets: dict[Any, Any], top: int, reuse: Callable[[Any], bool]
) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    slots: list[tuple[Any, Any, int]] = []  # (size, offset, last step that uses it)
    end: Any = top
    sizes: list[tuple[str, Any]] = []
    for block in sorted(blocks, key=lambda b: b.first):
        size = aligned(block.nbytes)
        for i, (known, offset, last) in enumerate(slots):
            if known == size and last < block.first and reuse(block.key):
                offsets[block.key] = offset
                slots[i] = (size, offset, block.last)
                break
        else:
            offsets[block.key] = end
            slots.append((size, end, block.last))
            name = f"arena{len(sizes)}"
            sizes.append((name, ["add", end, size]))
            end = name
    return end, tuple(sizes)
