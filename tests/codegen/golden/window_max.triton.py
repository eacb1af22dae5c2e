import triton
import triton.language as tl


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def window_max(x, out, M, N, XBLOCK: tl.constexpr):
    xindex = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = xindex < M * N
    i = xindex // N
    j = xindex % N
    top = tl.full([XBLOCK], float("-inf"), tl.float32)
    for k in range(0, 2):
        for l in range(0, 3):
            a = tl.load(x + (j * 3 + l + N * (i * 2 + k) * 3), mask=xmask, other=0.0)
            top = _maximum(top, a)
    tl.store(out + xindex, top, mask=xmask)
