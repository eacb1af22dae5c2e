// Transcendental functions of kernel IR on float, double and vec of either.
//
// The hot float functions (exp, exp2, expm1, log, log1p, log2, log10, sin, cos, tan, tanh, sigmoid, erf, pow) are straight-line
// code on lanes, within 2 ULP (tan: 2.5) over the whole range, subnormals, inf and NaN included; sin, cos and tan hand arguments
// beyond 30000 to libm, lane by lane. The others, and all of double, call libm for each lane. A scalar runs the same
// template, so it gets the same bits as a lane.
#pragma once
#include "vcoef.h"
#include "vops.h"

namespace plait {

constexpr float TANH_SPLIT = 0.55f, ERF_SPLIT = 0.9277f;  // ends of the intervals of TANH and ERF in vcoef.h

// ---- shared parts ------------------------------------------------------------------------------------------------

template <int K = 0, class V, class T, int N> PLAIT_FN V poly(V x, const T (&c)[N]) {  // Horner, lowest power first
  if constexpr (K == N - 1) return V(c[K]);
  else return fma(poly<K + 1>(x, c), x, V(c[K]));
}

template <class V> PLAIT_FN V with_sign(V positive, V x) {
  using I = rebind_t<V, int32_t>;
  return bitcast<float>(I(bitcast<int32_t>(positive) | (bitcast<int32_t>(x) & int32_t(0x80000000))));
}
template <class V> PLAIT_FN V at_most(V x, lane_t<V> limit) { return less_of(V(limit), x); }  // keeps NaN
template <class V> PLAIT_FN V at_least(V x, lane_t<V> limit) { return more_of(V(limit), x); }

// The nearest integer as float (`n`) and as int32 (`k`), for |x| < 2^22: adding 1.5 * 2^23 leaves it in the low bits.
template <class V> struct Nearest {
  V n;
  rebind_t<V, int32_t> k;
  PLAIT_FN explicit Nearest(V x) : Nearest(x, V(1.0f)) {}
  PLAIT_FN Nearest(V x, V scale) {
    const V t = fma(x, scale, V(0x1.8p23f));
    n = t - 0x1.8p23f;
    k = bitcast<int32_t>(t) - int32_t(0x4b400000);
  }
};

template <class V, class I> PLAIT_FN V power_of_two(I k) {  // -126 <= k <= 127
  return bitcast<float>(I((k + int32_t(127)) << int32_t(23)));
}
// x * 2^n, rounded once, for integers -252 <= n <= 254 (Small: -126 <= n <= 127); k is n as int32
template <bool Small = false, class V, class I> PLAIT_FN V scale(V x, [[maybe_unused]] V n, I k) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return V(__builtin_ia32_scalefps512_mask(x.v, n.v, x.v, 0xffff, 4));
#endif
  if constexpr (Small) return x * power_of_two<V>(k);
  const I half = I(k >> int32_t(1));
  return x * power_of_two<V>(half) * power_of_two<V>(I(k - half));
}

// f(x) in the lanes where `which` holds, y in the others: the way out for arguments that the straight-line code leaves.
template <class F, class V, class M> [[gnu::noinline, gnu::cold]] V redo(F f, V x, V y, M which) {
  if constexpr (is_vec<V>) return where(which, calls(f, x), y);
  else return which ? f(x) : y;
}
template <class F, class V, class M> [[gnu::noinline, gnu::cold]] V redo2(F f, V x0, V x1, V y, M which) {
  if constexpr (is_vec<V>) return where(which, calls(f, x0, x1), y);
  else return which ? f(x0, x1) : y;
}

#define PLAIT_LIBM1(name, fn)                                                                    \
  template <class V> PLAIT_FN V name(V x) {                                                      \
    using T = lane_t<V>;                                                                         \
    const auto one = [](T s) -> T {                                                              \
      if constexpr (same<T, float>) return __builtin_##fn##f(s);                                 \
      else return __builtin_##fn(s);                                                             \
    };                                                                                           \
    if constexpr (is_vec<V>) return calls(one, x);                                               \
    else return one(x);                                                                          \
  }
