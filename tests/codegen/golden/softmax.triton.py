# %y = softmax(%x, dim=-1)
import triton
import triton.language as tl


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax(x, out, M, N, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    top_lanes = tl.full([XBLOCK, RBLOCK], float("-inf"), tl.float32)
    for r_base in range(0, N, RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)[None, :]
        r_mask = r < N
        a = tl.load(x + (r + N * i), mask=xmask & r_mask, other=0.0)
        top_lanes = tl.where(r_mask, _maximum(top_lanes, a), top_lanes)
    top = tl.reduce(top_lanes, 1, _maximum)[:, None]
    total_lanes = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for s_base in range(0, N, RBLOCK):
        s = s_base + tl.arange(0, RBLOCK)[None, :]
        s_mask = s < N
        b = tl.load(x + (s + N * i), mask=xmask & s_mask, other=0.0)
        d = b - top
        e = tl.exp(d)
        total_lanes = tl.where(s_mask, total_lanes + e, total_lanes)
    total = tl.sum(total_lanes, 1)[:, None]
    for t_base in range(0, N, RBLOCK):
        t = t_base + tl.arange(0, RBLOCK)[None, :]
        t_mask = t < N
        c = tl.load(x + (t + N * i), mask=xmask & t_mask, other=0.0)
        g = c - top
        h = tl.exp(g)
        p = tl.div_rn(h, total)
        tl.store(out + (t + N * i), p, mask=xmask & t_mask)
