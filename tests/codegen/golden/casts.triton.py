import triton
import triton.language as tl


@triton.jit
def casts(x, y, half, back, small, truth, double, count, N, XBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = i < N
    a = tl.load(x + i, mask=xmask, other=0.0)
    f = a.to(tl.float32)
    g = f * f
    h = g.to(tl.float16)
    tl.store(half + i, h, mask=xmask)
    c = tl.load(y + i, mask=xmask, other=0)
    cf = c.to(tl.float32)
    s = g + cf
    b = s.to(tl.bfloat16)
    tl.store(back + i, b, mask=xmask)
    n = f.to(tl.int32).to(tl.int8)
    tl.store(small + i, n, mask=xmask)
    t = c != 0
    tl.store(truth + i, t, mask=xmask)
    d = a.to(tl.float32).to(tl.float64)
    tl.store(double + i, d, mask=xmask)
    tn = t.to(tl.int64)
    sum = tn + c
    tl.store(count + i, sum, mask=xmask)
