import triton
import triton.language as tl


@triton.jit
def add_in_place(x, y, N, XBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = i < N
    a = tl.load(x + i, mask=xmask, other=0.0)
    b = tl.load(y + i, mask=xmask, other=0.0)
    c = a + b
    tl.store(x + i, c, mask=xmask)
