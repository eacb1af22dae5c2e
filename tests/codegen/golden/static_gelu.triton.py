import triton
import triton.language as tl


@triton.jit
def static_gelu(x, out, XBLOCK: tl.constexpr):
    xindex = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = xindex < 204
    half = tl.full([], 0.5, tl.float32)
    one = tl.full([], 1.0, tl.float32)
    root = tl.full([], 0.70710677, tl.float32)
    a = tl.load(x + xindex, mask=xmask, other=0.0)
    u = a * root
    e = tl.erf(u)
    w = e + one
    h = a * half
    g = h * w
    tl.store(out + xindex, g, mask=xmask)
