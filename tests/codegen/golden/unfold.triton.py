import triton
import triton.language as tl


@triton.jit
def unfold(x, out, N, XBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = i < N * 6
    a = tl.load(x + (N * (i % 2) * 2 + N * ((i // 2) % 3) + i // 6), mask=xmask, other=0.0)
    tl.store(out + i, a, mask=xmask)
