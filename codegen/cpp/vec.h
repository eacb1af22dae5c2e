// Fixed-width SIMD values for generated kernels: vec<T> holds W lanes of T, whatever the machine's registers are.
// Plain GCC vector extensions, no intrinsics and no standard headers but <stdint.h> (including <math.h> alone costs more
// compile time than a small kernel). A vector wider than a register is a pair of halves, so that every operation stays
// in registers; GCC's own lowering of over-wide vectors goes through memory, lane by lane.
//
// Everything here gives the same bits in a full tile, in a partial tile and on a scalar.
#pragma once
#include <stdint.h>

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

template <class T, int N, int... I> PLAIT_FN vec<T, N / 2> pick(vec<T, N> x, int, indices<I...>) {
  return __builtin_shufflevector(x.v, x.v, I...);
}
template <class T, int N, int... I> PLAIT_FN vec<T, N / 2> pick_high(vec<T, N> x, indices<I...>) {
  return __builtin_shufflevector(x.v, x.v, (I + N / 2)...);
}
template <class T, int N, int... I> PLAIT_FN vec<T, 2 * N> concat(vec<T, N> lo, vec<T, N> hi, indices<I...>) {
  return __builtin_shufflevector(lo.v, hi.v, I...);
}
template <class T, int N> PLAIT_FN vec<T, N / 2> low(vec<T, N> x) {
  if constexpr (same<T, bool>) return low(x.m);
  else if constexpr (is_half<T>) return low(x.bits);
  else if constexpr (whole<T, N>) return pick(x, 0, iota_of<N / 2>{});
  else return x.lo;
}
template <class T, int N> PLAIT_FN vec<T, N / 2> high(vec<T, N> x) {
  if constexpr (same<T, bool>) return high(x.m);
  else if constexpr (is_half<T>) return high(x.bits);
  else if constexpr (whole<T, N>) return pick_high(x, iota_of<N / 2>{});
  else return x.hi;
}
template <class T, int N> PLAIT_FN vec<T, 2 * N> join(vec<T, N> lo, vec<T, N> hi) {
  if constexpr (same<T, bool>) return join(lo.m, hi.m);
  else if constexpr (is_half<T>) return join(lo.bits, hi.bits);
  else if constexpr (whole<T, 2 * N>) return concat(lo, hi, iota_of<2 * N>{});
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
template <class D, class T, int N> PLAIT_FN vec<D, N> convert(vec<T, N> x) {  // between arithmetic types
  if constexpr (same<D, T>) return x;
  else if constexpr (whole<T, N> && whole<D, N>) return __builtin_convertvector(x.v, typename vec<D, N>::raw);
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

// ---- tiles -------------------------------------------------------------------------------------------------------
// A vector loop runs over tiles of W iterations. Its body is one generic lambda, compiled for a full tile and for the
// partial tile at the end; lanes from `n` on are dead in the latter: they read nothing and write nothing.

template <int Width> struct Full {
  static constexpr bool full = true;
  static constexpr int width = Width, n = Width;
};
struct Part {
  static constexpr bool full = false;
  static constexpr int width = W;
  int n;
};
template <int K> struct Int {
  static constexpr int value = K;
  PLAIT_FN constexpr operator int() const { return K; }
};

template <class T, int N, int... I> PLAIT_FN vec<T, N> iota_lanes(indices<I...>) {
  if constexpr (whole<T, N>) return typename vec<T, N>::raw{T(I)...};
  else return {iota_lanes<T, N / 2>(iota_of<N / 2>{}), iota_lanes<T, N / 2>(iota_of<N / 2>{}) + T(N / 2)};
}
template <class T, int N = W> PLAIT_FN vec<T, N> iota() { return iota_lanes<T, N>(iota_of<N>{}); }

// a in live lanes, b in dead ones
template <class V, class L> PLAIT_FN V blend(L lanes, V a, V b) {
  if constexpr (L::full) return a;
  else return where(iota<int32_t>() < vec<int32_t>(lanes.n), a, b);
}
template <class L> PLAIT_FN auto live(L lanes) {
  using M = vec<bool, L::width>;
  return blend(lanes, M(true), M(false));
}

template <class T, class L> PLAIT_FN vec<T, L::width> load(const T* p, L lanes) {
  if constexpr (L::full) return from_lanes<T, L::width>(p);
  T tile[L::width] = {};
  for (int l = 0; l < lanes.n; l++) tile[l] = p[l];
  return from_lanes<T, L::width>(tile);
}
template <class T, class L> PLAIT_FN void store(T* p, vec<T, L::width> x, L lanes) {
  if constexpr (L::full) return to_lanes(p, x);
  T tile[L::width];
  to_lanes(tile, x);
  for (int l = 0; l < lanes.n; l++) p[l] = tile[l];
}

// p[at[lane]]; dead lanes give 0
template <class T, class L> PLAIT_FN vec<T, L::width> gather(const T* p, vec<int64_t, L::width> at, L lanes) {
  int64_t offset[L::width];
  to_lanes(offset, at);
  T tile[L::width] = {};
  for (int l = 0; l < lanes.n; l++) tile[l] = p[offset[l]];
  return from_lanes<T, L::width>(tile);
}
template <class T, class L> PLAIT_FN void scatter(T* p, vec<int64_t, L::width> at, vec<T, L::width> x, L lanes) {
  int64_t offset[L::width];
  to_lanes(offset, at);
  T tile[L::width];
  to_lanes(tile, x);
  for (int l = 0; l < lanes.n; l++) p[offset[l]] = tile[l];
}
// p[lane * stride]
template <class T, class L> PLAIT_FN vec<T, L::width> load_strided(const T* p, int64_t stride, L lanes) {
  T tile[L::width] = {};
  for (int l = 0; l < lanes.n; l++) tile[l] = p[l * stride];
  return from_lanes<T, L::width>(tile);
}
template <class T, class L> PLAIT_FN void store_strided(T* p, int64_t stride, vec<T, L::width> x, L lanes) {
  T tile[L::width];
  to_lanes(tile, x);
  for (int l = 0; l < lanes.n; l++) p[l * stride] = tile[l];
}

// Masked forms: a lane whose mask is false reads nothing (and gives `other`), or writes nothing.
template <class T, class L>
PLAIT_FN vec<T, L::width> load_if(vec<bool, L::width> mask, const T* p, L lanes, T other) {
  const vec<bool, L::width> reads = mask & live(lanes);
  if (all_lanes(reads)) return from_lanes<T, L::width>(p);
  T tile[L::width];
  for (int l = 0; l < L::width; l++) tile[l] = reads[l] ? p[l] : other;
  return from_lanes<T, L::width>(tile);
}
template <class T, class L>
PLAIT_FN vec<T, L::width> gather_if(vec<bool, L::width> mask, const T* p, vec<int64_t, L::width> at, L lanes, T other) {
  T tile[L::width];
  for (int l = 0; l < L::width; l++) tile[l] = l < lanes.n && mask[l] ? p[at[l]] : other;
  return from_lanes<T, L::width>(tile);
}
template <class T, class L> PLAIT_FN void store_if(vec<bool, L::width> mask, T* p, vec<T, L::width> x, L lanes) {
  for (int l = 0; l < lanes.n; l++)
    if (mask[l]) p[l] = x[l];
}
template <class T, class L>
PLAIT_FN void scatter_if(vec<bool, L::width> mask, T* p, vec<int64_t, L::width> at, vec<T, L::width> x, L lanes) {
  for (int l = 0; l < lanes.n; l++)
    if (mask[l]) p[at[l]] = x[l];
}

template <class T> PLAIT_FN void atomic_add(T* p, T x) {
#pragma omp atomic
  *p += x;
}
template <class T, class L>
PLAIT_FN void atomic_scatter_if(vec<bool, L::width> mask, T* p, vec<int64_t, L::width> at, vec<T, L::width> x, L lanes) {
#pragma GCC unroll 1
  for (int l = 0; l < lanes.n; l++)
    if (mask[l]) atomic_add(p + at[l], x[l]);
}

// f(lane) for every lane, as int64: index expressions that are not affine in the vector axis
template <int N = W, class F> PLAIT_FN vec<int64_t, N> per_lane(F f) {
  int64_t at[N];
  for (int l = 0; l < N; l++) at[l] = f(l);
  return from_lanes<int64_t, N>(at);
}

// body(first iteration, lanes, Int<k>) over [begin, end) in tiles.
// `Partials` = 4 unrolls: tile t of each group of four updates partial accumulator k = t, which hides the latency of
// dependent additions; the order in which values meet is fixed by the position alone.
// `Tiles` = 4 takes four tiles as one where it can: a column is walked once for 4 W lanes, which saves cache and page misses.
template <int Partials, int Tiles = 1, class F> PLAIT_FN void tiles(int64_t begin, int64_t end, F body) {
  static_assert(Partials == 1 || Partials == 4);
  int64_t i = begin;
  if constexpr (Tiles > 1) {
    for (; i + Tiles * W <= end; i += Tiles * W) body(i, Full<Tiles * W>{}, Int<0>{});
  }
  if constexpr (Partials == 4) {
    for (; i + 4 * W <= end; i += 4 * W) {
      body(i, Full<W>{}, Int<0>{});
      body(i + W, Full<W>{}, Int<1>{});
      body(i + 2 * W, Full<W>{}, Int<2>{});
      body(i + 3 * W, Full<W>{}, Int<3>{});
    }
  }
  for (; i + W <= end; i += W) body(i, Full<W>{}, Int<0>{});
  if (i < end) body(i, Part{int(end - i)}, Int<Partials - 1>{});
}

// ---- threads -----------------------------------------------------------------------------------------------------

extern "C" int omp_get_thread_num() noexcept;
extern "C" int omp_get_num_threads() noexcept;

#ifndef PLAIT_GRAIN
#define PLAIT_GRAIN (1 << 14)
#endif
constexpr int64_t GRAIN = PLAIT_GRAIN;  // scalar statements that are worth waking a thread for

// By value and out of line: the closure's fields are then locals of one function, which no store can alias.
template <class F> [[gnu::noinline]] void run_span(F body, int64_t begin, int64_t end) { body(begin, end); }

// body(begin, end) over [0, n), split evenly over at most `nthreads` threads. No parallel region is opened for one
// thread: a forked child, whose OpenMP pool is gone, must be able to run with nthreads = 1.
template <class F> PLAIT_FN void parallel(int64_t n, int64_t work, int nthreads, F body) {
  if (n <= 0) return;
  int64_t threads = nthreads < n ? nthreads : n;
  if (threads > work / GRAIN) threads = work / GRAIN;
  if (threads <= 1) return run_span(body, 0, n);
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
    run_span(body, n * t / count, n * (t + 1) / count);
  }
}

PLAIT_FN int64_t tile_count(int64_t n) { return (n + W - 1) / W; }

}  // namespace plait
