import triton
import triton.language as tl


@triton.jit
def total_1(x, scaled, N, XBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = i < N
    two = tl.full([], 2.0, tl.float32)
    b = tl.load(x + i, mask=xmask, other=0.0)
    c = b * two
    tl.store(scaled + i, c, mask=xmask)
