import triton
import triton.language as tl


@triton.jit
def segment_sum_0(offsets, ones, M, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    unit = tl.full([], 1.0, tl.float32)
    first = tl.load(offsets + i, mask=xmask, other=0)
    last = tl.load(offsets + (i + 1), mask=xmask, other=0)
    count = tl.cast(-first + last, tl.int64)
    n_lanes = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    r_end = tl.where(xmask, count, 0)
    for r_base in range(0, tl.max(r_end), RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)[None, :]
        r_mask = r < r_end
        n_lanes = tl.where(r_mask, n_lanes + unit, n_lanes)
    n = tl.sum(n_lanes, 1)[:, None]
    tl.store(ones + i, n, mask=xmask)
