// Fixed-width SIMD values for generated kernels: vec<T> holds W lanes of T, whatever the machine's registers are.
// Plain GCC vector extensions, no intrinsics and no standard headers but <stdint.h> (including <math.h> alone costs more
// compile time than a small kernel). A vector wider than a register is a pair of halves, so that every operation stays
// in registers; GCC's own lowering of over-wide vectors goes through memory, lane by lane.
//
// Everything here gives the same bits in a full tile, in a partial tile and on a scalar.
#pragma once
#include <stdint.h>

#if !defined(__GNUC__) || defined(__clang__) || __GNUC__ < 11
#error "kernels of plait need GCC 11 or newer (set CXX)"
#endif
#ifndef PLAIT_LANES
#define PLAIT_LANES 16
#endif
#define PLAIT_FN [[gnu::always_inline]] inline
#define PLAIT_BODY __attribute__((always_inline))

namespace plait {

constexpr int W = PLAIT_LANES;
#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

// ---- types -------------------------------------------------------------------------------------------------------

struct bf16 {  // storage only: arithmetic is done in float
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <int Bytes> struct sized_int;
template <> struct sized_int<1> { using type = int8_t; };
template <> struct sized_int<2> { using type = int16_t; };
template <> struct sized_int<4> { using type = int32_t; };
template <> struct sized_int<8> { using type = int64_t; };

template <class T, int N> constexpr bool whole = N * int(sizeof(T)) <= REGISTER_BYTES;  // fits one register
template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
template <class T> constexpr bool is_float = same<T, float> || same<T, double>;
template <class T> constexpr bool is_half = same<T, bf16> || same<T, f16>;

enum Form { ONE, PAIR, MASK, HALF };
template <class T, int N> constexpr Form form = same<T, bool> ? MASK : is_half<T> ? HALF : whole<T, N> ? ONE : PAIR;
template <class T, int N = W, Form = form<T, N>> struct vec;
template <class T, int N> struct raw_of { typedef T type __attribute__((vector_size(N * sizeof(T)))); };

// A bool lane is an int32 of 0 or -1, so that masks of four-byte types need no conversion.
template <int N> struct vec<bool, N, MASK> {
  vec<int32_t, N> m;
  vec() = default;
  PLAIT_FN vec(vec<int32_t, N> mask) : m(mask) {}
  PLAIT_FN vec(bool s) : m(int32_t(s ? -1 : 0)) {}
  PLAIT_FN bool operator[](int lane) const { return m[lane] != 0; }
  PLAIT_FN void set(int lane, bool s) { m.set(lane, s ? -1 : 0); }
  PLAIT_FN friend vec operator&(vec a, vec b) { return a.m & b.m; }
  PLAIT_FN friend vec operator|(vec a, vec b) { return a.m | b.m; }
  PLAIT_FN friend vec operator^(vec a, vec b) { return a.m ^ b.m; }
  PLAIT_FN friend vec operator!(vec a) { return ~a.m; }
  PLAIT_FN friend vec operator==(vec a, vec b) { return ~(a.m ^ b.m); }
  PLAIT_FN friend vec operator!=(vec a, vec b) { return a.m ^ b.m; }
  PLAIT_FN friend vec operator<(vec a, vec b) { return ~a.m & b.m; }
  PLAIT_FN friend vec operator>(vec a, vec b) { return a.m & ~b.m; }
  PLAIT_FN friend vec operator<=(vec a, vec b) { return ~a.m | b.m; }
  PLAIT_FN friend vec operator>=(vec a, vec b) { return a.m | ~b.m; }
};

// bf16 and f16: moved, selected and converted, never computed with
template <class T, int N> struct vec<T, N, HALF> {
  vec<uint16_t, N> bits;
  vec() = default;
  PLAIT_FN vec(vec<uint16_t, N> b) : bits(b) {}
  PLAIT_FN vec(T s) : bits(s.bits) {}
  PLAIT_FN T operator[](int lane) const { return {bits[lane]}; }
  PLAIT_FN void set(int lane, T s) { bits.set(lane, s.bits); }
};

template <class T, int N> struct vec<T, N, ONE> {  // one register
  using raw = typename raw_of<T, N>::type;
  raw v;
  vec() = default;
  PLAIT_FN vec(raw r) : v(r) {}
  PLAIT_FN vec(T s) : v(s - raw{}) {}  // x - 0 keeps the sign of zero, x + 0 would not
  PLAIT_FN T operator[](int lane) const { return v[lane]; }
  PLAIT_FN void set(int lane, T s) { v[lane] = s; }
};

template <class T, int N> struct vec<T, N, PAIR> {  // two halves
  using half = vec<T, N / 2>;
  half lo, hi;
  vec() = default;
  PLAIT_FN vec(half l, half h) : lo(l), hi(h) {}
  PLAIT_FN vec(T s) : lo(s), hi(s) {}
  PLAIT_FN T operator[](int lane) const { return lane < N / 2 ? lo[lane] : hi[lane - N / 2]; }
  PLAIT_FN void set(int lane, T s) { lane < N / 2 ? lo.set(lane, s) : hi.set(lane - N / 2, s); }
};

template <class V> struct lane_of { using type = V; };
template <class T, int N, Form K> struct lane_of<vec<T, N, K>> { using type = T; };
template <class V> using lane_t = typename lane_of<V>::type;  // the element type of a vector or scalar
template <class V> constexpr bool is_vec = !same<V, lane_t<V>>;
template <class V, class T> struct rebind { using type = T; };
template <class S, int N, Form K, class T> struct rebind<vec<S, N, K>, T> { using type = vec<T, N>; };
template <class V, class T> using rebind_t = typename rebind<V, T>::type;  // the same shape with lanes of T

// ---- halves ------------------------------------------------------------------------------------------------------

template <int... I> struct indices {};
template <int N> using iota_of = indices<__integer_pack(N)...>;

#if __GNUC__ >= 12
template <int Half, class T, int N, int... I> PLAIT_FN vec<T, N / 2> part(vec<T, N> x, indices<I...>) {
  return __builtin_shufflevector(x.v, x.v, (I + Half * N / 2)...);
}
template <class T, int N, int... I> PLAIT_FN vec<T, 2 * N> concat(vec<T, N> lo, vec<T, N> hi, indices<I...>) {
  return __builtin_shufflevector(lo.v, hi.v, I..., (I + N)...);
}
#else  // by way of memory, most of which GCC 11 removes again
template <int Half, class T, int N, int... I> PLAIT_FN vec<T, N / 2> part(vec<T, N> x, indices<I...>) {
  vec<T, N / 2> r;
  __builtin_memcpy(&r.v, reinterpret_cast<const char*>(&x.v) + Half * sizeof r.v, sizeof r.v);
  return r;
}
template <class T, int N, int... I> PLAIT_FN vec<T, 2 * N> concat(vec<T, N> lo, vec<T, N> hi, indices<I...>) {
  vec<T, 2 * N> r;
  __builtin_memcpy(&r.v, &lo.v, sizeof lo.v);
  __builtin_memcpy(reinterpret_cast<char*>(&r.v) + sizeof lo.v, &hi.v, sizeof hi.v);
  return r;
}
#endif
template <class T, int N> PLAIT_FN vec<T, N / 2> low(vec<T, N> x) {
  if constexpr (same<T, bool>) return low(x.m);
  else if constexpr (is_half<T>) return low(x.bits);
  else if constexpr (whole<T, N>) return part<0>(x, iota_of<N / 2>{});
  else return x.lo;
}
template <class T, int N> PLAIT_FN vec<T, N / 2> high(vec<T, N> x) {
  if constexpr (same<T, bool>) return high(x.m);
  else if constexpr (is_half<T>) return high(x.bits);
  else if constexpr (whole<T, N>) return part<1>(x, iota_of<N / 2>{});
  else return x.hi;
}
template <class T, int N> PLAIT_FN vec<T, 2 * N> join(vec<T, N> lo, vec<T, N> hi) {
  if constexpr (same<T, bool>) return join(lo.m, hi.m);
  else if constexpr (is_half<T>) return join(lo.bits, hi.bits);
  else if constexpr (whole<T, 2 * N>) return concat(lo, hi, iota_of<N>{});
  else return {lo, hi};
}

template <class D, class T, int N> vec<D, N> convert(vec<T, N> x);

template <class T, int N> PLAIT_FN void to_lanes(T* p, vec<T, N> x) {
  if constexpr (same<T, bool>) to_lanes(reinterpret_cast<uint8_t*>(p), convert<uint8_t>(x.m & 1));
  else if constexpr (is_half<T>) to_lanes(reinterpret_cast<uint16_t*>(p), x.bits);
  else if constexpr (whole<T, N>) __builtin_memcpy(p, &x.v, sizeof x.v);
  else to_lanes(p, x.lo), to_lanes(p + N / 2, x.hi);
}
template <class T, int N> PLAIT_FN vec<T, N> from_lanes(const T* p) {
  if constexpr (same<T, bool>) {
    return from_lanes<uint8_t, N>(reinterpret_cast<const uint8_t*>(p)) != uint8_t(0);
  } else if constexpr (is_half<T>) {
    return from_lanes<uint16_t, N>(reinterpret_cast<const uint16_t*>(p));
  } else if constexpr (whole<T, N>) {
    vec<T, N> r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
  } else {
    return {from_lanes<T, N / 2>(p), from_lanes<T, N / 2>(p + N / 2)};
  }
}
template <class T, int N> struct lane_array {
  alignas(vec<T, N>) T lane[N];
  PLAIT_FN lane_array(vec<T, N> x) { to_lanes(lane, x); }
};
template <class R, int N, class F, class... A> PLAIT_FN vec<R, N> calls_on(F f, const A&... args) {
  alignas(vec<R, N>) R result[N];
#pragma GCC unroll 1
  for (int l = 0; l < N; l++) result[l] = f(args.lane[l]...);
  return from_lanes<R, N>(result);
}

// Lane-wise function of one-instruction builtins: GCC turns the unrolled loop back into one vector instruction.
template <class F, class T, int N, class... More> PLAIT_FN auto lanewise(F f, vec<T, N> a, More... more) {
  using R = decltype(f(T{}, more[0]...));
  vec<R, N> r;
  if constexpr (whole<T, N> && whole<R, N>) {
    for (int l = 0; l < N; l++) r.v[l] = f(a.v[l], more.v[l]...);
  } else {
    r = join(lanewise(f, low(a), low(more)...), lanewise(f, high(a), high(more)...));
  }
  return r;
}

// Lane-wise function that is a call or a long computation: a real loop over memory, kept rolled.
template <class F, class T, int N, class... More> PLAIT_FN auto calls(F f, vec<T, N> a, More... more) {
  using R = decltype(f(T{}, more[0]...));
  return calls_on<R, N>(f, lane_array<T, N>(a), lane_array<lane_t<More>, N>(more)...);
}

// ---- operators ---------------------------------------------------------------------------------------------------
// Binary operators take a scalar on either side.

#define PLAIT_BINARY(op)                                                                                        \
  template <class T, int N> PLAIT_FN vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                          \
    if constexpr (whole<T, N>) return a.v op b.v;                                                               \
    else return {a.lo op b.lo, a.hi op b.hi};                                                                   \
  }                                                                                                             \
  template <class T, int N> PLAIT_FN vec<T, N> operator op(vec<T, N> a, T b) { return a op vec<T, N>(b); }      \
  template <class T, int N> PLAIT_FN vec<T, N> operator op(T a, vec<T, N> b) { return vec<T, N>(a) op b; }
PLAIT_BINARY(+)
PLAIT_BINARY(-)
PLAIT_BINARY(*)
PLAIT_BINARY(/)  // integers: use trunc_div, which is defined for a zero divisor
PLAIT_BINARY(&)
PLAIT_BINARY(|)
PLAIT_BINARY(^)
PLAIT_BINARY(<<)
PLAIT_BINARY(>>)
#undef PLAIT_BINARY

#define PLAIT_COMPARE(op)                                                                                       \
  template <class T, int N> PLAIT_FN vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) {                       \
    if constexpr (whole<T, N>) {                                                                                \
      using M = vec<typename sized_int<sizeof(T)>::type, N>;                                                    \
      return convert<int32_t>(M(typename M::raw(a.v op b.v)));                                                  \
    } else {                                                                                                    \
      return join(a.lo op b.lo, a.hi op b.hi);                                                                  \
    }                                                                                                           \
  }                                                                                                             \
  template <class T, int N> PLAIT_FN vec<bool, N> operator op(vec<T, N> a, T b) { return a op vec<T, N>(b); }   \
  template <class T, int N> PLAIT_FN vec<bool, N> operator op(T a, vec<T, N> b) { return vec<T, N>(a) op b; }
