import triton
import triton.language as tl


@triton.jit
def normalise_rows_0(x, sums, M, N, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    s_lanes = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for r_base in range(0, N, RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)[None, :]
        r_mask = r < N
        a = tl.load(x + (r + N * i), mask=xmask & r_mask, other=0.0)
        s_lanes = tl.where(r_mask, s_lanes + a, s_lanes)
    s = tl.sum(s_lanes, 1)[:, None]
    tl.store(sums + i, s, mask=xmask)