#define PLAIT_LIBM2(name, fn)                                                                    \
  template <class V> PLAIT_FN V name(V x, V y) {                                                 \
    using T = lane_t<V>;                                                                         \
    const auto one = [](T s, T t) -> T {                                                         \
      if constexpr (same<T, float>) return __builtin_##fn##f(s, t);                              \
      else return __builtin_##fn(s, t);                                                          \
    };                                                                                           \
    if constexpr (is_vec<V>) return calls(one, x, y);                                            \
    else return one(x, y);                                                                       \
  }
PLAIT_LIBM1(libm_exp, exp)
PLAIT_LIBM1(libm_exp2, exp2)
PLAIT_LIBM1(libm_expm1, expm1)
PLAIT_LIBM1(libm_log, log)
PLAIT_LIBM1(libm_log1p, log1p)
PLAIT_LIBM1(libm_log2, log2)
PLAIT_LIBM1(libm_log10, log10)
PLAIT_LIBM1(libm_sin, sin)
PLAIT_LIBM1(libm_cos, cos)
PLAIT_LIBM1(libm_tan, tan)
PLAIT_LIBM1(libm_tanh, tanh)
PLAIT_LIBM1(libm_erf, erf)
PLAIT_LIBM2(libm_pow, pow)
PLAIT_LIBM1(asin, asin)
PLAIT_LIBM1(acos, acos)
PLAIT_LIBM1(atan, atan)
PLAIT_LIBM1(sinh, sinh)
PLAIT_LIBM1(cosh, cosh)
PLAIT_LIBM1(asinh, asinh)
PLAIT_LIBM1(acosh, acosh)
PLAIT_LIBM1(atanh, atanh)
PLAIT_LIBM1(erfc, erfc)
PLAIT_LIBM2(atan2, atan2)

// ---- exponentials ------------------------------------------------------------------------------------------------

constexpr float LOG2E = 0x1.715476p+0f;
constexpr float LN2_HI = 0x1.62e430p-1f, LN2_LO = -0x1.05c610p-29f;  // their sum is ln 2 to 48 bits

template <class V> struct ExpReduced {  // x = n ln 2 + r + tail, |r| <= ln 2 / 2
  Nearest<V> by;
  V r, tail;
  PLAIT_FN explicit ExpReduced(V x) : by(x, V(LOG2E)) {
    const V a = fma(by.n, V(-LN2_HI), x);  // exact
    r = fma(by.n, V(-LN2_LO), a);
    tail = fma(by.n, V(-LN2_LO), V(a - r));
  }
};

template <class V> PLAIT_FN V exp(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_exp(x);
  else {
    const ExpReduced<V> e(at_least(at_most(x, 89.0f), -105.0f));  // beyond: inf and 0, by the scaling below
    return scale(V(1.0f + (e.r + fma(V(e.r * e.r), poly(e.r, EXP), e.tail))), e.by.n, e.by.k);
  }
}
template <class V> PLAIT_FN V exp2(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_exp2(x);
  else {
    const Nearest<V> by(at_least(at_most(x, 129.0f), -151.0f));
    const V r = at_least(at_most(x, 129.0f), -151.0f) - by.n;
    return scale(fma(r, poly(r, EXP2), V(1.0f)), by.n, by.k);
  }
}

