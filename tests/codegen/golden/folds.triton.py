import triton
import triton.language as tl


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def folds(x, flag, y, product, least, some, every, high, M, N, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    p_lanes = tl.full([XBLOCK, RBLOCK], 1.0, tl.float32)
    m_lanes = tl.full([XBLOCK, RBLOCK], float("inf"), tl.float32)
    o_lanes = tl.full([XBLOCK, RBLOCK], False, tl.int1)
    e_lanes = tl.full([XBLOCK, RBLOCK], True, tl.int1)
    h_lanes = tl.full([XBLOCK, RBLOCK], -2147483648, tl.int32)
    for r_base in range(0, N, RBLOCK):
        r = r_base + tl.arange(0, RBLOCK)[None, :]
        r_mask = r < N
        a = tl.load(x + (r + N * i), mask=xmask & r_mask, other=0.0)
        p_lanes = tl.where(r_mask, p_lanes * a, p_lanes)
        m_lanes = tl.where(r_mask, _minimum(m_lanes, a), m_lanes)
        f = tl.load(flag + (r + N * i), mask=xmask & r_mask, other=False)
        o_lanes = tl.where(r_mask, o_lanes | f, o_lanes)
        e_lanes = tl.where(r_mask, e_lanes & f, e_lanes)
        b = tl.load(y + (r + N * i), mask=xmask & r_mask, other=0)
        h_lanes = tl.where(r_mask, tl.maximum(h_lanes, b), h_lanes)
    p = tl.reduce(p_lanes, 1, _product)[:, None]
    m = tl.reduce(m_lanes, 1, _minimum)[:, None]
    o = (tl.max(o_lanes.to(tl.int32), 1) != 0)[:, None]
    e = (tl.min(e_lanes.to(tl.int32), 1) != 0)[:, None]
    h = tl.max(h_lanes, 1)[:, None]
    tl.store(product + i, p, mask=xmask)
    tl.store(least + i, m, mask=xmask)
    tl.store(some + i, o, mask=xmask)
    tl.store(every + i, e, mask=xmask)
    tl.store(high + i, h, mask=xmask)
