import triton
import triton.language as tl


@triton.jit
def scatter(x, ids, out, hits, M, D, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    one = tl.full([], 1, tl.int32)
    none = tl.full([], -1, tl.int64)
    id = tl.load(ids + i, mask=xmask, other=0)
    valid = id > none
    for j_base in range(0, D, RBLOCK):
        j = j_base + tl.arange(0, RBLOCK)[None, :]
        j_mask = j < D
        a = tl.load(x + (j + D * i), mask=xmask & j_mask, other=0.0)
        tl.atomic_add(out + (j + D * id), a, mask=xmask & j_mask & valid, sem="relaxed")
        tl.atomic_add(hits + (0 + tl.zeros([XBLOCK, RBLOCK], tl.int32)), one, mask=xmask & j_mask & valid, sem="relaxed")
