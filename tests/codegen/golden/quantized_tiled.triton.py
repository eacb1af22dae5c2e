import triton
import triton.language as tl


@triton.jit
def quantized(
    A,
    codes,
    scales,
    zeros,
    bias,
    out,
    M,
    lda,
    ldc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # neighbouring programs share columns of B, GROUP of them also rows of A, while both are in the cache
    mm_rows = (M + BLOCK_M - 1) // BLOCK_M
    mm_columns = (70 + BLOCK_N - 1) // BLOCK_N
    mm_pid = tl.program_id(0)
    mm_first = mm_pid // (GROUP * mm_columns) * GROUP
    mm_height = tl.minimum(mm_rows - mm_first, GROUP)
    mm_place = mm_pid % (GROUP * mm_columns)
    mm_m = ((mm_first + mm_place % mm_height) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    mm_n = ((mm_place // mm_height) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    mm_row = mm_m < M
    mm_column = mm_n < 70
    mm_ks = tl.arange(0, BLOCK_K)
    mm_a = A + (mm_m * lda + mm_ks[:, None])
    mm_lane = (mm_n % 32).to(tl.int32)
    mm_words = codes + (mm_n // 32 * 1152 + mm_lane)
    mm_scales = scales + (mm_n // 32 * 128 + mm_lane)
    mm_zeros = zeros + (mm_n // 32 * 64 + mm_lane % 16)
    mm_p0 = tl.arange(0, BLOCK_K // 32 * 2)[None, :]
    mm_p0_shift = (tl.arange(0, 16) * 2)[None, None, :]
    mm_p0_at = (mm_p0 // 2 * 3 + mm_p0 % 2) * 32
    mm_p2 = tl.arange(0, BLOCK_K // 32 * 1)[None, :]
    mm_p2_shift = (tl.arange(0, 32) * 1)[None, None, :]
    mm_p2_at = (mm_p2 // 1 * 3 + mm_p2 % 1 + 2) * 32
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for mm_k in range(0, 384, BLOCK_K):
        mm_scale = tl.load(mm_scales + (mm_k // 96) * 32, mask=mm_column, other=0.0).to(tl.float32)
        mm_zero = (tl.load(mm_zeros + (mm_k // 96) * 16, mask=mm_column, other=0).to(tl.int32) >> mm_lane // 16 * 4 & 15).to(tl.float32)
        mm_p0_words = tl.load(mm_words + (mm_p0_at + mm_k * 3), mask=mm_column, other=0)
        mm_code = tl.reshape(mm_p0_words[:, :, None] >> mm_p0_shift & 3, [BLOCK_N, BLOCK_K])
        mm_p2_words = tl.load(mm_words + (mm_p2_at + mm_k * 3), mask=mm_column, other=0)
        mm_code = mm_code | tl.reshape(mm_p2_words[:, :, None] >> mm_p2_shift & 1, [BLOCK_N, BLOCK_K]) << 2
        # 2^23 + code, as bits, then code - zero, which is exact
        mm_whole = (mm_code | 1258291200).to(tl.float32, bitcast=True) - (mm_zero + 8388608.0)
        mm_right = tl.load(mm_a + mm_k, mask=mm_row, other=0.0)
        acc += tl.dot(mm_whole.to(tl.bfloat16), mm_right) * mm_scale
    b = tl.load(bias + mm_n, mask=mm_column, other=0.0)
    b32 = b.to(tl.float32)
    biased = acc + b32
    result = biased.to(tl.bfloat16)
    tl.store(out + (mm_n + ldc * mm_m), result, mask=mm_row & mm_column)
