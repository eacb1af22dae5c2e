// The non-transcendental operations of kernel IR on scalars and vec alike: casts, minima, rounding, division by every
// rule, shifts, and reductions over lanes in a fixed tree. One template serves both, so the bits agree.
#pragma once
#include "vmem.h"

namespace plait {

// ---- numeric limits ----------------------------------------------------------------------------------------------

template <class T> constexpr T highest() {
  if constexpr (same<T, float>) return __builtin_inff();
  else if constexpr (same<T, double>) return __builtin_inf();
  else if constexpr (same<T, bool>) return true;
  else if constexpr (T(-1) > T(0)) return T(-1);
  else return T((uint64_t(1) << (sizeof(T) * 8 - 1)) - 1);
}
template <class T> constexpr T lowest() {
  if constexpr (is_float<T>) return -highest<T>();
  else if constexpr (same<T, bool> || T(-1) > T(0)) return T(0);
  else return T(-highest<T>() - 1);
}

// ---- half precision ----------------------------------------------------------------------------------------------

template <class V> PLAIT_FN auto bits_to_float(bf16, V h) {  // h: uint32 lanes
  return bitcast<float>(V(h << lane_t<V>(16)));
}
template <class V> PLAIT_FN auto bits_to_float(f16, V h) {
  using F = rebind_t<V, float>;
  const V payload = V((h & lane_t<V>(0x7fff)) << lane_t<V>(13));
  const V scaled = bitcast<uint32_t>(F(bitcast<float>(payload) * 0x1p112f));  // rebiases, subnormals too
  const V wide = where((h & lane_t<V>(0x7c00)) == lane_t<V>(0x7c00), V(payload | lane_t<V>(0x7f800000)), scaled);
  return bitcast<float>(V(wide | ((h & lane_t<V>(0x8000)) << lane_t<V>(16))));
}
template <class V> PLAIT_FN auto float_to_bits(bf16, V x) {  // round to nearest even; NaN stays NaN
  using U = rebind_t<V, uint32_t>;
  const U u = bitcast<uint32_t>(x);
  const U rounded = U((u + uint32_t(0x7fff) + ((u >> uint32_t(16)) & uint32_t(1))) >> uint32_t(16));
  return where(x != x, U((u >> uint32_t(16)) | uint32_t(0x40)), rounded);
}
template <class V> PLAIT_FN auto float_to_bits(f16, V x) {
  using U = rebind_t<V, uint32_t>;
  const U u = bitcast<uint32_t>(x), twice = U(u + u);
  const V magnitude = bitcast<float>(U(u & uint32_t(0x7fffffff)));
  const V overflowed = (magnitude * 0x1p112f) * 0x1p-110f;  // past the largest half this is inf
  const U exponent = U(twice & uint32_t(0xff000000));
  const U bias = where(exponent < uint32_t(0x71000000), U(uint32_t(0x71000000)), exponent);
  const U sum = bitcast<uint32_t>(V(bitcast<float>(U((bias >> uint32_t(1)) + uint32_t(0x07800000))) + overflowed));
  const U finite = U(((sum >> uint32_t(13)) & uint32_t(0x7c00)) + (sum & uint32_t(0xfff)));
  const U half = where(twice > uint32_t(0xff000000), U(uint32_t(0x7e00)), finite);
  return U(((u & uint32_t(0x80000000)) >> uint32_t(16)) | half);
}

// ---- casts -------------------------------------------------------------------------------------------------------

template <class D, class S> PLAIT_FN rebind_t<S, D> number_cast(S x) {  // between arithmetic types
  if constexpr (is_vec<S>) return convert<D>(x);
  else return D(x);
}

#if defined(__F16C__)
// The processor's own conversions of float16; a scalar takes one lane of them.
typedef short shorts __attribute__((vector_size(16)));
typedef float floats __attribute__((vector_size(16)));
PLAIT_FN float float_of(f16 h) { return __builtin_ia32_vcvtph2ps(shorts{short(h.bits)})[0]; }
PLAIT_FN f16 f16_of(float x) { return {uint16_t(__builtin_ia32_vcvtps2ph(floats{x}, 0)[0])}; }
template <int N> PLAIT_FN vec<float, N> float_of(vec<f16, N> h) {
  using R = typename raw_of<float, N>::type;
  if constexpr (N > REGISTER_BYTES / 4) return join(float_of(low(h)), float_of(high(h)));
#if defined(__AVX512F__)
  else if constexpr (N == 16) {
    typedef short wide __attribute__((vector_size(32)));
    return R(__builtin_ia32_vcvtph2ps512_mask(wide(h.bits.v), R{}, -1, 4));
  }
#endif
  else if constexpr (N == 8) return R(__builtin_ia32_vcvtph2ps256(shorts(h.bits.v)));
  else return bits_to_float(f16{}, convert<uint32_t>(h.bits));
}
template <int N> PLAIT_FN vec<f16, N> f16_of(vec<float, N> x) {
  using R = typename raw_of<uint16_t, N>::type;
  if constexpr (N > REGISTER_BYTES / 4) return join(f16_of(low(x)), f16_of(high(x)));
#if defined(__AVX512F__)
  else if constexpr (N == 16) {
    typedef short wide __attribute__((vector_size(32)));
    return vec<uint16_t, N>(R(__builtin_ia32_vcvtps2ph512_mask(x.v, 0, wide{}, -1)));
  }
#endif
  else if constexpr (N == 8) return vec<uint16_t, N>(R(__builtin_ia32_vcvtps2ph256(x.v, 0)));
  else return vec<uint16_t, N>(convert<uint16_t>(float_to_bits(f16{}, x)));
}
#endif

// Integers below 65536 in half the room.
PLAIT_FN uint16_t shorten(uint32_t x) { return uint16_t(x); }
template <int N> PLAIT_FN vec<uint16_t, N> shorten(vec<uint32_t, N> x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (N == 16) {  // packed inside the halves of a register, whose quarters are then put in order
    typedef int I __attribute__((vector_size(32)));
    typedef long long Q __attribute__((vector_size(32)));
    return typename vec<uint16_t, N>::raw(__builtin_ia32_permdi256(Q(__builtin_ia32_packusdw256(I(x.lo.v), I(x.hi.v))), 0xd8));
  }
#endif
  return convert<uint16_t>(x);
}

// float -> int truncates (8 and 16 bits by way of int32, and wrap); -> bool is != 0; halves go by way of float.
template <class D, class S> PLAIT_FN rebind_t<S, D> cast(S x) {
  using T = lane_t<S>;
  using R = rebind_t<S, D>;
  if constexpr (same<D, T>) return x;
#if defined(__F16C__)
  else if constexpr (same<T, f16>) return cast<D>(float_of(x));
  else if constexpr (same<D, f16>) return f16_of(cast<float>(x));
#endif
  else if constexpr (is_half<T>) {
    rebind_t<S, uint16_t> half = x.bits;
    return cast<D>(bits_to_float(T{}, number_cast<uint32_t>(half)));
  } else if constexpr (is_half<D>) {
    return R{shorten(float_to_bits(D{}, cast<float>(x)))};
  } else if constexpr (same<D, bool>) return x != T(0);
  else if constexpr (same<T, bool>) return where(x, R(D(1)), R(D(0)));
  else if constexpr (is_float<T> && !is_float<D> && sizeof(D) < 4) return number_cast<D>(number_cast<int32_t>(x));
  else return number_cast<D>(x);
}

// ---- one-instruction arithmetic ----------------------------------------------------------------------------------

template <class T> PLAIT_FN T fma(T a, T b, T c) {  // one rounding on floats
  if constexpr (same<T, float>) return __builtin_fmaf(a, b, c);
  else if constexpr (same<T, double>) return __builtin_fma(a, b, c);
  else return T(a * b + c);
}
template <class T> PLAIT_FN T sqrt(T x) {
  if constexpr (same<T, float>) return __builtin_sqrtf(x);
  else return __builtin_sqrt(x);
}
template <class T> PLAIT_FN T less_of(T a, T b) { return a < b ? a : b; }  // b if either is NaN
template <class T> PLAIT_FN T more_of(T a, T b) { return a > b ? a : b; }

// One register's worth by the instruction itself: GCC does not reliably turn sixteen scalar calls back into one.
#if defined(__AVX512F__)
#define PLAIT_X86(ps512, pd512, ps256, pd256)                      \
  if constexpr (sizeof(a.v) == 64 && same<T, float>) return ps512;  \
  if constexpr (sizeof(a.v) == 64 && same<T, double>) return pd512; \
  if constexpr (sizeof(a.v) == 32 && same<T, float>) return ps256;  \
  if constexpr (sizeof(a.v) == 32 && same<T, double>) return pd256;
#elif defined(__AVX2__) && defined(__FMA__)
#define PLAIT_X86(ps512, pd512, ps256, pd256)                      \
  if constexpr (sizeof(a.v) == 32 && same<T, float>) return ps256;  \
  if constexpr (sizeof(a.v) == 32 && same<T, double>) return pd256;
#else
#define PLAIT_X86(ps512, pd512, ps256, pd256)
#endif
#if defined(__aarch64__)
#define PLAIT_ARM(ps128, pd128)                                     \
  if constexpr (sizeof(a.v) == 16 && same<T, float>) return ps128;  \
  if constexpr (sizeof(a.v) == 16 && same<T, double>) return pd128;
#else
#define PLAIT_ARM(ps128, pd128)
#endif

template <class T, int N> PLAIT_FN vec<T, N> fma_register(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  PLAIT_X86(__builtin_ia32_vfmaddps512_mask(a.v, b.v, c.v, 0xffff, 4), __builtin_ia32_vfmaddpd512_mask(a.v, b.v, c.v, 0xff, 4),
            __builtin_ia32_vfmaddps256(a.v, b.v, c.v), __builtin_ia32_vfmaddpd256(a.v, b.v, c.v))
  PLAIT_ARM(__builtin_aarch64_fmav4sf(a.v, b.v, c.v), __builtin_aarch64_fmav2df(a.v, b.v, c.v))
  return lanewise([] [[gnu::always_inline]] (T x, T y, T z) { return fma(x, y, z); }, a, b, c);
}
template <class T, int N> PLAIT_FN vec<T, N> sqrt_register(vec<T, N> a) {
  PLAIT_X86(__builtin_ia32_sqrtps512_mask(a.v, a.v, 0xffff, 4), __builtin_ia32_sqrtpd512_mask(a.v, a.v, 0xff, 4),
            __builtin_ia32_sqrtps256(a.v), __builtin_ia32_sqrtpd256(a.v))
  PLAIT_ARM(__builtin_aarch64_sqrtv4sf(a.v), __builtin_aarch64_sqrtv2df(a.v))
  return lanewise([] [[gnu::always_inline]] (T x) { return sqrt(x); }, a);
}
template <class T, int N> PLAIT_FN vec<T, N> less_of_register(vec<T, N> a, vec<T, N> b) {
  PLAIT_X86(__builtin_ia32_minps512_mask(a.v, b.v, a.v, 0xffff, 4), __builtin_ia32_minpd512_mask(a.v, b.v, a.v, 0xff, 4),
            __builtin_ia32_minps256(a.v, b.v), __builtin_ia32_minpd256(a.v, b.v))
  return where(a < b, a, b);
}
template <class T, int N> PLAIT_FN vec<T, N> more_of_register(vec<T, N> a, vec<T, N> b) {
  PLAIT_X86(__builtin_ia32_maxps512_mask(a.v, b.v, a.v, 0xffff, 4), __builtin_ia32_maxpd512_mask(a.v, b.v, a.v, 0xff, 4),
            __builtin_ia32_maxps256(a.v, b.v), __builtin_ia32_maxpd256(a.v, b.v))
  return where(a > b, a, b);
}
#undef PLAIT_X86
#undef PLAIT_ARM

template <class T, int N> PLAIT_FN vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  if constexpr (whole<T, N>) return fma_register(a, b, c);
  else return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
template <class T, int N> PLAIT_FN vec<T, N> sqrt(vec<T, N> x) {
  if constexpr (whole<T, N>) return sqrt_register(x);
  else return {sqrt(x.lo), sqrt(x.hi)};
}
template <class T, int N> PLAIT_FN vec<T, N> less_of(vec<T, N> a, vec<T, N> b) {
  if constexpr (same<T, bool>) return a & b;
  else if constexpr (whole<T, N>) return less_of_register(a, b);
  else return {less_of(a.lo, b.lo), less_of(a.hi, b.hi)};
}
template <class T, int N> PLAIT_FN vec<T, N> more_of(vec<T, N> a, vec<T, N> b) {
  if constexpr (same<T, bool>) return a | b;
  else if constexpr (whole<T, N>) return more_of_register(a, b);
  else return {more_of(a.lo, b.lo), more_of(a.hi, b.hi)};
}

// ---- order -------------------------------------------------------------------------------------------------------

template <class V> PLAIT_FN auto isnan(V x) { return x != x; }
template <class V> PLAIT_FN auto isinf(V x) {
  using T = lane_t<V>;
  if constexpr (is_float<T>) return (x == highest<T>()) | (x == lowest<T>());
  else return x != x;
}
template <class V> PLAIT_FN V maximum(V a, V b) { return where(a != a, a, more_of(a, b)); }
template <class V> PLAIT_FN V minimum(V a, V b) { return where(a != a, a, less_of(a, b)); }
template <class V> PLAIT_FN V sign(V x) {
  using T = lane_t<V>;
  return where(x > T(0), V(T(1)), where(x < T(0), V(T(-1)), V(T(0))));
}
template <class V> PLAIT_FN V abs(V x) {
  using T = lane_t<V>;
  if constexpr (same<T, float>) {
    return bitcast<float>(rebind_t<V, int32_t>(bitcast<int32_t>(x) & int32_t(0x7fffffff)));
  } else if constexpr (same<T, double>) {
    return bitcast<double>(rebind_t<V, int64_t>(bitcast<int64_t>(x) & int64_t(0x7fffffffffffffff)));
  } else {
    return where(x < T(0), V(-x), x);
  }
}
template <class V> PLAIT_FN V copysign(V magnitude, V sign_of) {
  using T = lane_t<V>;
  using I = typename sized_int<sizeof(T)>::type;
  using VI = rebind_t<V, I>;
  return bitcast<T>(VI((bitcast<I>(magnitude) & highest<I>()) | (bitcast<I>(sign_of) & lowest<I>())));
}

// ---- roots and rounding ------------------------------------------------------------------------------------------

template <class V> PLAIT_FN V rsqrt(V x) { return lane_t<V>(1) / sqrt(x); }
template <class V> PLAIT_FN V reciprocal(V x) { return lane_t<V>(1) / x; }

// Half to even. Adding and removing 1.5 * 2^p drops the fraction in the current (default) rounding mode.
template <class V> PLAIT_FN V round(V x) {
  using T = lane_t<V>;
  if constexpr (is_float<T>) {
    const T whole_from = same<T, float> ? T(0x1p23) : T(0x1p52);
    const V big = copysign(V(whole_from), x);
    const V r = copysign(V((x + big) - big), x);
    return where(abs(x) < whole_from, r, x);  // else x is an integer, inf or NaN already
  } else {
    return x;
  }
}
template <class V> PLAIT_FN V floor(V x) {
  using T = lane_t<V>;
  if constexpr (is_float<T>) {
    const V r = round(x);
    return copysign(V(r - where(r > x, V(T(1)), V(T(0)))), x);
  } else return x;
}
template <class V> PLAIT_FN V ceil(V x) {
  using T = lane_t<V>;
  if constexpr (is_float<T>) {
    const V r = round(x);
    return copysign(V(r + where(r < x, V(T(1)), V(T(0)))), x);
  } else return x;
}
template <class V> PLAIT_FN V trunc(V x) {
  if constexpr (is_float<lane_t<V>>) return copysign(floor(abs(x)), x);
  else return x;
}

// ---- division and remainder --------------------------------------------------------------------------------------
// Integers: a zero divisor gives 0, and lowest / -1 wraps (both trap in hardware).

template <class T> PLAIT_FN T int_div(T a, T b) {
  if (b == 0) return 0;
  if constexpr (T(-1) < T(0)) {
    if (b == T(-1)) return T(0 - uint64_t(a));
  }
  return T(a / b);
}
template <class T> PLAIT_FN T int_rem(T a, T b) { return b == 0 ? T(0) : T(a - int_div(a, b) * b); }

template <class T> PLAIT_FN T float_rem(T a, T b) {
  if constexpr (same<T, float>) return __builtin_fmodf(a, b);
  else return __builtin_fmod(a, b);
}

template <class V> PLAIT_FN V trunc_div(V a, V b) {
  using T = lane_t<V>;
  if constexpr (is_float<T>) return trunc(V(a / b));
  else if constexpr (is_vec<V>) return calls([](T x, T y) { return int_div(x, y); }, a, b);
  else return int_div(a, b);
}
template <class V> PLAIT_FN V fmod(V a, V b) {
  using T = lane_t<V>;
  const auto one = [](T x, T y) -> T {
    if constexpr (is_float<T>) return float_rem(x, y);
    else return int_rem(x, y);
  };
  if constexpr (is_vec<V>) return calls(one, a, b);
  else return one(a, b);
}
template <class V> PLAIT_FN V mod(V a, V b) {  // Python's: the sign of the divisor
  using T = lane_t<V>;
  const V r = fmod(a, b);
  return where((r != T(0)) & ((r < T(0)) != (b < T(0))), V(r + b), r);
}
template <class V> PLAIT_FN V floordiv(V a, V b) {
  using T = lane_t<V>;
  const V r = fmod(a, b);
  const auto away = (r != T(0)) & ((r < T(0)) != (b < T(0)));
  if constexpr (is_float<T>) {  // as torch: exact where a / b would round up to the next integer
    const V whole_part = V(a - r) / b;
    const V q = where(away, V(whole_part - T(1)), whole_part);
    const V down = floor(q);
    const V near = where(q - down > T(0.5), V(down + T(1)), down);
    const V quotient = a / b;
    return where(b == T(0), quotient, where(q == T(0), copysign(V(T(0)), quotient), near));
  } else {
    const V q = trunc_div(a, b);
    return where(away, V(q - T(1)), q);
  }
}
template <class V> PLAIT_FN V div(V a, V b) {
  if constexpr (is_float<lane_t<V>>) return a / b;
  else return trunc_div(a, b);
}

// ---- shifts: a count that is negative or too large shifts everything out -----------------------------------------

template <class V> PLAIT_FN V shl(V a, V count) {
  using T = lane_t<V>;
  const T width = T(sizeof(T) * 8);
  const auto ok = (count >= T(0)) & (count < width);
  return where(ok, V(a << where(ok, count, V(T(0)))), V(T(0)));
}
template <class V> PLAIT_FN V shr(V a, V count) {
  using T = lane_t<V>;
  const T width = T(sizeof(T) * 8);
  const auto ok = (count >= T(0)) & (count < width);
  if constexpr (T(-1) > T(0)) return where(ok, V(a >> where(ok, count, V(T(0)))), V(T(0)));
  else return V(a >> where(ok, count, V(T(width - 1))));
}

// ---- reductions over lanes ---------------------------------------------------------------------------------------
// Lane l meets lane l + n/2, then n/4, ...: the same tree for every register width.

struct Sum {
  template <class V> PLAIT_FN static V join(V a, V b) { return V(a + b); }
};
struct Prod {
  template <class V> PLAIT_FN static V join(V a, V b) { return V(a * b); }
};
struct Max {
  template <class V> PLAIT_FN static V join(V a, V b) { return maximum(a, b); }
};
struct Min {
  template <class V> PLAIT_FN static V join(V a, V b) { return minimum(a, b); }
};
struct Any {
  template <class V> PLAIT_FN static V join(V a, V b) { return V(a | b); }
};
struct All {
  template <class V> PLAIT_FN static V join(V a, V b) { return V(a & b); }
};

template <class Op, class T, int N> PLAIT_FN T reduce_lanes(vec<T, N> x) {
  if constexpr (N == 2) return Op::join(T(x[0]), T(x[1]));
  else return reduce_lanes<Op>(vec<T, N / 2>(Op::join(low(x), high(x))));
}
template <class Op, class V, int K> PLAIT_FN lane_t<V> reduce(const V (&partial)[K]) {
  if constexpr (K == 1) return reduce_lanes<Op>(partial[0]);
  else return reduce_lanes<Op>(Op::join(Op::join(partial[0], partial[1]), Op::join(partial[2], partial[3])));
}
template <class V, int K> PLAIT_FN void fill(V (&partial)[K], lane_t<V> identity) {
  for (int k = 0; k < K; k++) partial[k] = identity;
}
template <class Op, class V> PLAIT_FN void accumulate(V& into, V value) { into = Op::join(into, value); }
template <class Op, class V, class L> PLAIT_FN void accumulate(V& into, V value, L lanes) {  // dead lanes keep theirs
  into = blend(lanes, V(Op::join(into, value)), into);
}

// The best value so far and where it stood: ties keep the lowest index, NaN beats everything.
template <class V> struct Arg {
  V value;
  rebind_t<V, int64_t> index;
  PLAIT_FN Arg(lane_t<V> identity) : value(identity), index(highest<int64_t>()) {}
};
template <bool Largest, class V, class M>
PLAIT_FN void arg_join(Arg<V>& best, V value, rebind_t<V, int64_t> index, M candidate) {
  const auto nan = value != value, was_nan = best.value != best.value;
  const auto beats = Largest ? value > best.value : value < best.value;
  const auto tie = ((value == best.value) | (nan & was_nan)) & (index < best.index);
  const auto take = candidate & (((nan | beats) & !was_nan) | tie);
  best.value = where(take, value, best.value);
  best.index = where(take, index, best.index);
}
template <bool Largest, class V> PLAIT_FN void accumulate_arg(Arg<V>& best, V value, rebind_t<V, int64_t> index) {
  arg_join<Largest>(best, value, index, rebind_t<V, bool>(true));
}
template <bool Largest, class V, class L>
PLAIT_FN void accumulate_arg(Arg<V>& best, V value, rebind_t<V, int64_t> index, L lanes) {
  arg_join<Largest>(best, value, index, live(lanes));
}
template <bool Largest, class T> PLAIT_FN void accumulate_lanes(Arg<T>& best, Arg<vec<T>> partial) {
  for (int l = 0; l < W; l++) accumulate_arg<Largest, T>(best, partial.value[l], partial.index[l]);
}

// ---- index arithmetic of int64 scalars ---------------------------------------------------------------------------

PLAIT_FN int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PLAIT_FN int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace plait