template <class V> PLAIT_FN V expm1_small(const ExpReduced<V>& e) {  // e^r - 1
  return e.r + fma(V(e.r * e.r), poly(e.r, EXPM1), e.tail);
}
template <class V> PLAIT_FN V expm1_reduced(const ExpReduced<V>& e) {  // 2^k e^r - 1 for k < 128
  const V m = expm1_small(e);
  const V s = power_of_two<V>(e.by.k);
  return fma(s, m, V(s - 1.0f));
}
template <class V> PLAIT_FN V expm1(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_expm1(x);
  else {
    ExpReduced<V> e(at_least(at_most(x, 89.0f), -20.0f));
    const auto top = e.by.k > int32_t(127);  // 2^128 is no float: halve, then double
    e.by.k = where(top, rebind_t<V, int32_t>(e.by.k - int32_t(1)), e.by.k);
    const V y = expm1_reduced(e);
    return where(x == 0.0f, x, where(top, V(y + y), y));
  }
}
template <class V> PLAIT_FN V sigmoid(V x) {
  using T = lane_t<V>;
  if constexpr (!same<T, float>) {
    const V e = exp(V(-abs(x)));  // at most 1: no overflow on either side
    return where(x < T(0), e, V(T(1))) / (T(1) + e);
  } else {
    // 1 / (1 + 2^k + 2^k (e^r - 1)), with what 1 + 2^k loses; both sides of the quotient smaller where 2^k could overflow
    const ExpReduced<V> e(at_least(at_most(V(-x), 105.0f), -20.0f));
    const auto large = e.by.k > int32_t(64);
    const V unit = where(large, V(0x1p-64f), V(1.0f));
    const V s = power_of_two<V>(where(large, rebind_t<V, int32_t>(e.by.k - int32_t(64)), e.by.k));
    const V sum = unit + s, lost = unit - (sum - s);
    return unit / (sum + fma(s, expm1_small(e), lost));
  }
}
template <class V> PLAIT_FN V tanh(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_tanh(x);
  else {
    const V a = abs(x), u = x * x;
    const V near = fma(V(a * u), poly(u, TANH), a);
    // 1 - 2 / (e^2a + 1): from TANH_SPLIT on, an error of e^2a counts less than half
    const V y = at_most(V(a * (2.0f * LOG2E)), 27.0f);
    const Nearest<V> by(y);
    const V e = scale<true>(poly(V(y - by.n), TANH_EXP2), by.n, by.k);
    return with_sign(where(a < TANH_SPLIT, near, fma(V(-2.0f), V(1.0f / (e + 1.0f)), V(1.0f))), x);
  }
}

// ---- logarithms --------------------------------------------------------------------------------------------------

template <class V> struct LogReduced {  // x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), for normal x > 0
  rebind_t<V, int32_t> k;
  V f;
  PLAIT_FN explicit LogReduced(V x) {
    using I = rebind_t<V, int32_t>;
    const I above = bitcast<int32_t>(x) - int32_t(0x3f3504f3);
    k = above >> int32_t(23);
    f = bitcast<float>(I((above & int32_t(0x7fffff)) + int32_t(0x3f3504f3))) - 1.0f;
  }
};
template <class V> PLAIT_FN V log1p_minus(V f) { return f * f * fma(f, poly(f, LOG), V(-0.5f)); }  // log(1 + f) - f

template <class V> PLAIT_FN V log_edges(V x, V y) {  // the values at 0, inf, below 0 and NaN
  const V nan = V(__builtin_nanf(""));
  const V inf = V(__builtin_inff());
  return where(x > 0.0f, where(x == inf, inf, y), where(x == 0.0f, V(-__builtin_inff()), nan));
}
// log of any base: hi and lo parts of log_base(2) and of log_base(e)
template <class V> PLAIT_FN V log_base(V x, float two_hi, float two_lo, float e_hi, float e_lo) {
  const auto subnormal = x < 0x1p-126f;
  const LogReduced<V> by(where(subnormal, V(x * 0x1p23f), x));
  const V k = cast<float>(by.k) - where(subnormal, V(23.0f), V(0.0f));
  const V rest = log1p_minus(by.f);
  // k two_hi + (f e_hi + (f e_lo + rest e_hi + k two_lo))
  const V low = fma(k, V(two_lo), fma(by.f, V(e_lo), V(rest * e_hi)));
  return log_edges(x, fma(k, V(two_hi), fma(by.f, V(e_hi), low)));
}

