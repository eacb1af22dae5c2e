import triton
import triton.language as tl


@triton.jit
def _argmax(value, index, other, other_index):
    """The larger (value, index) pair: NaN is largest, ties take the lower index."""
    tie = (other == value) | ((other != other) & (value != value))
    take = (other > value) | ((other != other) & (value == value)) | (tie & (other_index < index))
    return tl.where(take, other, value), tl.where(take, other_index, index)


@triton.jit
def argmax_1(x, column, M, N, XBLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = j < N
    first_value = tl.full([XBLOCK], float("-inf"), tl.float32)
    first = tl.full([XBLOCK], 9223372036854775807, tl.int64)
    for k in range(0, M):
        b = tl.load(x + (j + N * k), mask=xmask, other=0.0)
        row = tl.cast(k, tl.int64)
        first_value, first = _argmax(first_value, first, b, row)
    tl.store(column + j, first, mask=xmask)
