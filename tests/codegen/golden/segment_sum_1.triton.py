import triton
import triton.language as tl


@triton.jit
def segment_sum_1(x, offsets, out, M, D, XBLOCK: tl.constexpr):
    xindex = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = xindex < D * M
    k = xindex // D
    j = xindex % D
    from_ = tl.load(offsets + k, mask=xmask, other=0)
    to = tl.load(offsets + (k + 1), mask=xmask, other=0)
    total = tl.full([XBLOCK], 0.0, tl.float32)
    s_end = tl.where(xmask, -from_ + to, 0)
    for s in range(0, tl.max(s_end)):
        s_mask = s < s_end
        a = tl.load(x + (j + D * (from_ + s)), mask=xmask & s_mask, other=0.0)
        total = tl.where(s_mask, total + a, total)
    tl.store(out + xindex, total, mask=xmask)
