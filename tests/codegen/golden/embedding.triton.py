import triton
import triton.language as tl


@triton.jit
def embedding(table, ids, out, M, D, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = i < M
    id = tl.load(ids + i, mask=xmask, other=0)
    for j_base in range(0, D, RBLOCK):
        j = j_base + tl.arange(0, RBLOCK)[None, :]
        j_mask = j < D
        a = tl.load(table + (j + D * id.to(tl.int64)), mask=xmask & j_mask, other=0.0)
        tl.store(out + (j + D * i), a, mask=xmask & j_mask)
