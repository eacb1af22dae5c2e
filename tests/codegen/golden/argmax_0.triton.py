import triton
import triton.language as tl


@triton.jit
def _argmax(value, index, other, other_index):
    """The larger (value, index) pair: NaN is largest, ties take the lower index."""
    tie = (other == value) | ((other != other) & (value != value))
    take = (other > value) | ((other != other) & (value == value)) | (tie & (other_index < index))
    return tl.where(take, other, value), tl.where(take, other_index, index)


@triton.jit
def _argmin(value, index, other, other_index):
    """The smaller (value, index) pair: NaN is smallest, ties take the lower index."""
    tie = (other == value) | ((other != other) & (value != value))
    take = (other < value) | ((other != other) & (value == value)) | (tie & (other_index < index))
    return tl.where(take, other, value), tl.where(take, other_index, index)


@triton.jit
def argmax_0(x, top, bottom, M, N, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    best_lanes_value = tl.full([XBLOCK, RBLOCK], float("-inf"), tl.float32)
    best_lanes = tl.full([XBLOCK, RBLOCK], 9223372036854775807, tl.int64)
    worst_lanes_value = tl.full([XBLOCK, RBLOCK], float("inf"), tl.float32)
    worst_lanes = tl.full([XBLOCK, RBLOCK], 9223372036854775807, tl.int64)
    for r_base in range(0, N, RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)[None, :]
        r_mask = r < N
        a = tl.load(x + (r + N * i), mask=xmask & r_mask, other=0.0)
        at = tl.cast(r, tl.int64)
        best_lanes_next_value, best_lanes_next = _argmax(best_lanes_value, best_lanes, a, at)
        best_lanes_value = tl.where(r_mask, best_lanes_next_value, best_lanes_value)
        best_lanes = tl.where(r_mask, best_lanes_next, best_lanes)
        worst_lanes_next_value, worst_lanes_next = _argmin(worst_lanes_value, worst_lanes, a, at)
        worst_lanes_value = tl.where(r_mask, worst_lanes_next_value, worst_lanes_value)
        worst_lanes = tl.where(r_mask, worst_lanes_next, worst_lanes)
    best_best, best_at = tl.reduce((best_lanes_value, best_lanes), 1, _argmax)
    best = best_at[:, None]
    worst_best, worst_at = tl.reduce((worst_lanes_value, worst_lanes), 1, _argmin)
    worst = worst_at[:, None]
    tl.store(top + i, best, mask=xmask)
    tl.store(bottom + i, worst, mask=xmask)
