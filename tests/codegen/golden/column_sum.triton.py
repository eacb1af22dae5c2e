import triton
import triton.language as tl


@triton.jit
def column_sum(x, out, M, N, XBLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = j < N
    total = tl.full([XBLOCK], 0.0, tl.float32)
    for i in range(0, M):
        a = tl.load(x + (j + N * i), mask=xmask, other=0.0)
        total = total + a
    tl.store(out + j, total, mask=xmask)
