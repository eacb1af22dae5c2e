import triton
import triton.language as tl


@triton.jit
def block_sum(x, out, largest, M, N, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = j < N
    total_lanes = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    most_lanes = tl.full([XBLOCK, RBLOCK], -9223372036854775808, tl.int64)
    for i in range(0, M):
        for k_base in range(0, 21, RBLOCK):
            k = k_base + tl.arange(0, RBLOCK)[None, :]
            k_mask = k < 21
            a = tl.load(x + (j * 21 + k + N * i * 21), mask=xmask & k_mask, other=0.0)
            total_lanes = tl.where(k_mask, total_lanes + a, total_lanes)
            weight = tl.cast(i * 100 + k, tl.int64)
            most_lanes = tl.where(k_mask, tl.maximum(most_lanes, weight), most_lanes)
    total = tl.sum(total_lanes, 1)[:, None]
    most = tl.max(most_lanes, 1)[:, None]
    tl.store(out + j, total, mask=xmask)
    tl.store(largest + j, most, mask=xmask)
