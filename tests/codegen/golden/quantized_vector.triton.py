import triton
import triton.language as tl


@triton.jit
def quantized(A, codes, scales, zeros, bias, out, M, lda, ldc, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    mm_rows = (M + 1) // 2
    mm_m0 = tl.program_id(0) % mm_rows * 2
    mm_m1 = mm_m0 + 1
    mm_m = mm_m0 + tl.arange(0, 2)[:, None]
    mm_n = ((tl.program_id(0) // mm_rows) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mm_row = mm_m < M
    mm_column = mm_n < 70
    mm_lane = (mm_n % 32).to(tl.int32)
    mm_words = codes + (mm_n // 32 * 1152 + mm_lane)
    mm_scales = scales + (mm_n // 32 * 128 + mm_lane)
    mm_zeros = zeros + (mm_n // 32 * 64 + mm_lane % 16)
    mm_p0 = tl.arange(0, BLOCK_K // 32 * 2)[:, None]
    mm_p0_sum0 = tl.zeros([BLOCK_K // 32 * 2, BLOCK_N], tl.float32)
    mm_p0_sum1 = tl.zeros([BLOCK_K // 32 * 2, BLOCK_N], tl.float32)
    mm_p2 = tl.arange(0, BLOCK_K // 32 * 1)[:, None]
    mm_p2_sum0 = tl.zeros([BLOCK_K // 32 * 1, BLOCK_N], tl.float32)
    mm_p2_sum1 = tl.zeros([BLOCK_K // 32 * 1, BLOCK_N], tl.float32)
    for mm_k in range(0, 384, BLOCK_K):
        mm_p0_k = mm_k + mm_p0 * 16
        mm_live = mm_column & (mm_p0_k < 384)
        mm_word = tl.load(mm_words + ((mm_p0 // 2 * 3 + mm_p0 % 2) * 32 + mm_k * 3), mask=mm_live, other=0)
        mm_scale = tl.load(mm_scales + (mm_p0_k // 96) * 32, mask=mm_live, other=0.0).to(tl.float32)
        mm_zero = (tl.load(mm_zeros + (mm_p0_k // 96) * 16, mask=mm_live, other=0).to(tl.int32) >> mm_lane // 16 * 4 & 15).to(tl.float32)
        mm_part0 = tl.zeros([BLOCK_K // 32 * 2, BLOCK_N], tl.float32)
        mm_part1 = tl.zeros([BLOCK_K // 32 * 2, BLOCK_N], tl.float32)
        for mm_i in tl.static_range(16):
            mm_whole = (mm_word >> mm_i * 2 & 3 | 1258291200).to(tl.float32, bitcast=True) - (mm_zero + 8388608.0)
            mm_x = tl.load(A + (mm_m0 * lda + mm_p0_k + mm_i), mask=(mm_p0_k < 384) & (mm_m0 < M), other=0.0)
            mm_part0 += mm_whole * mm_x.to(tl.float32)
            mm_x = tl.load(A + (mm_m1 * lda + mm_p0_k + mm_i), mask=(mm_p0_k < 384) & (mm_m1 < M), other=0.0)
            mm_part1 += mm_whole * mm_x.to(tl.float32)
        mm_p0_sum0 += mm_part0 * mm_scale
        mm_p0_sum1 += mm_part1 * mm_scale
        mm_p2_k = mm_k + mm_p2 * 32
        mm_live = mm_column & (mm_p2_k < 384)
        mm_word = tl.load(mm_words + ((mm_p2 // 1 * 3 + mm_p2 % 1 + 2) * 32 + mm_k * 3), mask=mm_live, other=0)
        mm_scale = tl.load(mm_scales + (mm_p2_k // 96) * 32, mask=mm_live, other=0.0).to(tl.float32)
        mm_part0 = tl.zeros([BLOCK_K // 32 * 1, BLOCK_N], tl.float32)
        mm_part1 = tl.zeros([BLOCK_K // 32 * 1, BLOCK_N], tl.float32)
        for mm_i in tl.static_range(32):
            mm_whole = (mm_word >> mm_i * 1 & 1 | 1258291200).to(tl.float32, bitcast=True) - 8388608.0
            mm_x = tl.load(A + (mm_m0 * lda + mm_p2_k + mm_i), mask=(mm_p2_k < 384) & (mm_m0 < M), other=0.0)
            mm_part0 += mm_whole * mm_x.to(tl.float32)
            mm_x = tl.load(A + (mm_m1 * lda + mm_p2_k + mm_i), mask=(mm_p2_k < 384) & (mm_m1 < M), other=0.0)
            mm_part1 += mm_whole * mm_x.to(tl.float32)
        mm_p2_sum0 += mm_part0 * (mm_scale * 4.0)
        mm_p2_sum1 += mm_part1 * (mm_scale * 4.0)
    mm_total0 = tl.sum(mm_p0_sum0, 0)[None, :] + tl.sum(mm_p2_sum0, 0)[None, :]
    mm_total1 = tl.sum(mm_p0_sum1, 0)[None, :] + tl.sum(mm_p2_sum1, 0)[None, :]
    acc = tl.where(mm_m == mm_m1, mm_total1, mm_total0)
    b = tl.load(bias + mm_n, mask=mm_column, other=0.0)
    b32 = b.to(tl.float32)
    biased = acc + b32
    result = biased.to(tl.bfloat16)
    tl.store(out + (mm_n + ldc * mm_m), result, mask=mm_row & mm_column)
