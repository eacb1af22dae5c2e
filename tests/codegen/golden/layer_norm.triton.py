import triton
import triton.language as tl


@triton.jit
def layer_norm(x, weight, bias, out, M, N, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    epsilon = tl.full([], 1e-05, tl.float32)
    count = tl.cast(N, tl.int64)
    n = count.to(tl.float32)
    total_lanes = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for r_base in range(0, N, RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)[None, :]
        r_mask = r < N
        a = tl.load(x + (r + N * i), mask=xmask & r_mask, other=0.0)
        total_lanes = tl.where(r_mask, total_lanes + a, total_lanes)
    total = tl.sum(total_lanes, 1)[:, None]
    mean = tl.div_rn(total, n)
    squares_lanes = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for s_base in range(0, N, RBLOCK):
        s = s_base + tl.arange(0, RBLOCK)[None, :]
        s_mask = s < N
        b = tl.load(x + (s + N * i), mask=xmask & s_mask, other=0.0)
        d = b - mean
        d2 = d * d
        squares_lanes = tl.where(s_mask, squares_lanes + d2, squares_lanes)
    squares = tl.sum(squares_lanes, 1)[:, None]
    variance = tl.div_rn(squares, n)
    safe = variance + epsilon
    inv = tl.rsqrt(safe)
    for t_base in range(0, N, RBLOCK):
        t = t_base + tl.arange(0, RBLOCK)[None, :]
        t_mask = t < N
        c = tl.load(x + (t + N * i), mask=xmask & t_mask, other=0.0)
        e = c - mean
        f = e * inv
        w = tl.load(weight + t, mask=t_mask, other=0.0)
        o = tl.load(bias + t, mask=t_mask, other=0.0)
        g = tl.fma(f, w, o)
        tl.store(out + (t + N * i), g, mask=xmask & t_mask)
