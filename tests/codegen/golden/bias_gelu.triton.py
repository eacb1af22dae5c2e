# %y = gelu(%x + %bias, approximate='tanh')
import triton
import triton.language as tl


@triton.jit
def _copysign(x, y):
    """The magnitude of x with the sign of y; signs of zeros and NaNs count."""
    if x.dtype == tl.float64:
        bits = (x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) | (y.to(tl.int64, bitcast=True) & -0x8000000000000000)
        return bits.to(tl.float64, bitcast=True)
    else:
        bits = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (y.to(tl.int32, bitcast=True) & -0x80000000)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation: a polynomial up to 1/2, exp beyond; 4 ULP."""
    if x.dtype == tl.float64:
        p = x * 1.1506646643626771e-11 + 1.6116496514371548e-10
        p = p * x + 2.0876655966148874e-09
        p = p * x + 2.505194670972162e-08
        p = p * x + 2.7557319354970364e-07
        p = p * x + 2.755731943362024e-06
        p = p * x + 2.4801587301510543e-05
        p = p * x + 0.00019841269841146993
        p = p * x + 0.0013888888888888905
        p = p * x + 0.00833333333333336
        p = p * x + 0.041666666666666664
        p = p * x + 0.16666666666666666
    else:
        p = x * 0.000199275819 + 0.00139666093
        p = p * x + 0.00833327975
        p = p * x + 0.0416661799
        p = p * x + 0.166666672
    small = x + x * x * (0.5 + x * p)
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1.0)


@triton.jit
def _tanh(x):
    """-expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x; 5 ULP."""
    t = _expm1(-2.0 * tl.abs(x))
    return _copysign(t / (2.0 + t), x)


@triton.jit
def bias_gelu(x, bias, out, M, N, XBLOCK: tl.constexpr):
    xindex = tl.program_id(0).to(tl.int64) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = xindex < M * N
    j = xindex % N
    half = tl.full([], 0.5, tl.float32)
    one = tl.full([], 1.0, tl.float32)
    cubic = tl.full([], 0.044715, tl.float32)
    scale = tl.full([], 0.7978846, tl.float32)
    a = tl.load(x + xindex, mask=xmask, other=0.0)
    b = tl.load(bias + j, mask=xmask, other=0.0)
    v = a + b
    v2 = v * v
    p = tl.fma(v2, cubic, one)
    q = v * p
    u = q * scale
    th = _tanh(u)
    w = th + one
    h = v * half
    g = h * w
    tl.store(out + xindex, g, mask=xmask)
