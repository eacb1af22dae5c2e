"""Frozen layers in bubbles: what a step's idle devices compute of the next batch, whose layers no gradient reaches.

Each block of devices (a stage with its replicas) takes rows of the next batch and runs all frozen layers on these, so that
nothing between frozen layers travels. How many rows it takes follows from its bubbles: what does not fit into them runs
behind the step, and blocks should end together. Within a bubble whole layers are chosen first, and then one layer on a
part of the rows fills the rest (DiffusionPipe, MLSys 2024, algorithms 1 and 2).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...cost.schedule import Span
from .layers import FrozenLayer

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
"""Rows of a device that a layer on a part of them may have: kernels are compiled for few sizes."""

CANDIDATES = 256
"""How many choices of whole layers are looked at for one bubble."""


@dataclass(frozen=True, slots=True)
class Block:
    """Devices that are idle at the same times: how many, and when, in order."""

    devices: int
    idle: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A frozen layer on rows low to high of what each device of a block has; `bubble` numbers the idle span of the block
    (None: behind the step), `start` and `seconds` say when."""

    layer: int
    low: int
    high: int
    bubble: int | None
    start: float
    seconds: float


@dataclass(frozen=True)
class Filling:
    """For each block the rows that each of its devices takes, and its pieces in order. `seconds` is the step with what runs
    behind it, `hidden` the part of the frozen layers' device seconds that runs in bubbles."""

    rows: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    seconds: float
    hidden: float


def fill(
    frozen: Sequence[FrozenLayer],
    rows: int,
    blocks: Sequence[Block],
    end: float,
    *,
    partial: bool = True,
    least: float = 0.0,
    sizes: Sequence[int] = SIZES,
    use: bool = True,
) -> Filling:
    """Place frozen layers on `rows` rows in the bubbles of a step that ends at `end`.

    Bubbles shorter than `least` seconds stay empty. Without `partial` only whole layers are placed; without `use`
    nothing is, and all runs behind the step on all devices. Choices bubble by bubble may spoil later ones, so that what
    may be split is also tried whole, and what may be placed is also left behind.
    """
    ways = [(partial, use), *([(False, True)] if partial and use else []), *([(False, False)] if use else [])]
    found = [_filled([_Filler(frozen, block, p, least, tuple(sizes), u) for block in blocks], rows, end) for p, u in ways]
    return min(found, key=lambda filling: filling.seconds)


def _filled(fillers: Sequence[_Filler], rows: int, end: float) -> Filling:
    shares = _shares(fillers, rows)
    pieces: list[tuple[Piece, ...]] = []
    hidden = whole = behind = 0.0
    for filler, share in zip(fillers, shares, strict=True):
        placed, left = filler.place(share)
        at, rest = end, list[Piece]()
        for piece in left:
            rest.append(Piece(piece.layer, piece.low, piece.high, None, at, piece.seconds))
            at += piece.seconds
        behind = max(behind, at - end)
        pieces.append((*placed, *rest))
        hidden += filler.block.devices * sum(piece.seconds for piece in placed)
        whole += filler.block.devices * sum(piece.seconds for piece in (*placed, *rest))
    return Filling(tuple(shares), tuple(pieces), end + behind, hidden / whole if whole else 1.0)


