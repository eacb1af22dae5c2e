"""Scalar functions that `triton.language` lacks, as jit functions over what it has.

The printer copies the functions that a kernel needs, with what they call, into the kernel's text, so that every printed
kernel is a module of its own. They use no libdevice call, so that Triton's interpreter can run them. Floating-point
functions take float32 or float64 and work in that type unless they say otherwise; errors below are relative, in units
in the last place (ULP), measured against mpmath by the tests.
"""

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
def _signbit(x):
    """True where the sign bit is set, that is also for -0.0."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) < 0
    else:
        return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def _trunc(x):
    """Towards zero; keeps the sign of zero."""
    return _copysign(tl.floor(tl.abs(x)), x)


@triton.jit
def _round(x):
    """Half to even: adding 2**23 (2**52) leaves no fraction bits, and the addition itself rounds to even."""
    a = tl.abs(x)
    if x.dtype == tl.float64:
        return tl.where(a < 4503599627370496.0, _copysign((a + 4503599627370496.0) - 4503599627370496.0, x), x)
    else:
        return tl.where(a < 8388608.0, _copysign((a + 8388608.0) - 8388608.0, x), x)


@triton.jit
def _sign(x):
    """-1, 0 or 1; 0 for NaN, as torch.sign."""
    one = tl.full([], 1, x.dtype)
    zero = tl.full([], 0, x.dtype)
    return tl.where(x > 0, one, zero) - tl.where(x < 0, one, zero)


@triton.jit
def _fmod(x, y):
    """C's fmod. float32 goes through float64, where a target's remainder is exact for quotients below 2**29."""
    if x.dtype == tl.float64:
        return x % y
    else:
        return (x.to(tl.float64) % y.to(tl.float64)).to(tl.float32)


@triton.jit
def _mod(x, y):
    """Python's remainder: the sign of y."""
    r = _fmod(x, y)
    return tl.where((r != 0) & ((r < 0) != (y < 0)), r + y, r)


@triton.jit
def _floordiv(x, y):
    """Python's floor division on floats: the remainder is taken first, so that x is y * quotient + remainder."""
    r = _fmod(x, y)
    q = (x - r) / y
    q = tl.where((r != 0) & ((r < 0) != (y < 0)), q - 1.0, q)
    f = tl.floor(q)
    f = tl.where(q - f > 0.5, f + 1.0, f)
    f = tl.where(q == 0, _copysign(q, x / y), f)
    return tl.where(y == 0, x / y, f)


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
def _floordiv_index(x, y):
    """Python's integer division of index expressions that may be negative."""
    return _floordiv_int(tl.cast(x, tl.int64), tl.cast(y, tl.int64))


@triton.jit
def _mod_index(x, y):
    """Python's integer remainder of index expressions that may be negative."""
    return _mod_int(tl.cast(x, tl.int64), tl.cast(y, tl.int64))


@triton.jit
def _shl(x, y):
    """x << y; 0 where y is outside the type's width."""
    width: tl.constexpr = x.dtype.primitive_bitwidth
    inside = (y >= 0) & (y < width)
    zero = tl.full([], 0, x.dtype)
    return tl.where(inside, x << tl.where(inside, y, zero), zero)


@triton.jit
def _shr(x, y):
    """x >> y, arithmetic on signed types; every bit is the sign where y is outside the type's width."""
    width: tl.constexpr = x.dtype.primitive_bitwidth
    inside = (y >= 0) & (y < width)
    half = x >> tl.where(inside, y, tl.full([], width - 1, x.dtype))
    if x.dtype.is_int_signed():
        return half
    else:
        return tl.where(inside, half, tl.full([], 0, x.dtype))


@triton.jit
def _pow_int(x, y):
    """x to the power y by squaring, wrapping; a negative power is 0 unless x is 1 or -1, as torch.pow."""
    zero = (x + y) * 0
    base = zero + x
    left = zero + y
    result = zero + 1
    for _step in range(63):
        result = tl.where((left & 1) != 0, result * base, result)
        base = base * base
        left = left >> 1
    if x.dtype.is_int_signed():
        alternate = tl.where((y & 1) != 0, zero - 1, zero + 1)
        inverse = tl.where(x == 1, zero + 1, tl.where(x == -1, alternate, zero))
        result = tl.where(y < 0, inverse, result)
    return result


