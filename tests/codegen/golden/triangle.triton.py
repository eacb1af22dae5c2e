import triton
import triton.language as tl


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def triangle(x, out, N, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < N
    top_lanes = tl.full([XBLOCK, RBLOCK], float("-inf"), tl.float32)
    r_end = tl.where(xmask, i + 1, 0)
    for r_base in range(0, tl.max(r_end), RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)[None, :]
        r_mask = r < r_end
        a = tl.load(x + (r + N * i), mask=xmask & r_mask, other=0.0)
        top_lanes = tl.where(r_mask, _maximum(top_lanes, a), top_lanes)
    top = tl.reduce(top_lanes, 1, _maximum)[:, None]
    tl.store(out + i, top, mask=xmask)