template <class V> PLAIT_FN V log(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_log(x);
  else {
    const auto subnormal = x < 0x1p-126f;
    const LogReduced<V> by(where(subnormal, V(x * 0x1p23f), x));
    const V k = cast<float>(by.k) - where(subnormal, V(23.0f), V(0.0f));
    const V low = fma(k, V(LN2_LO), log1p_minus(by.f));
    return log_edges(x, fma(k, V(LN2_HI), V(by.f + low)));
  }
}
template <class V> PLAIT_FN V log2(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_log2(x);
  else return log_base(x, 1.0f, 0.0f, 0x1.715476p+0f, 0x1.4ae0cp-26f);
}
template <class V> PLAIT_FN V log10(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_log10(x);
  else return log_base(x, 0x1.344136p-2f, -0x1.ec10cp-27f, 0x1.bcb7b2p-2f, -0x1.5b235ep-27f);
}
template <class V> PLAIT_FN V log1p(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_log1p(x);
  else {
    const V u = x + 1.0f;
    LogReduced<V> by(u);
    // 1 + x = 2^k (1 + f) from x itself, as u has lost bits of it; from 2^60 on, u = x
    const V shrink = power_of_two<V>(rebind_t<V, int32_t>(-by.k));
    by.f = where(by.k == int32_t(0), x, where(by.k < int32_t(60), fma(x, shrink, V(shrink - 1.0f)), by.f));
    const V k = cast<float>(by.k);
    const V low = fma(k, V(LN2_LO), log1p_minus(by.f));
    return where(x == 0.0f, x, log_edges(u, fma(k, V(LN2_HI), V(by.f + low))));
  }
}

// ---- trigonometry ------------------------------------------------------------------------------------------------

constexpr float PI_2_A = 0x1.921fb6p+0f, PI_2_B = -0x1.777a5cp-25f, PI_2_C = -0x1.ee59dap-50f;  // pi / 2 to 72 bits
constexpr float TRIG_MAX = 30000.0f;

template <class V> struct TrigReduced {  // x = k pi / 2 + r + tail, |r| <= pi / 4
  Nearest<V> by;
  V r, tail;
  PLAIT_FN explicit TrigReduced(V x) : by(x, V(0x1.45f306p-1f)) {
    const V a = fma(by.n, V(-PI_2_A), x);  // exact
    const V b = by.n * -PI_2_B, b_tail = fma(by.n, V(-PI_2_B), V(-b));
    r = a + b;
    const V from_b = r - a, r_tail = (a - (r - from_b)) + (b - from_b);  // what a + b lost (Knuth's two-sum)
    tail = fma(by.n, V(-PI_2_C), V(r_tail + b_tail));
  }
  PLAIT_FN V sine() const {
    const V u = r * r;
    return r + fma(V(u * r), poly(u, SIN), tail);
  }
  PLAIT_FN V cosine() const {
    const V u = r * r, half = u * 0.5f, c = 1.0f - half;
    return c + fma(V(u * u), poly(u, COS), V(((1.0f - c) - half) - r * tail));
  }
};
template <class V, class I> PLAIT_FN V flip_if(I odd_bit, V x) {  // -x where bit 1 of odd_bit is set
  return bitcast<float>(I(bitcast<int32_t>(x) ^ ((odd_bit & int32_t(2)) << int32_t(30))));
}
template <class V> PLAIT_FN V sin_quadrant(V x, int32_t shift) {
  using I = rebind_t<V, int32_t>;
  const TrigReduced<V> by(x);
  const I q = by.by.k + shift;
  return flip_if(q, where((q & int32_t(1)) == int32_t(0), by.sine(), by.cosine()));
}
template <class V> PLAIT_FN V sin(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_sin(x);
  else {
    const V y = where(x == 0.0f, x, sin_quadrant(x, 0));
    const auto far = abs(x) > TRIG_MAX;
    if (__builtin_expect(any_lane(far), 0)) return redo([](float s) { return __builtin_sinf(s); }, x, y, far);
    return y;
  }
}
template <class V> PLAIT_FN V cos(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_cos(x);
  else {
    const V y = sin_quadrant(x, 1);
    const auto far = abs(x) > TRIG_MAX;
    if (__builtin_expect(any_lane(far), 0)) return redo([](float s) { return __builtin_cosf(s); }, x, y, far);
    return y;
  }
}
template <class V> PLAIT_FN V tan(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_tan(x);
  else {
    using I = rebind_t<V, int32_t>;
    const TrigReduced<V> by(x);
    const V s = by.sine(), c = by.cosine();
    const auto even = (by.by.k & int32_t(1)) == int32_t(0);
    const V y = where(x == 0.0f, x, flip_if(I(by.by.k << int32_t(1)), V(where(even, s, c) / where(even, c, s))));
    const auto far = abs(x) > TRIG_MAX;
    if (__builtin_expect(any_lane(far), 0)) return redo([](float t) { return __builtin_tanf(t); }, x, y, far);
    return y;
  }
}