@triton.jit
def _pow(x, y):
    """x to the power y with C's special cases, by float64 exp and log: 1 ULP in float32, |y log x| ULP in float64."""
    a = tl.abs(x).to(tl.float64)
    b = y.to(tl.float64)
    r = tl.exp(b * tl.log(a))
    r = tl.where((b == 0) | (x == 1) | ((x == -1) & (tl.abs(b) == float("inf"))), tl.full([], 1.0, tl.float64), r)
    whole = tl.floor(b) == b
    odd = whole & (b - 2.0 * tl.floor(b * 0.5) == 1.0)
    r = tl.where(_signbit(x) & odd, r * -1.0, r)  # Triton's -r is 0 - r, which loses the sign of zero
    bad = (x < 0) & (a != float("inf")) & (whole == 0)
    return tl.where(bad, tl.full([], float("nan"), tl.float64), r).to(x.dtype)


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
def _log1p(x):
    """log(1 + x): the rounding error of u = 1 + x is undone by the factor x / (u - 1) (Goldberg); 3 ULP."""
    u = 1.0 + x
    d = u - 1.0
    y = tl.log(u) * (x / tl.where(d == 0, tl.full([], 1.0, x.dtype), d))
    return tl.where(d == 0, x, tl.where(u == float("inf"), u, y))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); 3 ULP where the result is a normal number."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """-expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x; 5 ULP."""
    t = _expm1(-2.0 * tl.abs(x))
    return _copysign(t / (2.0 + t), x)


@triton.jit
def _sinh(x):
    """From expm1, so that small x keep their digits; halves the exponent for large x, against overflow; 4 ULP."""
    a = tl.abs(x)
    t = _expm1(a)
    h = tl.exp(0.5 * a)
    return _copysign(tl.where(a < 20.0, 0.5 * (t + t / (t + 1.0)), (0.5 * h) * h), x)


@triton.jit
def _cosh(x):
    """(exp(x) + exp(-x)) / 2; halves the exponent for large x, against overflow; 4 ULP."""
    a = tl.abs(x)
    e = tl.exp(a)
    h = tl.exp(0.5 * a)
    return tl.where(a < 20.0, 0.5 * (e + 1.0 / e), (0.5 * h) * h)


@triton.jit
def _asinh(x):
    """log1p(|x| + x**2 / (1 + sqrt(1 + x**2))) with the sign of x, log(2|x|) where the square would overflow; 4 ULP."""
    a = tl.abs(x)
    big = a > 1.0e9
    s = tl.where(big, tl.full([], 1.0, x.dtype), a)
    near = _log1p(s + s * s / (1.0 + tl.sqrt(1.0 + s * s)))
    return _copysign(tl.where(big, tl.log(a) + 0.6931471805599453, near), x)


@triton.jit
def _acosh(x):
    """log1p(t + sqrt(t (t + 2))) with t = x - 1, log(2 x) where the square would overflow, NaN below 1; 4 ULP."""
    big = x > 1.0e9
    t = tl.where(big, tl.full([], 1.0, x.dtype), x - 1.0)
    near = _log1p(t + tl.sqrt(t * (t + 2.0)))
    far = tl.log(x) + 0.6931471805599453
    return tl.where(x < 1.0, tl.full([], float("nan"), x.dtype), tl.where(big, far, near))


@triton.jit
def _atanh(x):
    """log1p(2|x| / (1 - |x|)) / 2 with the sign of x; 4 ULP."""
    a = tl.abs(x)
    return _copysign(0.5 * _log1p(2.0 * a / (1.0 - a)), x)


@triton.jit
def _atan(x):
    """A polynomial on [0, tan(pi/8)] after the usual reductions by pi/2 and pi/4; 3 ULP."""
    a = tl.abs(x)
    high = a > 2.414213562373095
    middle = (a > 0.4142135623730951) & (a <= 2.414213562373095)
    one = tl.full([], 1.0, x.dtype)
    top = tl.where(high, -one, tl.where(middle, a - 1.0, a))
    bottom = tl.where(high, a, tl.where(middle, a + 1.0, one))
    r = top / bottom
    z = r * r
    if x.dtype == tl.float64:
        p = z * -0.01917688711906226 + 0.03923165829558719
        p = p * z - 0.0508544973794026
        p = p * z + 0.0585814891280221
        p = p * z - 0.06664511447381948
        p = p * z + 0.07692183190826087
        p = p * z - 0.09090904578123903
        p = p * z + 0.11111111015256361
        p = p * z - 0.14285714284666542
        p = p * z + 0.1999999999999552
        p = p * z - 0.3333333333333333
    else:
        p = z * -0.0645192787 + 0.107437313
        p = p * z - 0.142639562
        p = p * z + 0.199995399
        p = p * z - 0.333333313
    base = tl.where(high, one * 1.5707963267948966, tl.where(middle, one * 0.7853981633974483, one * 0.0))
    return _copysign(base + (r + r * z * p), x)


@triton.jit
def _atan2(y, x):
    """The angle of (x, y) in (-pi, pi] with C's cases for zeros and infinities; 4 ULP."""
    a = tl.abs(x)
    b = tl.abs(y)
    one = tl.full([], 1.0, x.dtype)
    equal = (a == b) & (a != 0)  # also inf / inf
    r = _atan(tl.where(equal, one, b / tl.where((a == 0) & (b == 0), one, a)))
    r = tl.where(_signbit(x), one * 3.141592653589793 - r, r)
    return tl.where((x != x) | (y != y), x + y, _copysign(r, y))


