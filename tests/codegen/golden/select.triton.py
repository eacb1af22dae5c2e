import triton
import triton.language as tl


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def select(x, y, flag, out, above, N, XBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = i < N
    nothing = tl.full([], 0.0, tl.float32) * -1.0
    a = tl.load(x + i, mask=xmask, other=0.0)
    b = tl.load(y + i, mask=xmask, other=0.0)
    f = tl.load(flag + i, mask=xmask, other=False)
    gt_ = a > b
    nf = ~f
    take = gt_ | nf
    top = _maximum(a, b)
    neg_ = top * -1.0
    v = tl.where(take, neg_, nothing)
    tl.store(out + i, v, mask=xmask)
    nan = v != v
    both = take ^ nan
    tl.store(above + i, both, mask=xmask & f)