// ---- error function ----------------------------------------------------------------------------------------------

template <class V> PLAIT_FN V erf(V x) {
  if constexpr (!same<lane_t<V>, float>) return libm_erf(x);
  else {
    const V t = at_most(abs(x), 4.0f);  // erf(4) rounds to 1
    const V near = fma(x, poly(V(x * x), ERF), x);
    const V far = 1.0f - exp(V(-fma(t, poly(t, ERFC), t)));
    return where(t < ERF_SPLIT, near, with_sign(far, x));
  }
}

// ---- powers ------------------------------------------------------------------------------------------------------

template <class T> PLAIT_FN T int_pow(T base, T exponent) {  // as torch: a negative exponent gives 0, but for base 1 and -1
  if (exponent < 0) return base == 1 ? T(1) : base == T(-1) ? (exponent & 1 ? T(-1) : T(1)) : T(0);
  T r = 1;
  for (; exponent > 0; exponent = T(exponent >> 1)) {
    if (exponent & 1) r = T(r * base);
    base = T(base * base);
  }
  return r;
}
template <class D> PLAIT_FN D nearest_to(D x, D& n) {  // 2^n for the nearest integer n to double x
  using I = rebind_t<D, int64_t>;
  const D t = x + 0x1.8p52;
  n = t - 0x1.8p52;
  return bitcast<double>(I((bitcast<int64_t>(t) + int64_t(1023)) << int64_t(52)));
}
// |x|^y for 0 < |x| < inf and finite y, by way of 2^(y log2 |x|) in double: 37 good bits of the logarithm suffice
template <class V> PLAIT_FN V pow_positive(V x, V y) {
  using D = rebind_t<V, double>;
  using I = rebind_t<V, int64_t>;
  const D wide = cast<double>(x);
  const I above = bitcast<int64_t>(wide) - int64_t(0x3fe6a09e667f3bcd);  // sqrt(1/2)
  const D m = bitcast<double>(I((above & int64_t(0xfffffffffffff)) + int64_t(0x3fe6a09e667f3bcd)));
  const D z = (m - 1.0) / (m + 1.0);
  const D log2_x = fma(z, poly(D(z * z), POW_LOG2), cast<double>(I(above >> int64_t(52))));
  const D t = at_least(at_most(D(cast<double>(y) * log2_x), 200.0), -200.0);
  D n;
  const D unit = nearest_to(t, n);
  return cast<float>(D(poly(D(t - n), POW_EXP2) * unit));
}
template <class V> PLAIT_FN V pow(V x, V y) {
  using T = lane_t<V>;
  if constexpr (same<T, double>) return libm_pow(x, y);
  else if constexpr (same<T, float>) {
    const V a = abs(x);
    const auto whole_y = round(y) == y;
    const auto odd_y = whole_y & (round(V(y * 0.5f)) != V(y * 0.5f));
    const V r = pow_positive(a, y);
    const V signed_r = where((x < 0.0f) & odd_y, V(-r), r);
    const auto plain = (a > 0.0f) & (a < __builtin_inff()) & (abs(y) < __builtin_inff()) & ((x > 0.0f) | whole_y);
    if (__builtin_expect(!all_lanes(plain), 0)) {
      return redo2([](float s, float t) { return __builtin_powf(s, t); }, x, y, signed_r, !plain);
    }
    return signed_r;
  } else if constexpr (is_vec<V>) return calls([](T s, T t) { return int_pow(s, t); }, x, y);
  else return int_pow(x, y);
}

}  // namespace plait