template <class T> constexpr bool is_short = !is_float<T> && sizeof(T) < 4;

// A register of 16 bytes with a shorter vector at its lower end; others as they are.
template <class V> PLAIT_FN auto filled(V v) {
  typedef long long Q __attribute__((vector_size(16)));
  if constexpr (sizeof v == 8) return Q{__builtin_bit_cast(int64_t, v), 0};
  else return v;
}

// Short integers as int32 by the instruction for it: GCC takes several for 16 bits, and one for each lane of 8 bits.
template <class T, int N> PLAIT_FN vec<int32_t, N> lengthen(vec<T, N> x) {
  using R = typename vec<int32_t, N>::raw;
#if defined(__AVX2__)
  if constexpr (N * 4 == REGISTER_BYTES && N >= 8) {
    const auto w = filled(x.v);
    constexpr bool sign = T(-1) < T(0);
    typedef char B __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    typedef short H __attribute__((vector_size(32)));
    if constexpr (sizeof(T) == 2 && sign) return R(__builtin_ia32_pmovsxwd512_mask(H(w), R{}, -1));
    else if constexpr (sizeof(T) == 2) return R(__builtin_ia32_pmovzxwd512_mask(H(w), R{}, -1));
    else if constexpr (sign) return R(__builtin_ia32_pmovsxbd512_mask(B(w), R{}, -1));
    else return R(__builtin_ia32_pmovzxbd512_mask(B(w), R{}, -1));
#else
    typedef short H __attribute__((vector_size(16)));
    if constexpr (sizeof(T) == 2 && sign) return R(__builtin_ia32_pmovsxwd256(H(w)));
    else if constexpr (sizeof(T) == 2) return R(__builtin_ia32_pmovzxwd256(H(w)));
    else if constexpr (sign) return R(__builtin_ia32_pmovsxbd256(B(w)));
    else return R(__builtin_ia32_pmovzxbd256(B(w)));
#endif
  }
#endif
  return __builtin_convertvector(x.v, R);
}

