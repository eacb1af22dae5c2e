import triton
import triton.language as tl


@triton.jit
def total_0(x, out, N, RBLOCK: tl.constexpr):
    s_lanes = tl.full([RBLOCK], 0.0, tl.float32)
    for r_base in range(0, N, RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)
        r_mask = r < N
        a = tl.load(x + r, mask=r_mask, other=0.0)
        s_lanes = tl.where(r_mask, s_lanes + a, s_lanes)
    s = tl.sum(s_lanes, 0)
    tl.store(out, s)
