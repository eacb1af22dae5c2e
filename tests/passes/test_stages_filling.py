"""Frozen layers in bubbles: each row goes through each layer once, in order, where there is room, and it pays."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from plait.cost.curve import Curve
from plait.cost.schedule import Span
from plait.passes.stages.filling import Block, Filling, Piece, fill
from plait.passes.stages.layers import NOTHING, FrozenLayer

SEED = 20261204
TURNS = 240


def linear(seconds: float, fixed: float = 0.0) -> Curve:
    return Curve(((1, seconds + fixed), (4, 4 * seconds + fixed), (16, 16 * seconds + fixed)))


def layer(seconds: float, *after: int, fixed: float = 0.0) -> FrozenLayer:
    return FrozenLayer("", linear(seconds, fixed), after=after)


def drawn(rng: random.Random) -> tuple[list[FrozenLayer], int, list[Block], float]:
    frozen: list[FrozenLayer] = []
    for i in range(rng.randint(0, 8)):
        after: tuple[int, ...] = ()
        if i and (kind := rng.random()) > 0.25:
            after = (i - 1,) if kind < 0.8 else tuple(sorted(rng.sample(range(i), rng.randint(1, min(i, 3)))))
        curve = linear(rng.choice([0.1, 0.5, 1, rng.random()]), rng.choice([0, 0.2, 1]))
        frozen.append(FrozenLayer(f"f{i}", curve if rng.random() > 0.05 else NOTHING, after=after))
    blocks: list[Block] = []
    end = 0.0
    for _ in range(rng.randint(1, 4)):
        at, idle = 0.0, list[Span]()
        for _ in range(rng.randint(0, 5)):
            start = at + 0.01 + 3 * rng.random()
            at = start + 0.01 + rng.choice([0.5, 1, 3, 10]) * rng.random()
            idle.append(Span(start, at))
        end = max(end, at)
        blocks.append(Block(rng.randint(1, 3), tuple(idle)))
    return frozen, rng.choice([1, 3, 8, 16, 40]), blocks, end + rng.random()


def check(frozen: Sequence[FrozenLayer], rows: int, blocks: Sequence[Block], end: float, made: Filling) -> None:
    """That every row goes through every layer once, in order, nothing overlaps or overruns, and times are as said."""
    assert len(made.rows) == len(made.pieces) == len(blocks)
    all_rows = sum(n * block.devices for n, block in zip(made.rows, blocks, strict=True))
    if not frozen:
        assert all_rows == 0
    else:
        assert rows <= all_rows < rows + min(block.devices for n, block in zip(made.rows, blocks, strict=True) if n)
    last, inside, whole = end, 0.0, 0.0
    for n, block, pieces in zip(made.rows, blocks, made.pieces, strict=True):
        done, at = [0] * len(frozen), 0.0
        for piece in pieces:
            assert piece.low == done[piece.layer] < piece.high <= n
            assert all(done[j] == n for j in frozen[piece.layer].after)
            assert piece.start >= at - 1e-9
            assert piece.seconds == frozen[piece.layer].seconds.seconds(piece.high - piece.low)
            done[piece.layer], at = piece.high, piece.start + piece.seconds
            if piece.bubble is None:
                assert piece.start >= end
            else:
                span = block.idle[piece.bubble]
                assert span.start <= piece.start and at <= span.end + 1e-9
                inside += block.devices * piece.seconds
            whole += block.devices * piece.seconds
        assert done == [n] * len(frozen)
        last = max(last, at)
    assert made.seconds == pytest.approx(last)
    assert made.hidden == pytest.approx(inside / whole if whole else 1.0)


def in_bubbles(made: Filling) -> list[Piece]:
    return [piece for pieces in made.pieces for piece in pieces if piece.bubble is not None]


@pytest.mark.parametrize("part", range(3))
def test_every_row_goes_through_every_layer_once_in_order(part: int) -> None:
    for turn in range(part, TURNS, 3):
        print(f"seed {SEED + turn}")
        rng = random.Random(SEED + turn)
        frozen, rows, blocks, end = drawn(rng)
        everything = fill(frozen, rows, blocks, end)
        whole = fill(frozen, rows, blocks, end, partial=False)
        nothing = fill(frozen, rows, blocks, end, use=False)
        long = fill(frozen, rows, blocks, end, least=1.0)
        few = fill(frozen, rows, blocks, end, sizes=(4, 8))
        for made in (everything, whole, nothing, long, few):
            check(frozen, rows, blocks, end, made)
        # what is switched off is not done, and each thing that is switched on pays or does nothing
        assert all((p.low, p.high) == (0, n) for n, pieces in zip(whole.rows, whole.pieces, strict=True) for p in pieces)
        assert not in_bubbles(nothing)
        each = -(-rows // sum(block.devices for block in blocks))
        assert nothing.seconds == pytest.approx(end + sum(one.seconds.seconds(each) for one in frozen))
        for block, pieces in zip(blocks, long.pieces, strict=True):
            assert all(block.idle[p.bubble].seconds >= 1.0 for p in pieces if p.bubble is not None)
        for n, pieces in zip(few.rows, few.pieces, strict=True):
            assert all(p.high == n or p.high - p.low in (4, 8) for p in pieces)
        assert everything.seconds <= whole.seconds <= nothing.seconds
        assert long.seconds <= nothing.seconds


def test_what_fits_is_hidden_and_the_rest_runs_behind() -> None:
    frozen = [layer(1.0), layer(2.0, 0)]
    block = Block(1, (Span(0, 5), Span(10, 11)))
    made = fill(frozen, 4, [block], 20.0)
    # the second layer's 8 s fit nowhere, and those of one row do not either
    assert made.pieces[0][0] == Piece(0, 0, 4, 0, 0.0, 4.0)
    assert made.seconds == 28.0 and made.hidden == pytest.approx(4 / 12)
    more = fill(frozen, 4, [Block(1, (Span(0, 5), Span(10, 15)))], 20.0)
    assert [str(p.layer) + f":{p.low}-{p.high}" for p in more.pieces[0]] == ["0:0-4", "1:0-2", "1:2-4"]
    assert more.seconds == 24.0 and more.pieces[0][-1] == Piece(1, 2, 4, None, 20.0, 4.0)
    assert fill(frozen, 4, [Block(1, (Span(0, 12),))], 20.0).hidden == 1.0


def test_a_part_that_saves_nothing_is_not_placed() -> None:
    frozen = [FrozenLayer("latency", Curve(((1, 3.0), (8, 3.0))))]
    made = fill(frozen, 8, [Block(1, (Span(0, 2.9), Span(4, 7)))], 10.0)
    assert made.pieces[0] == (Piece(0, 0, 8, 1, 4.0, 3.0),)
    # 2 rows would fill the bubble better than the second layer does, and save less
    two = [FrozenLayer("flat", Curve(((1, 2.8), (8, 3.2)))), layer(0.25)]
    made = fill(two, 8, [Block(1, (Span(0, 3),))], 10.0)
    assert in_bubbles(made) == [Piece(1, 0, 8, 0, 0.0, 2.0)] and made.seconds == 13.2


def test_blocks_with_more_room_take_more_rows() -> None:
    frozen = [layer(1.0)]
    blocks = [Block(1, (Span(0, 6),)), Block(1, (Span(0, 2),)), Block(1, ())]
    made = fill(frozen, 8, blocks, 10.0)
    assert made.rows == (6, 2, 0) and made.seconds == 10.0 and made.hidden == 1.0
    assert fill(frozen, 11, blocks, 10.0, sizes=range(1, 9)).seconds == 11.0
    assert fill(frozen, 11, blocks, 10.0).seconds == 12.0  # of 7 rows only 4 fit, since there is no kernel for 6
    # a block of two devices takes pairs of rows
    pairs = fill(frozen, 5, [Block(2, (Span(0, 9),))], 10.0)
    assert pairs.rows == (3,) and pairs.seconds == 10.0


def test_layers_that_do_not_depend_on_each_other_are_chosen_to_fit() -> None:
    frozen = [layer(0.6), layer(0.5), layer(0.4)]
    made = fill(frozen, 10, [Block(1, (Span(0, 9),))], 10.0, partial=False)
    assert sorted(p.layer for p in in_bubbles(made)) == [1, 2] and made.seconds == 16.0
    # a reader waits for all that it reads
    joined = [layer(0.1), layer(0.2), layer(0.3, 0, 1)]
    made = fill(joined, 10, [Block(1, (Span(0, 2.5), Span(5, 9)))], 10.0)
    order = [p.layer for p in made.pieces[0]]
    assert order.index(2) > max(order.index(0), order.index(1)) and made.hidden == 1.0


def test_rows_are_covered_where_more_rows_leave_less() -> None:
    # one row: the first and the third layer fill the first bubble so that the second layer fits nowhere;
    # two rows: what fits is another choice, and everything does
    for frozen, idle in (
        ([(4, 6, ()), (7, 9, (0,)), (6, 6, ())], [Span(0, 6), Span(7, 17)]),
        ([(9, 11, ()), (6, 6, ()), (4, 4, (1,))], [Span(0, 11), Span(12, 20)]),
    ):
        layers = [FrozenLayer("", Curve(((1, one), (2, two))), after=after) for one, two, after in frozen]
        end = idle[-1].end
        for partial in (False, True):
            made = fill(layers, 2, [Block(1, tuple(idle))], end, partial=partial)
            assert made.rows == (2,)
            check(layers, 2, [Block(1, tuple(idle))], end, made)


def test_nothing_to_do_takes_no_time() -> None:
    for blocks in ([Block(2, ())], [Block(1, (Span(0, 1),)), Block(3, ())]):
        made = fill([], 8, blocks, 5.0)
        assert made.rows == (0,) * len(blocks) and made.seconds == 5.0 and made.hidden == 1.0
        assert fill([layer(1.0)], 0, blocks, 5.0).seconds == 5.0
    free = fill([FrozenLayer("", NOTHING), FrozenLayer("", NOTHING, after=(0,))], 3, [Block(1, (Span(0, 1),))], 2.0)
    assert free.seconds == 2.0 and free.rows == (3,) and free.hidden == 1.0
    # a layer behind one that takes no time is placed all the same
    made = fill([FrozenLayer("", NOTHING), layer(1.0, 0)], 2, [Block(1, (Span(0, 2),))], 5.0)
    assert made.seconds == 5.0 and [p.layer for p in made.pieces[0]] == [0, 1]


def test_bubbles_of_the_least_length_are_filled() -> None:
    block = Block(1, (Span(0, 1), Span(2, 3.5)))
    assert len(in_bubbles(fill([layer(0.5)], 2, [block], 5.0, least=1.0))) == 1
    assert in_bubbles(fill([layer(0.5)], 2, [block], 5.0, least=1.25))[0].bubble == 1
    assert not in_bubbles(fill([layer(0.5)], 2, [block], 5.0, least=2.0))


def test_many_layers_and_bubbles_are_done_soon() -> None:
    rng = random.Random(SEED)
    frozen = [layer(rng.random(), *([i - 1] if i % 6 else []), fixed=0.2) for i in range(48)]
    blocks = [Block(4, tuple(Span(3.0 * i + 0.1 * b, 3.0 * i + 1.5 + 0.1 * b) for i in range(60))) for b in range(6)]
    made = fill(frozen, 96, blocks, 200.0)
    check(frozen, 96, blocks, 200.0, made)
    assert made.hidden > 0.5