template <class D, class T, int N> PLAIT_FN vec<D, N> convert(vec<T, N> x) {  // between arithmetic types
  if constexpr (same<D, T>) return x;
  else if constexpr (whole<T, N> && whole<D, N> && is_short<T> && sizeof(D) == 4) {
    if constexpr (is_float<D>) return convert<D>(lengthen(x));
    else return typename vec<D, N>::raw(lengthen(x).v);
  } else if constexpr (whole<T, N> && whole<D, N>) return __builtin_convertvector(x.v, typename vec<D, N>::raw);
  else return join(convert<D>(low(x)), convert<D>(high(x)));
}
PLAIT_COMPARE(==)
PLAIT_COMPARE(!=)
PLAIT_COMPARE(<)
PLAIT_COMPARE(<=)
PLAIT_COMPARE(>)
PLAIT_COMPARE(>=)
#undef PLAIT_COMPARE

template <class T, int N> PLAIT_FN vec<T, N> operator-(vec<T, N> a) {
  if constexpr (whole<T, N>) return -a.v;
  else return {-a.lo, -a.hi};
}
template <class T, int N> PLAIT_FN vec<T, N> operator~(vec<T, N> a) {
  if constexpr (whole<T, N>) return ~a.v;
  else return {~a.lo, ~a.hi};
}

