import triton
import triton.language as tl


@triton.jit
def _trunc_div_int(x, y):
    """C's integer division; 0 where y is 0."""
    zero = tl.full([], 0, y.dtype)
    safe = tl.where(y == 0, tl.full([], 1, y.dtype), y)
    return tl.where(y == 0, zero, x // safe)


@triton.jit
def _fmod_int(x, y):
    """C's integer remainder; 0 where y is 0."""
    zero = tl.full([], 0, y.dtype)
    safe = tl.where(y == 0, tl.full([], 1, y.dtype), y)
    return tl.where(y == 0, zero, x % safe)


@triton.jit
def _floordiv_int(x, y):
    """Python's integer division; 0 where y is 0."""
    zero = tl.full([], 0, y.dtype)
    safe = tl.where(y == 0, tl.full([], 1, y.dtype), y)
    q = x // safe
    r = x - q * safe
    q = tl.where((r != 0) & ((r < 0) != (safe < 0)), q - 1, q)
    return tl.where(y == 0, zero, q)


@triton.jit
def _mod_int(x, y):
    """Python's integer remainder; 0 where y is 0."""
    zero = tl.full([], 0, y.dtype)
    safe = tl.where(y == 0, tl.full([], 1, y.dtype), y)
    r = x % safe
    r = tl.where((r != 0) & ((r < 0) != (safe < 0)), r + safe, r)
    return tl.where(y == 0, zero, r)


@triton.jit
def remainders(x, y, quotient, rest, cut, left, N, XBLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = i < N
    a = tl.load(x + i, mask=xmask, other=0)
    b = tl.load(y + i, mask=xmask, other=0)
    q = _floordiv_int(a, b)
    tl.store(quotient + i, q, mask=xmask)
    m = _mod_int(a, b)
    tl.store(rest + i, m, mask=xmask)
    t = _trunc_div_int(a, b)
    tl.store(cut + i, t, mask=xmask)
    f = _fmod_int(a, b)
    tl.store(left + i, f, mask=xmask)
