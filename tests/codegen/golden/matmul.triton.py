import triton
import triton.language as tl


@triton.jit
def matmul_bfloat16(
    A,
    B,
    bias,
    out,
    M,
    N,
    K,
    lda,
    ldb,
    ldc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # neighbouring programs share columns of B, GROUP of them also rows of A, while both are in the cache
    mm_rows = (M + BLOCK_M - 1) // BLOCK_M
    mm_columns = (N + BLOCK_N - 1) // BLOCK_N
    mm_pid = tl.program_id(0)
    mm_first = mm_pid // (GROUP * mm_columns) * GROUP
    mm_height = tl.minimum(mm_rows - mm_first, GROUP)
    mm_place = mm_pid % (GROUP * mm_columns)
    mm_m = ((mm_first + mm_place % mm_height) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    mm_n = ((mm_place // mm_height) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mm_row = mm_m < M
    mm_column = mm_n < N
    mm_ks = tl.arange(0, BLOCK_K)
    mm_a = A + (mm_m * lda + mm_ks[None, :])
    mm_b = B + (mm_ks[:, None] + mm_n * ldb)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for mm_k in range(0, K, BLOCK_K):
        mm_live = mm_ks < K - mm_k
        mm_left = tl.load(mm_a, mask=mm_row & mm_live[None, :], other=0.0)
        mm_right = tl.load(mm_b, mask=mm_live[:, None] & mm_column, other=0.0)
        acc = tl.dot(mm_left, mm_right, acc)
        mm_a += BLOCK_K
        mm_b += BLOCK_K
    b = tl.load(bias + mm_n, mask=mm_column, other=0.0)
    b32 = b.to(tl.float32)
    biased = acc + b32
    result = biased.to(tl.bfloat16)
    tl.store(out + (mm_n + ldc * mm_m), result, mask=mm_row & mm_column)