def _shares(fillers: Sequence[_Filler], rows: int) -> list[int]:
    """Rows of each device of each block, so that the last block behind the step ends as early as possible."""
    if not fillers[0].frozen or not rows:
        return [0] * len(fillers)
    each = -(-rows // sum(filler.block.devices for filler in fillers))
    low, high = 0.0, max(filler.behind(each) for filler in fillers)

    def within(seconds: float, least: Sequence[int], most: Sequence[int]) -> list[int]:
        return [filler.most(seconds, a, b) for filler, a, b in zip(fillers, least, most, strict=True)]

    def enough(shares: Sequence[int]) -> bool:
        return sum(n * filler.block.devices for n, filler in zip(shares, fillers, strict=True)) >= rows

    everything = [-(-rows // filler.block.devices) for filler in fillers]
    under = within(low, [0] * len(fillers), everything)
    if enough(under):
        return _trimmed(under, fillers, rows)
    found = within(high, [each] * len(fillers), everything)
    for _ in range(30):
        middle = (low + high) / 2
        shares = within(middle, under, found)
        if enough(shares):
            found, high = shares, middle
        else:
            under, low = shares, middle
    return _trimmed(found, fillers, rows)


def _trimmed(shares: list[int], fillers: Sequence[_Filler], rows: int) -> list[int]:
    """Shares reduced to what is needed: the largest down to one level, then, row by row, where it saves most."""
    devices = [filler.block.devices for filler in fillers]

    def extra(shares: Sequence[int]) -> int:
        return sum(n * d for n, d in zip(shares, devices, strict=True)) - rows

    levels = range(max(shares) + 1)
    level = bisect_left(levels, 0, key=lambda level: extra([min(n, level) for n in shares]))
    found = [min(n, level) for n in shares]
    while True:
        able = [i for i, n in enumerate(found) if n and devices[i] <= extra(found)]
        if not able:
            return found
        found[max(able, key=lambda i: (fillers[i].behind(found[i]), found[i]))] -= 1


@dataclass(frozen=True, slots=True)
class _Left:
    """Of each layer, how many rows are done; layers with all rows done are done."""

    done: tuple[int, ...]

    def with_rows(self, layer: int, rows: int) -> _Left:
        return _Left((*self.done[:layer], rows, *self.done[layer + 1 :]))


class _Filler:
    def __init__(
        self, frozen: Sequence[FrozenLayer], block: Block, partial: bool, least: float, sizes: tuple[int, ...], use: bool
    ) -> None:
        self.frozen, self.block, self.partial, self.sizes = frozen, block, partial, sizes
        self.bubbles = [(i, s) for i, s in enumerate(block.idle) if use and s.seconds >= least]
        self.chains = _chains(frozen)
        self._behind: dict[int, float] = {0: 0.0}
        self._seconds: dict[tuple[int, int], float] = {}

    def seconds(self, layer: int, rows: int) -> float:
        key = (layer, rows)
        if key not in self._seconds:
            self._seconds[key] = self.frozen[layer].seconds.seconds(rows) if rows else 0.0
        return self._seconds[key]

    def behind(self, rows: int) -> float:
        """Seconds that remain behind the step where each device takes so many rows."""
        if rows not in self._behind:
            self._behind[rows] = sum(piece.seconds for piece in self.place(rows)[1])
        return self._behind[rows]

    def most(self, seconds: float, low: int, high: int) -> int:
        """The most rows of a device, `low` to `high`, that leave no more than so many seconds behind the step, as `low` do;
        fewer where more rows leave less, which what is chosen for bubbles makes possible."""
        while low < high:
            middle = (low + high + 1) // 2
            if self.behind(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def place(self, rows: int) -> tuple[list[Piece], list[Piece]]:
        """What goes into bubbles, and what is left, each in order."""
        left = _Left((0,) * len(self.frozen))
        placed: list[Piece] = []
        some = [i for i in range(len(self.frozen)) if self.seconds(i, rows) > 0]
        quickest = min((self.seconds(i, 1 if self.partial else rows) for i in some), default=0.0)
        for number, span in self.bubbles if some else []:
            if span.seconds < quickest:  # most bubbles are short, where many micro-batches wait for what is sent
                continue
            at = span.start
            for layer, low, high in self._chosen(left, rows, span.seconds):
                took = self.seconds(layer, high - low)
                placed.append(Piece(layer, low, high, number, at, took))
                left, at = left.with_rows(layer, high), at + took
            if all(left.done[i] == rows for i in some):
                break
        rest = [
            Piece(layer, done, rows, None, 0.0, self.seconds(layer, rows - done))
            for layer, done in enumerate(left.done) if done < rows
        ]  # fmt: skip
        return placed, rest

    def _chosen(self, left: _Left, rows: int, room: float) -> list[tuple[int, int, int]]:
        """(layer, first row, last row) of what, in one bubble, leaves the least to do."""
        best: list[tuple[int, int, int]] = []
        most = 0.0
        for count, (chosen, state, spent) in enumerate(self._whole(left, rows, room, 0)):
            pieces, saved = list(chosen), spent
            part = self._part(state, rows, room - spent) if self.partial else None
            if part is not None:
                pieces.append(part)
                saved += self._saved(part, rows)
            if saved > most:
                best, most = pieces, saved
            if count >= CANDIDATES or most > 0.999 * room:
                break
        return best

    def _whole(
        self, left: _Left, rows: int, room: float, chain: int
    ) -> Iterator[tuple[tuple[tuple[int, int, int], ...], _Left, float]]:
        """Choices of whole layers that fit: from each chain of layers a first part, longer ones first."""
        if chain == len(self.chains):
            yield (), left, 0.0
            return
        options: list[tuple[tuple[tuple[int, int, int], ...], _Left, float]] = [((), left, 0.0)]
        state, spent, taken = left, 0.0, tuple[tuple[int, int, int], ...]()
        for layer in self.chains[chain]:
            done = state.done[layer]
            if done == rows:
                continue
            if not self._ready(state, layer, rows):
                break
            took = self.seconds(layer, rows - done)
            if spent + took > room:
                break
            state, spent, taken = state.with_rows(layer, rows), spent + took, (*taken, (layer, done, rows))
            options.append((taken, state, spent))
        for taken, state, spent in reversed(options):
            for more, after, longer in self._whole(state, rows, room - spent, chain + 1):
                yield (*taken, *more), after, spent + longer

    def _ready(self, state: _Left, layer: int, rows: int) -> bool:
        return all(state.done[j] == rows for j in self.frozen[layer].after)

    def _part(self, state: _Left, rows: int, room: float) -> tuple[int, int, int] | None:
        """The piece of one layer on a part of the rows that fits and saves most."""
        found: tuple[int, int, int] | None = None
        most = 0.0
        for chain in self.chains:
            layer = next((i for i in chain if state.done[i] < rows), None)
            if layer is None or not self._ready(state, layer, rows):
                continue
            done = state.done[layer]
            size = max((n for n in self.sizes if n < rows - done and self.seconds(layer, n) <= room), default=0)
            piece = (layer, done, done + size)
            if size and self._saved(piece, rows) > most:
                found, most = piece, self._saved(piece, rows)
        return found

    def _saved(self, piece: tuple[int, int, int], rows: int) -> float:
        """By how much less of a layer is left; a kernel on few rows takes longer than what it saves."""
        layer, low, high = piece
        return self.seconds(layer, rows - low) - self.seconds(layer, rows - high)


def _chains(frozen: Sequence[FrozenLayer]) -> list[list[int]]:
    """Layers as chains: each layer follows the only one that it reads where nothing else reads that."""
    readers: dict[int, int] = {}
    for layer in frozen:
        for j in layer.after:
            readers[j] = readers.get(j, 0) + 1
    chains: list[list[int]] = []
    at: dict[int, list[int]] = {}
    for i, layer in enumerate(frozen):
        if len(layer.after) == 1 and readers[layer.after[0]] == 1:
            chain = at[layer.after[0]]
            chain.append(i)
        else:
            chain = [i]
            chains.append(chain)
        at[i] = chain
    return chains


__all__ = ["SIZES", "Block", "Filling", "Piece", "fill"]