@triton.jit
def _asin(x):
    """atan(x / sqrt((1 - x)(1 + x))); NaN outside [-1, 1]; 4 ULP."""
    return _atan(x / tl.sqrt((1.0 - x) * (1.0 + x)))


@triton.jit
def _acos(x):
    """2 atan(sqrt((1 - x) / (1 + x))); NaN outside [-1, 1]; 4 ULP."""
    return 2.0 * _atan(tl.sqrt((1.0 - x) / (1.0 + x)))


@triton.jit
def _tan(x):
    """sin(x) / cos(x); 3 ULP away from its poles."""
    return tl.sin(x) / tl.cos(x)


@triton.jit
def _erfc(x):
    """exp(-x**2) g(t) / (1 + 2x) with t = (x - 3) / (x + 3), g a polynomial for (1 + 2x) erfcx(x); 2 - erfc(-x) below 0.

    x**2 is split in a part that squares exactly and a rest, since exp would magnify its rounding error; 8 ULP.
    """
    a = tl.abs(x)
    t = (a - 3.0) / (a + 3.0)
    if x.dtype == tl.float64:
        p = t * 8.864219016427092e-10 + 9.885798831139365e-10
        p = p * t - 8.500397929772615e-09
        p = p * t - 1.3326364813003834e-08
        p = p * t + 4.180784698845582e-08
        p = p * t + 1.0187000600072885e-07
        p = p * t - 1.4160064940265987e-07
        p = p * t - 6.166496077604353e-07
        p = p * t + 3.5683839153992204e-07
        p = p * t + 3.472414602875686e-06
        p = p * t - 7.315105164159062e-07
        p = p * t - 2.0100567931289227e-05
        p = p * t + 4.949484992570595e-06
        p = p * t + 0.00012509935235563107
        p = p * t - 0.00010515979981501177
        p = p * t - 0.0007798322721083991
        p = p * t + 0.0018886903591561553
        p = p * t + 0.002529391816066239
        p = p * t - 0.023770514918645888
        p = p * t + 0.06830802734397848
        p = p * t - 0.11927366341530699
        p = p * t + 0.1296451587027606
        p = p * t - 0.04756229435345087
        p = p * t - 0.13562110612458117
        p = p * t + 1.2530080582697296
        s = (a.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
    else:
        p = t * 8.00745474e-05 - 9.2537688e-05
        p = p * t - 0.000734082074
        p = p * t + 0.00187506026
        p = p * t + 0.00250677858
        p = p * t - 0.0237635598
        p = p * t + 0.0683131963
        p = p * t - 0.119275279
        p = p * t + 0.129644722
        p = p * t - 0.0475621559
        p = p * t - 0.135621101
        p = p * t + 1.25300801
        s = (a.to(tl.int32, bitcast=True) & -0x1000).to(tl.float32, bitcast=True)
    far = a > 30.0
    s = tl.where(far, tl.full([], 30.0, x.dtype), s)
    rest = tl.where(far, tl.full([], 0.0, x.dtype), a - s)
    q = tl.exp(-s * s) * tl.exp(-rest * (s + a)) * (p / (1.0 + 2.0 * a))
    q = tl.where(far, tl.full([], 0.0, x.dtype), q)
    return tl.where(x != x, x, tl.where(x < 0, 2.0 - q, q))


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _both(a, b):
    return a & b


@triton.jit
def _argmax(value, index, other, other_index):
    """The larger (value, index) pair: NaN is largest, ties take the lower index."""
    tie = (other == value) | ((other != other) & (value != value))
    take = (other > value) | ((other != other) & (value == value)) | (tie & (other_index < index))
    return tl.where(take, other, value), tl.where(take, other_index, index)


@triton.jit
def _argmin(value, index, other, other_index):
    """The smaller (value, index) pair: NaN is smallest, ties take the lower index."""
    tie = (other == value) | ((other != other) & (value != value))
    take = (other < value) | ((other != other) & (value == value)) | (tie & (other_index < index))
    return tl.where(take, other, value), tl.where(take, other_index, index)