template <class T> PLAIT_FN T where(bool c, T a, T b) { return c ? a : b; }
template <class T, int N> PLAIT_FN vec<T, N> where(vec<bool, N> c, vec<T, N> a, vec<T, N> b) {
  if constexpr (same<T, bool>) return (c & a) | (!c & b);
  else if constexpr (is_half<T>) return where(c, a.bits, b.bits);
  else if constexpr (whole<T, N>) {
    using I = typename sized_int<sizeof(T)>::type;
    return convert<I>(c.m).v ? a.v : b.v;
  } else return {where(low(c), a.lo, b.lo), where(high(c), a.hi, b.hi)};
}

template <class D, class S> PLAIT_FN rebind_t<S, D> bitcast(S x) {  // lanes of the same size, same bits
  if constexpr (!is_vec<S>) return __builtin_bit_cast(D, x);
  else if constexpr (sizeof(S) <= REGISTER_BYTES) return typename rebind_t<S, D>::raw(x.v);
  else return {bitcast<D>(x.lo), bitcast<D>(x.hi)};
}

template <int N> PLAIT_FN bool any_lane(vec<bool, N> c) {
  if constexpr (N == 1) return c[0];
  else if constexpr (whole<int32_t, N> && N >= 4) {
    using Q = vec<int64_t, N / 2>;
    Q q(typename Q::raw(c.m.v));
    int64_t r = 0;
    for (int l = 0; l < N / 2; l++) r |= q.v[l];
    return r != 0;
  } else return any_lane(low(c) | high(c));
}
PLAIT_FN bool any_lane(bool c) { return c; }
template <class C> PLAIT_FN bool all_lanes(C c) { return !any_lane(!c); }

}  // namespace plait
